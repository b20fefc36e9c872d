//! Accesses beside the one before, which need no look-up of their own.
//!
//! Behind the check of an access R13 has the addend of its page, and R15 how far into the page it is. As long as both stay, an access at a
//! known distance from that one, as most in a stack frame or in a structure are, is in the same page if one compare says so. Whatever
//! changes these registers ends that; who comes back from the interpreter has R15 far outside of any page.

use iced_x86::{Instruction, InstructionInfoFactory, Mnemonic, OpKind, Register};

use super::asm::{qword_ptr, Memory};
use super::block::written_registers;
use super::loops::moves_by;
use crate::memory::PAGE_SIZE;
use crate::paging::AccessKind;

/// In R15, what no compare takes for a place in a page.
pub const OUTSIDE: i32 = -1;

/// A linear address for host code.
#[derive(Clone, Copy)]
pub struct Linear {
    pub memory: Memory,
    /// The guest register to which the displacement is added, and nothing else; or none.
    pub base: Register,
}

impl From<Memory> for Linear {
    fn from(memory: Memory) -> Self {
        Linear { memory, base: Register::None }
    }
}

/// What R13 and R15 tell.
pub struct Near {
    /// Guest registers, each with how much more it is than the base of the access was.
    bases: Vec<(Register, i64)>,
    /// What the page lets through, and what each page that takes its place must: a read that finds itself in another one is looked up for a
    /// write, if a write relies on that behind it.
    pub kind: AccessKind,
    /// R15 is the place of what is so far from that base.
    at: i64,
}

impl Near {
    /// What they tell behind the look-up for an access at `address`.
    pub fn to(address: Linear, kind: AccessKind) -> Option<Self> {
        let near = Near { bases: vec![(address.base, 0)], kind, at: address.memory.displacement.into() };
        (address.base != Register::None).then_some(near)
    }

    /// How far the access to `bytes` at `address` is from where R15 is, if it is one beside it.
    pub fn distance(&self, address: Linear, bytes: usize, kind: AccessKind) -> Option<i32> {
        let base = self.bases.iter().find(|(base, _)| *base == address.base)?.1;
        let distance = base + i64::from(address.memory.displacement) - self.at;
        let allowed = kind == self.kind || kind == AccessKind::Read;
        (allowed && distance.unsigned_abs() + bytes as u64 <= PAGE_SIZE).then_some(distance as i32)
    }

    /// R15 is the place of what is `distance` bytes further on from now on.
    pub fn shift(&mut self, distance: i32) {
        self.at += i64::from(distance);
    }

    /// `insn` has run, and changed `written`.
    pub fn pass(&mut self, insn: &Instruction, written: &[Register]) {
        let source = (insn.mnemonic() == Mnemonic::Mov && insn.op1_kind() == OpKind::Register).then(|| insn.op1_register());
        let copied = source.and_then(|source| self.bases.iter().find(|(base, _)| *base == source).map(|(_, more)| *more));
        self.bases.retain_mut(|(base, more)| {
            if !written.contains(base) {
                return true;
            }
            let by = if *base == Register::RSP { stack_moves_by(insn) } else { moves_by(insn, *base) };
            by.and_then(|by| more.checked_add(by)).map(|sum| *more = sum).is_some()
        });
        self.bases.extend(copied.filter(|_| insn.op0_kind() == OpKind::Register).map(|more| (insn.op0_register(), more)));
    }
}

/// For each instruction: the next access of the block is beside the one that it makes, as far as the registers tell.
pub fn shares(instructions: &[Instruction], factory: &mut InstructionInfoFactory) -> Vec<bool> {
    let accesses: Vec<Option<Linear>> = instructions.iter().map(access).collect();
    let mut shared = vec![false; instructions.len()];
    let mut last: Option<(usize, Near)> = None;
    for (n, insn) in instructions.iter().enumerate() {
        if let Some(address) = accesses[n] {
            if let Some((before, near)) = &last {
                shared[*before] = near.distance(address, 1, AccessKind::Read).is_some();
            }
            last = Near::to(address, AccessKind::Read).map(|near| (n, near));
        }
        if let Some((_, near)) = &mut last {
            near.pass(insn, &written_registers(factory, insn));
        }
    }
    shared
}

/// Where `insn` accesses memory, if it does.
fn access(insn: &Instruction) -> Option<Linear> {
    let named = (0..insn.op_count()).any(|n| insn.op_kind(n) == OpKind::Memory) && insn.mnemonic() != Mnemonic::Lea;
    let plain = insn.memory_index() == Register::None && !matches!(insn.segment_prefix(), Register::FS | Register::GS);
    let base = if named && plain { insn.memory_base() } else { Register::None };
    let (base, displacement) = match insn.mnemonic() {
        Mnemonic::Push | Mnemonic::Call if !named => (Register::RSP, -8),
        Mnemonic::Pop | Mnemonic::Ret if !named => (Register::RSP, 0),
        _ if !named => return None,
        _ => (base, insn.memory_displacement64() as i32),
    };
    Some(Linear { memory: qword_ptr(base, displacement), base })
}

/// How far `insn` moves RSP, if that is all that it does to it.
fn stack_moves_by(insn: &Instruction) -> Option<i64> {
    let named = insn.op0_kind() == OpKind::Register && insn.op0_register() == Register::RSP;
    match insn.mnemonic() {
        Mnemonic::Push | Mnemonic::Pushfq => Some(insn.stack_pointer_increment().into()),
        Mnemonic::Pop if !named => Some(insn.stack_pointer_increment().into()),
        _ => moves_by(insn, Register::RSP),
    }
}
