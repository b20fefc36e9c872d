"""Exit handlers that both vendors share: the skip rules, CPUID, MSRs, XSETBV, CR4, hypercalls."""

from __future__ import annotations

import pytest

from softkvm.host.clock import HrTimer, VirtualClock
from softkvm.kvm import Vcpu, events, exits
from softkvm.kvm.vendor import PLE_WINDOW, PLE_WINDOW_MAX
from softkvm.silicon import control
from softkvm.uapi import kvm as uapi
from tests import fake_engine
from tests.kvm.conftest import Script
from tests.kvm.guest import leave, out_of_guest

RIP = 0x1000
TF, RF = 1 << 8, 1 << 16


def injected() -> list[int]:
    return fake_engine.Core.cores[-1].injected


def exception(vector: int, error: bool = False) -> int:
    return 1 << 31 | 3 << 8 | vector | (1 << 11 if error else 0)


@pytest.mark.parametrize("length", [2, 4])
def test_skip_uses_the_length_that_the_silicon_gives(vcpu: Vcpu, play: Script, length: int) -> None:
    vcpu.state.rip, vcpu.state.rflags = RIP, 2 | RF
    vcpu.state.interruptibility = 1
    out_of_guest(vcpu, play, leave(vcpu, "cpuid", length))
    assert (vcpu.state.rip, vcpu.state.rflags, vcpu.state.interruptibility) == (RIP + length, 2, 0)


def unknown_length(vcpu: Vcpu) -> fake_engine.Step:
    """An exit of silicon that does not tell where the instruction ends."""

    def step(view: control.ControlBlock) -> int | None:
        reason = leave(vcpu, "cpuid", 0)(view)
        view.exit.next_rip = 0
        return reason

    return step


def test_skip_of_what_is_no_instruction_is_an_emulation_failure(vcpu: Vcpu, ram: object, play: Script) -> None:
    fake_engine.as_bytes(ram)[RIP : RIP + 2] = bytes([0x0F, 0x04])
    vcpu.state.segments[1].base, vcpu.state.rip = 0, RIP
    vcpu.state.interruptibility = 1
    play(unknown_length(vcpu))
    vcpu.run()
    failure = vcpu.kvm_run.emulation_failure
    assert vcpu.kvm_run.exit_reason == uapi.KVM_EXIT_INTERNAL_ERROR
    assert failure.suberror == uapi.KVM_INTERNAL_ERROR_EMULATION
    assert (failure.ndata, failure.flags, failure.insn_size) == (8, 1, 15)
    assert bytes(failure.insn_bytes) == bytes([0x0F, 0x04] + [0] * 13)
    assert (vcpu.state.rip, vcpu.state.interruptibility, vcpu.instructions_skipped) == (RIP, 1, 0)


def test_skip_of_what_cannot_be_read_has_no_bytes(vcpu: Vcpu, play: Script) -> None:
    play(unknown_length(vcpu))
    vcpu.run()
    failure = vcpu.kvm_run.emulation_failure
    assert (failure.suberror, failure.ndata, failure.flags) == (uapi.KVM_INTERNAL_ERROR_EMULATION, 6, 0)


def test_skip_with_trap_flag_queues_a_debug_exception(vcpu: Vcpu, play: Script) -> None:
    vcpu.state.rip, vcpu.state.rflags = RIP, 2 | TF
    out_of_guest(vcpu, play, leave(vcpu, "cpuid", 2))
    assert injected() == [exception(events.DB)]
    assert vcpu.state.dr6 == 0xFFFF_4FF0
    assert vcpu.state.rip == RIP + 2


def test_instruction_pointer_wraps_at_4_gb_outside_64_bit_mode(vcpu: Vcpu, play: Script) -> None:
    vcpu.state.rip = 0xFFFF_FFFE
    out_of_guest(vcpu, play, leave(vcpu, "cpuid", 2))
    assert vcpu.state.rip == 0


def test_cpuid_answers_from_the_table(vcpu: Vcpu, play: Script) -> None:
    vcpu.gpr[0], vcpu.gpr[1] = 0xFFFF_FFFF_4000_0000, 0
    out_of_guest(vcpu, play, leave(vcpu, "cpuid", 2))
    assert vcpu.gpr[0] == 0x4000_0001
    assert b"".join(int(vcpu.gpr[index]).to_bytes(4, "little") for index in (3, 1, 2)) == b"KVMKVMKVM\0\0\0"


def test_unknown_msr_is_gp_at_the_instruction(vcpu: Vcpu, play: Script) -> None:
    for name in ("rdmsr", "wrmsr"):
        vcpu.state.rip = RIP
        vcpu.gpr[1] = 0x1234_5678
        out_of_guest(vcpu, play, leave(vcpu, name, 2))
        assert vcpu.state.rip == RIP
    assert injected() == [exception(events.GP)] * 2  # real mode: no error code
    assert vcpu.state.rflags & RF


