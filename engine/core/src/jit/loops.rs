//! Which blocks are loops whose accesses host code can check once for many turns.
//!
//! Such a block ends with a conditional jump to its own start, and every address in it moves by the same distance in each turn. From where
//! the accesses are when a turn begins follows how many turns keep all of them in the pages in which they are, so that many turns need no
//! look at the TLB and cannot fault. [`super::turns`] is their host code.

use iced_x86::{Instruction, InstructionInfo, InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register};

use super::access::MAX_DISPLACEMENT;
use super::asm::{qword_ptr, Memory};
use super::block::{may_keep_flags, point_to, ALL_FLAGS};
use super::flags::{Recipe, Rule};
use super::plan::Plan;
use super::registers::{self, host, PINNED, SCRATCH};
use super::vector;
use crate::memory::PAGE_SIZE;

/// Groups of accesses that a loop may have.
pub const GROUPS: usize = 4;
/// The farthest that an address may move in a turn: more would leave its page at once.
const MAX_STRIDE: u64 = PAGE_SIZE / 4;

/// Accesses at constant distances from each other.
#[derive(Clone, Debug)]
pub struct Group {
    pub base: Register,
    pub index: Register,
    pub scale: u8,
    /// How far they move in a turn.
    pub stride: i64,
    /// What their addresses have at least, and less than, added to base and index when a turn begins.
    pub low: i64,
    pub high: i64,
    pub reads: bool,
    pub writes: bool,
    /// Bytes to which the address with this displacement is aligned.
    pub alignment: Option<(i64, i64)>,
    /// Whether base and index are the same in all turns.
    pub fixed_base: bool,
    pub fixed_index: bool,
    /// The host register of what is added to the rest of the address.
    pub place: Register,
}

/// A loop of one block.
#[derive(Debug)]
pub struct Loop {
    pub groups: Vec<Group>,
    /// What is run in a turn but for the jump, each with the group of its memory operand.
    pub body: Vec<(Instruction, Option<usize>)>,
    /// How the flags at the end of a turn are made.
    pub recipe: Recipe,
    /// Guest registers that stay in memory elsewhere, with their host registers in here.
    pub residents: Vec<(Register, Register)>,
    /// Guest registers that the loop has no use for, whose host registers it takes.
    pub lent: Vec<(Register, Register)>,
}

impl Loop {
    /// The loop that a block of `instructions` is, if it is one.
    pub fn of(instructions: &[Instruction], plans: &[Plan]) -> Option<Self> {
        let (last, body) = instructions.split_last()?;
        let closed = plans.last() == Some(&Plan::Conditional) && last.near_branch_target() == 0;
        if !closed || !body.iter().zip(plans).all(|(insn, plan)| is_plain(insn, *plan)) || !flags_are_own(instructions, plans) {
            return None;
        }
        let mut factory = InstructionInfoFactory::new();
        let infos: Vec<InstructionInfo> = body.iter().map(|insn| factory.info(insn).clone()).collect();
        let recipe = last_recipe(body, &infos)?;
        let mut groups: Vec<Group> = Vec::new();
        let mut members = Vec::new();
        for (n, insn) in body.iter().enumerate().filter(|(n, _)| plans[*n] != Plan::Nothing) {
            let operand = memory_operand(insn);
            let group = operand.map(|operand| access(body, &infos, n, operand).and_then(|new| join(&mut groups, new)));
            members.push((*insn, if operand.is_some() { Some(group.flatten()?) } else { None }));
        }
        if groups.is_empty() || groups.len() > GROUPS {
            return None;
        }
        let (residents, lent) = places(&infos, &mut groups)?;
        Some(Loop { groups, body: members, recipe, residents, lent })
    }
}

/// Whether `insn` can be run by the host on registers and memory of which nothing else is known: whatever it does, it does not fault, but
/// for its memory operand.
fn is_plain(insn: &Instruction, plan: Plan) -> bool {
    use Mnemonic::*;
    let suitable = match plan {
        Plan::Same(_) => !matches!(insn.mnemonic(), Xchg | Xadd | Cmpxchg | Cmpxchg8b | Cmpxchg16b),
        Plan::Media(units) => !units.x87,
        Plan::Lea => insn.memory_base() != Register::RIP,
        Plan::Nothing => true,
        _ => false,
    };
    suitable && !insn.has_lock_prefix() && !matches!(insn.segment_prefix(), Register::FS | Register::GS)
}

