//! Transfers of control by kind, as branch records, branch events and LBR filters tell them apart (SDM vol. 3, 18.9.2 and 20.3.1.2;
//! the numbers are those of `softkvm/silicon/pmu.py`).

use iced_x86::{Code, ConditionCode, Instruction, Mnemonic, OpKind};

use crate::cpu::Cpu;
use crate::decode::block::Block;
use crate::exec::select::holds;
use crate::flags::Flags;
use crate::state::gpr;
use crate::uop::Uop;

/// What transfers control.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// No transfer; in the branch log, a change of CR3.
    None = 0,
    /// Jcc and JrCXZ.
    Conditional,
    Loop,
    Jump,
    IndirectJump,
    Call,
    /// CALL to the next instruction, which position-independent code uses to read RIP.
    ZeroCall,
    IndirectCall,
    Return,
    FarJump,
    FarCall,
    FarReturn,
    /// SYSCALL and SYSENTER.
    Syscall,
    /// SYSRET and SYSEXIT.
    Sysret,
    Iret,
    /// INT n, INT1, INT3 and INTO.
    SoftwareInterrupt,
    Exception,
    /// External interrupts and NMIs.
    Interrupt,
}

/// How many kinds there are.
pub const KINDS: usize = Kind::ALL.len();

impl Kind {
    /// Every kind, in the order of their numbers.
    pub const ALL: [Kind; 18] = {
        use Kind::*;
        [
            None,
            Conditional,
            Loop,
            Jump,
            IndirectJump,
            Call,
            ZeroCall,
            IndirectCall,
            Return,
            FarJump,
            FarCall,
            FarReturn,
            Syscall,
            Sysret,
            Iret,
            SoftwareInterrupt,
            Exception,
            Interrupt,
        ]
    };

    /// Bit of the kind in a set of kinds.
    pub const fn bit(self) -> u32 {
        1 << self as u32
    }

    /// Whether an instruction of the kind never falls through: all but conditional branches and INTO.
    #[inline(always)]
    pub const fn always_taken(self) -> bool {
        const MAYBE: u32 = Kind::None.bit() | Kind::Conditional.bit() | Kind::Loop.bit() | Kind::SoftwareInterrupt.bit();
        MAYBE & self.bit() == 0
    }

    /// The kind of an instruction.
    pub fn of(insn: &Instruction) -> Kind {
        use Mnemonic::*;
        match insn.mnemonic() {
            Jmp if is_far(insn) => Kind::FarJump,
            Jmp if is_relative(insn) => Kind::Jump,
            Jmp => Kind::IndirectJump,
            Call if is_far(insn) => Kind::FarCall,
            Call if is_relative(insn) && insn.near_branch_target() == insn.next_ip() => Kind::ZeroCall,
            Call if is_relative(insn) => Kind::Call,
            Call => Kind::IndirectCall,
            Ret => Kind::Return,
            Retf => Kind::FarReturn,
            Iret | Iretd | Iretq => Kind::Iret,
            Syscall | Sysenter => Kind::Syscall,
            Sysret | Sysretq | Sysexit | Sysexitq => Kind::Sysret,
            Int | Int1 | Int3 | Into => Kind::SoftwareInterrupt,
            Loop | Loope | Loopne => Kind::Loop,
            _ if insn.is_jcc_short_or_near() || insn.is_jcx_short() => Kind::Conditional,
            _ => Kind::None,
        }
    }
}

fn is_far(insn: &Instruction) -> bool {
    let memory =
        matches!(insn.code(), Code::Jmp_m1616 | Code::Jmp_m1632 | Code::Jmp_m1664 | Code::Call_m1616 | Code::Call_m1632 | Code::Call_m1664);
    memory || matches!(insn.op0_kind(), OpKind::FarBranch16 | OpKind::FarBranch32)
}

fn is_relative(insn: &Instruction) -> bool {
    matches!(insn.op0_kind(), OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64)
}

/// Whether the branch at the end of `block` was taken, after which RIP is at the next instruction: not, unless that is its target. Jcc
/// changes no flags and JrCXZ no count, and LOOPcc leaves the count that it decided on.
pub fn taken_in_place(cpu: &Cpu, block: &Block) -> bool {
    let branch = &block.uops[block.instructions as usize - 1];
    let conditional = matches!(block.branch, Kind::Conditional | Kind::Loop);
    conditional && branch.imm == branch.next_offset() && would_take(cpu, branch)
}

