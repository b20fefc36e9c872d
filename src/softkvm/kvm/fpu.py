"""FPU and vector state for user space: `State.fpu` to and from `kvm_fpu` and the XSAVE area of KVM_{GET,SET}_XSAVE.

Answers to SDM vol. 1, 13.4 (the standard format), table 10-2 (the FXSAVE area), and Linux 6.1 `arch/x86/kernel/fpu/xstate.c`. The silicon
keeps x87 registers by physical number; both user formats have them in stack order.
"""

from __future__ import annotations

import ctypes
import errno
import struct
from typing import TYPE_CHECKING

from softkvm.kvm.cpuid_policy import OFFERED_XCR0
from softkvm.uapi.kvm import Fpu, Xsave

if TYPE_CHECKING:
    from softkvm.kvm.types import Model, Vcpu
    from softkvm.silicon.control import Fpu as Registers

FP, SSE, YMM, OPMASK, ZMM_HI256, HI16_ZMM, PKRU = 0, 1, 2, 5, 6, 7, 9
"""State components: bits of XCR0 and of XSTATE_BV."""
MXCSR_DEFAULT, MXCSR_MASK = 0x1F80, 0xFFFF
FCW_DEFAULT = 0x37F

_LEGACY = struct.Struct("<HHBxHQQII")  # fcw, fsw, ftw, fop, fip, fdp, mxcsr, mxcsr_mask
_ST, _XMM = 32, 160
_LEGACY_USED = 416
_HEADER = 512
_HEADER_RESERVED = slice(_HEADER + 8, 576)  # XCOMP_BV, 0 in the standard format, and reserved bytes
_XSTATE_LEAF = 0xD
_VECTOR_BYTES = 64


def get_fpu(vcpu: Vcpu) -> Fpu:
    """KVM_GET_FPU."""
    fpu = vcpu.state.fpu
    result = Fpu(fcw=fpu.fcw, fsw=fpu.fsw, ftwx=fpu.ftw, last_opcode=fpu.fop, last_ip=fpu.fip, last_dp=fpu.fdp, mxcsr=fpu.mxcsr)
    _store(result.fpr, _stack_order(fpu))
    vectors = bytes(fpu.vector)
    _store(result.xmm, _lanes(vectors, range(16), 0, 16))
    return result


def set_fpu(vcpu: Vcpu, value: Fpu) -> None:
    """KVM_SET_FPU; MXCSR bits that do not exist are dropped."""
    fpu = vcpu.state.fpu
    fpu.fcw, fpu.fsw, fpu.ftw, fpu.fop = value.fcw, value.fsw, value.ftwx, value.last_opcode
    fpu.fip, fpu.fdp, fpu.mxcsr = value.last_ip, value.last_dp, value.mxcsr & MXCSR_MASK
    _load_stack(fpu, bytes(value.fpr))
    _load_lanes(fpu, range(16), 0, bytes(value.xmm))


def get_xsave(vcpu: Vcpu) -> Xsave:
    """KVM_GET_XSAVE: the standard format; components in their initial state are zeros, and XSTATE_BV does not name them."""
    fpu, area = vcpu.state.fpu, bytearray(ctypes.sizeof(Xsave))
    _LEGACY.pack_into(area, 0, fpu.fcw, fpu.fsw, fpu.ftw, fpu.fop, fpu.fip, fpu.fdp, fpu.mxcsr, MXCSR_MASK)
    vectors = bytes(fpu.vector)
    area[_ST:_XMM] = _stack_order(fpu)
    area[_XMM:_LEGACY_USED] = _lanes(vectors, range(16), 0, 16)
    features = 1 << FP | 1 << SSE
    for component, data in _extended(fpu, vectors).items():
        place = _place(vcpu, component)
        if place is not None and any(data):
            area[place] = data
            features |= 1 << component
    struct.pack_into("<Q", area, _HEADER, features)
    return Xsave.from_buffer(area)


