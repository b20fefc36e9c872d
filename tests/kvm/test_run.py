"""KVM_RUN: the EINTR contract, exits to user space, HLT, SIPI, injection, and what kvm_run holds afterwards."""

from __future__ import annotations

import errno
import threading

import pytest

from softkvm import kvm
from softkvm.host.clock import HrTimer, VirtualClock
from softkvm.kvm import Vcpu, Vm, events
from softkvm.kvm.request import REQ_TRIPLE_FAULT
from softkvm.silicon import control
from softkvm.uapi import kvm as uapi
from tests import fake_engine
from tests.fake_engine import exits_with
from tests.kvm.conftest import Script, ready
from tests.kvm.guest import REASONS, leave, out_of_guest, run_errno

RIP = 0x1000
INTERRUPT_FLAG = 1 << 9


def test_immediate_exit_leaves_the_exit_reason_alone(vcpu: Vcpu) -> None:
    vcpu.kvm_run.exit_reason = 99
    vcpu.kvm_run.immediate_exit = 1
    assert run_errno(vcpu) == errno.EINTR
    assert (vcpu.kvm_run.exit_reason, vcpu.kvm_run.immediate_exit) == (99, 1)


def test_a_kick_ends_the_next_run_once(vcpu: Vcpu, play: Script) -> None:
    vcpu.kick()
    assert run_errno(vcpu) == errno.EINTR
    assert vcpu.kvm_run.exit_reason == uapi.KVM_EXIT_INTR
    assert vcpu.stats["signal_exits"] == 1
    out_of_guest(vcpu, play)


def test_a_kick_ends_a_run_in_guest_mode(vcpu: Vcpu, play: Script) -> None:
    def kicked(view: control.ControlBlock) -> int:
        vcpu.kick()
        assert fake_engine.Core.cores[-1].kicked
        return REASONS[vcpu.model.vendor]["interrupt"]

    play(kicked)
    assert run_errno(vcpu) == errno.EINTR
    assert vcpu.kvm_run.exit_reason == uapi.KVM_EXIT_INTR


def test_an_internal_kick_does_not_end_the_run(vcpu: Vcpu, play: Script) -> None:
    def kicked(view: control.ControlBlock) -> int:
        vcpu.kick_guest()
        return REASONS[vcpu.model.vendor]["interrupt"]

    out_of_guest(vcpu, play, kicked)


def test_every_return_refreshes_kvm_run(vcpu: Vcpu, play: Script) -> None:
    shared = vcpu.kvm_run
    shared.cr8, shared.apic_base, shared.if_flag = 99, 99, 99
    vcpu.state.rflags |= INTERRUPT_FLAG
    out_of_guest(vcpu, play)
    assert (shared.cr8, shared.apic_base, shared.if_flag, shared.ready_for_interrupt_injection) == (0, 0xFEE0_0900, 1, 1)


