"""The PMU, LBR stack and branch log of `_engine.Core` as `silicon/pmu.py` describes them: the host's accesses, VM entry and exit."""

from __future__ import annotations

import pytest

from softkvm import _engine
from softkvm.silicon import pmu
from softkvm.silicon.control import Intercept, Register
from softkvm.silicon.pmu import BranchKind, Debugctl
from tests.helpers.one_core import CODE, HOST_INTERRUPT, Machine

HLT, HLT_EXITS, NMI_EXITS, INVALID_STATE = b"\xf4", (12, 0x78), (0, 0x61), 0x8000_0021
EVTSEL, A_PMC, PMC, FIXED_CTR, FIXED_CTR_CTRL, GLOBAL_STATUS, GLOBAL_CTRL = 0x186, 0x4C1, 0xC1, 0x309, 0x38D, 0x38E, 0x38F
DEBUGCTL, PERF_CAPABILITIES, LBR_TOS, LBR_FROM, LBR_TO, PRED_CMD = 0x1D9, 0x345, 0x1C9, 0x680, 0x6C0, 0x49
INSTRUCTIONS_OS, INT = 0x42_00C0, 1 << 20
JUMP_AND_HALT = b"\xeb\x01\x90\xeb\x00" + HLT


@pytest.fixture
def intel() -> Machine:
    machine = Machine("cascadelake")
    machine.view.control.intercepts = 1 << Intercept.HLT
    return machine


def test_entry_and_exit_switch_global_ctrl(intel: Machine) -> None:
    intel.load(b"\x90\x90\x90" + HLT)
    intel.core.pmu_write(FIXED_CTR_CTRL, 3)
    intel.core.pmu_write(GLOBAL_CTRL, 0)
    control = intel.view.control
    control.perf_controls = pmu.LOAD_GUEST_GLOBAL_CTRL | pmu.LOAD_HOST_GLOBAL_CTRL
    control.guest_perf_global_ctrl, control.host_perf_global_ctrl = 1 << 32, 2
    assert intel.run() in HLT_EXITS
    assert (intel.core.pmu_read(FIXED_CTR), intel.core.pmu_read(GLOBAL_CTRL)) == (3, 2)
    assert intel.view.exit.instructions == 3
    control.guest_perf_global_ctrl = 1 << 4
    assert intel.run() == INVALID_STATE


def test_without_the_controls_the_host_s_value_counts(intel: Machine) -> None:
    intel.load(b"\x90\x90\x90" + HLT)
    intel.core.pmu_write(FIXED_CTR_CTRL, 3)
    intel.core.pmu_write(GLOBAL_CTRL, 1 << 32)
    assert intel.run() in HLT_EXITS
    assert intel.core.pmu_read(FIXED_CTR) == 3


def test_debugctl_is_the_guest_s_in_the_guest_and_zero_behind_it(intel: Machine) -> None:
    intel.load(JUMP_AND_HALT)
    intel.core.pmu_write(DEBUGCTL, Debugctl.LBR)
    assert intel.run() in HLT_EXITS
    assert (intel.core.pmu_read(DEBUGCTL), intel.core.pmu_read(LBR_TOS)) == (0, 0)
    intel.view.state.rip = CODE
    intel.view.state.debugctl = Debugctl.LBR
    assert intel.run() in HLT_EXITS
    assert intel.view.state.debugctl == Debugctl.LBR
    records = [(intel.core.pmu_read(LBR_FROM + n), intel.core.pmu_read(LBR_TO + n)) for n in (1, 2)]
    assert records == [(CODE, CODE + 3), (CODE + 3, CODE + 5)]
    assert intel.core.pmu_read(LBR_TOS) == 2


@pytest.mark.parametrize("amd", [False, True])
def test_an_overflow_leaves_through_lvtpc(amd: bool) -> None:
    machine = Machine("epyc" if amd else "cascadelake")
    machine.load(b"\x90" * 8 + HLT)
    machine.view.control.intercepts = 1 << Intercept.HLT
    select, counter = (0xC001_0200, 0xC001_0201) if amd else (EVTSEL, A_PMC)
    machine.core.pmu_write(select, INSTRUCTIONS_OS | INT)
    machine.core.pmu_write(counter, (1 << pmu.COUNTER_BITS) - 5)
    machine.core.pmu_write(pmu.MSR_LVTPC, pmu.LVTPC_NMI)
    assert machine.run() in NMI_EXITS
    assert (machine.view.state.rip, machine.view.exit.interruption) == (CODE + 5, 0 if amd else pmu.NMI_EXIT_INFO)
    assert machine.core.pmu_read(pmu.MSR_LVTPC) == pmu.LVTPC_NMI | (0 if amd else pmu.LVTPC_MASKED)
    if not amd:
        assert machine.core.pmu_read(GLOBAL_STATUS) == 1
    assert machine.run() in HLT_EXITS
    assert machine.core.pmu_read(counter) == 3


