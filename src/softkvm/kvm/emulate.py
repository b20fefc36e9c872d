"""KVM's instruction emulator: one instruction of the guest, executed or stepped over by KVM where the silicon alone cannot.

Answers to Linux 6.1 `x86_emulate_instruction()`, `handle_emulation_failure()`, `complete_emulated_mmio()` and `handle_ud()`. It serves
accesses to devices and to read-only slots, string I/O, the forced emulation prefix, the other vendor's hypercall, and skips where the
silicon does not tell where an instruction ends. There is no second set of instruction semantics: the interpreter is the silicon's
`Control.emulate`, the decoder the silicon's own. What the emulator of Linux has as callbacks are exits of that run: memory that is no RAM
asks for an access (KVM gives it a list of completed ones, which starts empty and grows by one each time the instruction is restarted, until
it runs through and the guest goes on behind it); intercepts, ports and MSRs leave as those of any other instruction. `emulator_ops.py` is
what KVM's side of it does.

From its first completed access to its end an instruction is half done: its accesses are made once and must not be lost, so nothing may
come in between (`Vcpu.half_done`).
"""

from __future__ import annotations

import errno
import logging
from functools import cache
from typing import TYPE_CHECKING

from softkvm.host import trace
from softkvm.kvm import emulate_string, events, exits, hypercall, regs, smm
from softkvm.kvm import emulator_ops as ops
from softkvm.kvm.mmu import Fault
from softkvm.silicon import EMULATE_FIRST, EXIT_ACCESS, EXIT_BREAKPOINT, EXIT_EMULATED, EXIT_MONITOR_TRAP_AMD, DeviceAccess
from softkvm.uapi import kvm as uapi

if TYPE_CHECKING:
    from softkvm.kvm.vcpu import Vcpu

EMULTYPE_TRAP_UD = 1 << 1
"""The silicon has not the instruction; the other vendor's may have it, and then the guest shall not be without."""
EMULTYPE_SKIP = 1 << 2
"""Only step over the instruction: KVM has done its work."""
EMULTYPE_TRAP_UD_FORCED = 1 << 4
"""The guest asked for the emulator, by the forced emulation prefix."""
EMULTYPE_PF = 1 << 6
"""The nested page tables refused a data access of the instruction. Without any type it is a string instruction at a port."""

FORCED_EMULATION_PREFIX = b"\x0f\x0bkvm"
"""`ud2; .ascii "kvm"`."""
_PREFIXES, _REX = b"\x26\x2e\x36\x3e\x64\x65\x66\x67\xf2\xf3", bytes(range(0x40, 0x50))
_INT, _SHORT_FORMS = 0xCD, {events.BP: b"\xcc", events.OF: b"\xce"}
_U32 = 0xFFFF_FFFF
_CS_DB = 1 << 14
_RFLAGS_VM = 1 << 17

_log = logging.getLogger(__name__)
_wanted, _done = DeviceAccess.wanted, DeviceAccess.complete

ACCESS_LIMIT = 8
"""Entries of `ControlBlock.access`: the most device accesses of one instruction (a 64-byte load in 8-byte pieces)."""


def emulate_instruction(vcpu: Vcpu, emulation_type: int) -> int:
    """Emulate the instruction at RIP, or step over it (EMULTYPE_SKIP): as an exit handler."""
    vcpu.stats["insn_emulation"] += 1
    if trace.kvm_emulate_insn.enabled:
        _trace(vcpu, failed=False)
    if emulation_type & EMULTYPE_SKIP:
        return _skip(vcpu)
    if emulation_type & EMULTYPE_TRAP_UD:
        return _trap_ud(vcpu)
    if not emulation_type:
        result = emulate_string.transfer(vcpu)
        return handle_emulation_failure(vcpu, emulation_type) if result is None else result
    control = vcpu.control
    if emulation_type & EMULTYPE_PF and control.emulate:  # what the page tables refused again is a fetch, or a page table
        stop(vcpu)
        return handle_emulation_failure(vcpu, emulation_type)
    control.access_count, control.emulate = 0, EMULATE_FIRST
    return 1


def _trace(vcpu: Vcpu, failed: bool) -> None:
    """The instruction at RIP, or what can be read there."""
    state, code = vcpu.state, ops.fetch(vcpu)
    length = vcpu.model.instruction_length(code, _code_bits(vcpu)) or len(code)
    segment, flags = state.segments[regs.CS], 0
    if state.cr0 & regs.CR0_PE:
        flags = trace.INSN_CR0_PE
        if state.rflags & _RFLAGS_VM:
            flags |= trace.INSN_EFL_VM
        elif regs.is_64_bit_mode(vcpu):
            flags |= trace.INSN_CS_L
        elif segment.access_rights & _CS_DB:
            flags |= trace.INSN_CS_D
    trace.kvm_emulate_insn(state.rip, segment.base, length, flags, code, failed)


