"""Filters of system calls: first match, strictest filter, and what each action does."""

from __future__ import annotations

import errno
import logging
from itertools import combinations
from pathlib import Path

import msgspec
import pytest

from softkvm.host import entry, ptrace
from softkvm.host.audit import AuditLog
from softkvm.host.call import SYS_IOCTL, SYS_MMAP, Call
from softkvm.host.process import Process
from softkvm.host.seccomp import ALLOW, Action, Comparison, Filter, Killed, Rule, Verdict, judge
from softkvm.host.task import Task
from softkvm.uapi import kvm as uapi
from tests.host.doubles import NMI, RUN, File, a_call, nothing


def filtered(verdict: Verdict) -> File:
    """A file on which NMI gets the verdict and all else is allowed."""
    return File(Process((Filter((Rule(verdict, nr=SYS_IOCTL, command=NMI),), ALLOW),)))


def test_the_first_rule_that_matches_decides() -> None:
    rules = (
        Rule(Verdict(Action.ERRNO, 1), command=NMI, fd_class="vm"),
        Rule(Verdict(Action.ERRNO, 2), command=NMI, comparisons=(Comparison("eq", 5, index=2),)),
        Rule(Verdict(Action.ERRNO, 3), nr=SYS_IOCTL, command=NMI),
        Rule(Verdict(Action.ERRNO, 4)),
    )
    one = Filter(rules, ALLOW)
    assert one.judge(a_call(NMI, fd_class="vm")).data == 1
    assert one.judge(a_call(NMI, (5,))).data == 2
    assert one.judge(a_call(NMI, (6,))).data == 3
    assert one.judge(a_call(RUN)).data == 4
    assert Filter((), Verdict(Action.LOG)).judge(a_call()) == Verdict(Action.LOG)


@pytest.mark.parametrize(("strict", "lax"), list(combinations(Action, 2)))
def test_the_strictest_of_several_filters_counts(strict: Action, lax: Action) -> None:
    one, other = Filter((), Verdict(strict)), Filter((), Verdict(lax))
    assert judge((one, other), a_call(), "vmm").action == judge((other, one), a_call(), "vmm").action == strict


def test_of_equals_the_last_filters_data_counts() -> None:
    assert judge((Filter((), Verdict(Action.ERRNO, 1)), Filter((), Verdict(Action.ERRNO, 2))), a_call(), "vmm").data == 2


@pytest.mark.parametrize(
    ("op", "value", "expected"),
    [("eq", 5, True), ("eq", 4, False), ("ne", 5, False), ("lt", 6, True), ("le", 4, False), ("gt", 4, True), ("ge", 6, False)],
)
def test_comparisons(op: str, value: int, expected: bool) -> None:
    assert Comparison(op, value, index=2).holds(a_call(args=(5,))) is expected


def test_comparisons_are_unsigned_and_masked() -> None:
    assert Comparison("gt", 1 << 63, index=2).holds(a_call(args=(-1,)))
    assert Comparison("eq", 0x80, index=2, mask=0xF0).holds(a_call(args=(0x85,)))


def test_fields_are_parameters_or_members_of_structures() -> None:
    def handler(file: File, gsi: int, entry: object, entries: object) -> None: ...

    entries = [uapi.CpuidEntry2(function=1), uapi.CpuidEntry2(function=7)]
    call = Call(File(), SYS_IOCTL, NMI, (24, uapi.UserspaceMemoryRegion(slot=3), entries), handler)
    assert Comparison("eq", 24, field="gsi").holds(call)
    assert Comparison("eq", 3, field="slot").holds(call)
    assert Comparison("eq", 7, field="function").holds(call)
    assert not Comparison("ge", 0, field="no_such").holds(call)


def test_errno_refuses_and_the_call_is_not_made() -> None:
    file, made = filtered(Verdict(Action.ERRNO, errno.EACCES)), list[int]()
    with pytest.raises(PermissionError):
        file.call(Task(), lambda it: made.append(1), command=NMI)
    file.call(Task(), lambda it: made.append(2), command=RUN)
    assert made == [2]


def test_kill_process_ends_it_for_good() -> None:
    file = filtered(Verdict(Action.KILL_PROCESS))
    other = File(file.process)
    with pytest.raises(Killed, match="KVM_NMI on a vcpu file"):
        file.call(Task(), nothing, command=NMI)
    assert file.was_killed
    assert other.was_killed
    with pytest.raises(Killed):
        other.call(Task(), nothing, command=RUN)