/// Number of the operand that is in memory.
fn memory_operand(insn: &Instruction) -> Option<u32> {
    (0..insn.op_count()).find(|n| insn.mnemonic() != Mnemonic::Lea && insn.op_kind(*n) == OpKind::Memory)
}

/// Whether no turn sees flags that it has not made, nor such that are not the host's.
fn flags_are_own(instructions: &[Instruction], plans: &[Plan]) -> bool {
    let mut live = ALL_FLAGS;
    for (insn, plan) in instructions.iter().zip(plans).rev() {
        let changed = insn.rflags_modified() & ALL_FLAGS;
        let inexact = match plan {
            Plan::Same(Rule::Exact) | Plan::Media(_) => 0,
            Plan::Same(rule) if rule.keeps_flags() => ALL_FLAGS,
            _ => changed,
        };
        if inexact & live != 0 {
            return false;
        }
        let replaced = if may_keep_flags(insn) { 0 } else { changed };
        live = live & !replaced | insn.rflags_read() & ALL_FLAGS;
    }
    live == 0
}

/// The recipe for the flags behind `body`.
fn last_recipe(body: &[Instruction], infos: &[InstructionInfo]) -> Option<Recipe> {
    let maker = body.iter().rposition(|insn| insn.rflags_modified() & ALL_FLAGS != 0)?;
    let recipe = Recipe::of(&body[maker])?;
    let lost = infos[maker + 1..].iter().any(|info| recipe.loses(|guest| writes(info, guest)));
    (!lost).then_some(recipe)
}

fn changes(access: OpAccess) -> bool {
    use OpAccess::*;
    matches!(access, Write | ReadWrite | CondWrite | ReadCondWrite)
}

fn writes(info: &InstructionInfo, guest: Register) -> bool {
    info.used_registers().iter().any(|used| changes(used.access()) && used.register().full_register() == guest)
}

/// How far `insn` moves a register, if that is all that it does to it.
pub fn moves_by(insn: &Instruction, guest: Register) -> Option<i64> {
    let target = insn.op0_kind() == OpKind::Register && insn.op0_register() == guest;
    let immediate = insn.op_count() == 2 && insn.op1_kind() != OpKind::Register && insn.op1_kind() != OpKind::Memory;
    match insn.mnemonic() {
        _ if !target => None,
        Mnemonic::Add if immediate => Some(insn.immediate(1) as i64),
        Mnemonic::Sub if immediate => (insn.immediate(1) as i64).checked_neg(),
        Mnemonic::Inc => Some(1),
        Mnemonic::Dec => Some(-1),
        Mnemonic::Lea if insn.memory_base() == guest && insn.memory_index() == Register::None => Some(insn.memory_displacement64() as i64),
        _ => None,
    }
}

/// How far a register moves in each turn, and how far until instruction `n`; `None` if that is not the same in all turns.
fn motion(body: &[Instruction], infos: &[InstructionInfo], n: usize, guest: Register) -> Option<(i64, i64)> {
    let mut writers = (0..body.len()).filter(|n| writes(&infos[*n], guest));
    let Some(writer) = writers.next() else { return Some((0, 0)) };
    let stride = moves_by(&body[writer], guest).filter(|stride| stride.unsigned_abs() <= MAX_STRIDE)?;
    writers.next().is_none().then_some((stride, if writer < n { stride } else { 0 }))
}