def set_xsave(vcpu: Vcpu, value: Xsave) -> None:
    """KVM_SET_XSAVE; OSError(EINVAL) for components that do not exist, a compacted area, reserved bits, or a bad MXCSR."""
    area, fpu = bytes(value), vcpu.state.fpu
    fcw, fsw, ftw, fop, fip, fdp, mxcsr, _mask = _LEGACY.unpack_from(area)
    (features,) = struct.unpack_from("<Q", area, _HEADER)
    if features & ~supported_features(vcpu) or any(area[_HEADER_RESERVED]) or mxcsr & ~MXCSR_MASK:
        raise OSError(errno.EINVAL, "not an XSAVE area of this CPU")
    ctypes.memset(ctypes.addressof(fpu), 0, ctypes.sizeof(fpu))
    fpu.fcw, fpu.mxcsr = FCW_DEFAULT, MXCSR_DEFAULT
    if features & 1 << FP:
        fpu.fcw, fpu.fsw, fpu.ftw, fpu.fop, fpu.fip, fpu.fdp = fcw, fsw, ftw, fop, fip, fdp
        _load_stack(fpu, area[_ST:_XMM])
    if features & (1 << SSE | 1 << YMM):
        fpu.mxcsr = mxcsr
    if features & 1 << SSE:
        _load_lanes(fpu, range(16), 0, area[_XMM:_LEGACY_USED])
    for component in (YMM, OPMASK, ZMM_HI256, HI16_ZMM, PKRU):
        place = _place(vcpu, component) if features >> component & 1 else None
        if place is not None:
            _load_extended(fpu, component, area[place])


def supported_features(vcpu: Vcpu) -> int:
    """The state components of the silicon that KVM saves and restores."""
    return offered_features(vcpu.model)


def offered_features(model: Model) -> int:
    """The same of a model: the XCR0 bits that a guest may have."""
    low, _, _, high = model.cpuid(_XSTATE_LEAF, 0)
    return (low | high << 32) & OFFERED_XCR0 | 1 << FP | 1 << SSE


def _place(vcpu: Vcpu, component: int) -> slice | None:
    """Where the silicon has a component in the standard format; None if it does not have it."""
    if not supported_features(vcpu) >> component & 1:
        return None
    size, offset, _, _ = vcpu.model.cpuid(_XSTATE_LEAF, component)
    return slice(offset, offset + size)


def _stack_order(fpu: Registers) -> bytes:
    top, registers = fpu.fsw >> 11 & 7, bytes(fpu.st)
    return registers[16 * top :] + registers[: 16 * top]


def _load_stack(fpu: Registers, stack: bytes) -> None:
    top = fpu.fsw >> 11 & 7
    split = 128 - 16 * top
    _store(fpu.st, stack[split:] + stack[:split])


def _lanes(vectors: bytes, registers: range, start: int, size: int) -> bytes:
    """Bytes `start` .. `start + size` of each of `registers`, one after the other."""
    return b"".join(vectors[_VECTOR_BYTES * number + start :][:size] for number in registers)


def _load_lanes(fpu: Registers, registers: range, start: int, data: bytes) -> None:
    size, vectors = len(data) // len(registers), bytearray(fpu.vector)
    for position, number in enumerate(registers):
        place = _VECTOR_BYTES * number + start
        vectors[place : place + size] = data[position * size :][:size]
    _store(fpu.vector, vectors)


def _extended(fpu: Registers, vectors: bytes) -> dict[int, bytes]:
    """Every component beyond the legacy area."""
    return {
        YMM: _lanes(vectors, range(16), 16, 16),
        OPMASK: bytes(fpu.mask),
        ZMM_HI256: _lanes(vectors, range(16), 32, 32),
        HI16_ZMM: _lanes(vectors, range(16, 32), 0, 64),
        PKRU: fpu.pkru.to_bytes(8, "little"),
    }


def _load_extended(fpu: Registers, component: int, data: bytes) -> None:
    if component == YMM:
        _load_lanes(fpu, range(16), 16, data)
    elif component == OPMASK:
        _store(fpu.mask, data)
    elif component == ZMM_HI256:
        _load_lanes(fpu, range(16), 32, data)
    elif component == HI16_ZMM:
        _load_lanes(fpu, range(16, 32), 0, data)
    else:
        fpu.pkru = int.from_bytes(data[:4], "little")


def _store(array: ctypes.Array[ctypes.Array[ctypes.c_uint8]] | ctypes.Array[ctypes.c_uint64], data: bytes | bytearray) -> None:
    """Fill a ctypes array of exactly `len(data)` bytes."""
    if ctypes.sizeof(array) != len(data):
        raise ValueError(f"{len(data)} bytes do not fill {ctypes.sizeof(array)}")
    ctypes.memmove(array, bytes(data), len(data))
