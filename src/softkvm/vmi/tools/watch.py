"""Watchpoints and breakpoints that the guest cannot see: who touches this memory, who calls this function."""

from __future__ import annotations

import msgspec

from softkvm.uapi.kvmi import Access
from softkvm.vmi.errors import UnknownName
from softkvm.vmi.events import HiddenBreakpointEvent, PageEvent, VcpuEvent
from softkvm.vmi.linux.btf import Kind
from softkvm.vmi.memory import PAGE_MASK
from softkvm.vmi.target import Target
from softkvm.vmi.tools.dispatch import Dispatcher
from softkvm.vmi.tools.lock import describe

_ARGUMENT_REGISTERS = ("rdi", "rsi", "rdx", "rcx", "r8", "r9")


class Hit(msgspec.Struct, frozen=True):
    """A process came to a place, or touched some memory."""

    pid: int
    process: str
    vcpu: int
    rip: int
    code: str
    """RIP as a symbol."""
    access: str = ""
    """Of a watchpoint: `read`, `write` or `execute`."""
    address: int = 0
    """Of a watchpoint: the virtual address."""
    value: str = ""
    """Of a watchpoint: the bytes before the access."""
    arguments: dict[str, int] = {}
    """Of a breakpoint on a function: its parameters by name, as far as they are in registers."""


def _who(target: Target, event: VcpuEvent) -> tuple[int, str]:
    task = target.task(event)
    return (task.number("pid"), task.text("comm")) if task is not None else (0, "")


class Watchpoint(Dispatcher[Hit]):
    """Notes accesses to `size` bytes at a kernel-virtual address, which lie in one page."""

    def __init__(self, target: Target, address: int, size: int = 8, access: Access = Access.W) -> None:
        super().__init__(target)
        self._start, self._size = target.kernel.physical(address), size
        if (self._start & PAGE_MASK) + size > PAGE_MASK + 1:
            raise UnknownName(f"the {size} bytes at {address:#x} are in more than one page")
        left = (Access.R | Access.W | Access.X) & ~access
        if Access.R in access:
            left &= ~Access.W  # no page table can express memory that is written but not read
        self._access = access
        self.protect([self._start & ~PAGE_MASK], left, self._touched)

    def _touched(self, event: PageEvent) -> None:
        if not self._start - 7 <= event.gpa < self._start + self._size or not event.access & self._access:
            return
        pid, process = _who(self.target, event)
        before = self.target.client.memory.read(self._start, self._size)
        name = {Access.R: "read", Access.W: "write", Access.X: "execute"}[event.access]
        code = describe(self.target, event.regs.rip)
        self.note(Hit(pid, process, event.vcpu, event.regs.rip, code, name, event.gva or 0, before.hex()))


class Breakpoint(Dispatcher[Hit]):
    """Notes calls of a kernel function, or executions of the instruction at an address of the kernel's."""

    def __init__(self, target: Target, place: str) -> None:
        """`place` is a symbol, `SYMBOL+OFFSET`, or an address; UnknownName if the kernel has no such symbol."""
        super().__init__(target)
        address, self._parameters = resolve(target, place)
        self.at(address, self._hit)

    def _hit(self, event: HiddenBreakpointEvent) -> None:
        pid, process = _who(self.target, event)
        values = {name: int(getattr(event.regs, register)) for name, register in zip(self._parameters, _ARGUMENT_REGISTERS, strict=False)}
        code = describe(self.target, event.regs.rip)
        self.note(Hit(pid, process, event.vcpu, event.regs.rip, code, arguments=values))


def resolve(target: Target, place: str) -> tuple[int, tuple[str, ...]]:
    """The address of a place and, if a function begins there, the names of its parameters."""
    name, _, offset = place.partition("+")
    kernel = target.kernel
    try:
        distance = int(offset, 0) if offset else 0
    except ValueError as error:
        raise UnknownName(f"{offset} is no number") from error
    if name[:1].isdigit():
        try:
            return int(name, 0) + distance, ()
        except ValueError as error:
            raise UnknownName(f"{name} is neither a symbol nor an address") from error
    address = kernel.symbols[name] + distance
    if distance:
        return address, ()
    try:
        function = kernel.types.find(name, frozenset({Kind.FUNCTION}))
    except UnknownName:
        return address, ()
    return address, tuple(parameter for parameter, _ in kernel.types.parameters(function.number))