/// The access of instruction `n`, as a group of its own.
fn access(body: &[Instruction], infos: &[InstructionInfo], n: usize, operand: u32) -> Option<Group> {
    let insn = &body[n];
    let (base, index, scale) = (insn.memory_base(), insn.memory_index(), insn.memory_index_scale());
    let of = |register| if register == Register::None { Some((0, 0)) } else { motion(body, infos, n, register) };
    let ((base_stride, base_moved), (index_stride, index_moved)) = (of(base)?, of(index)?);
    let stride = base_stride + index_stride * i64::from(scale);
    if base_stride != 0 && index_stride != 0 || stride.unsigned_abs() > MAX_STRIDE {
        return None;
    }
    let low = insn.memory_displacement64() as i64 + base_moved + index_moved * i64::from(scale);
    let bytes = insn.memory_size().size() as i64;
    let how = infos[n].op_access(operand);
    let reads = matches!(how, OpAccess::Read | OpAccess::ReadWrite | OpAccess::CondRead | OpAccess::ReadCondWrite);
    let alignment = vector::is_aligned(insn).then_some((bytes, low));
    let in_reach = low.unsigned_abs() < u64::from(MAX_DISPLACEMENT) - 2 * PAGE_SIZE;
    (in_reach && alignment.is_none_or(|(bytes, _)| stride % bytes == 0)).then_some(Group {
        base,
        index,
        scale: scale as u8,
        stride,
        low,
        high: low + bytes,
        reads,
        writes: changes(how),
        alignment,
        fixed_base: base_stride == 0,
        fixed_index: index_stride == 0,
        place: Register::None,
    })
}

/// Adds an access to the group that it belongs to; `None` if one check cannot do for both.
fn join(groups: &mut Vec<Group>, new: Group) -> Option<usize> {
    let alike = |group: &Group| (group.base, group.index, group.scale) == (new.base, new.index, new.scale);
    let Some(at) = groups.iter().position(alike) else {
        groups.push(new);
        return Some(groups.len() - 1);
    };
    let group = &mut groups[at];
    (group.low, group.high) = (group.low.min(new.low), group.high.max(new.high));
    group.reads |= new.reads;
    group.writes |= new.writes;
    match (group.alignment, new.alignment) {
        (Some((bytes, one)), Some((others, other))) if bytes != others || (one - other) % bytes != 0 => return None,
        (known, new) => group.alignment = known.or(new),
    }
    (group.high - group.low <= PAGE_SIZE as i64 / 4).then_some(at)
}

type Places = Vec<(Register, Register)>;

/// Gives the groups, and guest registers that stay in memory elsewhere, host registers of their own. Tells those of guest registers, and
/// those that were lent.
fn places(infos: &[InstructionInfo], groups: &mut [Group]) -> Option<(Places, Places)> {
    let used: Vec<Register> = infos.iter().flat_map(|info| info.used_registers()).map(|used| used.register().full_register()).collect();
    let idle = PINNED.iter().rev().filter(|(guest, _)| !used.contains(guest) && *guest != Register::RSP);
    let mut free = SCRATCH.iter().map(|place| (Register::None, *place)).chain(idle.copied());
    let mut lent = Vec::new();
    let mut take = || {
        let (guest, place) = free.next()?;
        lent.extend((guest != Register::None).then_some((guest, place)));
        Some(place)
    };
    for group in groups {
        group.place = take()?;
    }
    let mut residents: Places = Vec::new();
    for guest in used.iter().copied().filter(|register| register.is_gpr64() && host(*register).is_none()) {
        if residents.iter().all(|(known, _)| *known != guest) {
            residents.push((guest, take()?));
        }
    }
    Some((residents, lent))
}

impl Loop {
    /// The host register of a guest register in the loop.
    fn place(&self, guest: Register) -> Register {
        let resident = self.residents.iter().find(|(known, _)| *known == guest).map(|(_, place)| *place);
        resident.or_else(|| host(guest)).unwrap_or_else(|| unreachable!("the loop has a place for all it uses"))
    }

    /// `insn`, whose memory operand is one of `group`, on what the host has in the place of the guest's registers.
    pub fn placed(&self, insn: &Instruction, group: Option<usize>) -> Instruction {
        let mut placed = vector::cached(insn);
        for n in 0..insn.op_count() {
            match insn.op_kind(n) {
                OpKind::Register => {
                    let register = insn.op_register(n);
                    if !registers::is_high_byte(register) && !registers::is_media(register) {
                        placed.set_op_register(n, registers::resized(self.place(register.full_register()), register));
                    }
                }
                OpKind::Memory => point_to(&mut placed, self.address(insn, group)),
                _ => {}
            }
        }
        placed
    }

