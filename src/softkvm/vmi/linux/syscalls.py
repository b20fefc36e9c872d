"""System calls of a kernel: names, and the names and types of their arguments, from the kernel's own tables.

Source of truth: Linux 6.1 `include/trace/syscall.h` (`struct syscall_metadata`, there with CONFIG_FTRACE_SYSCALLS) and
`kernel/trace/trace_syscalls.c`. Where the kernel keeps no metadata, the handler's name is that of the call, and the arguments are numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from softkvm.vmi.errors import Unreadable
from softkvm.vmi.linux.kernel import Kernel

_MOST_CALLS = 1024
_MOST_ARGUMENTS = 6
_PREFIXES = ("__x64_sys_", "__do_sys_", "sys_")

# The handlers that are called otherwise than their system call is in the manual.
_RENAMED = {
    "newstat": "stat",
    "newlstat": "lstat",
    "newfstat": "fstat",
    "newuname": "uname",
    "sendfile64": "sendfile",
    "umount": "umount2",
}


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of a system call, its type as C spells it."""

    name: str
    type: str


@dataclass(frozen=True, slots=True)
class Call:
    """A system call; without metadata it has no parameters."""

    number: int
    name: str
    parameters: tuple[Parameter, ...]


class SyscallTable:
    """The 64-bit system calls of a kernel."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel

    def __getitem__(self, number: int) -> Call:
        """What a number stands for, also one that stands for nothing."""
        calls = self._calls
        return calls[number] if 0 <= number < len(calls) else Call(number, f"syscall_{number:#x}", ())

    @cached_property
    def entries(self) -> list[int]:
        """The addresses in `sys_call_table`."""
        symbols = self._kernel.symbols
        count = min(symbols.size("sys_call_table") // 8, _MOST_CALLS)
        entries = list(memoryview(self._kernel.read(symbols["sys_call_table"], 8 * count)).cast("Q"))
        while entries and not entries[-1]:  # the table's end is padded
            entries.pop()
        return entries

    @cached_property
    def _calls(self) -> list[Call]:
        metadata = self._metadata_pointers()
        return [self._call(number, entry, metadata) for number, entry in enumerate(self.entries)]

    def _metadata_pointers(self) -> list[int]:
        symbols, count = self._kernel.symbols, len(self.entries)
        if "syscalls_metadata" not in symbols or not (table := self._kernel.number(symbols["syscalls_metadata"])):
            return [0] * count
        try:
            return list(memoryview(self._kernel.read(table, 8 * count)).cast("Q"))
        except Unreadable:
            return [0] * count

    def _call(self, number: int, entry: int, metadata: list[int]) -> Call:
        parameters: tuple[Parameter, ...] = ()
        name = self._kernel.symbols.describe(entry)
        if address := metadata[number]:
            record = self._kernel.struct("syscall_metadata", address)
            name, count = record.text("name"), min(record.number("nb_args"), _MOST_ARGUMENTS)
            types, names = record.number("types"), record.number("args")
            texts = [(self._text(names + 8 * at), self._text(types + 8 * at)) for at in range(count)]
            parameters = tuple(Parameter(parameter, kind) for parameter, kind in texts)
        for prefix in _PREFIXES:
            name = name.removeprefix(prefix)
        return Call(number, _RENAMED.get(name, name), parameters)

    def _text(self, pointer: int) -> str:
        return self._kernel.text(self._kernel.number(pointer), 64)