#[cold]
fn would_take(cpu: &Cpu, branch: &Uop) -> bool {
    use Code::*;
    let Ok(code) = Code::try_from(usize::from(branch.code)) else { return false };
    let count = match code {
        Jcxz_rel8_16 | Jcxz_rel8_32 | Loop_rel8_16_CX | Loop_rel8_32_CX | Loope_rel8_16_CX | Loope_rel8_32_CX | Loopne_rel8_16_CX
        | Loopne_rel8_32_CX => cpu.gpr(gpr::RCX) & 0xffff,
        Jrcxz_rel8_16 | Jrcxz_rel8_64 | Loop_rel8_16_RCX | Loop_rel8_64_RCX | Loope_rel8_16_RCX | Loope_rel8_64_RCX
        | Loopne_rel8_16_RCX | Loopne_rel8_64_RCX => cpu.gpr(gpr::RCX),
        _ => cpu.gpr(gpr::RCX) & 0xffff_ffff,
    };
    match code.mnemonic() {
        Mnemonic::Jcxz | Mnemonic::Jecxz | Mnemonic::Jrcxz => count == 0,
        Mnemonic::Loop => count != 0,
        Mnemonic::Loope => count != 0 && cpu.flags.zf(),
        Mnemonic::Loopne => count != 0 && !cpu.flags.zf(),
        _ => condition_holds(code.condition_code(), cpu.flags),
    }
}

fn condition_holds(condition: ConditionCode, flags: Flags) -> bool {
    match condition {
        ConditionCode::o => holds::<0>(flags),
        ConditionCode::no => holds::<1>(flags),
        ConditionCode::b => holds::<2>(flags),
        ConditionCode::ae => holds::<3>(flags),
        ConditionCode::e => holds::<4>(flags),
        ConditionCode::ne => holds::<5>(flags),
        ConditionCode::be => holds::<6>(flags),
        ConditionCode::a => holds::<7>(flags),
        ConditionCode::s => holds::<8>(flags),
        ConditionCode::ns => holds::<9>(flags),
        ConditionCode::p => holds::<10>(flags),
        ConditionCode::np => holds::<11>(flags),
        ConditionCode::l => holds::<12>(flags),
        ConditionCode::ge => holds::<13>(flags),
        ConditionCode::le => holds::<14>(flags),
        ConditionCode::g => holds::<15>(flags),
        ConditionCode::None => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Decoder, DecoderOptions};

    fn kind(bits: u32, bytes: &[u8]) -> Kind {
        Kind::of(&Decoder::with_ip(bits, bytes, 0x100, DecoderOptions::NONE).decode())
    }

    #[test]
    fn kinds_are_numbered_in_their_order() {
        assert!(Kind::ALL.iter().enumerate().all(|(n, kind)| *kind as usize == n));
    }

    #[test]
    fn every_transfer_has_its_kind() {
        for (bytes, expected) in [
            (&[0x75, 0x10][..], Kind::Conditional),
            (&[0x0f, 0x84, 0, 1, 0, 0], Kind::Conditional),
            (&[0xe3, 0x10], Kind::Conditional),
            (&[0xe2, 0x10], Kind::Loop),
            (&[0xe0, 0x10], Kind::Loop),
            (&[0xeb, 0x10], Kind::Jump),
            (&[0xe9, 0, 1, 0, 0], Kind::Jump),
            (&[0xff, 0xe0], Kind::IndirectJump),
            (&[0xff, 0x20], Kind::IndirectJump),
            (&[0xe8, 0, 1, 0, 0], Kind::Call),
            (&[0xe8, 0, 0, 0, 0], Kind::ZeroCall),
            (&[0xff, 0xd0], Kind::IndirectCall),
            (&[0xff, 0x10], Kind::IndirectCall),
            (&[0xc3], Kind::Return),
            (&[0xc2, 8, 0], Kind::Return),
            (&[0xff, 0x28], Kind::FarJump),
            (&[0xff, 0x18], Kind::FarCall),
            (&[0xcb], Kind::FarReturn),
            (&[0x48, 0xcf], Kind::Iret),
            (&[0x0f, 0x05], Kind::Syscall),
            (&[0x0f, 0x34], Kind::Syscall),
            (&[0x48, 0x0f, 0x07], Kind::Sysret),
            (&[0x0f, 0x35], Kind::Sysret),
            (&[0xcd, 0x80], Kind::SoftwareInterrupt),
            (&[0xcc], Kind::SoftwareInterrupt),
            (&[0xf1], Kind::SoftwareInterrupt),
            (&[0x0f, 0x01, 0xc1], Kind::None),
            (&[0xf4], Kind::None),
            (&[0x0f, 0x0b], Kind::None),
            (&[0x90], Kind::None),
        ] {
            assert_eq!(kind(64, bytes), expected, "{bytes:02x?}");
        }
        assert_eq!(kind(32, &[0xea, 0, 0, 0, 0, 8, 0]), Kind::FarJump);
        assert_eq!(kind(32, &[0x9a, 0, 0, 0, 0, 8, 0]), Kind::FarCall);
        assert_eq!(kind(32, &[0xce]), Kind::SoftwareInterrupt);
    }
}
