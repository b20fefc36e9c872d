//! The architectural state of one guest CPU, laid out for the control block.
//!
//! `softkvm/silicon/control.py` declares the same structures; a test compares every offset. Sources: SDM vol. 1, ch. 3 and 8;
//! SDM vol. 3, ch. 2 and 25.4.

/// Number of a segment register in `State::segments` and in `Uop::seg`.
pub mod seg {
    pub const ES: usize = 0;
    pub const CS: usize = 1;
    pub const SS: usize = 2;
    pub const DS: usize = 3;
    pub const FS: usize = 4;
    pub const GS: usize = 5;
    pub const LDTR: usize = 6;
    pub const TR: usize = 7;
}

/// Number of a general register in `State::gpr`.
pub mod gpr {
    pub const RAX: usize = 0;
    pub const RCX: usize = 1;
    pub const RDX: usize = 2;
    pub const RBX: usize = 3;
    pub const RSP: usize = 4;
    pub const RBP: usize = 5;
    pub const RSI: usize = 6;
    pub const RDI: usize = 7;
}

/// Bits of CR0.
pub mod cr0 {
    pub const PE: u64 = 1 << 0;
    pub const MP: u64 = 1 << 1;
    pub const EM: u64 = 1 << 2;
    pub const TS: u64 = 1 << 3;
    pub const ET: u64 = 1 << 4;
    pub const NE: u64 = 1 << 5;
    pub const WP: u64 = 1 << 16;
    pub const AM: u64 = 1 << 18;
    pub const NW: u64 = 1 << 29;
    pub const CD: u64 = 1 << 30;
    pub const PG: u64 = 1 << 31;
}

/// Bits of CR4.
pub mod cr4 {
    pub const VME: u64 = 1 << 0;
    pub const PVI: u64 = 1 << 1;
    pub const TSD: u64 = 1 << 2;
    pub const DE: u64 = 1 << 3;
    pub const PSE: u64 = 1 << 4;
    pub const PAE: u64 = 1 << 5;
    pub const MCE: u64 = 1 << 6;
    pub const PGE: u64 = 1 << 7;
    pub const PCE: u64 = 1 << 8;
    pub const OSFXSR: u64 = 1 << 9;
    pub const OSXMMEXCPT: u64 = 1 << 10;
    pub const UMIP: u64 = 1 << 11;
    pub const LA57: u64 = 1 << 12;
    pub const VMXE: u64 = 1 << 13;
    pub const FSGSBASE: u64 = 1 << 16;
    pub const PCIDE: u64 = 1 << 17;
    pub const OSXSAVE: u64 = 1 << 18;
    pub const SMEP: u64 = 1 << 20;
    pub const SMAP: u64 = 1 << 21;
    pub const PKE: u64 = 1 << 22;
    pub const PKS: u64 = 1 << 24;
}

/// Bits of IA32_EFER.
pub mod efer {
    pub const SCE: u64 = 1 << 0;
    pub const LME: u64 = 1 << 8;
    pub const LMA: u64 = 1 << 10;
    pub const NXE: u64 = 1 << 11;
    pub const SVME: u64 = 1 << 12;
    pub const FFXSR: u64 = 1 << 14;
}

/// Bits of RFLAGS.
pub mod rflags {
    pub const CF: u64 = 1 << 0;
    pub const FIXED: u64 = 1 << 1;
    pub const PF: u64 = 1 << 2;
    pub const AF: u64 = 1 << 4;
    pub const ZF: u64 = 1 << 6;
    pub const SF: u64 = 1 << 7;
    pub const TF: u64 = 1 << 8;
    pub const IF: u64 = 1 << 9;
    pub const DF: u64 = 1 << 10;
    pub const OF: u64 = 1 << 11;
    pub const IOPL: u64 = 3 << 12;
    pub const NT: u64 = 1 << 14;
    pub const RF: u64 = 1 << 16;
    pub const VM: u64 = 1 << 17;
    pub const AC: u64 = 1 << 18;
    pub const VIF: u64 = 1 << 19;
    pub const VIP: u64 = 1 << 20;
    pub const ID: u64 = 1 << 21;
    /// The flags that arithmetic writes; they live in `Flags` while the CPU runs.
    pub const ARITHMETIC: u64 = CF | PF | AF | ZF | SF | OF;
    /// Every flag that software can change.
    pub const WRITABLE: u64 = ARITHMETIC | TF | IF | DF | IOPL | NT | RF | VM | AC | VIF | VIP | ID;
}

