"""A vCPU's registers as KVMI events and replies carry them, taken out of the control block in one piece.

Answers to `kvmi_arch_setup_vcpu_event()` and `kvmi_vcpu_get_registers()` of "VM introspection" v9. The same numbers as
`regs.get_regs()` and `regs.get_sregs()`, without an object per field, because every event has all of them.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import TYPE_CHECKING

from softkvm.kvm import regs
from softkvm.silicon import control
from softkvm.uapi.layout import offset_of

if TYPE_CHECKING:
    from softkvm.kvm.vcpu import Vcpu

_OFFSET = offset_of(control.ControlBlock, "state")
_GENERAL, _REGISTERS = struct.Struct("<8Q"), 18 * 8
"""RAX to RDI, which `kvm_regs` has in another order; with R8 to R15, RIP and RFLAGS behind them they are the beginning of the state."""
_SEGMENT, _TABLE = struct.Struct("<HHIIIQ"), struct.Struct("<QII")
_ES, _CS, _SS, _DS, _FS, _GS, _LDTR, _TR = range(8)
_SEGMENTS = slice(_REGISTERS, _REGISTERS + 8 * _SEGMENT.size + 2 * _TABLE.size)
"""Segments, GDTR, IDTR."""
_CONTROL = struct.Struct("<18Q")
"""CR0, CR2, CR3, CR4, CR8, XCR0, XSS, EFER; STAR, LSTAR, CSTAR, FMASK, KERNEL_GS_BASE, the three of SYSENTER, TSC_AUX, PAT."""
_CR8, _EFER = 4, 7
_STATE = slice(_OFFSET, _OFFSET + _SEGMENTS.stop + _CONTROL.size)

_KVM_SEGMENT = struct.Struct("<QIH")
_KVM_TABLES = struct.Struct("<QH6xQH6x")
_KVM_CONTROL = struct.Struct("<7Q4Q")
_MSRS = struct.Struct("<9Q")
_PREFIX = struct.Struct("<Q")

MODE_16, MODE_32, MODE_64 = 2, 4, 8
_LONG, _DB = 1 << 13, 1 << 14


def _attributes(rights: int) -> bytes:
    """Type, present, DPL, D/B, S, L, G, AVL, unusable and padding of `struct kvm_segment`."""
    unusable = rights >> 16 & 1
    flags = (rights & 15, rights >> 7 & 1 & ~unusable, rights >> 5 & 3, rights >> 14 & 1, rights >> 4 & 1, rights >> 13 & 1)
    return bytes((*flags, rights >> 15 & 1, rights >> 12 & 1, unusable, 0))


@lru_cache(maxsize=1024)
def _segments(raw: bytes) -> tuple[bytes, int, int]:
    """Segments and tables as `kvm_sregs` has them, and the mode outside and inside of long mode; a guest has few different ones."""
    values = [_SEGMENT.unpack_from(raw, number * _SEGMENT.size) for number in range(8)]
    packed = [
        _KVM_SEGMENT.pack(base, limit, selector) + _attributes(rights & 0x1_F0FF)
        for selector, _, rights, limit, _, base in (values[number] for number in (_CS, _DS, _ES, _FS, _GS, _SS, _TR, _LDTR))
    ]
    gdt, idt = (_TABLE.unpack_from(raw, 8 * _SEGMENT.size + at) for at in (0, _TABLE.size))
    tables = _KVM_TABLES.pack(gdt[0], gdt[1] & 0xFFFF, idt[0], idt[1] & 0xFFFF)
    code = values[_CS][2]
    short = MODE_32 if code & _DB else MODE_16
    return b"".join((*packed, tables)), short, MODE_64 if code & _LONG else short


def _parts(vcpu: Vcpu) -> tuple[int, bytes, tuple[int, ...]]:
    """Mode, `kvm_regs` with `kvm_sregs`, and CR0 to PAT."""
    raw = bytes(vcpu.hardware_view[_STATE])
    rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi = _GENERAL.unpack_from(raw)
    segments, short, long = _segments(raw[_SEGMENTS])
    values = _CONTROL.unpack_from(raw, _SEGMENTS.stop)
    queue = vcpu.events
    vector = queue.interrupt_nr if queue.interrupt_injected and not queue.interrupt_soft else vcpu.userspace_irq
    bitmap = [0] * 4
    if vector >= 0:
        bitmap[vector >> 6] = 1 << (vector & 63)
    efer = values[_EFER]
    control = _KVM_CONTROL.pack(*values[:_CR8], regs.get_cr8(vcpu), efer, vcpu.apic_base, *bitmap)
    general = _GENERAL.pack(rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp) + raw[_GENERAL.size : _REGISTERS]
    return long if efer & regs.EFER_LMA else short, general + segments + control, values


def event(vcpu: Vcpu) -> bytes:
    """`kvmi.EventArch`."""
    mode, registers, values = _parts(vcpu)
    efer, star, lstar, cstar, _, kernel_gs, cs, esp, eip, _, pat = values[_EFER:]
    return _PREFIX.pack(mode) + registers + _MSRS.pack(cs, esp, eip, efer, star, lstar, cstar, pat, kernel_gs)


def registers(vcpu: Vcpu) -> bytes:
    """`kvmi.GetRegistersReply` up to the MSRs."""
    mode, parts, _ = _parts(vcpu)
    return _PREFIX.pack(mode) + parts