# --- Stepping over -----------------------------------------------------------------------------------------------------------------


def _skip(vcpu: Vcpu) -> int:
    """Nothing is executed and no fault reaches the guest: an instruction that cannot be read any more goes to user space."""
    length = instruction_length(vcpu)
    if length is None:
        _say_once_that_skipping_failed()
        return handle_emulation_failure(vcpu, EMULTYPE_SKIP)
    return exits.step_over(vcpu, vcpu.state.rip + length)


def instruction_length(vcpu: Vcpu) -> int | None:
    """Bytes of the instruction at RIP, which is decoded and nothing else; None if it cannot be read or is none."""
    return vcpu.model.instruction_length(ops.fetch(vcpu), _code_bits(vcpu))


def soft_event_length(vcpu: Vcpu, vector: int) -> int | None:
    """EMULTYPE_SKIP_SOFT_INT: the length of the instruction at RIP if it raises `vector` by itself (INT3, INTO, INT n), else None."""
    length = instruction_length(vcpu)
    if length is None:
        return None
    code = ops.fetch(vcpu)[:length]
    body = _opcode(vcpu, code)
    return length if body == _SHORT_FORMS.get(vector) or body == bytes((_INT, vector)) else None


def _opcode(vcpu: Vcpu, code: bytes) -> bytes:
    """An instruction's bytes without its prefixes."""
    body = code.lstrip(_PREFIXES)
    return body.lstrip(_REX) if regs.is_64_bit_mode(vcpu) else body


@cache
def _say_once_that_skipping_failed() -> None:
    """RIP stays, so the guest may come back for ever: once is enough (`pr_err_once()`)."""
    _log.error("unable to skip an instruction of the guest")


def _code_bits(vcpu: Vcpu) -> int:
    """Default operand and address size of the code segment."""
    if regs.is_64_bit_mode(vcpu):
        return 64
    state = vcpu.state
    return 32 if state.segments[regs.CS].access_rights & _CS_DB and not state.rflags & _RFLAGS_VM else 16


# --- Executing ---------------------------------------------------------------------------------------------------------------------


def handle_ud(vcpu: Vcpu) -> int:
    """An intercepted #UD: RSM, the forced emulation prefix, an instruction of the other vendor, or the guest's own."""
    code = ops.fetch(vcpu)
    if vcpu.smm.active and _opcode(vcpu, code).startswith(smm.RSM):
        return smm.leave(vcpu)
    if not (code.startswith(FORCED_EMULATION_PREFIX) and vcpu.vm.parameters.force_emulation_prefix):
        return emulate_instruction(vcpu, EMULTYPE_TRAP_UD)
    rip = vcpu.state.rip + len(FORCED_EMULATION_PREFIX)
    vcpu.state.rip = rip if regs.is_64_bit_mode(vcpu) else rip & _U32
    if ops.fetch(vcpu).startswith(FORCED_EMULATION_PREFIX):  # to the emulator its UD2 is no prefix but undefined
        events.inject_ud(vcpu)
        return 1
    return emulate_instruction(vcpu, EMULTYPE_TRAP_UD_FORCED)


def _trap_ud(vcpu: Vcpu) -> int:
    """Of what only the other vendor's silicon has, a hypercall is done; all else is undefined."""
    code = ops.fetch(vcpu)
    opcode = _opcode(vcpu, code)
    if opcode.startswith(hypercall.INSTRUCTIONS):
        return hypercall.fix(vcpu, len(code) - len(opcode), opcode)
    events.inject_ud(vcpu)
    return 1


def after_exit(vcpu: Vcpu, reason: int) -> None:
    """The guest was entered with a half done instruction: see whether it still is."""
    if reason == EXIT_ACCESS and vcpu.control.emulate:
        return
    if vcpu.exit.vectoring & events.EVENT_VALID:
        stop(vcpu)  # it ended by an exception, which KVM has now
    elif not vcpu.control.emulate:
        vcpu.half_done = False
    elif reason != vcpu.vendor.exit_memory_fault:  # which is for a page that the restarted instruction needs
        stop(vcpu)  # it has become another instruction


def stop(vcpu: Vcpu) -> None:
    """Forget the instruction."""
    vcpu.half_done = False
    vcpu.control.emulate = vcpu.control.waiver_count = 0


def handle_emulated(vcpu: Vcpu) -> int:
    """The instruction is done, and the guest stopped behind it because something waits."""
    return 1