def test_a_guest_reaches_what_the_bitmap_lets_through(intel: Machine) -> None:
    # mov ecx, PMC0; rdmsr; hlt
    intel.load(b"\x66\xb9" + PMC.to_bytes(4, "little") + b"\x0f\x32" + HLT)
    intel.core.pmu_write(A_PMC, 0x1234_5678_9ABC)
    intel.view.control.intercepts = 1 << Intercept.HLT | 1 << Intercept.MSR_BITMAP
    assert intel.run() in HLT_EXITS
    assert (intel.view.state.gpr[Register.RDX], intel.view.state.gpr[Register.RAX]) == (0x1234, 0x5678_9ABC)
    intel.view.state.rip = CODE
    intel.view.msr_bitmap[0][0][PMC // 8] |= 1 << PMC % 8
    assert intel.run() == 31
    assert intel.view.exit.msr_index == PMC


@pytest.mark.parametrize(
    ("index", "value"),
    [
        (DEBUGCTL, 1 << 6),
        (PRED_CMD, 2),
        (pmu.MSR_LVTPC, 1 << 12),
        (PERF_CAPABILITIES, 0x3005),
        (EVTSEL, 1 << 32),
        (LBR_FROM, 1 << 47),
        (0xC001_0200, 0),
        (0x10, 0),
    ],
)
def test_what_would_be_gp_is_a_value_error(intel: Machine, index: int, value: int) -> None:
    with pytest.raises(ValueError, match=f"{index:#x}"):
        intel.core.pmu_write(index, value)


def test_registers_that_do_not_exist_cannot_be_read(intel: Machine) -> None:
    with pytest.raises(ValueError, match="no MSR 0x10"):
        intel.core.pmu_read(0x10)
    assert intel.core.pmu_read(PERF_CAPABILITIES) == 0x3005


def test_the_branch_log(machine: Machine) -> None:
    machine.load(JUMP_AND_HALT)
    machine.view.control.intercepts = 1 << Intercept.HLT
    machine.core.branch_log_start(100, 3, 0, (1 << 64) - 1)
    assert machine.run() in HLT_EXITS
    records = list(pmu.BRANCH_RECORD.iter_unpack(machine.core.branch_log_read()))
    assert [(from_, to, kind) for from_, to, kind, *_ in records[1:]] == [
        (CODE, CODE + 3, BranchKind.JUMP),
        (CODE + 3, CODE + 5, BranchKind.JUMP),
    ]
    assert records[0][1:3] == (0, BranchKind.CR3)
    machine.core.branch_log_stop()
    assert machine.core.branch_log_read() == b""


def test_a_log_that_fills_up_interrupts_the_host_once(machine: Machine) -> None:
    machine.load(b"\xeb\xfe")
    machine.core.branch_log_start(64, 3, 0, (1 << 64) - 1)
    assert machine.enter() in HOST_INTERRUPT
    assert len(machine.core.branch_log_read()) == 48 * pmu.BRANCH_RECORD.size
    assert machine.core.counters()["branches_lost"] == 0
    assert machine.enter() in HOST_INTERRUPT
    assert machine.enter() in HOST_INTERRUPT
    assert machine.core.counters()["branches_lost"] > 0


@pytest.mark.parametrize("vendor", pmu.EVENTS)
def test_every_listed_event_counts_and_no_other_does(vendor: str) -> None:
    machine = Machine("cascadelake" if vendor == "GenuineIntel" else "epyc")
    select, counter = (EVTSEL, A_PMC) if vendor == "GenuineIntel" else (0xC001_0200, 0xC001_0201)
    # mov cx, 9; L: call F; push F; ret; F: loop L (as a mispredicted return); mov bx, G; call bx; G: int 3, whose handler is G's HLT
    code = b"\xb9\x09\x00\xe8\x00\x00\x68\x0a\x10\xc3\xe2\xf7\xbb\x12\x10\xff\xd3\x90\xcc" + HLT
    machine.view.control.intercepts = 1 << Intercept.HLT
    machine.ram[12:16] = (CODE + 19).to_bytes(2, "little") + b"\0\0"
    for event in (*pmu.EVENTS[vendor], 0x00BD):
        machine.load(code)
        machine.view.state.rip, machine.view.state.gpr[Register.RSP] = CODE, 0x8000
        machine.view.control.tlb_control = 1
        machine.core.pmu_write(PRED_CMD, 1)
        machine.core.pmu_write(select, event | 0x43_0000)
        machine.core.pmu_write(counter, 0)
        assert machine.run() in HLT_EXITS
        assert bool(machine.core.pmu_read(counter)) == (event in pmu.EVENTS[vendor]), hex(event)


def test_model_switches() -> None:
    assert _engine.Model("cascadelake").cpuid(0xA, 0) == (0x0730_0404, 0, 0, 0x603)
    assert {"pmu", "lbr", "pdcm"} <= set(_engine.Model("cascadelake").features)
    assert "lbr" not in _engine.Model("cascadelake", {"pmu": False}).features
    assert "perfctr-core" in _engine.Model("epyc").features
