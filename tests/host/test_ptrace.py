"""Tracers: stop, inspect and rewrite a call."""

from __future__ import annotations

import errno

import pytest

from softkvm.host import entry, ptrace
from softkvm.host.call import Call
from softkvm.host.process import Process
from softkvm.host.task import Task
from tests.host.doubles import NMI, RUN, File, nothing


class Recorder(ptrace.Tracer):
    def __init__(self) -> None:
        self.stops: list[tuple[str, str, tuple[object, ...], object]] = []

    def enter(self, call: Call) -> None:
        self.stops.append(("enter", call.name, call.args, None))

    def exit(self, call: Call) -> None:
        self.stops.append(("exit", call.name, call.args, call.result))


def test_a_tracer_sees_both_ends_of_a_call_and_then_none() -> None:
    file, tracer = File(), Recorder()
    file.process.attach(tracer)
    file.call(Task(), lambda it, a: a + 1, 5)
    file.process.detach()
    assert file.process.cross is entry.syscall_bare
    file.call(Task(), nothing)
    assert tracer.stops == [("enter", "KVM_RUN", (5,), None), ("exit", "KVM_RUN", (5,), 6)]


def test_arguments_and_result_can_be_rewritten() -> None:
    class Rewriter(ptrace.Tracer):
        def enter(self, call: Call) -> None:
            call.args = (10,)

        def exit(self, call: Call) -> None:
            call.result *= 2

    file = File()
    file.process.attach(Rewriter())
    assert file.call(Task(), lambda it, a: a + 1, 5) == 22


def test_a_rewritten_number_is_another_call() -> None:
    class Rewriter(ptrace.Tracer):
        def enter(self, call: Call) -> None:
            call.command = NMI

    file = File()
    file.handlers[NMI] = lambda it: "nmi"
    file.process.attach(Rewriter())
    assert file.call(Task(), lambda it: "run", command=RUN) == "nmi"
    del file.handlers[NMI]
    with pytest.raises(OSError, match="no such ioctl"):
        file.call(Task(), lambda it: "run", command=RUN)


def test_an_error_can_be_rewritten() -> None:
    class Forgiver(ptrace.Tracer):
        def exit(self, call: Call) -> None:
            call.result, call.error = "fine", None

    def fail(it: File) -> None:
        raise OSError(errno.EBUSY, "busy")

    file = File()
    file.process.attach(Forgiver())
    assert file.call(Task(), fail) == "fine"


def test_a_skipped_call_is_enosys_unless_somebody_says_otherwise() -> None:
    class Skipper(ptrace.Tracer):
        def enter(self, call: Call) -> None:
            call.nr = -1

    file, made = File(), list[int]()
    file.process.attach(Skipper())
    with pytest.raises(OSError, match="not made") as caught:
        file.call(Task(), lambda it: made.append(1))
    assert caught.value.errno == errno.ENOSYS
    assert made == []


def test_emulation_makes_no_call_and_has_no_exit_stop() -> None:
    class Emulator(Recorder):
        emulate = True

        def enter(self, call: Call) -> None:
            super().enter(call)
            call.skip(result=12)

    file, tracer, made = File(), Emulator(), list[int]()
    file.process.attach(tracer)
    assert file.call(Task(), lambda it: made.append(1)) == 12
    assert (made, len(tracer.stops)) == ([], 1)


def test_what_a_tracer_raises_comes_out_and_the_crossing_is_paired() -> None:
    class Broken(ptrace.Tracer):
        def enter(self, call: Call) -> None:
            raise RuntimeError("tracer's bug")

    file, task = File(), Task()
    file.process.attach(Broken())
    with pytest.raises(RuntimeError, match="tracer's bug"):
        file.call(task, nothing)
    assert (task.context, task.irqs_off, task.lockdep_irqs_off, task.call) == (2, False, False, None)


def test_one_tracer_at_a_time() -> None:
    process = Process()
    with pytest.raises(ProcessLookupError):
        process.detach()
    process.attach(ptrace.Tracer())
    with pytest.raises(PermissionError):
        process.attach(ptrace.Tracer())