def test_kill_thread_ends_that_thread_only() -> None:
    file, mine, other = filtered(Verdict(Action.KILL_THREAD)), Task(), Task()
    with pytest.raises(Killed):
        file.call(mine, nothing, command=NMI)
    with pytest.raises(Killed):
        file.call(mine, nothing, command=RUN)
    file.call(other, nothing, command=RUN)


def test_no_except_exception_survives_a_kill() -> None:
    assert not issubclass(Killed, Exception)


def test_trap_calls_the_handler_in_place_of_the_call() -> None:
    file, trapped = filtered(Verdict(Action.TRAP)), list[str]()

    def on_sigsys(call: Call) -> None:
        trapped.append("trapped")
        call.skip(result=33)

    file.process.on_sigsys = on_sigsys
    assert file.call(Task(), nothing, command=NMI) == 33
    assert trapped == ["trapped"]


def test_trap_without_a_handler_kills() -> None:
    file = filtered(Verdict(Action.TRAP))
    with pytest.raises(Killed):
        file.call(Task(), nothing, command=NMI)
    assert file.was_killed


@pytest.mark.parametrize(("answer", "result"), [(7, 7), (0, 0), (None, "made")])
def test_the_supervisor_answers(answer: int | None, result: object) -> None:
    file = filtered(Verdict(Action.USER_NOTIF))
    file.process.supervisor = lambda call: answer
    assert file.call(Task(), lambda it: "made", command=NMI) == result


def test_the_supervisor_refuses() -> None:
    file = filtered(Verdict(Action.USER_NOTIF))
    file.process.supervisor = lambda call: -errno.EPERM
    with pytest.raises(PermissionError):
        file.call(Task(), nothing, command=NMI)


@pytest.mark.parametrize("action", [Action.USER_NOTIF, Action.TRACE])
def test_nobody_to_ask_is_enosys(action: Action) -> None:
    with pytest.raises(OSError, match="wants a") as caught:
        filtered(Verdict(action)).call(Task(), nothing, command=NMI)
    assert caught.value.errno == errno.ENOSYS


def test_log_lets_the_call_be_made(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert filtered(Verdict(Action.LOG)).call(Task(), lambda it: "made", command=NMI) == "made"
    assert "KVM_NMI of vcpu" in caplog.text


def test_what_a_tracer_makes_of_a_call_is_judged_again() -> None:
    """A tracer that the filter asks may not widen what the filter allows."""
    rules = (Rule(Verdict(Action.TRACE, 9), command=NMI), Rule(Verdict(Action.ERRNO, errno.EACCES), command=RUN))
    file = File(Process((Filter(rules, ALLOW),)))
    messages: list[int] = []

    class Rewriter(ptrace.Tracer):
        def seccomp(self, call: Call, message: int) -> bool:
            messages.append(message)
            call.command = RUN
            return True

    file.process.attach(Rewriter())
    file.handlers[RUN] = nothing
    with pytest.raises(PermissionError):
        file.call(Task(), nothing, command=NMI)
    assert messages == [9]


def test_the_filter_sees_what_the_tracer_made_of_the_call() -> None:
    file = filtered(Verdict(Action.ERRNO, errno.EACCES))

    class Rewriter(ptrace.Tracer):
        def enter(self, call: Call) -> None:
            call.command = NMI

    file.process.attach(Rewriter())
    with pytest.raises(PermissionError):
        file.call(Task(), nothing, command=RUN)


def test_filters_are_only_ever_added() -> None:
    process = Process()
    assert process.cross is entry.syscall_bare
    strict, lax = Filter((), Verdict(Action.ERRNO, 1)), Filter((), ALLOW)
    process.add_filter(strict)
    process.add_filter(lax)
    assert process.cross is entry.syscall
    assert judge(process.filters, a_call(), "vmm").action is Action.ERRNO


def test_other_system_calls_are_filtered_too() -> None:
    file = File(Process((Filter((Rule(Verdict(Action.ERRNO, errno.EACCES), nr=SYS_MMAP),), ALLOW),)))
    with pytest.raises(PermissionError):
        file.process.cross(Task(), file, SYS_MMAP, 0, (4096, 0), nothing)


def test_what_is_not_simply_allowed_leaves_an_audit_record(tmp_path: Path) -> None:
    path = tmp_path / "audit"
    with AuditLog(path) as audit:
        file = filtered(Verdict(Action.ERRNO, errno.EACCES))
        file.process.audit = audit
        with pytest.raises(PermissionError):
            file.call(Task(), nothing, command=NMI)
    (line,) = path.read_bytes().splitlines()
    record = msgspec.json.decode(line)
    assert (record["call"], record["action"], "result" in record) == ("KVM_NMI", "errno(13)", False)
