"""Every crossing between user space, the kernel and the guest.

Answers to "entry, x86, kvm: Generic entry/exit functionality" (Gleixner, 2020) in its merged form: Linux 6.1 `kernel/entry/{common,kvm}.c`,
whose names and order of work these functions have. Whoever wants to see, filter or delay a crossing hooks in here. A call that nobody
watches takes `syscall_bare()`: a static call (`host/static_call.py`) chooses, so hooks that are off are not even tested.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from softkvm.host import context_tracking, ptrace, rseq, trace
from softkvm.host.call import SKIPPED, Call, File, Handler
from softkvm.host.irqflags import (
    local_irq_disable,
    local_irq_enable,
    lockdep_hardirqs_off,
    lockdep_hardirqs_on,
    lockdep_hardirqs_on_prepare,
    trace_hardirqs_off_finish,
    trace_hardirqs_on_prepare,
)
from softkvm.host.noinstr import instrumentation, noinstr
from softkvm.host.seccomp import secure_computing
from softkvm.host.task import (
    CONTEXT_IDLE,
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

_SIGNALS = TIF_SIGPENDING | TIF_NOTIFY_SIGNAL
EXIT_TO_USER_MODE_WORK = _SIGNALS | TIF_NEED_RESCHED | TIF_NOTIFY_RESUME | TIF_UPROBE | TIF_PATCH_PENDING
"""Flags handled in the loop before user space. The user-return notifiers are not among them: they are fired once, behind the loop."""
XFER_TO_GUEST_MODE_WORK = _SIGNALS | TIF_NEED_RESCHED | TIF_NOTIFY_RESUME
"""Flags that must be handled before a guest runs; checked with `task.flags & XFER_TO_GUEST_MODE_WORK`."""


class GuestContext(Protocol):
    """What a transfer to guest mode needs of the vCPU."""

    def handle_signal_exit(self) -> None:
        """Report `KVM_EXIT_INTR` and count it (`kvm_handle_signal_exit()`)."""


# --- System calls ------------------------------------------------------------------------------------------------------------------


def syscall_bare(task: Task, file: File, nr: int, command: int, args: tuple[Any, ...], handler: Handler) -> Any:
    """A system call that nobody watches: only what is pending at its end is done. Takes and returns the same as `syscall()`."""
    try:
        result = handler(file, *args)
    except BaseException:
        if task.flags:
            _exit_bare(task)
        raise
    if task.flags:
        _exit_bare(task)
    return result


def _exit_bare(task: Task) -> None:
    """The exit loop and the user-return notifiers, unless KVM itself has made the call in the middle of KVM_RUN."""
    if task.guest is None:
        local_irq_disable(task)
        try:
            exit_to_user_mode_prepare(task)
        finally:
            local_irq_enable(task)


@noinstr
def syscall(task: Task, file: File, nr: int, command: int, args: tuple[Any, ...], handler: Handler) -> Any:
    """`do_syscall_64()`: the call `nr` (an ioctl: `command`) of `task`, done by `handler(file, *args)`, with all entry and exit work.

    Raises what the handler raises, what a hook raises, and Killed if a filter kills the caller. A call made inside of another one (by a
    probe in the middle of KVM_RUN, say) crosses nothing and goes straight to its handler.
    """
    if task.call is not None or task.guest is not None:
        with instrumentation():
            return handler(file, *args)
    task.call = call = Call(file, nr, command, args, handler)
    try:
        if syscall_enter_from_user_mode(task, call):
            with instrumentation():
                call.make()
    finally:
        try:
            syscall_exit_to_user_mode(task, call)
        finally:
            task.call = None
    with instrumentation():
        return call.outcome()


@noinstr
def enter_from_user_mode(task: Task) -> None:
    """Checks, lockdep, context tracking, tracing: after it RCU watches and instrumentation is allowed."""
    check_user_regs(task)
    lockdep_hardirqs_off(task)
    context_tracking.user_exit_irqoff(task)
    with instrumentation():
        trace_hardirqs_off_finish(task)


@noinstr
def check_user_regs(task: Task) -> None:
    """`arch_check_user_regs()`: user space has interrupts on and holds nothing of the kernel's."""
    assert not task.irqs_off
    assert task.preempt_count == 0
    assert task.rcu_irq_nesting == 0


