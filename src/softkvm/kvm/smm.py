"""System management mode: SMI, the state save area in SMRAM, and RSM.

Answers to APM vol. 2, ch. 10 (table 10-1: the AMD64 save area, which KVM uses for both vendors; table 10-2: the legacy one), and to
`enter_smm()` and `em_rsm()` of Linux 6.1 `arch/x86/kvm/{x86,emulate}.c`. A vCPU in SMM has memory of its own, the second address space of
the VM, where user space lets SMRAM show. Silicon knows nothing of all this: RSM is #UD for it, which KVM intercepts.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from softkvm.host import trace
from softkvm.kvm import cpuid, events, regs
from softkvm.kvm.msr_index import SMI_COUNT
from softkvm.kvm.request import REQ_EVENT, REQ_TRIPLE_FAULT
from softkvm.silicon.control import SegmentRegister

if TYPE_CHECKING:
    from softkvm.kvm.vcpu import Vcpu
    from softkvm.silicon.control import Segment

DEFAULT_BASE = 0x3_0000
RSM = b"\x0f\xaa"
_ENTRY = 0x8000
_AREA, _AREA_SIZE = 0xFE00, 512
"""The save area, from SMBASE."""
_BASE_OF_OFFSETS = 0x7E00
"""What the tables of the manual count from."""
_REVISION_64, _REVISION_32 = 0x2_0064, 0x2_0000
_FLAT_RIGHTS = 0x93 | 1 << 15
_CR0_CLEARED = 1 << 0 | 1 << 2 | 1 << 3 | 1 << 31
"""PE, EM, TS, PG."""
_U16, _U32, _U64 = struct.Struct("<H"), struct.Struct("<I"), struct.Struct("<Q")

_TOP_64, _TOP_32 = 0x7FF8, 0x7FD0
_REGISTERS_64 = {"rip": 0x7F78, "dr6": 0x7F68, "dr7": 0x7F60, "cr0": 0x7F58, "cr3": 0x7F50, "cr4": 0x7F48, "efer": 0x7ED0}
_REGISTERS_32 = {"cr0": 0x7FFC, "cr3": 0x7FF8, "rip": 0x7FF0, "dr6": 0x7FCC, "dr7": 0x7FC8, "cr4": 0x7F14}
_RFLAGS_64, _RFLAGS_32 = 0x7F70, 0x7FF4
_SMBASE_64, _SMBASE_32, _REVISION = 0x7F00, 0x7EF8, 0x7EFC
_SEGMENTS_64 = {**{index: 0x7E00 + 16 * index for index in range(6)}, SegmentRegister.LDTR: 0x7E70, SegmentRegister.TR: 0x7E90}
_TABLES_64 = {"gdtr": (0x7E64, 0x7E68), "idtr": (0x7E84, 0x7E88)}
_TABLES_32 = {"gdtr": (0x7F70, 0x7F74), "idtr": (0x7F54, 0x7F58)}
_SEGMENTS_32 = {
    **{index: (0x7FA8 + 4 * index, 0x7F84 + 12 * index) for index in range(3)},
    **{index: (0x7FA8 + 4 * index, 0x7F2C + 12 * (index - 3)) for index in range(3, 6)},
    SegmentRegister.LDTR: (0x7FC0, 0x7F78),
    SegmentRegister.TR: (0x7FC4, 0x7F5C),
}
"""Where the selector is, and attributes, limit and base."""


class SmmState:
    """What a vCPU has of SMM besides its registers."""

    def __init__(self) -> None:
        """After RESET."""
        self.active = False
        self.pending = False
        self.inside_nmi = False
        """NMIs were blocked when the SMI came, and stay so behind RSM."""
        self.base = DEFAULT_BASE


def inject(vcpu: Vcpu) -> bool:
    """Enter SMM if an SMI waits and the vCPU is not there already; whether it did."""
    smm = vcpu.smm
    if not smm.pending or smm.active:
        return False
    smm.pending = False
    vcpu.msrs.values[SMI_COUNT] = vcpu.msrs.values.get(SMI_COUNT, 0) + 1
    _enter(vcpu)
    return True


def changed(vcpu: Vcpu, active: bool) -> None:
    """`kvm_smm_changed()`: the other address space counts."""
    vcpu.smm.active = active
    if trace.kvm_smm_transition.enabled:
        trace.kvm_smm_transition(vcpu.vcpu_id, vcpu.smm.base, active)
    if not active:
        vcpu.smm.inside_nmi = False
        vcpu.make_request(REQ_EVENT)
    vcpu.use_memory(vcpu.vm.smm_mmu if active else vcpu.vm.mmu)


def _enter(vcpu: Vcpu) -> None:
    state, smm = vcpu.state, vcpu.smm
    area = bytearray(_AREA_SIZE)
    if vcpu.cpuid.has(cpuid.LM):
        _save_64(vcpu, area)
    else:
        _save_32(vcpu, area)
    changed(vcpu, True)
    try:
        vcpu.mmu.write(smm.base + _AREA, bytes(area))
    except OSError:  # no SMRAM: the handler will find what there is
        vcpu.stats["smram_missing"] += 1
    if state.interruptibility & events.BLOCKED_BY_NMI:
        smm.inside_nmi = True
    state.interruptibility = events.BLOCKED_BY_NMI
    state.rflags, state.rip = regs.RFLAGS_FIXED, _ENTRY
    state.cr0 &= ~_CR0_CLEARED
    state.cr4 = state.efer = 0
    state.idtr.base = state.idtr.limit = 0
    vcpu.debug_registers.dr7 = 1 << 10
    for index in range(6):
        segment = state.segments[index]
        segment.selector, segment.base = (smm.base >> 4 & 0xFFFF, smm.base) if index == regs.CS else (0, 0)
        segment.limit, segment.access_rights = 0xFFFF_FFFF, _FLAT_RIGHTS
    regs.control_registers_changed(vcpu)


def leave(vcpu: Vcpu) -> int:
    """RSM in SMM, as an exit handler: back to where the save area says; a state that no CPU can be in shuts the vCPU down."""
    smm, state = vcpu.smm, vcpu.state
    try:
        area = vcpu.mmu.read(smm.base + _AREA, _AREA_SIZE)
    except OSError:
        vcpu.make_request(REQ_TRIPLE_FAULT)
        return 1
    if not smm.inside_nmi:
        state.interruptibility &= ~events.BLOCKED_BY_NMI
    changed(vcpu, False)
    restored = _load_64(vcpu, area) if vcpu.cpuid.has(cpuid.LM) else _load_32(vcpu, area)
    if not restored:
        vcpu.make_request(REQ_TRIPLE_FAULT)
        return 1
    vcpu.instructions_skipped += 1
    regs.control_registers_changed(vcpu)
    return 1


def _put(area: bytearray, kind: struct.Struct, offset: int, value: int) -> None:
    kind.pack_into(area, offset - _BASE_OF_OFFSETS, value & (1 << 8 * kind.size) - 1)


def _get(area: bytes, kind: struct.Struct, offset: int) -> int:
    (value,) = kind.unpack_from(area, offset - _BASE_OF_OFFSETS)
    return int(value)


def _attributes(segment: Segment) -> int:
    """As bits 8 to 23 of a descriptor's upper half; what is unusable is not present."""
    rights: int = segment.access_rights & 0xF0FF
    return rights & ~0x80 if segment.access_rights >> 16 & 1 else rights


