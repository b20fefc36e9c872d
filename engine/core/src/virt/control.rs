//! The control block: the layout that `softkvm/silicon/control.py` declares, in Rust.
//!
//! Sources: SDM vol. 3, ch. 25 (VMCS); APM vol. 2, app. B (VMCB).

use crate::state::State;

/// Bit numbers of `Control::intercepts`.
pub mod intercept {
    pub const NMI: u32 = 1;
    pub const SMI: u32 = 2;
    pub const INIT: u32 = 3;
    pub const INTERRUPT_WINDOW: u32 = 4;
    pub const NMI_WINDOW: u32 = 5;
    pub const HLT: u32 = 6;
    pub const PAUSE: u32 = 7;
    pub const MONITOR: u32 = 8;
    pub const MWAIT: u32 = 9;
    pub const RDTSC: u32 = 10;
    pub const RDPMC: u32 = 12;
    pub const RDRAND: u32 = 13;
    pub const RDSEED: u32 = 14;
    pub const CPUID: u32 = 15;
    pub const INVD: u32 = 16;
    pub const WBINVD: u32 = 17;
    pub const XSETBV: u32 = 18;
    pub const INVLPG: u32 = 19;
    pub const INVPCID: u32 = 20;
    pub const DESCRIPTOR_TABLE: u32 = 21;
    pub const TASK_SWITCH: u32 = 22;
    pub const SHUTDOWN: u32 = 23;
    pub const HYPERCALL: u32 = 24;
    pub const VM_INSTRUCTION: u32 = 25;
    pub const MONITOR_TRAP: u32 = 26;
    pub const IO: u32 = 27;
    pub const IO_BITMAP: u32 = 28;
    pub const MSR_BITMAP: u32 = 29;
    pub const PREEMPTION_TIMER: u32 = 30;
}

/// Values of `Control::emulate`.
pub mod emulate {
    /// Run exactly one instruction, which takes its device accesses from `Block::access`.
    pub const ONE: u32 = 1;
    /// The same for the first instruction, and run on behind it.
    pub const FIRST: u32 = 2;
}

/// Bits of `Control::perf_controls` (SDM vol. 3, tables 25-13 and 25-15).
pub mod perf {
    /// Entry loads GLOBAL_CTRL from `guest_perf_global_ctrl`.
    pub const LOAD_GUEST: u32 = 1;
    /// Exit loads it from `host_perf_global_ctrl`.
    pub const LOAD_HOST: u32 = 2;
    /// Exit saves it to `guest_perf_global_ctrl`.
    pub const SAVE_GUEST: u32 = 4;
    /// Overflow interrupts are the guest's, by `virtual_lvtpc`, and the masks behind that say what it may write.
    pub const VIRTUAL_PMI: u32 = 8;
}

/// What the hypervisor asks of the silicon for the next run.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct Control {
    pub intercepts: u64,
    pub exception_bitmap: u32,
    pub page_fault_error_mask: u32,
    pub page_fault_error_match: u32,
    pub cr_read: u16,
    pub cr_write: u16,
    pub dr_read: u16,
    pub dr_write: u16,
    /// 0 keep translations, 1 flush everything.
    pub tlb_control: u32,
    pub cr0_mask: u64,
    pub cr0_shadow: u64,
    pub cr4_mask: u64,
    pub cr4_shadow: u64,
    /// Event injection in the format of SDM vol. 3, 25.8.3.
    pub event: u32,
    pub event_error: u32,
    pub event_instruction_length: u32,
    pub vpid: u32,
    pub tsc_offset: u64,
    /// 48 fractional bits.
    pub tsc_multiplier: u64,
    /// Guest TSC value.
    pub preemption_deadline: u64,
    /// One of [`emulate`], cleared when the instruction is done; 0 is none.
    pub emulate: u32,
    pub access_count: u32,
    pub instruction_budget: u64,
    pub pause_gap: u32,
    pub pause_window: u32,
    /// Bits of [`perf`].
    pub perf_controls: u32,
    /// Valid entries of `Block::waivers`; cleared when the instruction or the event that they are for is done.
    pub waiver_count: u32,
    pub guest_perf_global_ctrl: u64,
    pub host_perf_global_ctrl: u64,
    /// Virtual time: the host's TSC at the entry.
    pub virtual_tsc: u64,
    /// Virtual time: where the generator behind RDRAND and RDSEED stands.
    pub random: u64,
    /// Virtual time: cycles of the host's TSC per retired instruction; zero is the real time.
    pub tsc_rate: u32,
    reserved1: u32,
    /// AMD silicon that saves the next RIP: where an injected software interrupt, INT3 or INTO returns to (APM vol. 2, 15.20).
    pub next_rip: u64,
    /// LVTPC of the guest's local APIC.
    pub virtual_lvtpc: u32,
    reserved2: u32,
    /// Bits that the guest may write to GLOBAL_STATUS_RESET, and to DEBUGCTL, where the MSR bitmap lets it: others exit.
    pub guest_status_mask: u64,
    pub guest_debugctl_mask: u64,
    /// Cycles of the host's TSC that a HLT of a guest with a virtual APIC waits for an interrupt before it exits; zero is none.
    pub halt_window: u64,
}