    /// The memory operand of `insn`, or for LEA what it computes.
    fn address(&self, insn: &Instruction, group: Option<usize>) -> Memory {
        let part = |register| if register == Register::None { register } else { self.place(register) };
        let (base, index, scale) = (insn.memory_base(), insn.memory_index(), insn.memory_index_scale() as u8);
        let displacement = insn.memory_displacement64() as i32;
        match group.map(|n| &self.groups[n]) {
            None => qword_ptr(part(base), displacement).index(part(index), scale),
            Some(group) if !group.fixed_base => qword_ptr(part(base), displacement).index(group.place, 1),
            Some(group) if !group.fixed_index => qword_ptr(group.place, displacement).index(part(index), scale),
            Some(group) => qword_ptr(group.place, displacement),
        }
    }
}

#[cfg(test)]
mod tests {
    use iced_x86::{Decoder, DecoderOptions};

    use super::super::plan::{plan, Host};
    use super::*;
    use crate::decode::liveness::live_flags;
    use crate::model::Model;

    fn of(code: &[u8]) -> Option<Loop> {
        let block: Vec<Instruction> = Decoder::new(64, code, DecoderOptions::NONE).into_iter().collect();
        let model = Model::new("cascadelake", &[]).unwrap();
        let live = live_flags(&block, model.silicon());
        let plans: Vec<Plan> = block.iter().zip(&live).map(|(insn, live)| plan(insn, *live, Host::new(), &model)).collect();
        Loop::of(&block, &plans)
    }

    #[test]
    fn a_copy_has_two_groups() {
        // again: mov rdx, [rcx+rax]; mov [rsi+rax], rdx; add rax, 8; cmp rax, rdi; jne again
        let found = of(&[0x48, 0x8b, 0x14, 0x01, 0x48, 0x89, 0x14, 0x06, 0x48, 0x83, 0xc0, 0x08, 0x48, 0x39, 0xf8, 0x75, 0xef]).unwrap();
        let shapes: Vec<_> = found.groups.iter().map(|group| (group.stride, group.low, group.high, group.reads, group.writes)).collect();
        assert_eq!(shapes, [(8, 0, 8, true, false), (8, 0, 8, false, true)]);
    }

    #[test]
    fn what_moved_before_an_access_is_part_of_its_distance() {
        // again: add rax, 16; mov edx, [rax-16]; add [rax+4], edx; cmp rax, rdi; jne again
        let found = of(&[0x48, 0x83, 0xc0, 0x10, 0x8b, 0x50, 0xf0, 0x01, 0x50, 0x04, 0x48, 0x39, 0xf8, 0x75, 0xf1]).unwrap();
        let group = &found.groups[0];
        assert_eq!((found.groups.len(), group.stride, group.low, group.high), (1, 16, 0, 24));
    }

    #[test]
    fn other_blocks_are_none() {
        // again: mov rax, [rax]; cmp rax, rdi; jne again
        assert!(of(&[0x48, 0x8b, 0x00, 0x48, 0x39, 0xf8, 0x75, 0xf8]).is_none());
        // again: mov [rax], dl; inc rax; dec rcx; jne again: CF comes from the turn before
        assert!(of(&[0x88, 0x10, 0x48, 0xff, 0xc0, 0x48, 0xff, 0xc9, 0x75, 0xf6]).is_none());
        // again: mov [rax], dl; add eax, 1; cmp rax, rdi; jne again: the address may wrap
        assert!(of(&[0x88, 0x10, 0x83, 0xc0, 0x01, 0x48, 0x39, 0xf8, 0x75, 0xf6]).is_none());
        // again: mov [rax], dl; add rax, 4096; cmp rax, rdi; jne again
        assert!(of(&[0x88, 0x10, 0x48, 0x05, 0x00, 0x10, 0, 0, 0x48, 0x39, 0xf8, 0x75, 0xf3]).is_none());
        // again: add rax, 1; cmp rax, rdi; jne again
        assert!(of(&[0x48, 0x83, 0xc0, 0x01, 0x48, 0x39, 0xf8, 0x75, 0xf7]).is_none());
    }
}
