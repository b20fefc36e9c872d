"""The tracepoints of the host and of KVM.

Answers to Linux 6.1 `include/trace/events/{syscalls,sched}.h` and `arch/x86/kvm/trace.h`: names, fields and text are theirs, so that what
reads the kernel's traces reads ours. `host/ftrace.py` writes them to a file.
"""

from __future__ import annotations

import errno

from softkvm.host.tracepoint import Tracepoint, registry
from softkvm.uapi import kvm as uapi
from softkvm.uapi import svm, vmx

__all__ = ["HOST_CLOCK_TSC", "ISA_SVM", "ISA_VMX", "MMIO_READ", "MMIO_WRITE", "Tracepoint", "recording", "registry"]

ISA_VMX, ISA_SVM = 1, 2
"""Whose exit reason `kvm_exit` has."""
MMIO_READ, MMIO_WRITE = 1, 2
"""`type` of `kvm_mmio`."""
HOST_CLOCK_TSC = 1
"""`host_clock` of the time events: VDSO_CLOCKMODE_TSC."""

_EXCEPTIONS = dict(
    enumerate(
        [
            "#DE",
            "#DB",
            "NMI",
            "#BP",
            "#OF",
            "#BR",
            "#UD",
            "#NM",
            "#DF",
            "CSO",
            "#TS",
            "#NP",
            "#SS",
            "#GP",
            "#PF",
            "SPUR",
            "#MF",
            "#AC",
            "#MC",
        ]
    )
)
_EXIT_NAMES = {value: name for name, value in vars(uapi).items() if name.startswith("KVM_EXIT_") and name[9:12] != "IO_"}
INSN_CR0_PE, INSN_EFL_VM, INSN_CS_D, INSN_CS_L = 1, 2, 4, 8
"""`flags` of `kvm_emulate_insn`."""
_CODE_SIZES = {
    0: "real",
    INSN_CR0_PE | INSN_EFL_VM: "vm16",
    INSN_CR0_PE: "prot16",
    INSN_CR0_PE | INSN_CS_D: "prot32",
    INSN_CR0_PE | INSN_CS_L: "prot64",
}
_HOST_CLOCKS = ("none", "tsc")
_MMIO_TYPES = ("unsatisfied-read", "read", "write")


def recording() -> bool:
    """Whether system calls must tell the tracepoints about themselves."""
    return any(point.enabled for point in registry.values())


# --- The text of each event --------------------------------------------------------------------------------------------------------


def _sys_enter(id: int, args: tuple[int, ...]) -> str:
    return f"NR {id} ({', '.join(f'{argument:x}' for argument in args)})"


def _sys_exit(id: int, ret: int) -> str:
    return f"NR {id} = {ret}"


def _sched_switch(prev_comm: str, prev_pid: int, prev_prio: int, prev_state: str, next_comm: str, next_pid: int, next_prio: int) -> str:
    before = f"prev_comm={prev_comm} prev_pid={prev_pid} prev_prio={prev_prio} prev_state={prev_state}"
    return f"{before} ==> next_comm={next_comm} next_pid={next_pid} next_prio={next_prio}"


def _kvm_entry(vcpu_id: int, rip: int) -> str:
    return f"vcpu {vcpu_id}, rip 0x{rip:x}"


def _kvm_exit(exit_reason: int, guest_rip: int, isa: int, info1: int, info2: int, intr_info: int, error_code: int, vcpu_id: int) -> str:
    if isa == ISA_VMX:
        name = vmx.EXIT_NAMES.get(exit_reason & 0xFFFF, f"0x{exit_reason & 0xFFFF:x}")
        name += " FAILED_VMENTRY" if exit_reason >> 31 & 1 else ""
    else:
        name = svm.EXIT_NAMES.get(exit_reason, f"0x{exit_reason:x}")
    infos = f"info1 0x{info1:016x} info2 0x{info2:016x} intr_info 0x{intr_info:08x} error_code 0x{error_code:08x}"
    return f"vcpu {vcpu_id} reason {name} rip 0x{guest_rip:x} {infos}"


def _kvm_userspace_exit(reason: int, errno_: int) -> str:
    if errno_ < 0:
        return f"reason {'restart' if errno_ == -errno.EINTR else 'error'} ({-errno_})"
    return f"reason {_EXIT_NAMES.get(reason, f'0x{reason:x}')} ({reason})"


