"""`softkvm tsc` with made-up answers, some of them nonsense. A real guest is asked in tests/guests/test_monitor.py."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace

import pytest

from softkvm import kvm
from softkvm.cli import app
from softkvm.vmm.monitor import Descriptors, Monitor, NoArguments

VCPU = kvm.VcpuTscStatus(
    vcpu_id=0,
    tsc_offset=(1 << 64) - 1000,
    tsc_scaling_ratio=3 << 47,
    tsc_scaling_ratio_frac_bits=48,
    virtual_tsc_khz=3_000_000,
    tsc_catchup=False,
    this_tsc_generation=2,
    matched=True,
    guest_tsc=14_000,
    ia32_tsc_adjust=(1 << 64) - 7,
    kvmclock_page=0x1000,
    hv_clock=kvm.TimeInfo(8, 500, 1_500_000_000, 0xAAAAAAAA, -1, 1),
)
CLOCKS = kvm.TscStatus(
    host_tsc=10_000,
    host_tsc_khz=2_000_000,
    cur_tsc_generation=2,
    nr_vcpus_matched_tsc=1,
    online_vcpus=2,
    use_master_clock=True,
    master_cycle_now=8_000,
    master_kernel_ns=10**9,
    kvmclock_offset=-(10**9),
    kvmclock=1000,
    realtime=1_700_000_000 * 10**9,
    vcpus=[VCPU, replace(VCPU, vcpu_id=1, matched=False, this_tsc_generation=1, guest_tsc=14_020, kvmclock_page=None, hv_clock=None)],
)


@pytest.fixture
def answers() -> Iterator[list[object]]:
    """What the only VM that runs answers to query-tsc: the last of the list."""
    given: list[object] = [CLOCKS]
    monitor = Monitor("clocked", given.append)

    @monitor.command("query-tsc")
    def query_tsc(arguments: NoArguments, descriptors: Descriptors) -> object:
        return given[-1]

    with monitor:
        yield given


def test_tables(answers: list[object], capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["tsc", "clocked"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for line in (
        "Clocks of clocked",
        "host TSC 10000 at 2000000 kHz",
        "generation 2, with 1 of 2 vCPUs",
        "guest TSCs apart 20 cycles",
        "master clock on, 0.000001000 s old",
        "kvmclock was 0 at 1699999999.999999000 s",
        "0 -1000 1.5 3000000 2 -7",
        "1 -1000 1.5 3000000 1 (old) -7",
        "0 0x1000 500 1.500000000 0xaaaaaaaa -1 stable",
    ):
        assert line in lines


def test_without_master_clock_and_at_different_rates(answers: list[object], capsys: pytest.CaptureFixture[str]) -> None:
    answers.append(replace(CLOCKS, use_master_clock=False, vcpus=[VCPU, replace(VCPU, virtual_tsc_khz=1, tsc_catchup=True, hv_clock=None)]))
    assert app.main(["tsc"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "master clock off" in out
    assert "guest TSCs apart their rates differ" in out
    assert "0x1000 not yet" in out
    assert "0 -1000 catches up 1 2" in out


def test_json_is_one_object(answers: list[object], capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["tsc", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["vcpus"][0]["hv_clock"]["tsc_to_system_mul"] == 0xAAAAAAAA
    assert shown["master_cycle_now"] == 8000


@pytest.mark.parametrize("nonsense", [[], {"host_tsc": "x"}, None])
def test_nonsense_is_one_sentence(answers: list[object], nonsense: object, capsys: pytest.CaptureFixture[str]) -> None:
    answers.append(nonsense)
    assert app.main(["tsc"]) == 125
    assert "softkvm: the VM's answer is not to be understood: " in capsys.readouterr().err