impl Control {
    /// Whether the intercept with number `bit` (see [`intercept`]) is on.
    #[inline(always)]
    pub const fn intercepts(&self, bit: u32) -> bool {
        self.intercepts >> bit & 1 != 0
    }
}

/// One device access of an emulated instruction.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Access {
    pub gpa: u64,
    pub size: u32,
    pub write: u32,
    pub data: [u64; 2],
}

/// Why the guest left, in the vendor's own numbers.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct Exit {
    pub reason: u32,
    pub instruction_length: u32,
    pub qualification: u64,
    pub info2: u64,
    pub gpa: u64,
    pub gla: u64,
    pub interruption: u32,
    pub interruption_error: u32,
    pub vectoring: u32,
    pub vectoring_error: u32,
    pub next_rip: u64,
    pub instruction_info: u32,
    pub instruction_bytes_length: u32,
    pub instruction_bytes: [u8; 16],
    pub msr_index: u32,
    pub io_port: u16,
    pub io_size: u8,
    pub io_flags: u8,
    pub io_count: u64,
    pub io_gla: u64,
    pub access: Access,
    pub instructions: u64,
    pub tsc: u64,
}

/// The part of a local APIC that the silicon works on by itself; see [`crate::virt::apic`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VirtualApic {
    /// Requested interrupts (VIRR), a bit per vector.
    pub irr: [u64; 4],
    /// Interrupts in service (VISR).
    pub isr: [u64; 4],
    /// Vectors whose end of interrupt exits.
    pub eoi_exit: [u64; 4],
    /// The interrupt command register.
    pub icr: u64,
    /// Task priority (VTPR).
    pub tpr: u32,
    /// 1 if the guest has this APIC; 0 leaves all of it to the hypervisor.
    pub enable: u32,
    /// HLTs that an interrupt ended within `Control::halt_window`, and how many cycles they took.
    pub halts: u64,
    pub halt_cycles: u64,
    /// Cycles that the HLT which exited last had waited for.
    pub halt_waited: u64,
}

/// Most device accesses that one emulated instruction can make.
pub const ACCESS_MAX: usize = 8;
/// Most waivers of one instruction.
pub const WAIVER_MAX: usize = 64;
/// Bytes of a control block's memory.
pub const BLOCK_SIZE: usize = 0x5000;

/// The whole block; see the Python declaration for the meaning of each part.
#[repr(C, align(4096))]
pub struct Block {
    pub control: Control,
    pad0: [u8; 0x100 - size_of::<Control>()],
    pub access: [Access; ACCESS_MAX],
    pub exit: Exit,
    pad1: [u8; 0x200 - size_of::<Exit>()],
    pub state: State,
    pad2: [u8; 0xc00 - size_of::<State>()],
    pub msr_bitmap: [[[u8; 1024]; 2]; 3],
    pub io_bitmap: [u8; 8192],
    /// Guest-physical pages with access rights, in the low bits (8: the page walker's), that the nested page table does not have to grant: to the instruction of
    /// `Control::emulate`, or to the delivery of the injected event.
    pub waivers: [u64; WAIVER_MAX],
    pub apic: VirtualApic,
    tail: [u8; 0x800 - WAIVER_MAX * 8 - size_of::<VirtualApic>()],
}

const _: () = assert!(size_of::<Block>() == BLOCK_SIZE);
