"""The system calls of a guest's processes, with arguments and results, as strace(1) has them, but from outside.

Source of truth: Linux 6.1.85 and later `arch/x86/entry/{common,syscall_64}.c`. All 64-bit system calls go through `x64_sys_call()`, whose
arguments are the saved registers and the number. A breakpoint there and one where it returns see every call, and neither is in the guest's
memory.
"""

from __future__ import annotations

import struct
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

_ENTRY = "x64_sys_call"
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
        self._returns: set[int] = set()
        registers = kernel.types.find("pt_regs")
        self._registers_size = registers.size
        self._offsets = [objects.field(kernel.types, registers.number, name).offset for name in _REGISTERS]
        self.at(kernel.symbols[_ENTRY], self._enter)

    def _wants(self, task: Struct) -> bool:
        if not self._pids or task.number("tgid") in self._pids:
            return True
        parent = task.follow("real_parent") if self._follow else None
        if parent is not None and parent.number("tgid") in self._pids:
            self._pids.add(task.number("tgid"))
            return True
        return False

    def _enter(self, event: HiddenBreakpointEvent) -> None:
        task = self.target.task(event)
        if task is None or not self._wants(task):
            return
        kernel = self.target.kernel
        call = self._table[event.regs.rsi & 0xFFFF_FFFF]
        saved = kernel.read(event.regs.rdi, self._registers_size)
        values = [int.from_bytes(saved[offset : offset + 8], "little") for offset in self._offsets]
        memory = task.follow("mm")
        space = kernel.user_space(memory.number("pgd")) if memory is not None else None
        pending = _Pending(task.number("pid"), task.text("comm"), call, self._decode(call, values, space), space)
        if call.name in _NEVER_RETURN:
            self._conclude(pending, None)
            return
        (back,) = struct.unpack("<Q", kernel.read(event.regs.rsp, 8))
        if back not in self._returns:
            self._returns.add(back)
            self.at(back, self._leave)
        if len(self._pending) < _MOST_PENDING:
            self._pending[event.regs.rsp + 8] = pending

    def _decode(self, call: Call, values: list[int], space: AddressSpace | None) -> list[Argument]:
        if space is None:
            return []
        following = [*values[1:], 0]
        return [arguments.decode(call, at, values[at], space, following[at]) for at in range(len(call.parameters))]

    def _leave(self, event: HiddenBreakpointEvent) -> None:
        pending = self._pending.pop(event.regs.rsp, None)
        if pending is None:
            return
        result = event.regs.rax
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
