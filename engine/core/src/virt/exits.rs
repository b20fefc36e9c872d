//! VM exits: how each cause is told to a hypervisor of either vendor (SDM vol. 3, app. C; APM vol. 2, app. C).

use crate::cpu::Cpu;
use crate::memory::nested::right;
use crate::paging::AccessKind;
use crate::uop::{Stop, Uop};
use crate::virt::control::{Access, Exit};

/// The number of one cause, for each vendor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Code {
    pub vmx: u32,
    pub svm: u32,
}

/// Numbers of the causes.
pub mod code {
    use super::Code;
    const fn both(vmx: u32, svm: u32) -> Code {
        Code { vmx, svm }
    }
    /// SVM adds the vector.
    pub const EXCEPTION: Code = both(0, 0x40);
    pub const EXTERNAL_INTERRUPT: Code = both(1, 0x60);
    /// On Intel silicon an exit as by an exception.
    pub const NMI: Code = both(0, 0x61);
    pub const TRIPLE_FAULT: Code = both(2, 0x7f);
    pub const INTERRUPT_WINDOW: Code = both(7, 0x64);
    pub const NMI_WINDOW: Code = both(8, 0x74);
    pub const TASK_SWITCH: Code = both(9, 0x7d);
    pub const CPUID: Code = both(10, 0x72);
    pub const HLT: Code = both(12, 0x78);
    pub const INVD: Code = both(13, 0x76);
    pub const INVLPG: Code = both(14, 0x79);
    pub const RDPMC: Code = both(15, 0x6f);
    pub const RDTSC: Code = both(16, 0x6e);
    pub const HYPERCALL: Code = both(18, 0x81);
    pub const VM_INSTRUCTION: Code = both(19, 0x80);
    /// SVM: 0 + n read of CRn, 0x10 + n write.
    pub const CR_ACCESS: Code = both(28, 0x00);
    /// SVM: 0x20 + n read of DRn, 0x30 + n write.
    pub const DR_ACCESS: Code = both(29, 0x20);
    pub const IO: Code = both(30, 0x7b);
    pub const RDMSR: Code = both(31, 0x7c);
    pub const WRMSR: Code = both(32, 0x7c);
    pub const INVALID_STATE: Code = both(33 | 1 << 31, u32::MAX);
    pub const MWAIT: Code = both(36, 0x8b);
    pub const MONITOR_TRAP: Code = both(37, 0x10003);
    pub const MONITOR: Code = both(39, 0x8a);
    pub const PAUSE: Code = both(40, 0x77);
    /// SVM: a write to the APIC that the silicon cannot complete; EXITINFO1 is the offset of the register, EXITINFO2 the vector.
    pub const EOI: Code = both(45, 0x402);
    /// SVM: an IPI that the silicon cannot complete; EXITINFO1 is the command.
    pub const APIC_WRITE: Code = both(56, 0x401);
    /// SVM adds the instruction: 0x66 reads and 0x6a writes, IDTR, GDTR, LDTR, TR.
    pub const GDTR_IDTR: Code = both(46, 0x66);
    pub const LDTR_TR: Code = both(47, 0x68);
    pub const NESTED_FAULT: Code = both(48, 0x400);
    pub const RDTSCP: Code = both(51, 0x87);
    /// Not on AMD silicon, whose hypervisors use the core's own timer.
    pub const PREEMPTION_TIMER: Code = both(52, 0x60);
    pub const WBINVD: Code = both(54, 0x89);
    pub const XSETBV: Code = both(55, 0x8d);
    pub const RDRAND: Code = both(57, 0x10004);
    pub const INVPCID: Code = both(58, 0xa2);
    pub const RDSEED: Code = both(61, 0x10005);
    /// The one instruction of an emulation is done.
    pub const EMULATED: Code = both(0x10000, 0x10000);
    /// An emulated instruction waits for a device access.
    pub const ACCESS: Code = both(0x10001, 0x10001);
    /// The instruction budget is used up.
    pub const BUDGET: Code = both(0x10002, 0x10002);
    /// The next instruction has a hidden breakpoint.
    pub const BREAKPOINT: Code = both(0x10006, 0x10006);
}