def _kvm_hypercall(nr: int, a0: int, a1: int, a2: int, a3: int) -> str:
    return f"nr 0x{nr:x} a0 0x{a0:x} a1 0x{a1:x} a2 0x{a2:x}  a3 0x{a3:x}"


def _kvm_pio(rw: int, port: int, size: int, count: int, val: int) -> str:
    return f"pio_{'write' if rw else 'read'} at 0x{port:x} size {size} count {count} val 0x{val:x} {'(...)' if count > 1 else ''}"


def _kvm_cpuid(function: int, index: int, rax: int, rbx: int, rcx: int, rdx: int, found: bool, used_max_basic: bool) -> str:
    entry = f"cpuid entry {'found' if found else 'not found'}{', used max basic' if used_max_basic else ''}"
    return f"func {function:x} idx {index:x} rax {rax:x} rbx {rbx:x} rcx {rcx:x} rdx {rdx:x}, {entry}"


def _kvm_msr(write: bool, ecx: int, data: int, exception: bool) -> str:
    return f"msr_{'write' if write else 'read'} {ecx:x} = 0x{data:x}{' (#GP)' if exception else ''}"


def _kvm_inj_virq(vector: int, soft: bool, reinjected: bool) -> str:
    return f"IRQ 0x{vector:x}{' [soft]' if soft else ''}{' [reinjected]' if reinjected else ''}"


def _kvm_inj_exception(exception: int, has_error: bool, error_code: int, reinjected: bool) -> str:
    name = _EXCEPTIONS[exception] if exception < len(_EXCEPTIONS) else f"0x{exception:x}"
    code = f" (0x{error_code:x})" if has_error else ""
    return f"{name}{code}{' [reinjected]' if reinjected else ''}"


def _kvm_page_fault(vcpu_id: int, guest_rip: int, fault_address: int, error_code: int) -> str:
    return f"vcpu {vcpu_id} rip 0x{guest_rip:x} address 0x{fault_address:016x} error_code 0x{error_code:x}"


def _kvm_mmio(type: int, len: int, gpa: int, val: int) -> str:
    return f"mmio {_MMIO_TYPES[type]} len {len} gpa 0x{gpa:x} val 0x{val:x}"


def _kvm_vcpu_wakeup(ns: int, waited: bool, valid: bool) -> str:
    return f"{'wait' if waited else 'poll'} time {ns} ns, polling {'valid' if valid else 'invalid'}"


def _kvm_set_irq(gsi: int, level: int, irq_source_id: int) -> str:
    return f"gsi {gsi} level {level} source {irq_source_id}"


def _kvm_write_tsc_offset(vcpu_id: int, previous_tsc_offset: int, next_tsc_offset: int) -> str:
    return f"vcpu={vcpu_id} prev={previous_tsc_offset} next={next_tsc_offset}"


def _kvm_update_master_clock(use_master_clock: bool, host_clock: int, offset_matched: bool) -> str:
    return f"masterclock {use_master_clock:d} hostclock {_HOST_CLOCKS[host_clock]} offsetmatched {offset_matched:d}"


def _kvm_track_tsc(vcpu_id: int, nr_vcpus_matched_tsc: int, online_vcpus: int, use_master_clock: bool, host_clock: int) -> str:
    state = f"masterclock {use_master_clock:d} offsetmatched {nr_vcpus_matched_tsc} nr_online {online_vcpus}"
    return f"vcpu_id {vcpu_id} {state} hostclock {_HOST_CLOCKS[host_clock]}"


def _kvm_pvclock_update(
    vcpu_id: int, version: int, tsc_timestamp: int, system_time: int, tsc_to_system_mul: int, tsc_shift: int, flags: int
) -> str:
    times = f"version {version}, tsc_timestamp 0x{tsc_timestamp:x}, system_time 0x{system_time:x}"
    scale = f"tsc_to_system_mul 0x{tsc_to_system_mul:x}, tsc_shift {tsc_shift}, flags 0x{flags:x}"
    return f"vcpu_id {vcpu_id}, pvclock {{ {times}, {scale} }}"


def _kvm_cr(rw: int, cr: int, val: int) -> str:
    return f"cr_{'write' if rw else 'read'} {cr:x} = 0x{val:x}"