def test_halt_in_the_kernel_waits_until_an_event(vcpu: Vcpu, clock: VirtualClock, play: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    timer = HrTimer(clock, lambda now: vcpu.queue_nmi())
    timer.start(clock.monotonic_ns() + 5000)
    sleeps: list[float | None] = []

    def wait(timeout: float | None = None) -> bool:
        assert vcpu.mp_state == uapi.KVM_MP_STATE_HALTED
        sleeps.append(timeout)
        clock._now += 5000
        return False

    monkeypatch.setattr(vcpu.wakeup, "wait", wait)
    vcpu.state.rip = RIP
    out_of_guest(vcpu, play, leave(vcpu, "hlt", 2))
    assert sleeps == [5000 / 1e9]
    assert vcpu.state.rip == RIP + 2
    assert fake_engine.Core.cores[-1].injected == [1 << 31 | 2 << 8 | 2]
    assert vcpu.stats["halt_exits"] == 1


def test_other_threads_wake_a_halted_vcpu(vcpu: Vcpu, play: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    asleep, sleep = threading.Event(), vcpu.wakeup.wait

    def wait(timeout: float | None = None) -> bool:
        asleep.set()
        return sleep(60)

    monkeypatch.setattr(vcpu.wakeup, "wait", wait)
    play(leave(vcpu, "hlt"), leave(vcpu, "shutdown"))
    thread = threading.Thread(target=vcpu.run)
    thread.start()
    assert asleep.wait(60)
    vcpu.queue_nmi()
    thread.join(60)
    assert not thread.is_alive()
    assert vcpu.kvm_run.exit_reason == uapi.KVM_EXIT_SHUTDOWN


def test_a_kick_ends_a_halt(vcpu: Vcpu, play: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vcpu.wakeup, "wait", lambda timeout=None: vcpu.kick())
    play(leave(vcpu, "hlt"))
    assert run_errno(vcpu) == errno.EINTR
    assert vcpu.kvm_run.exit_reason == uapi.KVM_EXIT_INTR
    assert vcpu.get_mp_state().mp_state == uapi.KVM_MP_STATE_HALTED


def test_halt_without_irqchip_goes_to_user_space(bare_vcpu: Vcpu, play: Script) -> None:
    bare_vcpu.state.rip = RIP
    play(leave(bare_vcpu, "hlt", 3))
    bare_vcpu.run()
    assert bare_vcpu.kvm_run.exit_reason == uapi.KVM_EXIT_HLT
    assert bare_vcpu.state.rip == RIP + 3
    assert bare_vcpu.mp_state == uapi.KVM_MP_STATE_RUNNABLE


def test_signal_ends_the_wait_for_sipi(vm: Vm, system: kvm.System) -> None:
    vm.create_irqchip()
    vm.create_vcpu(0)
    ap = ready(vm.create_vcpu(1), system)
    ap.kick()
    assert run_errno(ap) == errno.EINTR
    assert ap.kvm_run.exit_reason == uapi.KVM_EXIT_INTR


def test_bad_sync_regs_are_einval(vcpu: Vcpu) -> None:
    vcpu.kvm_run.kvm_dirty_regs = 8
    assert run_errno(vcpu) == errno.EINVAL


def test_sync_regs_go_in_and_out(vcpu: Vcpu, play: Script) -> None:
    shared = vcpu.kvm_run
    shared.kvm_valid_regs = shared.kvm_dirty_regs = uapi.KVM_SYNC_X86_REGS
    shared.regs.regs.rbx, shared.regs.regs.rip = 7, RIP

    def guest(view: control.ControlBlock) -> int | None:
        assert (view.state.gpr[3], view.state.rip) == (7, RIP)
        view.state.gpr[3] = 8
        return exits_with(REASONS[vcpu.model.vendor]["interrupt"])(view)

    out_of_guest(vcpu, play, guest)
    assert (shared.kvm_dirty_regs, shared.regs.regs.rbx) == (0, 8)


def test_entry_failure_and_unknown_exits(vcpu: Vcpu, play: Script) -> None:
    reasons = REASONS[vcpu.model.vendor]
    play(leave(vcpu, "invalid"))
    vcpu.run()
    assert vcpu.kvm_run.exit_reason == uapi.KVM_EXIT_FAIL_ENTRY
    assert vcpu.kvm_run.fail_entry.hardware_entry_failure_reason == reasons["invalid"]
    play(leave(vcpu, "unknown"))
    vcpu.run()
    internal = vcpu.kvm_run.internal
    assert vcpu.kvm_run.exit_reason == uapi.KVM_EXIT_INTERNAL_ERROR
    assert internal.suberror == uapi.KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON
    assert list(internal.data[: internal.ndata]) == [reasons["unknown"], 0]


def test_triple_fault_request(vcpu: Vcpu) -> None:
    vcpu.make_request(REQ_TRIPLE_FAULT)
    vcpu.run()
    assert vcpu.kvm_run.exit_reason == uapi.KVM_EXIT_SHUTDOWN


def test_timers_arm_the_core_and_run_on_its_interrupt(vcpu: Vcpu, clock: VirtualClock, play: Script) -> None:
    fired: list[int] = []
    timer = HrTimer(clock, lambda now: fired.append(now))
    expiry = clock.monotonic_ns() + 1000
    timer.start(expiry)

    def until_timer(view: control.ControlBlock) -> int:
        assert fake_engine.Core.cores[-1].timer == clock.ns_to_tsc(expiry)
        clock._now = expiry
        return REASONS[vcpu.model.vendor]["interrupt"]

    out_of_guest(vcpu, play, until_timer)
    assert fired == [expiry]
    assert clock.first_expiry is not None  # of kvmclock's own
    assert fake_engine.Core.cores[-1].timer == clock.ns_to_tsc(clock.first_expiry) != clock.ns_to_tsc(expiry)


def test_request_interrupt_window(bare_vcpu: Vcpu, play: Script) -> None:
    vcpu = bare_vcpu
    vcpu.kvm_run.request_interrupt_window = 1

    def opens(view: control.ControlBlock) -> int:
        assert view.control.intercepts & events.INTERRUPT_WINDOW
        view.state.rflags |= INTERRUPT_FLAG
        return REASONS[vcpu.model.vendor]["window"]

    play(opens)
    vcpu.run()
    assert vcpu.kvm_run.exit_reason == uapi.KVM_EXIT_IRQ_WINDOW_OPEN
    assert vcpu.kvm_run.ready_for_interrupt_injection == 1
    assert vcpu.stats["request_irq_exits"] == 1


def test_a_stranger_on_the_core_flushes_the_tlb(vm: Vm, system: kvm.System, play: Script) -> None:
    first, second = ready(vm.create_vcpu(0), system), ready(vm.create_vcpu(1), system)
    flushes: list[int] = []

    def note(view: control.ControlBlock) -> int:
        flushes.append(view.control.tlb_control)
        view.exit.vectoring = 0
        return REASONS[vm.model.vendor]["shutdown"]

    for vcpu in (first, first, second, first):
        play(note)
        vcpu.run()
    assert flushes == [1, 0, 1, 1]
    assert len(fake_engine.Core.cores) == 1


def test_closed_files_are_ebadf(vm: Vm, vcpu: Vcpu) -> None:
    vm.close()
    assert run_errno(vcpu) == errno.EBADF
    with pytest.raises(OSError) as caught:  # noqa: PT011
        vm.create_vcpu(3)
    assert caught.value.errno == errno.EBADF
