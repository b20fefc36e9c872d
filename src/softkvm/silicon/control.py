"""The control block: what a hypervisor and the silicon tell each other at a VM entry and a VM exit.

A superset of the VMCS (SDM vol. 3, ch. 25) and of the VMCB (APM vol. 2, app. B), held in memory that the engine shares through the
buffer protocol. The engine reads controls and guest state at VM entry and writes guest state and exit information at VM exit; between
the two calls the hypervisor owns every byte. `engine/core/src/virt/control.rs` is the same layout in Rust, and a test compares them.
"""

from __future__ import annotations

from ctypes import LittleEndianStructure, c_uint8, c_uint16, c_uint32, c_uint64, sizeof
from enum import IntEnum

_u8, _u16, _u32, _u64 = c_uint8, c_uint16, c_uint32, c_uint64


class Register(IntEnum):
    """Index into `State.gpr`, the encoding of the instruction set."""

    RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8, R9, R10, R11, R12, R13, R14, R15 = range(16)


class SegmentRegister(IntEnum):
    """Index into `State.segments`."""

    ES, CS, SS, DS, FS, GS, LDTR, TR = range(8)


class Segment(LittleEndianStructure):
    """A segment register with its hidden part; `access_rights` as in SDM vol. 3, 25.4.1 (bit 16 = unusable)."""

    _fields_ = [
        ("selector", _u16),
        ("_reserved0", _u16),
        ("access_rights", _u32),
        ("limit", _u32),
        ("_reserved1", _u32),
        ("base", _u64),
    ]
    selector: int
    access_rights: int
    limit: int
    base: int


class DescriptorTable(LittleEndianStructure):
    """GDTR or IDTR."""

    _fields_ = [("base", _u64), ("limit", _u32), ("_reserved", _u32)]
    base: int
    limit: int


class Fpu(LittleEndianStructure):
    """x87, SSE, AVX and AVX-512 registers; `st` holds R0..R7 by physical number (not relative to TOP), 10 bytes used of each 16."""

    _fields_ = [
        ("fcw", _u16),
        ("fsw", _u16),
        ("ftw", _u8),  # abridged: bit n = R(n) not empty
        ("_reserved0", _u8),
        ("fop", _u16),
        ("fip", _u64),
        ("fdp", _u64),
        ("mxcsr", _u32),
        ("pkru", _u32),
        ("st", _u8 * 16 * 8),
        ("vector", _u8 * 64 * 32),  # ZMM-sized; XMM is the low 16 bytes
        ("mask", _u64 * 8),
    ]


class State(LittleEndianStructure):
    """The guest's architectural state that lives in the silicon while it runs."""

    _fields_ = [
        ("gpr", _u64 * 16),
        ("rip", _u64),
        ("rflags", _u64),
        ("segments", Segment * 8),
        ("gdtr", DescriptorTable),
        ("idtr", DescriptorTable),
        ("cr0", _u64),
        ("cr2", _u64),
        ("cr3", _u64),
        ("cr4", _u64),
        ("cr8", _u64),
        ("xcr0", _u64),
        ("xss", _u64),
        ("efer", _u64),
        ("star", _u64),
        ("lstar", _u64),
        ("cstar", _u64),
        ("fmask", _u64),
        ("kernel_gs_base", _u64),
        ("sysenter_cs", _u64),
        ("sysenter_esp", _u64),
        ("sysenter_eip", _u64),
        ("tsc_aux", _u64),
        ("pat", _u64),
        ("debugctl", _u64),
        ("spec_ctrl", _u64),
        ("dr", _u64 * 4),
        ("dr6", _u64),
        ("dr7", _u64),
        ("pending_debug", _u64),  # SDM vol. 3, 25.4.2
        ("interruptibility", _u32),  # bit 0 STI, 1 MOV SS, 2 SMI, 3 NMI
        ("activity", _u32),  # 0 active, 1 HLT, 2 shutdown, 3 wait for SIPI
        ("pdpte", _u64 * 4),
        ("fpu", Fpu),
        ("pkrs", _u64),
    ]


