"""Filters of system calls: what a VMM may ask of KVM.

Answers to Linux 6.1 `kernel/seccomp.c` and `Documentation/userspace-api/seccomp_filter.rst`. A filter is an ordered list of rules on the
class of the file, the full number and the arguments; the first that matches says the action. Under several filters the strictest action
counts, of equals the last filter's. `host/seccomp_file.py` reads them from JSON.
"""

from __future__ import annotations

import errno
import logging
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

from softkvm.host.call import SKIPPED, SYS_IOCTL, Call

if TYPE_CHECKING:
    from softkvm.host.process import Process
    from softkvm.host.task import Task

_log = logging.getLogger(__name__)


class Killed(BaseException):
    """A filter has killed the VMM or one of its threads: SIGSYS, which no `except Exception` of the VMM survives."""


class FilterError(ValueError):
    """A filter file is wrong; the message is one sentence."""


THREAD_CLASSES = ("vmm", "api", "vcpu")
"""Kinds of a VMM's threads that filters may tell apart, by what is in their names; whoever is nothing else is of the first kind."""


def thread_class(comm: str) -> str:
    """The kind of a thread by its name, such as `softkvm-vcpu0` or Firecracker's `fc_api`."""
    return next((kind for kind in THREAD_CLASSES[1:] if kind in comm), THREAD_CLASSES[0])


class Action(IntEnum):
    """Strictest first, as seccomp ranks them."""

    KILL_PROCESS = 0
    KILL_THREAD = 1
    TRAP = 2
    ERRNO = 3
    USER_NOTIF = 4
    TRACE = 5
    LOG = 6
    ALLOW = 7


class Verdict(NamedTuple):
    """An action, and the errno of ERRNO or the message of TRACE."""

    action: Action
    data: int = 0

    def __str__(self) -> str:
        return f"errno({self.data})" if self.action is Action.ERRNO else self.action.name.lower()


ALLOW = Verdict(Action.ALLOW)

OPERATORS: dict[str, Callable[[int, int], bool]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}


@dataclass(frozen=True)
class Comparison:
    """A condition on an argument: of that `index` among the call's six numbers, or of that `field`; unsigned, after `& mask`."""

    op: str
    value: int
    index: int | None = None
    field: str | None = None
    mask: int = (1 << 64) - 1

    def holds(self, call: Call) -> bool:
        """Whether it is so; a field that the call lacks never is, one that it has several times is if any is."""
        values = (call.registers[self.index],) if self.index is not None else call.values(self.field or "")
        compare = OPERATORS[self.op]
        return any(compare(value & self.mask, self.value) for value in values)


@dataclass(frozen=True)
class Rule:
    """What to do with a call; None stands for any file class, call or ioctl."""

    verdict: Verdict
    fd_class: str | None = None
    nr: int | None = None
    command: int | None = None
    comparisons: tuple[Comparison, ...] = ()

    def concerns(self, fd_class: str, nr: int, command: int) -> bool:
        """Whether the rule could match such a call, by its arguments."""
        same_call = self.nr in (None, nr) and (self.command is None or (nr == SYS_IOCTL and command == self.command))
        return same_call and self.fd_class in (None, fd_class)


@dataclass(frozen=True)
class Filter:
    """Ordered rules, and the verdict on what none of them matches."""

    rules: Sequence[Rule]
    default: Verdict
    thread: str | None = None
    """The kind of threads (THREAD_CLASSES) that are under it; None is all."""
    _candidates: dict[tuple[str, int, int], tuple[Rule, ...]] = field(default_factory=dict, compare=False, repr=False)

    def judge(self, call: Call) -> Verdict:
        """The verdict on a call."""
        key = (call.file.fd_class, call.nr, call.command)
        rules = self._candidates.get(key)
        if rules is None:
            rules = tuple(rule for rule in self.rules if rule.concerns(*key))
            if len(self._candidates) < 1024:  # numbers come from the one who is filtered
                self._candidates[key] = rules
        for rule in rules:
            if all(comparison.holds(call) for comparison in rule.comparisons):
                return rule.verdict
        return self.default


def judge(filters: Sequence[Filter], call: Call, comm: str) -> Verdict:
    """The strictest verdict of all filters on a call of the thread `comm`; of equals that of the last one installed."""
    kind = thread_class(comm)
    verdicts = (one.judge(call) for one in reversed(filters) if one.thread in (None, kind))
    return min(verdicts, key=lambda verdict: verdict.action, default=ALLOW)


def secure_computing(task: Task, call: Call, process: Process) -> bool:
    """`__secure_computing()`: do what the filters say; False if the call is not to be made. Killed if they kill."""
    return _act(task, call, process, judge(process.filters, call, task.comm), may_trace=True)


def _act(task: Task, call: Call, process: Process, verdict: Verdict, may_trace: bool) -> bool:
    action = verdict.action
    if action is Action.ALLOW:
        return True
    if process.audit is not None:
        process.audit.seccomp(task, call, str(verdict))
    if action is Action.LOG:
        _log.warning("%s of %s (fd %d) is not allowed for", call.name, call.file.fd_class, call.file.fd)
        return True
    if action is Action.TRACE:
        return _trace(task, call, process, verdict) if may_trace else True
    if action is Action.USER_NOTIF:
        return _notify(call, process)
    if action is Action.ERRNO:
        call.skip(error=OSError(verdict.data, "refused by the ioctl filter"))
    elif action is Action.TRAP and process.on_sigsys is not None:
        call.skip(error=OSError(errno.ENOSYS, "trapped by the ioctl filter"))
        process.on_sigsys(call)
    else:
        _kill(task, call, process, action)
    return False


def _kill(task: Task, call: Call, process: Process, action: Action) -> None:
    why = f"the ioctl filter does not allow {call.name} on a {call.file.fd_class} file"
    call.skip(error=OSError(errno.ENOSYS, why))
    if action is Action.KILL_THREAD:
        process.kill_thread(task, why)
    else:
        process.kill(why)
    raise Killed(why)


def _trace(task: Task, call: Call, process: Process, verdict: Verdict) -> bool:
    """Let the tracer decide; what it made of the call is judged again, so that it cannot widen what the filters allow."""
    if process.tracer is None:
        call.skip(error=OSError(errno.ENOSYS, "the ioctl filter wants a tracer"))
        return False
    if not process.tracer.seccomp(call, verdict.data) or call.nr == SKIPPED:
        call.nr = SKIPPED
        return False
    return _act(task, call, process, judge(process.filters, call, task.comm), may_trace=False)


def _notify(call: Call, process: Process) -> bool:
    """Let the supervisor answer."""
    if process.supervisor is None:
        call.skip(error=OSError(errno.ENOSYS, "the ioctl filter wants a supervisor"))
        return False
    answer = process.supervisor(call)
    if answer is None:
        return True
    if answer < 0:
        call.skip(error=OSError(-answer, "refused by the supervisor"))
    else:
        call.skip(result=answer)
    return False