def _set_segment(segment: Segment, selector: int, attributes: int, limit: int, base: int) -> None:
    segment.selector, segment.limit, segment.base = selector, limit, base
    segment.access_rights = attributes & 0xF0FF | (0 if attributes & 0x80 else 1 << 16)


# --- The AMD64 save area -----------------------------------------------------------------------------------------------------------


def _save_64(vcpu: Vcpu, area: bytearray) -> None:
    state = vcpu.state
    for number in range(16):
        _put(area, _U64, _TOP_64 - 8 * number, state.gpr[number])
    for name, offset in _REGISTERS_64.items():
        _put(area, _U64, offset, _register(vcpu, name))
    _put(area, _U32, _RFLAGS_64, state.rflags)
    _put(area, _U32, _SMBASE_64, vcpu.smm.base)
    _put(area, _U32, _REVISION, _REVISION_64)
    for index, offset in _SEGMENTS_64.items():
        segment = state.segments[index]
        _put(area, _U16, offset, segment.selector)
        _put(area, _U16, offset + 2, _attributes(segment))
        _put(area, _U32, offset + 4, segment.limit)
        _put(area, _U64, offset + 8, segment.base)
    for name, (limit, base) in _TABLES_64.items():
        _put(area, _U32, limit, getattr(state, name).limit)
        _put(area, _U64, base, getattr(state, name).base)