@noinstr
def syscall_enter_from_user_mode(task: Task, call: Call) -> bool:
    """Everything up to the call; False if it is not to be made."""
    enter_from_user_mode(task)
    with instrumentation():
        local_irq_enable(task)
        call.file.process.check_alive(task)
        return syscall_trace_enter(task, call)


def syscall_trace_enter(task: Task, call: Call) -> bool:
    """Tracer, filters, tracepoint, audit. Each may rewrite the call, and each sees what those before it have made of it."""
    process = call.file.process
    if process.tracer is not None and not ptrace.report_syscall_entry(process.tracer, call):
        call.nr = SKIPPED
        return False
    if process.filters and not secure_computing(task, call, process):
        call.nr = SKIPPED
        return False
    if trace.sys_enter.enabled:
        trace.sys_enter(call.nr, call.registers)
    if process.audit is not None and call.nr != SKIPPED:
        process.audit.syscall_entry(task, call)
    return call.nr != SKIPPED


@noinstr
def syscall_exit_to_user_mode(task: Task, call: Call) -> None:
    """One-time work, the loop, the user-return notifiers, and the crossing back, which happens whatever those raise."""
    try:
        with instrumentation():
            _syscall_exit_to_user_mode_work(task, call)
    finally:
        exit_to_user_mode(task)


def _syscall_exit_to_user_mode_work(task: Task, call: Call) -> None:
    try:
        syscall_exit_to_user_mode_prepare(task, call)
    finally:
        local_irq_disable(task)
        exit_to_user_mode_prepare(task)


def syscall_exit_to_user_mode_prepare(task: Task, call: Call) -> None:
    """Once per call, with interrupts on: rseq's check, audit, tracepoint, tracer."""
    if task.irqs_off:
        local_irq_enable(task)
        raise AssertionError(f"{call.name} has left interrupts off")
    process = call.file.process
    try:
        rseq.check_syscall(task)
    finally:
        if process.audit is not None:
            process.audit.syscall_exit(call)
    if trace.sys_exit.enabled:
        trace.sys_exit(call.nr, call.ret)
    if process.tracer is not None:
        ptrace.report_syscall_exit(process.tracer, call)


# --- Back to user space ------------------------------------------------------------------------------------------------------------


def exit_to_user_mode_prepare(task: Task) -> None:
    """Interrupts are off: the loop, then once what must be last."""
    if task.flags & EXIT_TO_USER_MODE_WORK:
        exit_to_user_mode_loop(task)
    if task.flags & TIF_USER_RETURN_NOTIFY:
        task.fire_user_return()


def exit_to_user_mode_loop(task: Task) -> None:
    """`exit_to_user_mode_loop()`: with interrupts on, what a snapshot of the flags says, in the kernel's order; then look again."""
    while flags := task.flags & EXIT_TO_USER_MODE_WORK:
        local_irq_enable(task)
        try:
            if flags & TIF_NEED_RESCHED:
                schedule(task)
            if flags & TIF_UPROBE:
                task.run_works(TIF_UPROBE)
            if flags & TIF_PATCH_PENDING:
                task.run_works(TIF_PATCH_PENDING)
            if flags & _SIGNALS:
                do_signal(task)
            if flags & TIF_NOTIFY_RESUME:
                resume_user_mode_work(task)
        finally:
            local_irq_disable(task)


@noinstr
def exit_to_user_mode(task: Task) -> None:
    """The crossing: tracing and lockdep learn that interrupts will be on, RCU may stop watching."""
    with instrumentation():
        trace_hardirqs_on_prepare(task)
        lockdep_hardirqs_on_prepare(task)
    context_tracking.user_enter_irqoff(task)
    lockdep_hardirqs_on(task)


def schedule(task: Task) -> None:
    """`schedule()`: let others have the core. In user space a task holds none that they could not take."""
    task.clear_flag(TIF_NEED_RESCHED)
    if task.guest is not None:
        task.guest.schedule()


def do_signal(task: Task) -> None:
    """`arch_do_signal_or_restart()`: a signal interrupts a critical section; its handler is whatever the caller does next."""
    if task.flags & TIF_NOTIFY_SIGNAL:
        task.run_works(TIF_NOTIFY_SIGNAL)
    if task.clear_flag(TIF_SIGPENDING):
        rseq.note_event(task)


def resume_user_mode_work(task: Task) -> None:
    """`resume_user_mode_work()`: task work, then rseq."""
    task.run_works(TIF_NOTIFY_RESUME)
    rseq.handle_notify_resume(task)