impl Cpu {
    /// Leaves the guest for `code`: `return Err(cpu.exit(code::CPUID, 0))`. `detail` is the exit qualification, or EXITINFO1.
    #[cold]
    pub fn exit(&mut self, code: Code, detail: u64) -> Stop {
        let reason = if self.model.is_amd() { code.svm } else { code.vmx };
        self.exit_number(reason, detail)
    }

    /// Leaves the guest with a number of the vendor's own.
    #[cold]
    pub fn exit_number(&mut self, reason: u32, detail: u64) -> Stop {
        self.exit =
            Exit { reason, qualification: detail, vectoring: self.vectoring, vectoring_error: self.vectoring_error, ..Exit::default() };
        Stop::Exit
    }

    /// A host interrupt arrived.
    #[cold]
    pub fn exit_external_interrupt(&mut self) -> Stop {
        self.exit(code::EXTERNAL_INTERRUPT, 0)
    }

    /// An NMI of the host arrived.
    #[cold]
    pub fn exit_nmi(&mut self) -> Stop {
        const NMI: u32 = 2 | 2 << 8 | 1 << 31;
        let stop = self.exit(code::NMI, 0);
        if !self.model.is_amd() {
            self.exit.interruption = NMI;
        }
        stop
    }

    /// A guest-physical access that the nested page table does not allow (SDM vol. 3, table 28-7; APM vol. 2, 15.25.6).
    #[cold]
    pub fn exit_nested(&mut self, gpa: u64, la: Option<u64>, kind: AccessKind, rights: u8, walk: bool) -> Stop {
        let rights = rights & (right::READ | right::WRITE | right::EXECUTE);
        let write = kind == AccessKind::Write;
        let fetch = kind == AccessKind::Fetch;
        if self.model.is_amd() {
            let code =
                u64::from(rights != 0) | u64::from(write) << 1 | 1 << 2 | u64::from(fetch) << 4 | if walk { 1 << 33 } else { 1 << 32 };
            let stop = self.exit(code::NESTED_FAULT, code);
            (self.exit.info2, self.exit.gpa, self.exit.gla) = (gpa, gpa, la.unwrap_or(0));
            return stop;
        }
        let access = match kind {
            AccessKind::Read => 1,
            AccessKind::Write if walk => 3,
            AccessKind::Write => 2,
            AccessKind::Fetch => 4,
        };
        let allowed = u64::from(rights) << 3;
        let linear = if la.is_some() { 1 << 7 | u64::from(!walk) << 8 } else { 0 };
        let stop = self.exit(code::NESTED_FAULT, access | allowed | linear);
        (self.exit.gpa, self.exit.gla) = (gpa, la.unwrap_or(0));
        stop
    }

    /// The instruction needs a device access that the hypervisor has not made yet.
    #[cold]
    pub fn exit_access(&mut self, access: Access, la: u64) -> Stop {
        let stop = self.exit(code::ACCESS, 0);
        (self.exit.access, self.exit.gpa, self.exit.gla) = (access, access.gpa, la);
        stop
    }

    /// The instruction at linear address `la` has a hidden breakpoint.
    #[cold]
    pub fn exit_breakpoint(&mut self, gpa: u64, la: u64) -> Stop {
        let stop = self.exit(code::BREAKPOINT, 0);
        (self.exit.gpa, self.exit.gla) = (gpa, la);
        stop
    }

    /// Fills what every exit tells about its instruction; RIP is at the instruction.
    #[cold]
    pub fn complete_exit(&mut self, uop: &Uop) {
        let length = u64::from(uop.length);
        self.exit.instruction_length = length as u32;
        if self.model.saves_next_rip() {
            self.exit.next_rip = self.rip_at(length);
        }
        self.capture_instruction(length);
    }

    fn capture_instruction(&mut self, length: u64) {
        for n in 0..length.min(15) {
            let la = self.rip_at(n).wrapping_add(self.segment_base(crate::state::seg::CS));
            let Some(host) = self.cached(la, 1, AccessKind::Fetch) else { break };
            // SAFETY: a fetch tag in the TLB means that the byte is mapped RAM.
            self.exit.instruction_bytes[n as usize] = unsafe { host.read_volatile() };
            self.exit.instruction_bytes_length = n as u32 + 1;
        }
    }
}
