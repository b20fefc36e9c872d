"""Event injection: combined exceptions, windows, and events that must be injected again."""

from __future__ import annotations

import errno

import pytest

from softkvm.kvm import Vcpu, events
from softkvm.silicon import control
from softkvm.uapi import kvm as uapi
from tests import fake_engine
from tests.fake_engine import exits_with
from tests.kvm.conftest import Script
from tests.kvm.guest import REASONS, leave, out_of_guest

INTERRUPT_FLAG = 1 << 9


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (events.GP, events.GP, events.DF),
        (events.PF, events.GP, events.DF),
        (events.PF, events.PF, events.DF),
        (events.GP, events.PF, events.PF),
        (events.UD, events.GP, events.GP),
        (events.DF, events.GP, None),
    ],
)
def test_exceptions_combine(vcpu: Vcpu, first: int, second: int, expected: int | None) -> None:
    vcpu.take_requests()
    events.queue_exception(vcpu, first, 0)
    events.queue_exception(vcpu, second, 0)
    if expected is None:
        vcpu.run()
        assert vcpu.kvm_run.exit_reason == uapi.KVM_EXIT_SHUTDOWN
    else:
        assert vcpu.events.vector == expected


def test_an_event_whose_entry_never_was_is_injected_again(bare_vcpu: Vcpu, play: Script) -> None:
    vcpu = bare_vcpu
    vcpu.state.rflags |= INTERRUPT_FLAG
    vcpu.interrupt(0x31)
    play(leave(vcpu, "interrupt"))
    vcpu.load()
    fake_engine.Core.cores[-1].kicked = True  # the first entry returns at once
    out_of_guest(vcpu, play)
    assert fake_engine.Core.cores[-1].injected == [1 << 31 | 0x31]


def test_an_event_whose_delivery_was_cut_short_is_injected_again(bare_vcpu: Vcpu, play: Script) -> None:
    vcpu = bare_vcpu
    vcpu.state.rflags |= INTERRUPT_FLAG
    vcpu.interrupt(0x31)
    cut = exits_with(REASONS[vcpu.model.vendor]["interrupt"], vectoring=1 << 31 | 0x31)
    out_of_guest(vcpu, play, cut, leave(vcpu, "interrupt"))
    assert fake_engine.Core.cores[-1].injected == [1 << 31 | 0x31] * 2
    assert not vcpu.events.reinjection


def test_interrupt_injection_waits_for_its_window(bare_vcpu: Vcpu, play: Script) -> None:
    vcpu = bare_vcpu
    vcpu.interrupt(0x31)
    with pytest.raises(OSError) as caught:  # noqa: PT011
        vcpu.interrupt(0x32)
    assert caught.value.errno == errno.EEXIST

    def closed(view: control.ControlBlock) -> int:
        assert view.control.intercepts & events.INTERRUPT_WINDOW
        view.state.rflags |= INTERRUPT_FLAG
        return REASONS[vcpu.model.vendor]["window"]

    def opened(view: control.ControlBlock) -> int:
        assert not view.control.intercepts & events.INTERRUPT_WINDOW
        return REASONS[vcpu.model.vendor]["interrupt"]

    out_of_guest(vcpu, play, closed, opened)
    assert fake_engine.Core.cores[-1].injected == [1 << 31 | 0x31]


def test_two_nmis_that_arrive_together_both_come(vcpu: Vcpu, play: Script) -> None:
    def interrupted(view: control.ControlBlock) -> int:
        return REASONS[vcpu.model.vendor]["interrupt"]

    for _ in range(3):
        vcpu.nmi()
    out_of_guest(vcpu, play, interrupted)
    assert len(fake_engine.Core.cores[-1].injected) == 1
    assert vcpu.get_vcpu_events().nmi.pending == 1


def test_nmi_is_injected_and_a_second_waits(vcpu: Vcpu, play: Script) -> None:
    def blocked(view: control.ControlBlock) -> int:
        view.state.interruptibility |= events.BLOCKED_BY_NMI
        return REASONS[vcpu.model.vendor]["interrupt"]

    def again(view: control.ControlBlock) -> int:
        vcpu.queue_nmi()
        return REASONS[vcpu.model.vendor]["interrupt"]

    def wants_window(view: control.ControlBlock) -> int:
        assert view.control.intercepts & events.NMI_WINDOW
        return REASONS[vcpu.model.vendor]["interrupt"]

    vcpu.nmi()
    out_of_guest(vcpu, play, blocked, again, wants_window)
    assert fake_engine.Core.cores[-1].injected == [1 << 31 | 2 << 8 | 2]
    assert vcpu.get_vcpu_events().nmi.pending == 1
