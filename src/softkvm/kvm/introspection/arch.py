"""A vCPU's registers as KVMI events and replies carry them, taken out of the control block in one piece.

Answers to `kvmi_arch_setup_vcpu_event()` and `kvmi_vcpu_get_registers()` of "VM introspection" v9. The same numbers as
`regs.get_regs()` and `regs.get_sregs()`, without an object per field, because every event has all of them.
"""

from __future__ import annotations

import struct
from functools import cache
from typing import TYPE_CHECKING

from softkvm.kvm import regs
from softkvm.silicon import control
from softkvm.uapi.layout import offset_of

if TYPE_CHECKING:
    from softkvm.kvm.vcpu import Vcpu

_STATE = struct.Struct("<16Q 2Q" + "HHIIIQ" * 8 + "QII" * 2 + "18Q")
"""GPRs, RIP, RFLAGS; segments; GDTR, IDTR; from CR0 to PAT: the beginning of `silicon.control.State`."""
_STATE_OFFSET = offset_of(control.ControlBlock, "state")
_ES, _CS, _SS, _DS, _FS, _GS, _LDTR, _TR = (18 + 6 * number for number in range(8))
_GDTR = 18 + 6 * 8
_IDTR = _GDTR + 3
_CR0 = _IDTR + 3
_CR2, _CR3, _CR4, _XCR0, _XSS, _EFER = (_CR0 + n for n in (1, 2, 3, 5, 6, 7))
_STAR, _LSTAR, _CSTAR, _FMASK, _KERNEL_GS, _SYSENTER_CS, _SYSENTER_ESP, _SYSENTER_EIP, _TSC_AUX, _PAT = (_EFER + 1 + n for n in range(10))

_REGS = struct.Struct("<18Q")
_SEGMENT = struct.Struct("<QIH")
_TABLES = struct.Struct("<QH6x QH6x 7Q 4Q")
_MSRS = struct.Struct("<9Q")
_PREFIX = struct.Struct("<Q")

MODE_16, MODE_32, MODE_64 = 2, 4, 8
_LONG, _DB, _UNUSABLE = 1 << 13, 1 << 14, 1 << 16


@cache
def _attributes(rights: int) -> bytes:
    """Type, present, DPL, D/B, S, L, G, AVL, unusable and padding of `struct kvm_segment`."""
    unusable = rights >> 16 & 1
    flags = (rights & 15, rights >> 7 & 1 & ~unusable, rights >> 5 & 3, rights >> 14 & 1, rights >> 4 & 1, rights >> 13 & 1)
    return bytes((*flags, rights >> 15 & 1, rights >> 12 & 1, unusable, 0))


def _segment(values: tuple[int, ...], at: int) -> bytes:
    return _SEGMENT.pack(values[at + 5], values[at + 3], values[at]) + _attributes(values[at + 2] & 0x1_F0FF)


def _mode(values: tuple[int, ...]) -> int:
    code = values[_CS + 2]
    if values[_EFER] & regs.EFER_LMA and code & _LONG:
        return MODE_64
    return MODE_32 if code & _DB else MODE_16


def _parts(vcpu: Vcpu) -> tuple[int, bytes, tuple[int, ...]]:
    """Mode, `kvm_regs` with `kvm_sregs`, and all values."""
    values = _STATE.unpack_from(vcpu.hardware_view, _STATE_OFFSET)
    rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi = values[:8]
    general = _REGS.pack(rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, *values[8:18])
    segments = b"".join([_segment(values, at) for at in (_CS, _DS, _ES, _FS, _GS, _SS, _TR, _LDTR)])
    queue = vcpu.events
    vector = queue.interrupt_nr if queue.interrupt_injected and not queue.interrupt_soft else vcpu.userspace_irq
    bitmap = [0] * 4
    if vector >= 0:
        bitmap[vector >> 6] = 1 << (vector & 63)
    tables = _TABLES.pack(
        values[_GDTR],
        values[_GDTR + 1] & 0xFFFF,
        values[_IDTR],
        values[_IDTR + 1] & 0xFFFF,
        values[_CR0],
        values[_CR2],
        values[_CR3],
        values[_CR4],
        regs.get_cr8(vcpu),
        values[_EFER],
        vcpu.apic_base,
        *bitmap,
    )
    return _mode(values), general + segments + tables, values


def event(vcpu: Vcpu) -> bytes:
    """`kvmi.EventArch`."""
    mode, registers, values = _parts(vcpu)
    msrs = (_SYSENTER_CS, _SYSENTER_ESP, _SYSENTER_EIP, _EFER, _STAR, _LSTAR, _CSTAR, _PAT, _KERNEL_GS)
    return _PREFIX.pack(mode) + registers + _MSRS.pack(*[values[at] for at in msrs])


def registers(vcpu: Vcpu) -> bytes:
    """`kvmi.GetRegistersReply` up to the MSRs."""
    mode, parts, _ = _parts(vcpu)
    return _PREFIX.pack(mode) + parts