def _kvm_emulate_insn(rip: int, csbase: int, len: int, flags: int, insn: bytes, failed: bool) -> str:
    code = " ".join(f"{byte:02x}" for byte in insn[:len])
    return f"{csbase:x}:{rip:x}:{code} ({_CODE_SIZES[flags]}){' failed' if failed else ''}"


def _kvm_smm_transition(vcpu_id: int, smbase: int, entering: bool) -> str:
    return f"vcpu {vcpu_id}: {'entering' if entering else 'leaving'} SMM, smbase 0x{smbase:x}"


def _kvm_eoi(apicid: int, vector: int) -> str:
    return f"apicid {apicid:x} vector {vector}"


# --- The events --------------------------------------------------------------------------------------------------------------------

sys_enter = Tracepoint("raw_syscalls", "sys_enter", "id args", _sys_enter)
sys_exit = Tracepoint("raw_syscalls", "sys_exit", "id ret", _sys_exit)
sched_switch = Tracepoint("sched", "sched_switch", "prev_comm prev_pid prev_prio prev_state next_comm next_pid next_prio", _sched_switch)
kvm_entry = Tracepoint("kvm", "kvm_entry", "vcpu_id rip", _kvm_entry)
kvm_exit = Tracepoint("kvm", "kvm_exit", "exit_reason guest_rip isa info1 info2 intr_info error_code vcpu_id", _kvm_exit)
kvm_userspace_exit = Tracepoint("kvm", "kvm_userspace_exit", "reason errno", _kvm_userspace_exit)
kvm_vcpu_wakeup = Tracepoint("kvm", "kvm_vcpu_wakeup", "ns waited valid", _kvm_vcpu_wakeup)
kvm_inj_virq = Tracepoint("kvm", "kvm_inj_virq", "vector soft reinjected", _kvm_inj_virq)
kvm_inj_exception = Tracepoint("kvm", "kvm_inj_exception", "exception has_error error_code reinjected", _kvm_inj_exception)
kvm_set_irq = Tracepoint("kvm", "kvm_set_irq", "gsi level irq_source_id", _kvm_set_irq)
kvm_eoi = Tracepoint("kvm", "kvm_eoi", "apicid vector", _kvm_eoi)
kvm_cpuid = Tracepoint("kvm", "kvm_cpuid", "function index rax rbx rcx rdx found used_max_basic", _kvm_cpuid)
kvm_msr = Tracepoint("kvm", "kvm_msr", "write ecx data exception", _kvm_msr)
kvm_pio = Tracepoint("kvm", "kvm_pio", "rw port size count val", _kvm_pio)
kvm_mmio = Tracepoint("kvm", "kvm_mmio", "type len gpa val", _kvm_mmio)
kvm_page_fault = Tracepoint("kvm", "kvm_page_fault", "vcpu_id guest_rip fault_address error_code", _kvm_page_fault)
kvm_write_tsc_offset = Tracepoint("kvm", "kvm_write_tsc_offset", "vcpu_id previous_tsc_offset next_tsc_offset", _kvm_write_tsc_offset)
kvm_update_master_clock = Tracepoint(
    "kvm", "kvm_update_master_clock", "use_master_clock host_clock offset_matched", _kvm_update_master_clock
)
kvm_track_tsc = Tracepoint("kvm", "kvm_track_tsc", "vcpu_id nr_vcpus_matched_tsc online_vcpus use_master_clock host_clock", _kvm_track_tsc)
kvm_pvclock_update = Tracepoint(
    "kvm", "kvm_pvclock_update", "vcpu_id version tsc_timestamp system_time tsc_to_system_mul tsc_shift flags", _kvm_pvclock_update
)
kvm_hypercall = Tracepoint("kvm", "kvm_hypercall", "nr a0 a1 a2 a3", _kvm_hypercall)
kvm_cr = Tracepoint("kvm", "kvm_cr", "rw cr val", _kvm_cr)
kvm_emulate_insn = Tracepoint("kvm", "kvm_emulate_insn", "rip csbase len flags insn failed", _kvm_emulate_insn)
kvm_smm_transition = Tracepoint("kvm", "kvm_smm_transition", "vcpu_id smbase entering", _kvm_smm_transition)
