"""Commands about one vCPU, done by its own thread, or in its place while it is not in KVM_RUN.

Answers to `arch/x86/kvm/kvmi{,_msg}.c` of "VM introspection" v9, patches 51, 55-58, 64, 66, 69-72, 75, 80 and 82. Each takes the vCPU's
introspection, the parsed request, and what trails it; it returns the reply's data or raises Refused.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from softkvm.kvm import events, fpu, msr, mtrr
from softkvm.kvm.introspection import arch, intercepts
from softkvm.kvm.introspection.failures import Broken, Refused
from softkvm.uapi import kvm as uapi
from softkvm.uapi import kvmi
from softkvm.uapi.kvmi import Command, Error, Event

if TYPE_CHECKING:
    from softkvm.kvm.introspection.vcpu import VcpuIntrospection

_CONTROL_REGISTERS = frozenset({0, 3, 4})
_LAST_EXCEPTION = 31
_XSAVE_SIZE = ctypes.sizeof(uapi.Xsave)


def get_info(introspection: VcpuIntrospection, request: None, trailing: bytes) -> bytes:
    """VCPU_GET_INFO."""
    return bytes(kvmi.VcpuGetInfoReply(tsc_speed=introspection.vcpu.tsc.khz * 1000))


def control_events(introspection: VcpuIntrospection, request: kvmi.ControlEvents, trailing: bytes) -> bytes:
    """VCPU_CONTROL_EVENTS: EINVAL for what is no event of a vCPU, EPERM disallowed, EBUSY as `intercepts.control_event()`."""
    event = introspection.session.dialect.event_by_id.get(request.event_id)
    if request.enable > 1 or event is None or event in kvmi.VM_EVENTS:
        raise Refused(Error.EINVAL)
    if event not in introspection.session.allowed_events:
        raise Refused(Error.EPERM)
    intercepts.control_event(introspection, event, bool(request.enable))
    return b""


def get_registers(introspection: VcpuIntrospection, request: kvmi.GetRegisters, trailing: bytes) -> bytes:
    """VCPU_GET_REGISTERS: EINVAL for an MSR that cannot be read, or more than a message holds; Broken if the indices are not there."""
    count, vcpu = request.nmsrs, introspection.vcpu
    if len(trailing) < count * 4:
        raise Broken(f"VCPU_GET_REGISTERS of {count} MSRs has {len(trailing)} bytes of them")
    entry = ctypes.sizeof(uapi.MsrEntry)
    if ctypes.sizeof(kvmi.ErrorCode) + ctypes.sizeof(kvmi.GetRegistersReply) + count * entry > kvmi.MAX_MESSAGE:
        raise Refused(Error.EINVAL)
    parts = [arch.registers(vcpu), struct.pack("<II", count, 0)]
    try:
        parts += [struct.pack("<IIQ", index, 0, msr.get(vcpu, index, True)) for index in struct.unpack_from(f"<{count}I", trailing)]
    except msr.MsrError:
        raise Refused(Error.EINVAL) from None
    return b"".join(parts)


def set_registers(introspection: VcpuIntrospection, request: kvmi.SetRegisters, trailing: bytes) -> bytes:
    """VCPU_SET_REGISTERS: for when the answer to the event is there; EOPNOTSUPP if none is awaited."""
    if introspection.waiting is None:
        raise Refused(Error.EOPNOTSUPP)
    introspection.registers = uapi.Regs.from_buffer_copy(request.regs)
    return b""


def get_cpuid(introspection: VcpuIntrospection, request: kvmi.GetCpuid, trailing: bytes) -> bytes:
    """VCPU_GET_CPUID: ENOENT if the guest has no such leaf."""
    found = introspection.vcpu.cpuid.lookup(request.function, request.index)
    if found is None:
        raise Refused(Error.ENOENT)
    return struct.pack("<4I", *found)


def control_cr(introspection: VcpuIntrospection, request: Any, trailing: bytes) -> bytes:
    """VCPU_CONTROL_CR: EINVAL for a register but CR0, CR3 and CR4."""
    if request.enable > 1 or request.cr not in _CONTROL_REGISTERS:
        raise Refused(Error.EINVAL)
    intercepts.control_cr(introspection, request.cr, bool(request.enable))
    return b""


def inject_exception(introspection: VcpuIntrospection, request: kvmi.InjectException, trailing: bytes) -> bytes:
    """VCPU_INJECT_EXCEPTION: EPERM if TRAP events are disallowed, EBUSY until the last one has been told.

    v9 takes any vector, and the entry then fails: EINVAL for what is no exception.
    """
    if Event.TRAP not in introspection.session.allowed_events:
        raise Refused(Error.EPERM)
    if request.nr > _LAST_EXCEPTION or request.nr == events.NMI:
        raise Refused(Error.EINVAL)
    if introspection.exception is not None or introspection.trap_pending:
        raise Refused(Error.EBUSY)
    introspection.want_exception(request)
    return b""


def get_xcr(introspection: VcpuIntrospection, request: kvmi.GetXcr, trailing: bytes) -> bytes:
    """VCPU_GET_XCR: XCR0, EINVAL for any other."""
    if request.xcr:
        raise Refused(Error.EINVAL)
    return bytes(kvmi.GetXcrReply(value=introspection.vcpu.state.xcr0))


def get_xsave(introspection: VcpuIntrospection, request: None, trailing: bytes) -> bytes:
    """VCPU_GET_XSAVE."""
    return bytes(fpu.get_xsave(introspection.vcpu))


def set_xsave(introspection: VcpuIntrospection, request: None, trailing: bytes) -> bytes:
    """VCPU_SET_XSAVE: EINVAL for what is too large, or what XRSTOR would refuse."""
    if len(trailing) > _XSAVE_SIZE:
        raise Refused(Error.EINVAL)
    try:
        fpu.set_xsave(introspection.vcpu, uapi.Xsave.from_buffer_copy(trailing.ljust(_XSAVE_SIZE, b"\0")))
    except OSError:
        raise Refused(Error.EINVAL) from None
    return b""


def get_mtrr_type(introspection: VcpuIntrospection, request: kvmi.GetMtrrType, trailing: bytes) -> bytes:
    """VCPU_GET_MTRR_TYPE."""
    vcpu = introspection.vcpu
    kind = mtrr.memory_type(lambda index: msr.get(vcpu, index, True), request.gpa, vcpu.cpuid.physical_address_bits)
    return bytes(kvmi.GetMtrrTypeReply(type=kind))


def control_msr(introspection: VcpuIntrospection, request: kvmi.ControlMsr, trailing: bytes) -> bytes:
    """VCPU_CONTROL_MSR: EINVAL for an MSR outside of the bitmaps' ranges."""
    if request.enable > 1 or not (request.msr < 0x2000 or 0xC000_0000 <= request.msr < 0xC000_2000):
        raise Refused(Error.EINVAL)
    intercepts.control_msr(introspection, request.msr, bool(request.enable))
    return b""