# --- Interrupts of the host --------------------------------------------------------------------------------------------------------


class IrqState(NamedTuple):
    """`irqentry_state_t`, and what the interrupted registers would tell."""

    from_user: bool
    exit_rcu: bool
    irqs_were_on: bool


@noinstr
def irqentry_enter(task: Task) -> IrqState:
    """An interrupt or exception begins. Out of idle RCU is told unconditionally: a nested tick must not end a grace period."""
    if task.context == CONTEXT_USER:
        enter_from_user_mode(task)
        return IrqState(True, False, True)
    state = IrqState(False, task.context == CONTEXT_IDLE, not task.irqs_off)
    lockdep_hardirqs_off(task)
    if state.exit_rcu:
        task.rcu_irq_nesting += 1
    with instrumentation():
        trace_hardirqs_off_finish(task)
    return state


@noinstr
def irqentry_exit(task: Task, state: IrqState) -> None:
    """It ends. Only code that could be preempted is: in the kernel, interrupts on, preempt count 0; never the idle task."""
    if state.from_user:
        irqentry_exit_to_user_mode(task)
    elif not state.irqs_were_on:
        if state.exit_rcu:
            task.rcu_irq_nesting -= 1
    elif state.exit_rcu:
        with instrumentation():
            trace_hardirqs_on_prepare(task)
            lockdep_hardirqs_on_prepare(task)
        task.rcu_irq_nesting -= 1
        lockdep_hardirqs_on(task)
    else:
        with instrumentation():
            try:
                irqentry_exit_cond_resched(task)
            finally:
                local_irq_enable(task)


@noinstr
def irqentry_exit_to_user_mode(task: Task) -> None:
    """As a system call ends, without its one-time work."""
    try:
        with instrumentation():
            exit_to_user_mode_prepare(task)
    finally:
        exit_to_user_mode(task)


def irqentry_exit_cond_resched(task: Task) -> None:
    """Preempt the kernel, if nothing forbids it."""
    if task.preempt_count == 0 and task.flags & TIF_NEED_RESCHED:
        schedule(task)


def interrupt(task: Task, handler: Callable[[], object]) -> None:
    """An interrupt of the host (timers that are due) out of kernel or idle; a call without entry work has no state to keep."""
    if task.call is None and task.context == CONTEXT_USER:
        handler()
        return
    state = irqentry_enter(task)
    try:
        with instrumentation():
            handler()
    finally:
        irqentry_exit(task, state)


def idle(task: Task, wait: Callable[[], object]) -> None:
    """Sleep in `wait`: the processor has nothing to do. A call without entry work has no state to keep."""
    if task.call is None:
        wait()
        return
    context = context_tracking.switch(task, CONTEXT_IDLE)
    try:
        wait()
    finally:
        context_tracking.switch(task, context)


# --- Guest mode --------------------------------------------------------------------------------------------------------------------


def xfer_to_guest_mode(task: Task, vcpu: GuestContext) -> int:
    """`xfer_to_guest_mode_handle_work()`: handle what is pending; 0 to enter the guest, -EINTR for a signal (which comes first)."""
    while flags := task.flags & XFER_TO_GUEST_MODE_WORK:
        if flags & _SIGNALS:
            vcpu.handle_signal_exit()
            return -errno.EINTR
        if flags & TIF_NEED_RESCHED:
            schedule(task)
        if flags & TIF_NOTIFY_RESUME:
            resume_user_mode_work(task)
    return 0


exit_to_guest_mode = xfer_to_guest_mode
"""Its name in the series as it was posted; review renamed it."""


@noinstr
def run_guest(task: Task, enter: Callable[[], int]) -> int:
    """`guest_state_enter_irqoff()`, the guest, `guest_state_exit_irqoff()`: interrupts are off before and after, and on in the guest."""
    with instrumentation():
        trace_hardirqs_on_prepare(task)
        lockdep_hardirqs_on_prepare(task)
    context = context_tracking.guest_enter_irqoff(task)
    lockdep_hardirqs_on(task)
    try:
        return enter_guest(enter)
    finally:
        lockdep_hardirqs_off(task)
        context_tracking.switch(task, context)
        with instrumentation():
            trace_hardirqs_off_finish(task)


@noinstr
def enter_guest(enter: Callable[[], int]) -> int:
    """The instruction that enters the guest: nothing in it is the kernel's code."""
    with instrumentation():
        return enter()
