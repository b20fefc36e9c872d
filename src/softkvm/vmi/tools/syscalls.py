"""The system calls of a guest's processes, with arguments and results, as strace(1) has them, but from outside.

Source of truth: Linux 5.8 to 6.12 `arch/x86/entry/{entry_64.S,common.c,syscall_64.c}`, `kernel/entry/common.c`. All 64-bit system calls go
through `do_syscall_64()`, which is called with the saved registers on top of the stack, and `syscall_exit_to_user_mode()`, before signals
are looked at. Where the latter is not a function of its own (from 6.10 on), they go through `x64_sys_call()`, all but those that seccomp
refuses, and end where it returns. No breakpoint is in the guest's memory.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from softkvm.vmi.events import HiddenBreakpointEvent
from softkvm.vmi.linux import objects
from softkvm.vmi.linux.objects import Struct
from softkvm.vmi.linux.syscalls import Call, SyscallTable
from softkvm.vmi.paging import AddressSpace
from softkvm.vmi.target import Target
from softkvm.vmi.tools import arguments
from softkvm.vmi.tools.arguments import Argument, Kind
from softkvm.vmi.tools.dispatch import Dispatcher

_ENTRY, _EXIT, _CALL = "do_syscall_64", "syscall_exit_to_user_mode", "x64_sys_call"
_REGISTERS = ("di", "si", "dx", "r10", "r8", "r9")
_ADDRESS_CALLS = frozenset({"brk", "mmap", "mremap", "shmat"})
_NEVER_RETURN = frozenset({"exit", "exit_group", "rt_sigreturn"})
_EXECUTES = frozenset({"execve", "execveat"})
_MOST_PENDING = 1 << 16


class Syscall(msgspec.Struct, frozen=True):
    """One system call; `result` is None for a call that does not return."""

    pid: int
    process: str
    number: int
    name: str
    arguments: tuple[Argument, ...]
    result: int | None
    shown_result: str

    def __str__(self) -> str:
        shown = ", ".join(argument.shown for argument in self.arguments)
        return f"{self.name}({shown}) = {self.shown_result}"


class _Pending(msgspec.Struct):
    """A call that has begun."""

    pid: int
    process: str
    call: Call
    arguments: list[Argument]
    space: AddressSpace | None


class SyscallTracer(Dispatcher[Syscall]):
    """Notes the system calls of all processes, or of some and, with `follow`, of their children."""

    def __init__(self, target: Target, pids: Iterable[int] = (), *, follow: bool = False) -> None:
        super().__init__(target)
        kernel = target.kernel
        self._table = SyscallTable(kernel)
        self._pids = set(pids)
        self._follow = follow
        self._pending: dict[int, _Pending] = {}
        """By the address of the saved registers."""
        self._returns: set[int] = set()
        self._returning: dict[int, int] = {}
        """The same, by RSP behind _CALL."""
        registers = kernel.types.find("pt_regs")
        self._registers_size = registers.size
        self._offsets = {name: objects.field(kernel.types, registers.number, name).offset for name in (*_REGISTERS, "orig_ax", "ax")}
        if _EXIT in kernel.symbols:
            self.at(kernel.symbols[_ENTRY], self._enter)
            self.at(kernel.symbols[_EXIT], self._exit)
        else:
            self.at(kernel.symbols[_CALL], self._call_begins)

    def _wants(self, task: Struct) -> bool:
        if not self._pids or task.number("tgid") in self._pids:
            return True
        parent = task.follow("real_parent") if self._follow else None
        if parent is not None and parent.number("tgid") in self._pids:
            self._pids.add(task.number("tgid"))
            return True
        return False

    def _enter(self, event: HiddenBreakpointEvent) -> None:
        self._begin(event, event.regs.rsp + 8)

    def _begin(self, event: HiddenBreakpointEvent, where: int) -> bool:
        """A call begins, its registers are saved there; whether its end matters."""
        task = self.target.task(event)
        if task is None or not self._wants(task):
            return False
        saved = self.target.kernel.read(where, self._registers_size)
        call = self._table[self._saved(saved, "orig_ax") & 0xFFFF_FFFF]
        memory = task.follow("mm")
        space = self.target.kernel.user_space(memory.number("pgd")) if memory is not None else None
        values = [self._saved(saved, name) for name in _REGISTERS]
        pending = _Pending(task.number("pid"), task.text("comm"), call, self._decode(call, values, space), space)
        if call.name in _NEVER_RETURN:
            self._conclude(pending, None)
            return False
        if len(self._pending) < _MOST_PENDING:
            self._pending[where] = pending
        return True

    def _saved(self, registers: bytes, name: str) -> int:
        offset = self._offsets[name]
        return int.from_bytes(registers[offset : offset + 8], "little")

    def _exit(self, event: HiddenBreakpointEvent) -> None:
        if event.regs.rdi in self._pending:
            self._leave(event.regs.rdi, self.target.kernel.number(event.regs.rdi + self._offsets["ax"]))

    def _call_begins(self, event: HiddenBreakpointEvent) -> None:
        where = event.regs.rdi
        if not self._begin(event, where):
            return
        back = self.target.kernel.number(event.regs.rsp)
        self._returning[event.regs.rsp + 8] = where
        if back not in self._returns:
            self._returns.add(back)
            self.at(back, self._call_returns)

    def _call_returns(self, event: HiddenBreakpointEvent) -> None:
        where = self._returning.pop(event.regs.rsp, None)
        if where is not None:
            self._leave(where, event.regs.rax)

    def _decode(self, call: Call, values: list[int], space: AddressSpace | None) -> list[Argument]:
        if space is None:
            return []
        following = [*values[1:], 0]
        return [arguments.decode(call, at, values[at], space, following[at]) for at in range(len(call.parameters))]

    def _leave(self, where: int, result: int) -> None:
        """The call whose registers are saved there has its result."""
        pending = self._pending.pop(where, None)
        if pending is not None:
            self._complete(pending, result)
            self._conclude(pending, result)

    def _complete(self, pending: _Pending, result: int) -> None:
        """Read what the kernel has written, and text whose page was not there before."""
        if pending.space is None or (pending.call.name in _EXECUTES and not result):
            return  # a new program has replaced the memory that the arguments were in
        pending.space.forget()
        for position, argument in enumerate(pending.arguments):
            kind = arguments.classify(pending.call, position)
            if kind is Kind.OUTPUT and 0 <= result < 1 << 31:
                pending.arguments[position] = arguments.buffer(argument.name, argument.value, result, pending.space)
            elif kind is Kind.TEXT and argument.data is None and argument.value:
                pending.arguments[position] = arguments.text(argument.name, argument.value, pending.space)

    def _conclude(self, pending: _Pending, result: int | None) -> None:
        shown = "?" if result is None else arguments.show_result(result, address=pending.call.name in _ADDRESS_CALLS)
        values = tuple(pending.arguments)
        self.note(Syscall(pending.pid, pending.process, pending.call.number, pending.call.name, values, result, shown))
