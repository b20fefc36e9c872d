"""Tracers: stop a VMM at its system calls, look, rewrite, and let it go on.

Answers to Linux 6.1 `kernel/ptrace.c` and ptrace(2): syscall-enter-stop, syscall-exit-stop, PTRACE_EVENT_SECCOMP, PTRACE_SYSEMU. The
calling thread stands still while a method of the tracer runs, so a tracer that waits in one holds the VMM there.
"""

from __future__ import annotations

from softkvm.host.call import SKIPPED, Call


class Tracer:
    """To be attached by `Process.attach()`. What a method raises comes out of the traced call."""

    emulate = False
    """PTRACE_SYSEMU: no call is made and none is stopped at its exit; `enter` gives each its result by `call.skip()`."""

    def enter(self, call: Call) -> None:
        """A call is about to be made: `call.nr`, `command` and `args` may be rewritten, `call.skip()` answers in its place."""

    def exit(self, call: Call) -> None:
        """A call was made, or was skipped: `call.result` and `call.error` may be rewritten."""

    def seccomp(self, call: Call, message: int) -> bool:
        """A filter says `trace`, with its `message`; as `enter`. False skips the call."""
        return True


def report_syscall_entry(tracer: Tracer, call: Call) -> bool:
    """Stop at the entry; False if the call is not to be made."""
    tracer.enter(call)
    return call.nr != SKIPPED and not tracer.emulate


def report_syscall_exit(tracer: Tracer, call: Call) -> None:
    """Stop at the exit."""
    if not tracer.emulate:
        tracer.exit(call)