def _load_64(vcpu: Vcpu, area: bytes) -> bool:
    state = vcpu.state
    values = {name: _get(area, _U64, offset) for name, offset in _REGISTERS_64.items()}
    values["efer"] &= ~regs.EFER_LMA
    for number in range(16):
        state.gpr[number] = _get(area, _U64, _TOP_64 - 8 * number)
    for index, offset in _SEGMENTS_64.items():
        attributes = _get(area, _U16, offset + 2)
        _set_segment(
            state.segments[index], _get(area, _U16, offset), attributes, _get(area, _U32, offset + 4), _get(area, _U64, offset + 8)
        )
    for name, (limit, base) in _TABLES_64.items():
        table = getattr(state, name)
        table.limit, table.base = _get(area, _U32, limit) & 0xFFFF, _get(area, _U64, base)
    vcpu.smm.base = _get(area, _U32, _SMBASE_64)
    return _load_registers(vcpu, values, _get(area, _U32, _RFLAGS_64))


# --- The legacy one ----------------------------------------------------------------------------------------------------------------


def _save_32(vcpu: Vcpu, area: bytearray) -> None:
    state = vcpu.state
    for number in range(8):
        _put(area, _U32, _TOP_32 + 4 * number, state.gpr[number])
    for name, offset in _REGISTERS_32.items():
        _put(area, _U32, offset, _register(vcpu, name))
    _put(area, _U32, _RFLAGS_32, state.rflags)
    _put(area, _U32, _SMBASE_32, vcpu.smm.base)
    _put(area, _U32, _REVISION, _REVISION_32)
    for index, (selector, rest) in _SEGMENTS_32.items():
        segment = state.segments[index]
        _put(area, _U32, selector, segment.selector)
        for position, value in enumerate((_attributes(segment) << 8, segment.limit, segment.base)):
            _put(area, _U32, rest + 4 * position, value)
    for name, (limit, base) in _TABLES_32.items():
        _put(area, _U32, limit, getattr(state, name).limit)
        _put(area, _U32, base, getattr(state, name).base)


def _load_32(vcpu: Vcpu, area: bytes) -> bool:
    state = vcpu.state
    values = {name: _get(area, _U32, offset) for name, offset in _REGISTERS_32.items()}
    for number in range(8):
        state.gpr[number] = _get(area, _U32, _TOP_32 + 4 * number)
    for index, (selector, rest) in _SEGMENTS_32.items():
        attributes, limit, base = (_get(area, _U32, rest + 4 * position) for position in range(3))
        _set_segment(state.segments[index], _get(area, _U32, selector) & 0xFFFF, attributes >> 8, limit, base)
    for name, (limit, base) in _TABLES_32.items():
        table = getattr(state, name)
        table.limit, table.base = _get(area, _U32, limit) & 0xFFFF, _get(area, _U32, base)
    vcpu.smm.base = _get(area, _U32, _SMBASE_32)
    return _load_registers(vcpu, {**values, "efer": 0}, _get(area, _U32, _RFLAGS_32))


def _register(vcpu: Vcpu, name: str) -> int:
    return int(getattr(vcpu.debug_registers if name in ("dr6", "dr7") else vcpu.state, name))


def _load_registers(vcpu: Vcpu, values: dict[str, int], rflags: int) -> bool:
    """Control and debug registers; False for what no CPU can have."""
    state, own = vcpu.state, vcpu.debug_registers
    cr0, cr3, cr4, efer = values["cr0"], values["cr3"], values["cr4"], values["efer"]
    if cr0 & regs.CR0_PG and efer & regs.EFER_LME:
        efer |= regs.EFER_LMA
    if not regs.valid_control_registers(vcpu, cr0, cr3, cr4, efer) or values["dr6"] >> 32 or values["dr7"] >> 32:
        return False
    state.cr0, state.cr3, state.cr4, state.efer = cr0, cr3, cr4, efer
    own.dr6, own.dr7 = values["dr6"] | events.DR6_FIXED, values["dr7"] | 1 << 10
    state.rip, state.rflags = values["rip"], rflags | regs.RFLAGS_FIXED
    return True