def test_msr_round_trip_uses_the_low_halves(vcpu: Vcpu, play: Script) -> None:
    tsc_aux = 0xC000_0103
    vcpu.state.rip = RIP
    vcpu.gpr[0], vcpu.gpr[1], vcpu.gpr[2] = 0xAAAA_AAAA_0000_0007, 0xBBBB_BBBB_0000_0000 | tsc_aux, 0xCCCC_CCCC_0000_0000
    out_of_guest(vcpu, play, leave(vcpu, "wrmsr", 2), leave(vcpu, "rdmsr", 2))
    assert (vcpu.gpr[0], vcpu.gpr[2]) == (7, 0)
    assert vcpu.state.rip == RIP + 4


@pytest.mark.parametrize(
    ("index", "value", "allowed"),
    [
        (0, 0b001, True),
        (0, 0b011, True),
        (0, 0b111, True),
        (1, 0b001, False),
        (0, 0b000, False),
        (0, 0b110, False),
        (0, 0b101, False),
        (0, 1 | 1 << 9, False),
        (0, 0b01011, False),
        (0, 1 | 1 << 63, False),
    ],
)
def test_xsetbv_rules(vcpu: Vcpu, play: Script, index: int, value: int, allowed: bool) -> None:
    vcpu.state.rip, vcpu.state.cr4 = RIP, 1 << 18
    vcpu.gpr[1], vcpu.gpr[2], vcpu.gpr[0] = 0xFFFF_FFFF_0000_0000 | index, value >> 32, value & 0xFFFF_FFFF
    out_of_guest(vcpu, play, leave(vcpu, "xsetbv", 3))
    assert vcpu.state.rip == RIP + (3 if allowed else 0)
    assert vcpu.state.xcr0 == (value if allowed else 1)
    assert bool(injected()) is not allowed


def test_set_xcrs_refuses_what_xsetbv_refuses(vcpu: Vcpu) -> None:
    xcrs = uapi.Xcrs(nr_xcrs=1)
    for value, allowed in ((7, True), (5, False)):
        xcrs.xcrs[0].value = value
        if allowed:
            vcpu.set_xcrs(xcrs)
        else:
            with pytest.raises(OSError, match="bad XCR0"):
                vcpu.set_xcrs(xcrs)
    assert vcpu.get_xcrs().xcrs[0].value == 7


def test_cr4_write_follows_cpuid(vcpu: Vcpu, play: Script) -> None:
    vmxe, osxsave = 1 << 13, 1 << 18
    vcpu.state.rip = RIP
    vcpu.exit.instruction_length, vcpu.exit.next_rip = 3, RIP + 3
    assert exits.write_cr4(vcpu, vmxe) == 1
    assert vcpu.state.rip == RIP
    assert vcpu.events.exception_pending
    vcpu.events.clear_exception()
    assert exits.write_cr4(vcpu, osxsave) == 1
    assert (vcpu.state.cr4, vcpu.control.cr4_shadow, vcpu.state.rip) == (osxsave, osxsave, RIP + 3)
    assert vcpu.cpuid.execute(1, 0)[2] >> 27 & 1


def test_cr8_goes_to_the_local_apic(vcpu: Vcpu) -> None:
    assert vcpu.lapic is not None
    vcpu.state.rip = RIP
    vcpu.exit.instruction_length, vcpu.exit.next_rip = 4, RIP + 4
    assert exits.write_cr8(vcpu, 9) == 1
    assert vcpu.lapic.tpr() == 0x90
    assert exits.read_cr8(vcpu, 5) == 1
    assert vcpu.gpr[5] == 9
    rip = vcpu.state.rip
    assert exits.write_cr8(vcpu, 0x10) == 1
    assert vcpu.state.rip == rip
    assert vcpu.events.vector == events.GP


def test_user_space_hears_of_a_lower_task_priority(bare_vcpu: Vcpu) -> None:
    bare_vcpu.exit.instruction_length, bare_vcpu.exit.next_rip = 4, RIP
    assert exits.write_cr8(bare_vcpu, 9) == 1
    assert exits.write_cr8(bare_vcpu, 3) == 0
    assert bare_vcpu.kvm_run.exit_reason == uapi.KVM_EXIT_SET_TPR


def test_loops_of_pause_may_be_longer_where_nobody_wants_the_processor(vcpu: Vcpu, play: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    crowded = iter([False, False, True, *[False] * 40])
    monkeypatch.setattr(vcpu.vm.scheduler, "spin", lambda guest: next(crowded))
    windows = []
    for _ in range(43):
        out_of_guest(vcpu, play, leave(vcpu, "pause", 2))
        windows.append(vcpu.control.pause_window)
    assert windows[:4] == [2 * PLE_WINDOW, 4 * PLE_WINDOW, PLE_WINDOW, 2 * PLE_WINDOW]
    assert windows[-1] == PLE_WINDOW_MAX


def test_a_kick_leaves_the_timer_armed_and_the_timer_does_not(vcpu: Vcpu, play: Script, clock: VirtualClock) -> None:
    rung: list[int] = []
    timer = HrTimer(clock, rung.append)
    timer.start(clock.monotonic_ns() + 1000)
    out_of_guest(vcpu, play, leave(vcpu, "interrupt"))
    core = fake_engine.Core.cores[-1]
    armed = core.timer
    assert (vcpu.armed, rung) == (timer.expiry, [])
    clock.advance(1000)
    out_of_guest(vcpu, play, leave(vcpu, "interrupt"))
    assert len(rung) == 1
    assert core.timer != armed