/// Bits of `Segment::access_rights` (SDM vol. 3, 25.4.1).
pub mod rights {
    pub const TYPE: u32 = 0xf;
    pub const ACCESSED: u32 = 1;
    /// Writable data, or readable code.
    pub const RW: u32 = 2;
    /// Expand-down data, or conforming code.
    pub const DC: u32 = 4;
    pub const CODE: u32 = 8;
    /// Code or data, not system.
    pub const S: u32 = 1 << 4;
    pub const DPL_SHIFT: u32 = 5;
    pub const PRESENT: u32 = 1 << 7;
    pub const AVL: u32 = 1 << 12;
    pub const LONG: u32 = 1 << 13;
    pub const DB: u32 = 1 << 14;
    pub const GRANULARITY: u32 = 1 << 15;
    pub const UNUSABLE: u32 = 1 << 16;
}

/// Bits of `State::interruptibility`.
pub mod interruptibility {
    pub const STI: u32 = 1;
    pub const MOV_SS: u32 = 2;
    pub const SMI: u32 = 4;
    pub const NMI: u32 = 8;
}

/// Values of `State::activity`.
pub mod activity {
    pub const ACTIVE: u32 = 0;
    pub const HLT: u32 = 1;
    pub const SHUTDOWN: u32 = 2;
    pub const WAIT_SIPI: u32 = 3;
}

/// A segment register with its hidden part.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Segment {
    pub selector: u16,
    reserved0: u16,
    pub access_rights: u32,
    pub limit: u32,
    reserved1: u32,
    pub base: u64,
}

impl Segment {
    /// A segment register loaded with these values.
    pub const fn new(selector: u16, access_rights: u32, limit: u32, base: u64) -> Self {
        Segment { selector, reserved0: 0, access_rights, limit, reserved1: 0, base }
    }
    /// Descriptor privilege level.
    pub const fn dpl(&self) -> u8 {
        ((self.access_rights >> rights::DPL_SHIFT) & 3) as u8
    }
    /// Whether any of the bits of `mask` (see [`rights`]) is set.
    pub const fn has(&self, mask: u32) -> bool {
        self.access_rights & mask != 0
    }
}

/// GDTR or IDTR.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DescriptorTable {
    pub base: u64,
    pub limit: u32,
    reserved: u32,
}

impl DescriptorTable {
    pub const fn new(base: u64, limit: u32) -> Self {
        DescriptorTable { base, limit, reserved: 0 }
    }
}

/// x87, SSE, AVX and AVX-512 registers.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Fpu {
    pub fcw: u16,
    /// Status word, TOP in bits 13:11.
    pub fsw: u16,
    /// Abridged tag word: bit n set when R(n) is not empty.
    pub ftw: u8,
    reserved: u8,
    pub fop: u16,
    pub fip: u64,
    pub fdp: u64,
    pub mxcsr: u32,
    pub pkru: u32,
    /// R0..R7 by physical number, 80 bits used of each.
    pub st: [[u8; 16]; 8],
    /// ZMM-sized; XMM is bytes 0..16 and YMM bytes 0..32.
    pub vector: [[u8; 64]; 32],
    pub mask: [u64; 8],
}

impl Default for Fpu {
    /// State after INIT (SDM vol. 3, table 10-1): FCW 37F, everything empty, MXCSR 1F80.
    fn default() -> Self {
        Fpu {
            fcw: 0x37f,
            fsw: 0,
            ftw: 0,
            reserved: 0,
            fop: 0,
            fip: 0,
            fdp: 0,
            mxcsr: 0x1f80,
            pkru: 0,
            st: [[0; 16]; 8],
            vector: [[0; 64]; 32],
            mask: [0; 8],
        }
    }
}

/// Everything architectural that a VM entry loads and a VM exit saves.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct State {
    pub gpr: [u64; 16],
    pub rip: u64,
    pub rflags: u64,
    pub segments: [Segment; 8],
    pub gdtr: DescriptorTable,
    pub idtr: DescriptorTable,
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub cr8: u64,
    pub xcr0: u64,
    pub xss: u64,
    pub efer: u64,
    pub star: u64,
    pub lstar: u64,
    pub cstar: u64,
    pub fmask: u64,
    pub kernel_gs_base: u64,
    pub sysenter_cs: u64,
    pub sysenter_esp: u64,
    pub sysenter_eip: u64,
    pub tsc_aux: u64,
    pub pat: u64,
    pub debugctl: u64,
    pub spec_ctrl: u64,
    pub dr: [u64; 4],
    pub dr6: u64,
    pub dr7: u64,
    pub pending_debug: u64,
    pub interruptibility: u32,
    pub activity: u32,
    pub pdpte: [u64; 4],
    pub fpu: Fpu,
    /// IA32_PKRS.
    pub pkrs: u64,
}

const _: () = assert!(core::mem::size_of::<Fpu>() == 0x8e0);
const _: () = assert!(core::mem::size_of::<State>() == 0xb58);