class Intercept(IntEnum):
    """Bit numbers of `Control.intercepts`; each makes the named instruction or condition a VM exit."""

    NMI = 1
    SMI = 2
    INIT = 3
    INTERRUPT_WINDOW = 4
    NMI_WINDOW = 5
    HLT = 6
    PAUSE = 7
    MONITOR = 8
    MWAIT = 9
    RDTSC = 10  # and RDTSCP
    RDPMC = 12
    RDRAND = 13
    RDSEED = 14
    CPUID = 15
    INVD = 16
    WBINVD = 17
    XSETBV = 18
    INVLPG = 19
    INVPCID = 20
    DESCRIPTOR_TABLE = 21  # LGDT SGDT LIDT SIDT LLDT SLDT LTR STR
    TASK_SWITCH = 22
    SHUTDOWN = 23
    HYPERCALL = 24  # VMCALL, VMMCALL
    VM_INSTRUCTION = 25  # VMX set, or SVM set
    MONITOR_TRAP = 26
    IO = 27  # every port
    IO_BITMAP = 28  # ports by `ControlBlock.io_bitmap`
    MSR_BITMAP = 29  # MSRs by `ControlBlock.msr_bitmap`; without it every RDMSR and WRMSR exits
    PREEMPTION_TIMER = 30


class Control(LittleEndianStructure):
    """What the hypervisor asks of the silicon for the next run."""

    _fields_ = [
        ("intercepts", _u64),
        ("exception_bitmap", _u32),
        ("page_fault_error_mask", _u32),
        ("page_fault_error_match", _u32),
        ("cr_read", _u16),  # bit n: MOV from CRn exits
        ("cr_write", _u16),  # bit n: MOV to CRn exits
        ("dr_read", _u16),
        ("dr_write", _u16),
        ("tlb_control", _u32),  # 0 keep, 1 flush everything
        ("cr0_mask", _u64),  # guest/host masks and read shadows, SDM vol. 3, 25.6.6
        ("cr0_shadow", _u64),
        ("cr4_mask", _u64),
        ("cr4_shadow", _u64),
        ("event", _u32),  # event injection, SDM vol. 3, 25.8.3; bit 31 valid; cleared by a successful entry
        ("event_error", _u32),
        ("event_instruction_length", _u32),
        ("vpid", _u32),  # VPID or ASID: tags translations; 0 is the host's
        ("tsc_offset", _u64),
        ("tsc_multiplier", _u64),  # 48 fractional bits; 1 << 48 is unity
        ("preemption_deadline", _u64),  # guest TSC at which the preemption timer exits
        ("emulate", _u32),  # 1: run one instruction with device accesses from `access`; 2: and then run on. Cleared when it is done
        ("access_count", _u32),  # valid entries of `access`
        ("instruction_budget", _u64),  # exit with BUDGET after this many instructions; 0 is no limit
        ("pause_gap", _u32),  # PAUSE-loop exiting at CPL 0, SDM vol. 3, 25.1.3: most TSC cycles between two PAUSEs of one loop
        ("pause_window", _u32),  # most TSC cycles of a loop; 0 turns it off
        ("perf_controls", _u32),  # bits of `silicon.pmu`: what to do with GLOBAL_CTRL of the core's PMU
        ("waiver_count", _u32),  # valid entries of `ControlBlock.waivers`; cleared when what they are for is done
        ("guest_perf_global_ctrl", _u64),
        ("host_perf_global_ctrl", _u64),
        ("virtual_tsc", _u64),  # virtual time: the host's TSC at the entry; at the exit it is `Exit.tsc`
        ("random", _u64),  # virtual time: where the generator behind RDRAND and RDSEED stands, moved on by the run
        ("tsc_rate", _u32),  # virtual time: cycles of the host's TSC per retired instruction; 0 is the real time
        ("_reserved1", _u32),
        ("next_rip", _u64),  # AMD silicon with NRIP save: where an injected software interrupt, INT3 or INTO returns to
        ("virtual_lvtpc", _u32),  # LVTPC of the guest's local APIC: `silicon.pmu`, "Virtual interrupts"
        ("_reserved2", _u32),
        ("guest_status_mask", _u64),  # bits that the guest may write to GLOBAL_STATUS_RESET without an exit, if the bitmap lets it
        ("guest_debugctl_mask", _u64),  # the same for DEBUGCTL
        ("halt_window", _u64),  # host TSC cycles that HLT waits for an interrupt of the virtual APIC before it exits; 0 is none
    ]


