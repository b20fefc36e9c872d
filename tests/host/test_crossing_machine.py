"""The crossings as a state machine, driven by hypothesis with work set at every moment, by others and by the work itself.

Always: nobody enters a guest with work pending; what was queued is done before user space is seen again; interrupt flag, lockdep's account
of it and RCU's are paired; a signal ends KVM_RUN with EINTR and KVM_EXIT_INTR and is never lost. `tests/kvm/test_crossings.py` has the same
of the real run loop.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from softkvm.host import context_tracking, entry, nmi
from softkvm.host.call import SYS_IOCTL
from softkvm.host.irqflags import local_irq_disable, local_irq_enable
from softkvm.host.process import Process
from softkvm.host.seccomp import ALLOW, Filter
from softkvm.host.task import (
    CONTEXT_GUEST,
    CONTEXT_KERNEL,
    CONTEXT_USER,
    TIF_NEED_RESCHED,
    TIF_NOTIFY_RESUME,
    TIF_NOTIFY_SIGNAL,
    TIF_PATCH_PENDING,
    TIF_SIGPENDING,
    TIF_UPROBE,
    TIF_USER_RETURN_NOTIFY,
    Task,
)
from tests.host.doubles import RUN, File

FLAGS = (TIF_NEED_RESCHED, TIF_SIGPENDING, TIF_NOTIFY_RESUME, TIF_NOTIFY_SIGNAL, TIF_UPROBE, TIF_PATCH_PENDING, TIF_USER_RETURN_NOTIFY)
MOMENTS = ("before", "in the call", "in the guest", "in an interrupt", "in work", "between check and entry")
NMI = -1
"""In place of a flag: an NMI of the host."""


class Vcpu:
    """The run loop in small: the two looks at pending work before an entry, and a guest that exits every time it is entered."""

    def __init__(self, machine: Crossings) -> None:
        self.machine = machine
        self.signal_exits = 0
        self.in_guest_mode = False
        self.kicked = False

    def handle_signal_exit(self) -> None:
        self.signal_exits += 1

    def notice_flags(self) -> None:
        if self.in_guest_mode:
            self.kicked = True

    def schedule(self) -> None:
        self.machine.happen("in work")

    def run(self, entries: int) -> int:
        task = self.machine.task
        for _ in range(entries):
            if task.flags & entry.XFER_TO_GUEST_MODE_WORK and (result := entry.xfer_to_guest_mode(task, self)):
                return result
            self.machine.happen("between check and entry")
            self.in_guest_mode = True
            if task.flags & entry.XFER_TO_GUEST_MODE_WORK:
                self.in_guest_mode = False
                continue
            local_irq_disable(task)
            entry.run_guest(task, self.guest)
            local_irq_enable(task)
            self.in_guest_mode = False
            entry.interrupt(task, lambda: self.machine.happen("in an interrupt"))
        return 0

    def guest(self) -> int:
        task = self.machine.task
        assert not task.flags & entry.XFER_TO_GUEST_MODE_WORK, "the guest was entered with work pending"
        if task.call is not None:
            assert (task.context, task.irqs_off, task.rcu_watching) == (CONTEXT_GUEST, False, False)
        self.kicked = False
        self.machine.happen("in the guest")
        assert self.kicked or not task.flags & entry.XFER_TO_GUEST_MODE_WORK, "work came and nobody kicked the guest"
        return 0


class Crossings(RuleBasedStateMachine):
    """One thread of a VMM, and everybody else, who sets flags."""

    def __init__(self) -> None:
        super().__init__()
        self.task = Task()
        self.vcpu = Vcpu(self)
        self.plan: dict[str, deque[int]] = {moment: deque() for moment in MOMENTS}
        self.queued = 0
        self.done = 0
        nmi.register_nmi_handler(self.handle_nmi)

    @initialize(watched=st.booleans())
    def start(self, watched: bool) -> None:
        """With and without anybody who watches."""
        self.file = File(Process((Filter((), ALLOW),) if watched else ()))
        self.watched = watched

    def happen(self, moment: str) -> None:
        """What was planned for this moment."""
        if not self.plan[moment]:
            return
        if (planned := self.plan[moment].popleft()) != NMI:
            self.set(planned)
            return
        task = self.task
        before = (task.context, task.irqs_off, task.lockdep_irqs_off, task.rcu_watching, task.preempt_count, task.flags)
        nmi.do_nmi(task)
        assert before == (task.context, task.irqs_off, task.lockdep_irqs_off, task.rcu_watching, task.preempt_count, task.flags)

    def handle_nmi(self) -> bool:
        """The host's handler: nothing may be rescheduled or waited for in it."""
        assert nmi.in_nmi(self.task)
        assert (self.task.irqs_off, self.task.rcu_watching) == (True, True)
        return True

    def teardown(self) -> None:
        nmi.unregister_nmi_handler(self.handle_nmi)

    def set(self, flag: int) -> None:
        if flag == TIF_USER_RETURN_NOTIFY:
            self.queued += 1
            self.task.on_user_return(self.notifier)
        elif flag in (TIF_NEED_RESCHED, TIF_SIGPENDING):
            self.task.set_flag(flag)
        else:
            self.queued += 1
            self.task.add_work(self.work, flag)

    def work(self) -> None:
        assert not self.task.irqs_off
        assert self.task.context == CONTEXT_KERNEL or not self.watched
        self.done += 1
        self.happen("in work")

    def notifier(self) -> None:
        assert self.task.irqs_off
        assert not self.task.flags & entry.EXIT_TO_USER_MODE_WORK, "a user-return notifier was not last"
        self.done += 1

    @rule(moment=st.sampled_from(MOMENTS[1:]), flag=st.sampled_from((*FLAGS, NMI)))
    def plan_ahead(self, moment: str, flag: int) -> None:
        """Somebody will set a flag, or an NMI will come, at some moment."""
        if moment not in ("in work",) or flag != TIF_USER_RETURN_NOTIFY:
            self.plan[moment].append(flag)

    @rule(flag=st.sampled_from(FLAGS))
    def set_now(self, flag: int) -> None:
        """Somebody sets a flag while the task is in user space."""
        self.set(flag)

    @rule(fails=st.booleans())
    def call(self, fails: bool) -> None:
        """An ioctl that is not KVM_RUN."""

        def handler(file: File) -> None:
            self.happen("in the call")
            if fails:
                raise OSError(errno.EBUSY, "busy")

        self.cross(handler)

    @rule(entries=st.integers(1, 4))
    def kvm_run(self, entries: int) -> None:
        """KVM_RUN."""

        def handler(file: File) -> None:
            self.task.guest = self.vcpu
            try:
                if (result := self.vcpu.run(entries)) < 0:
                    assert self.task.flags & (TIF_SIGPENDING | TIF_NOTIFY_SIGNAL), "the signal that ends KVM_RUN was lost"
                    raise OSError(-result, "KVM_RUN")
            finally:
                self.vcpu.in_guest_mode = False
                self.task.guest = None

        before = self.vcpu.signal_exits
        error = self.cross(handler)
        assert (error == errno.EINTR) is (self.vcpu.signal_exits == before + 1)

    @precondition(lambda self: self.watched)
    @rule()
    def interrupt(self) -> None:
        """An interrupt in user space."""
        state = entry.irqentry_enter(self.task)
        assert self.task.rcu_watching
        self.happen("in an interrupt")
        entry.irqentry_exit(self.task, state)
        self.check_all_is_done()

    def cross(self, handler: Callable[[File], None]) -> int | None:
        error = None
        try:
            self.file.process.cross(self.task, self.file, SYS_IOCTL, RUN, (), handler)
        except OSError as caught:
            error = caught.errno
        self.check_all_is_done()
        return error

    def check_all_is_done(self) -> None:
        assert not self.task.flags, "work was left for later"
        assert self.done == self.queued, "work was lost"

    @invariant()
    def states_are_paired(self) -> None:
        """In user space between the steps."""
        task = self.task
        assert (task.context, task.irqs_off, task.lockdep_irqs_off, task.rcu_watching) == (CONTEXT_USER, False, False, False)
        assert (task.call, task.rcu_irq_nesting, task.preempt_count) == (None, 0, 0)


TestCrossings = Crossings.TestCase
TestCrossings.settings = settings(max_examples=100, stateful_step_count=30)


def test_time_is_counted_for_each_context() -> None:
    """The sum of the times is the time from the first crossing to the last one."""
    task, file = Task(), File()
    times = iter(range(100, 200, 10))
    context_tracking._now, real = lambda: next(times), context_tracking._now
    context_tracking.enable()
    try:
        file.call(task, lambda it: None)
        file.call(task, lambda it: None)
    finally:
        context_tracking.disable()
        context_tracking._now = real
    assert context_tracking.times(task) == {"kernel": 20, "idle": 0, "user": 10, "guest": 0}