def control_singlestep(introspection: VcpuIntrospection, request: kvmi.ControlSinglestep, trailing: bytes) -> bytes:
    """VCPU_CONTROL_SINGLESTEP: EPERM if SINGLESTEP events are disallowed."""
    if Event.SINGLESTEP not in introspection.session.allowed_events:
        raise Refused(Error.EPERM)
    if request.enable > 1:
        raise Refused(Error.EINVAL)
    introspection.set_singlestep(bool(request.enable))
    return b""


def translate_gva(introspection: VcpuIntrospection, request: kvmi.TranslateGva, trailing: bytes) -> bytes:
    """VCPU_TRANSLATE_GVA: by the vCPU's paging as it is now."""
    vcpu = introspection.vcpu
    vcpu.load()
    gpa = vcpu.translate_gva(request.gva, 0)
    return bytes(kvmi.TranslateGvaReply(gpa=kvmi.INVALID_GPA if gpa is None else gpa))


Handler = Callable[["VcpuIntrospection", Any, bytes], bytes]

COMMANDS: Mapping[Command, Handler] = {
    Command.VCPU_GET_INFO: get_info,
    Command.VCPU_CONTROL_EVENTS: control_events,
    Command.VCPU_GET_REGISTERS: get_registers,
    Command.VCPU_SET_REGISTERS: set_registers,
    Command.VCPU_GET_CPUID: get_cpuid,
    Command.VCPU_CONTROL_CR: control_cr,
    Command.VCPU_INJECT_EXCEPTION: inject_exception,
    Command.VCPU_GET_XCR: get_xcr,
    Command.VCPU_GET_XSAVE: get_xsave,
    Command.VCPU_SET_XSAVE: set_xsave,
    Command.VCPU_GET_MTRR_TYPE: get_mtrr_type,
    Command.VCPU_CONTROL_MSR: control_msr,
    Command.VCPU_CONTROL_SINGLESTEP: control_singlestep,
    Command.VCPU_TRANSLATE_GVA: translate_gva,
}
