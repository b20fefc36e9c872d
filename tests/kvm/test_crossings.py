"""The run loop against everybody who sets flags and requests: whenever they come, the guest does not run while they wait (Linux 6.1
`Documentation/virt/kvm/vcpu-requests.rst`, "IPI reduction" and "sleeping"), bare and watched."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hypothesis import given
from hypothesis import strategies as st

from softkvm import kvm, silicon
from softkvm.host import context_tracking, entry
from softkvm.host.clock import VirtualClock
from softkvm.host.task import TIF_NEED_RESCHED, Task, current
from softkvm.kvm import Vcpu, halt
from softkvm.kvm.request import REQ_EVENT
from softkvm.silicon import control
from softkvm.uapi import kvm as uapi
from tests import fake_engine
from tests.kvm.conftest import ready
from tests.kvm.guest import leave

DISTURBANCES: dict[str, Callable[[Vcpu, Task, list[str]], None]] = {
    "nothing": lambda vcpu, task, done: None,
    "resched": lambda vcpu, task, done: task.set_flag(TIF_NEED_RESCHED),
    "work": lambda vcpu, task, done: task.add_work(lambda: done.append("work")),
    "request": lambda vcpu, task, done: vcpu.make_request(REQ_EVENT),
    "kick": lambda vcpu, task, done: vcpu.kick(),
}
EXITS = ("cpuid", "hlt", "interrupt", "shutdown")
disturbances = st.sampled_from(sorted(DISTURBANCES))


class Guest:
    """A vCPU whose core checks at each entry that nothing waits, and is disturbed in the guest and in its sleep as a plan says."""

    def __init__(self, model: str, steps: list[tuple[str, str]], sleeps: list[str], last_moments: list[str]) -> None:
        system = kvm.System(silicon.Model(model))
        self.vm = system.create_vm(clock=VirtualClock())
        self.vm.create_irqchip()
        self.vcpu = ready(self.vm.create_vcpu(0), system)
        self.task = current()
        self.done: list[str] = []
        self.worked = 0
        self.sleeps = list(sleeps)
        self.woken = False
        self.vcpu.wakeup = self  # type: ignore[assignment]
        self.vcpu.halt_poll_ns = 1
        self.vcpu.arm_timer = self.arm_timer  # type: ignore[method-assign]
        self.last_moments = list(last_moments)
        fake_engine.Core.script = iter([self.step(*step) for step in steps] + [leave(self.vcpu, "shutdown")] * 100)

    def disturb(self, name: str) -> None:
        self.worked += name == "work"
        DISTURBANCES[name](self.vcpu, self.task, self.done)

    def step(self, reason: str, disturbance: str) -> fake_engine.Step:
        exit = leave(self.vcpu, reason, 2)

        def enter(view: control.ControlBlock) -> int | None:
            assert not self.vcpu.requests, "the guest was entered with a request pending"
            assert not self.task.flags & entry.XFER_TO_GUEST_MODE_WORK, "the guest was entered with work pending"
            self.disturb(disturbance)
            cpu = self.vcpu.cpu
            assert cpu is not None
            assert disturbance == "nothing" or cpu.core.kicked, "the guest was not kicked"  # type: ignore[attr-defined]
            return exit(view)

        return enter

    def arm_timer(self, expiry: int | None) -> None:
        """The last thing before the check with interrupts off; the timer counts as not armed, so it comes at every entry."""
        if self.last_moments:
            self.disturb(self.last_moments.pop())

    # The wake-up that the vCPU sleeps on

    def clear(self) -> None:
        self.woken = False
        if self.sleeps:
            self.disturb(self.sleeps.pop())  # in the moment before the last check

    def set(self) -> None:
        self.woken = True

    def poll(self, ns: int) -> bool:
        self.wait()
        return self.woken

    def wait(self, timeout: float | None = None) -> None:
        waiting = halt.runnable(self.vcpu) or self.task.flags & entry.XFER_TO_GUEST_MODE_WORK
        assert self.woken or not waiting, "asleep with work pending"
        if not self.woken:
            self.disturb(self.sleeps.pop() if self.sleeps else "kick")
            self.sleeps = self.sleeps or ["kick"]


@contextmanager
def watched(on: bool) -> Iterator[None]:
    if not on:
        yield
        return
    context_tracking.enable()
    try:
        yield
    finally:
        context_tracking.disable()


def errno_of(vcpu: Vcpu) -> int | None:
    try:
        vcpu.run()
    except OSError as error:
        return error.errno
    return None


@given(
    st.sampled_from(["cascadelake", "epyc"]),
    st.booleans(),
    st.lists(st.tuples(st.sampled_from(EXITS), disturbances), max_size=6),
    st.lists(disturbances, max_size=4),
    st.lists(disturbances, max_size=4),
)
def test_the_guest_never_runs_while_something_waits(
    model: str, watch: bool, steps: list[tuple[str, str]], sleeps: list[str], last_moments: list[str]
) -> None:
    with watched(watch):
        guest = Guest(model, steps, sleeps, last_moments)
        task = guest.task
        for _ in range(4):
            kicks = guest.vcpu.stats["signal_exits"]
            error = errno_of(guest.vcpu)
            interrupted = guest.vcpu.stats["signal_exits"] == kicks + 1
            assert error == (errno.EINTR if interrupted else None)
            assert guest.vcpu.kvm_run.exit_reason == (uapi.KVM_EXIT_INTR if interrupted else uapi.KVM_EXIT_SHUTDOWN)
            assert task.flags == 0
            assert len(guest.done) == guest.worked, "work was lost"
            assert (task.irqs_off, task.lockdep_irqs_off, task.call, task.guest) == (False, False, None, None)
        guest.vm.close()
