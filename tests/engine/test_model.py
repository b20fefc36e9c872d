"""`_engine.Model`: names, switches and the tables behind them."""

from __future__ import annotations

import pytest

from softkvm import _engine


def test_models_are_what_they_say() -> None:
    intel, amd = _engine.Model("cascadelake"), _engine.Model("epyc")
    assert (intel.name, intel.vendor, amd.name, amd.vendor) == ("cascadelake", "intel", "epyc", "amd")
    assert intel.cpuid(1, 0)[0] == 0x50657
    assert amd.cpuid(1, 0)[0] == 0x830F10
    assert _engine.model_names() == ["cascadelake", "epyc"]


@pytest.mark.parametrize("name", ["cascadelake", "epyc"])
def test_features_are_implemented_and_leaves_agree_with_cpuid(name: str) -> None:
    model = _engine.Model(name)
    assert set(model.features) <= set(_engine.feature_names())
    leaves = model.leaves()
    assert len({(leaf, subleaf) for leaf, subleaf, *_ in leaves}) == len(leaves)
    assert all(model.cpuid(leaf, subleaf) == tuple(registers) for leaf, subleaf, _, *registers in leaves)


def test_features_switch_by_name() -> None:
    model = _engine.Model("cascadelake", {"pcid": False})
    assert "pcid" not in model.features
    assert model.cpuid(1, 0)[2] & 1 << 17 == 0


def test_msr_values_follow_the_vendor() -> None:
    intel, amd = _engine.Model("cascadelake").msrs(), _engine.Model("epyc").msrs()
    assert intel[0x10A] & 3 == 3
    assert 0xCE in intel
    assert 0xCE not in amd
    assert amd[0xC001_1029] == 2


@pytest.mark.parametrize(
    ("name", "features", "message"),
    [
        ("pentium", {}, r'no CPU model "pentium"; models: cascadelake, epyc'),
        ("epic", {}, r'did you mean "epyc"\?'),
        ("epyc", {"fsgbase": True}, r'no CPU feature "fsgbase" \(did you mean "fsgsbase"\?\); features: fpu, '),
        ("epyc", {"avx512f": True}, r'the engine does not implement CPU feature "avx512f"; features: fpu, '),
        ("epyc", {"xsave": False, "xsaveopt": True}, r'"xsaveopt" needs "xsave", which is off'),
    ],
)
def test_errors_name_what_exists(name: str, features: dict[str, bool], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _engine.Model(name, features)


def test_tiers() -> None:
    assert all(_engine.Model("epyc", tier=tier).name == "epyc" for tier in ("interpreter", "translator", "auto"))
    with pytest.raises(ValueError, match="no tier is called jit: there are interpreter, translator, auto"):
        _engine.Model("epyc", tier="jit")
