"""QEMU's CPU names and feature switches in softkvm's: `max,vendor=GenuineIntel,+pcid` becomes `cascadelake,+pcid,...`.

Source of truth: QEMU `docs/system/cpu-models-x86.rst.inc` and the definition of the model qemu64. A name stands for the softkvm model of
the same vendor; only `qemu64`, which the test suites use as "a CPU with little", is cut down to QEMU's features.
"""

from __future__ import annotations

from softkvm.kvm import Model
from softkvm.silicon import feature_names
from softkvm.vmm import ConfigError

_INTEL, _AMD = "cascadelake", "epyc"
_MODELS = {"max": _INTEL, "host": _INTEL, "qemu64": _INTEL, "ivybridge": _INTEL, "skylake-server": _INTEL, "opteron_g1": _AMD, "epyc": _AMD}
_VENDORS = {"genuineintel": _INTEL, "authenticamd": _AMD}
_COMPLETE = frozenset({"max", "host"})

_OF_OTHER_VENDOR = frozenset({"svm", "npt", "nrip-save", "tsc-scale", "topoext", "mmxext"})
"""What `max` leaves out on Intel silicon."""

_QEMU64 = frozenset(
    {
        *("fpu", "de", "pse", "tsc", "msr", "pae", "mce", "cx8", "apic", "sep", "mtrr", "pge", "mca", "cmov", "pat", "pse36", "clflush"),
        *("mmx", "fxsr", "sse", "sse2", "pni", "cx16", "x2apic", "syscall", "nx", "lm", "lahf-lm", "svm", "npt", "arat"),
    }
)

_IGNORED = frozenset({"host-phys-bits", "phys-bits", "migratable", "check", "enforce", "vmx-mbec", "hv_passthrough"})
_ON, _OFF = frozenset({"on", "yes", "true"}), frozenset({"off", "no", "false"})


def translate(text: str) -> tuple[str, list[str]]:
    """softkvm's name for QEMU's `-cpu` value, and warnings for what it cannot have; ConfigError for an unknown model or vendor."""
    name, *switches = text.lower().split(",")
    if name not in _MODELS:
        raise ConfigError(f"-cpu {text}: unknown CPU model; known are {', '.join(sorted(_MODELS))}")
    model = _MODELS[name]
    wanted: dict[str, bool] = {}
    for switch in switches:
        feature, on = _switch(switch)
        if feature == "vendor":
            model = _vendor(text, switch)
        elif feature not in _IGNORED:
            wanted[feature] = on
    known = frozenset(_spell(feature) for feature in feature_names())
    chosen = _defaults(name, model, known) | {feature: on for feature, on in wanted.items() if feature in known}
    warnings = [
        f"this CPU does not support the requested feature {feature}" for feature, on in wanted.items() if on and feature not in known
    ]
    return ",".join([model, *(f"{'+' if on else '-'}{feature}" for feature, on in sorted(chosen.items()))]), warnings


def _defaults(name: str, model: str, known: frozenset[str]) -> dict[str, bool]:
    """What a QEMU model has that softkvm's has not, and the reverse."""
    own = frozenset(_spell(feature) for feature in Model(model).features)
    if name in _COMPLETE and model == _INTEL:
        return dict.fromkeys(known - own - _OF_OTHER_VENDOR, True)
    if name == "qemu64":
        return dict.fromkeys(own - _QEMU64, False)
    return {}


def _switch(switch: str) -> tuple[str, bool]:
    """Feature and state for `+x`, `-x`, `x`, `x=on` or `x=off`, spelled as `_spell` does."""
    if switch[:1] in ("+", "-"):
        return _spell(switch[1:]), switch[0] == "+"
    feature, _, value = switch.partition("=")
    return _spell(feature) if feature not in _IGNORED else feature, value not in _OFF


def _spell(feature: str) -> str:
    """A feature's name with every separator written as `-`; all spellings mean the same."""
    return feature.replace("_", "-").replace(".", "-")


def _vendor(text: str, switch: str) -> str:
    vendor = switch.partition("=")[2]
    if vendor not in _VENDORS:
        raise ConfigError(f"-cpu {text}: there is no CPU of vendor {vendor!r}")
    return _VENDORS[vendor]