class Access(LittleEndianStructure):
    """One completed device access that an emulated instruction may use (`Control.emulate`)."""

    _fields_ = [("gpa", _u64), ("size", _u32), ("write", _u32), ("data", _u64 * 2)]


class Exit(LittleEndianStructure):
    """Why the guest left, in the vendor's own numbers."""

    _fields_ = [
        ("reason", _u32),  # VMX basic exit reason (bit 31: entry failure), or low half of the SVM exit code
        ("instruction_length", _u32),
        ("qualification", _u64),  # VMX exit qualification, or SVM EXITINFO1
        ("info2", _u64),  # SVM EXITINFO2
        ("gpa", _u64),
        ("gla", _u64),
        ("interruption", _u32),  # the event that exited: SDM vol. 3, 25.9.2
        ("interruption_error", _u32),
        ("vectoring", _u32),  # the event whose delivery was cut short: SDM vol. 3, 25.9.3
        ("vectoring_error", _u32),
        ("next_rip", _u64),  # zero where the silicon does not save it
        ("instruction_info", _u32),
        ("instruction_bytes_length", _u32),
        ("instruction_bytes", _u8 * 16),
        ("msr_index", _u32),
        ("io_port", _u16),
        ("io_size", _u8),
        ("io_flags", _u8),  # bit 0 IN, 1 string, 2 REP, 3 address size 32, 4 address size 64, 5 DF
        ("io_count", _u64),  # REP count as the address size reads it, else 1
        ("io_gla", _u64),  # linear address of the first string element
        ("access", Access),  # the device access that an emulated instruction waits for
        ("instructions", _u64),  # retired in this run
        ("tsc", _u64),  # host TSC at the exit
    ]


class VirtualApic(LittleEndianStructure):
    """The part of a local APIC in x2APIC mode that the silicon works on by itself: SDM vol. 3, ch. 30; APM vol. 2, 15.29.

    With `enable`, interrupts arrive from `PostedInterrupts`, are delivered by priority and end without an exit, and a fixed IPI to an APIC
    id that the core's `IpiTable` knows is sent without one: as far as the MSR bitmap lets the guest write EOI, ICR and SELF_IPI. What is
    left to the hypervisor exits behind the WRMSR: other commands, which are in `icr`, and the end of a vector in `eoi_exit`.
    """

    _fields_ = [
        ("irr", _u64 * 4),  # requested, a bit per vector
        ("isr", _u64 * 4),  # in service
        ("eoi_exit", _u64 * 4),
        ("icr", _u64),  # the last command
        ("tpr", _u32),
        ("enable", _u32),
        ("halts", _u64),  # HLTs that an interrupt ended within `Control.halt_window`
        ("halt_cycles", _u64),  # how long they were
        ("halt_waited", _u64),  # how long the HLT that exited last had waited
    ]


class ControlBlock(LittleEndianStructure):
    """The whole block; the offsets are part of the engine's interface.

    `msr_bitmap[range][direction]`: ranges 0..1FFF, C0000000..C0001FFF and C0010000..C0011FFF, direction 0 read and 1 write; bit n of
    the little-endian bytes is the n-th MSR of the range, 1 exits, and an MSR outside the ranges always exits. `io_bitmap`: bit n is
    port n, 1 exits. `waivers`: guest-physical pages with access rights in the low bits, which the instruction of `Control.emulate`, or the
    delivery of the injected event, has beyond those of the nested page table.
    """

    _fields_ = [
        ("control", Control),
        ("_pad0", _u8 * (0x100 - sizeof(Control))),
        ("access", Access * 8),
        ("exit", Exit),
        ("_pad1", _u8 * (0x200 - sizeof(Exit))),
        ("state", State),
        ("_pad2", _u8 * (0xC00 - sizeof(State))),
        ("msr_bitmap", _u8 * 1024 * 2 * 3),
        ("io_bitmap", _u8 * 8192),
        ("waivers", _u64 * 64),
        ("apic", VirtualApic),
    ]


CONTROL_BLOCK_SIZE = 0x5000
"""Bytes of memory behind a control block; the tail is reserved."""
