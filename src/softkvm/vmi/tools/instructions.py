"""The instruction that an event is about, decoded by iced-x86: how long it is, and which memory it names.

Source of truth: Intel SDM volume 1, 3.7.5 (effective addresses).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from softkvm.vmi.errors import Unreadable
from softkvm.vmi.events import VcpuEvent
from softkvm.vmi.paging import CR4_LA57, AddressSpace
from softkvm.vmi.target import Target

if TYPE_CHECKING:
    from iced_x86 import Instruction

_LONGEST_INSTRUCTION = 15
_GENERAL = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{number}" for number in range(8, 16)))
_MASK = (1 << 64) - 1


def space(target: Target, event: VcpuEvent) -> AddressSpace:
    """The virtual memory that the event's vCPU sees."""
    return AddressSpace(target.client.memory, event.cr3, la57=bool(event.sregs.cr4 & CR4_LA57))


def at(target: Target, event: VcpuEvent) -> Instruction | None:
    """The instruction at RIP, in 64-bit code; None if it cannot be read or decoded."""
    from iced_x86 import Decoder  # loaded when somebody does what is locked, which is not often

    try:
        code = space(target, event).read_available(event.regs.rip, _LONGEST_INSTRUCTION)
    except Unreadable:
        return None
    instruction = Decoder(64, code, ip=event.regs.rip).decode()
    return None if instruction.is_invalid else instruction


def operand_size(instruction: Instruction) -> int:
    """Bytes of its operand in memory; 0 if it has none. A repeated instruction has that of one turn."""
    from iced_x86 import MemorySizeExt

    return int(MemorySizeExt.size(instruction.memory_size))


def operand_address(event: VcpuEvent, instruction: Instruction) -> int:
    """The linear address of its operand in memory."""
    from iced_x86 import Register

    if instruction.is_ip_rel_memory_operand:
        return int(instruction.ip_rel_memory_address)
    numbers = {getattr(Register, name.upper()): name for name in _GENERAL}
    segments = {Register.FS: event.sregs.fs.base, Register.GS: event.sregs.gs.base}

    def value(register: int) -> int:
        name = numbers.get(register)
        return int(getattr(event.regs, name)) if name is not None else 0

    offset = value(instruction.memory_base) + value(instruction.memory_index) * instruction.memory_index_scale
    return int(offset + instruction.memory_displacement + segments.get(instruction.memory_segment, 0)) & _MASK