def handle_access(vcpu: Vcpu) -> int:
    """Serve the access that the instruction waits for."""
    gpa, size, write, data = _wanted(vcpu.block_memory)
    if vcpu.control.emulate:  # else the nested page tables have said that it is a device
        fault = vcpu.mmu.fault(gpa, bool(write))
        if fault is Fault.FIXED:
            return 1
        if fault is Fault.UNMAPPED:
            stop(vcpu)
            return -errno.EFAULT
        if vcpu.half_done and vcpu.control.access_count >= ACCESS_LIMIT:
            stop(vcpu)
            return handle_emulation_failure(vcpu, EMULTYPE_PF)
    if write:
        return _write(vcpu, gpa, size, data & (1 << size * 8) - 1)
    return _read(vcpu, gpa, size)


def _read(vcpu: Vcpu, gpa: int, size: int) -> int:
    value = ops.mmio_read(vcpu, gpa, size)
    if value is not None:
        return _complete(vcpu, gpa, size, 0, value)
    return _exit(vcpu, gpa, size, 0, 0)


def _write(vcpu: Vcpu, gpa: int, size: int, value: int) -> int:
    if ops.mmio_write(vcpu, gpa, size, value):
        return _complete(vcpu, gpa, size, 1, value)
    return _exit(vcpu, gpa, size, 1, value)


def _exit(vcpu: Vcpu, gpa: int, size: int, write: int, value: int) -> int:
    vcpu.pending_io = (vcpu.state.rip, gpa, size, write, value)
    return ops.mmio_exit(vcpu, gpa, size, write, value, _complete_in_user_space)


def _complete_in_user_space(vcpu: Vcpu) -> int:
    """`complete_emulated_mmio()`; user space that moved RIP meanwhile (a reset) wants no restart."""
    rip, gpa, size, write, value = vcpu.pending_io
    if vcpu.state.rip != rip:
        stop(vcpu)
        return 1
    return _complete(vcpu, gpa, size, write, value if write else ops.mmio_data(vcpu, size))


def _complete(vcpu: Vcpu, gpa: int, size: int, write: int, value: int) -> int:
    """Append a done access, and restart the instruction."""
    control = vcpu.control
    count = control.access_count if vcpu.half_done else 0
    _done(vcpu.block_memory, count, gpa, size, write, value)
    control.access_count = count + 1
    control.emulate = EMULATE_FIRST
    vcpu.half_done = True
    if trace.kvm_mmio.enabled:
        trace.kvm_mmio(trace.MMIO_WRITE if write else trace.MMIO_READ, size, gpa, value)
    return 1


# --- Failing -----------------------------------------------------------------------------------------------------------------------


def handle_emulation_failure(vcpu: Vcpu, emulation_type: int) -> int:
    """The emulator cannot do the instruction: #UD for user mode; to user space for the guest's kernel, and always for a skip."""
    vcpu.stats["insn_emulation_fail"] += 1
    if trace.kvm_emulate_insn.enabled:
        _trace(vcpu, failed=True)
    if not (vcpu.vm.exit_on_emulation_failure or emulation_type & EMULTYPE_SKIP):
        events.inject_ud(vcpu)
        if regs.cpl(vcpu):
            return 1
    return _prepare_emulation_failure_exit(vcpu)


def _prepare_emulation_failure_exit(vcpu: Vcpu) -> int:
    """KVM_EXIT_INTERNAL_ERROR, suberror EMULATION: flags, the instruction's bytes if there are any, and what the exit told."""
    code, info, failure = ops.fetch(vcpu), vcpu.exit, vcpu.kvm_run.emulation_failure
    failure.suberror, failure.flags, failure.ndata = uapi.KVM_INTERNAL_ERROR_EMULATION, 0, 1
    if code:
        failure.flags = uapi.KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES
        failure.insn_size = len(code)
        failure.insn_bytes[:] = list(code.ljust(ops.INSTRUCTION_LIMIT, b"\x90"))
        failure.ndata += (1 + ops.INSTRUCTION_LIMIT) // 8
    exits.append_internal_data(vcpu, info.reason, info.qualification, info.info2, info.interruption, info.interruption_error)
    return vcpu.exit_to_user(uapi.KVM_EXIT_INTERNAL_ERROR)


handlers = {EXIT_ACCESS: handle_access, EXIT_EMULATED: handle_emulated}
"""The silicon's private exits, the same for both vendors."""
EXIT_NAMES = {EXIT_ACCESS: "ACCESS", EXIT_EMULATED: "EMULATED", EXIT_BREAKPOINT: "HIDDEN_BREAKPOINT", EXIT_MONITOR_TRAP_AMD: "MONITOR_TRAP"}
