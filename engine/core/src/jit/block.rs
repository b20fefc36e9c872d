//! The translation of one block.

use iced_x86::Register::{R13, R14, R15};
use iced_x86::{Instruction, InstructionInfoFactory, MemorySize, Mnemonic, OpAccess, OpKind, Register};

use super::access::MAX_DISPLACEMENT;
use super::asm::{qword_ptr, Asm, Label, Memory};
use super::backend::Arrival;
use super::emit::{cpu_field, in_memory, Emitter, Places};
use super::exits::ExitSite;
use super::flags::{settled, Recipe, Rule};
use super::loops::Loop;
use super::native::PAGE;
use super::near::{shares, Linear};
use super::plan::{plan, Host, Plan};
use super::registers::{self, host, resized, STACK};
use super::vector::{self, Units};
use super::watched::Branch;
use super::x87;
use crate::cpu::Cpu;
use crate::decode::block::Block;
use crate::decode::liveness::live_flags;
use crate::exec;
use crate::model::Model;
use crate::paging::AccessKind;
use crate::state::rflags::ARITHMETIC;
use crate::state::seg;

/// Host code of a block, which the assembler has.
pub struct Code {
    /// Where the dispatcher enters it, behind the head.
    pub body: Label,
    pub exits: Vec<ExitSite>,
    /// It is of use to come with flags that are not in memory.
    pub takes_recipes: bool,
    /// The site of each of its cells.
    pub cells: Vec<u16>,
}

/// What a back end knows before it translates a block.
#[derive(Clone, Copy)]
pub struct Ground {
    pub host: Host,
    pub places: Places,
    /// Distance of the next cell from the start of the code.
    pub first_cell: i32,
}

/// Translates `block`, which was made from `instructions`; `None` if an instruction cannot be encoded, or the dispatcher
/// must see what it is.
pub fn translate(
    asm: &mut Asm,
    block: &Block,
    instructions: &[Instruction],
    model: &Model,
    ground: Ground,
    arrival: Arrival,
) -> Option<Code> {
    let live = live_flags(instructions, model.silicon());
    let plans: Vec<Plan> = instructions.iter().zip(&live).map(|(insn, live)| plan(insn, *live, ground.host, model)).collect();
    let branch = Branch::of(block);
    if branch.is_some() && plans.iter().all(|plan| matches!(plan, Plan::Interpret)) {
        return None; // a LOOP may turn in its place, and who watches wants to know of every turn
    }
    let units = plans.iter().fold(Units::default(), |all, plan| all.and(plan.units()));
    let last_x87 = instructions.iter().rposition(|insn| x87::sets_pointer(insn.mnemonic()));
    let settled = settled(instructions, &plans);
    let found = if branch.is_none() { Loop::of(instructions, &plans) } else { None };
    let mut info = InstructionInfoFactory::new();
    let shared = shares(instructions, &mut info);
    let out = Emitter::new(asm, ground, block, units, model.silicon(), arrival);
    let mut translation = Translation { out, info, branch };
    let body = translation.out.head(block.instructions);
    translation.out.enter_units();
    let mut ended = false;
    for (index, insn) in instructions.iter().enumerate() {
        let before = if index == 0 { ARITHMETIC } else { live[index - 1] };
        let (seen_before, seen_behind) = (before != 0, live[index] != 0);
        let place = Place { index, seen_before, seen_behind, settled_behind: settled[index + 1] };
        translation.out.shared = shared[index];
        ended = match &found {
            Some(found) if index + 1 == instructions.len() => translation.close(insn, found, block.instructions as i32),
            _ => translation.instruction(insn, plans[index], place),
        };
        if last_x87 == Some(index) {
            translation.out.point_x87(insn.ip());
        }
    }
    if !ended {
        translation.out.save_flags();
        let steered = plans.last() == Some(&Plan::Interpret) && instructions.last().is_some_and(exec::ends_block);
        translation.out.exit(block.length.into(), steered);
    }
    let (exits, cells) = translation.out.finish()?;
    Some(Code { body, exits, takes_recipes: !settled[0] && found.is_none(), cells })
}

/// An instruction's number in its block, and whether anybody sees the flags before it and behind it.
#[derive(Clone, Copy)]
pub(super) struct Place {
    pub(super) index: usize,
    pub(super) seen_before: bool,
    pub(super) seen_behind: bool,
    /// The flags behind it must be in memory before they are replaced, whatever is done until then.
    pub(super) settled_behind: bool,
}

pub(super) struct Translation<'a> {
    pub(super) out: Emitter<'a>,
    info: InstructionInfoFactory,
    /// The branch at the end of the block, if somebody watches it.
    pub(super) branch: Option<Branch>,
}

impl Translation<'_> {
    /// Translates one instruction; true if nothing behind it is reached.
    fn instruction(&mut self, insn: &Instruction, plan: Plan, place: Place) -> bool {
        let keeps_flags = !makes_flags(insn, plan);
        if keeps_flags && place.seen_behind {
            let written = written_registers(&mut self.info, insn);
            self.out.keep_operands(|guest| written.contains(&guest));
        }
        let ended = self.host_code(insn, plan, place);
        if keeps_flags || self.out.near.is_some() {
            let written = written_registers(&mut self.info, insn);
            self.out.near.iter_mut().for_each(|near| near.pass(insn, &written));
            if keeps_flags {
                self.out.lose_operands(|guest| written.contains(&guest));
            }
        }
        ended
    }

    fn host_code(&mut self, insn: &Instruction, plan: Plan, place: Place) -> bool {
        match plan {
            Plan::Same(rule) => self.same(insn, rule, place),
            Plan::Media(_) => self.media(insn, place),
            Plan::LoadControl => self.load_control(insn, place),
            Plan::Divide => self.divide(insn, place),
            Plan::ShiftByCl => self.shift_by_cl(insn, place),
            Plan::Rotate(count) => self.rotate(insn, count, place),
            Plan::Scan => self.scan(insn, place),
            Plan::PushFlags => self.push_flags(place),
            Plan::DisableInterrupts => self.disable_interrupts(place),
            Plan::Direction(down) => self.set_direction(down, place),
            Plan::Repeat => self.repeat(insn, place),
            Plan::SwapGs => self.swap_gs(place),
            Plan::UserPages(allow) => self.allow_user_pages(allow, place),
            Plan::PushMemory => self.push_memory(insn, place),
            Plan::EnableInterrupts => self.enable_interrupts(place),
            Plan::ReadControl(number) => self.read_control(insn, number, place),
            Plan::ReadSegment => self.read_segment(insn),
            Plan::ReadKeys => self.read_keys(place),
            Plan::ReadTime(aux) => self.read_time(aux, place),
            Plan::SystemCall => self.system_call(insn, place),
            Plan::SystemReturn => self.system_return(place),
            Plan::Lea => self.lea(insn),
            Plan::Nothing => {}
            Plan::Push => self.push(insn, place),
            Plan::Pop => self.pop(insn, place),
            Plan::Leave => self.leave(place),
            Plan::Interpret => self.out.interpret(place.index),
            Plan::Conditional => self.conditional(insn),
            Plan::JumpRelative => self.jump_relative(insn),
            Plan::JumpIndirect => self.jump_indirect(insn, place),
            Plan::CallRelative => self.call_relative(insn, place),
            Plan::CallIndirect => self.call_indirect(insn, place),
            Plan::Return => self.ret(insn, place),
        }
        use Plan::*;
        matches!(plan, Conditional | JumpRelative | JumpIndirect | CallRelative | CallIndirect | Return | SystemCall | SystemReturn)
    }

    // ---- operations -----------------------------------------------------------------------------------------------------------------

    /// The same operation on the operands where they are on the host.
    pub(super) fn same(&mut self, insn: &Instruction, rule: Rule, place: Place) {
        let (reads, modifies) = (insn.rflags_read(), insn.rflags_modified());
        let operand = (0..insn.op_count()).find(|n| insn.op_kind(*n) == OpKind::Memory);
        if rule.keeps_flags() {
            self.out.flush_flags(place.seen_before);
        }
        let memory = operand.map(|operand| {
            self.out.clobber_flags(place.seen_before);
            let miss = self.out.detour(place.index);
            let address = self.operand_address(insn);
            let bytes = insn.memory_size().size();
            let kind = if self.writes(insn, operand) { AccessKind::Write } else { AccessKind::Read };
            if insn.has_lock_prefix() || insn.mnemonic() == iced_x86::Mnemonic::Xchg || vector::is_aligned(insn) {
                self.out.require_alignment(address.memory, bytes, miss);
            }
            self.out.access(address, bytes, kind, miss)
        });
        let partial = modifies != 0 && (modifies != ALL_FLAGS || may_keep_flags(insn));
        if reads & ALL_FLAGS != 0 || partial && place.seen_behind {
            self.out.need_flags();
        }
        if rule.keeps_flags() {
            self.out.clobber_flags(place.seen_behind);
        }
        let result = self.with_operands(insn, memory, rule);
        if modifies != 0 {
            self.out.new_flags(rule, result, place.seen_behind);
            self.out.remember(Recipe::of(insn).filter(|_| !place.settled_behind));
        }
        if memory.is_some() {
            self.out.rejoin();
        }
    }

    /// Emits `insn` with its operands replaced: registers by where they live, memory by `memory`, which has taken R13, and R14 if that is
    /// its base. Returns the host register with the result, if that is a register; for products in RDX:RAX the low half.
    pub(super) fn with_operands(&mut self, insn: &Instruction, memory: Option<Memory>, rule: Rule) -> Register {
        // The code behind some rules has R14 for itself; where none has, R13 and R15 are left to who relies on them.
        let alone = matches!(rule, Rule::Exact | Rule::Shift(_));
        let free: &[Register] = match memory {
            Some(memory) if !alone || memory.base == R14 => &[R15],
            Some(_) => &[R14, R15],
            None if alone => &[R14, R13],
            None => &[R13, R14],
        };
        let mut free = free.iter().copied();
        let mut changed = vector::cached(insn);
        let mut loaded: Vec<(Register, Register)> = Vec::new();
        let mut stores = Vec::new();
        for n in 0..insn.op_count() {
            match insn.op_kind(n) {
                OpKind::Register => {
                    let register = insn.op_register(n);
                    if registers::is_high_byte(register) || registers::is_media(register) {
                        continue;
                    }
                    let full = register.full_register();
                    // A register that is named twice is one on the host too.
                    let known = host(full).or_else(|| loaded.iter().find(|(guest, _)| *guest == full).map(|(_, place)| *place));
                    let place = known.unwrap_or_else(|| free.next().unwrap_or_else(|| unreachable!("the plan counts them")));
                    if known.is_none() {
                        if !self.replaces(insn, n) {
                            self.out.asm.mov(place, in_memory(full));
                        }
                        loaded.push((full, place));
                    }
                    if host(full).is_none() && self.writes(insn, n) {
                        stores.push((full, place));
                    }
                    changed.set_op_register(n, resized(place, register));
                }
                OpKind::Memory => memory.into_iter().for_each(|memory| point_to(&mut changed, memory)),
                _ => {}
            }
        }
        self.out.add(changed);
        for (full, place) in stores {
            self.out.asm.mov(in_memory(full), place);
        }
        if changed.op_count() == 1 {
            accumulator(width(insn))
        } else {
            changed.op0_register()
        }
    }

    fn writes(&mut self, insn: &Instruction, operand: u32) -> bool {
        use OpAccess::*;
        matches!(self.info.info(insn).op_access(operand), Write | ReadWrite | CondWrite | ReadCondWrite)
    }

    /// Whether operand `n`, a general register, is written whole whatever was in it, and not read.
    fn replaces(&self, insn: &Instruction, n: u32) -> bool {
        let moves = matches!(insn.mnemonic(), Mnemonic::Mov | Mnemonic::Movzx | Mnemonic::Movsx | Mnemonic::Movsxd);
        let full = |n| insn.op_register(n).full_register();
        let twice = insn.op1_kind() == OpKind::Register && full(0) == full(1);
        moves && n == 0 && !twice && insn.op0_register().size() >= 4
    }

    fn lea(&mut self, insn: &Instruction) {
        let address = self.effective_address(insn);
        let target = insn.op0_register();
        let full = target.full_register();
        let place = host(full).unwrap_or(R14);
        self.out.asm.lea(resized(place, target), address);
        if place == R14 {
            self.out.asm.mov(in_memory(full), R14);
        }
    }

    /// Guest register `guest` = host register `value`.
    pub(super) fn set(&mut self, guest: Register, value: Register) {
        match host(guest) {
            Some(host) => self.out.asm.mov(host, value),
            None => self.out.asm.mov(in_memory(guest), value),
        }
    }

    /// The host register that has `guest`, loaded to `scratch` if it stays in memory.
    pub(super) fn get(&mut self, guest: Register, scratch: Register) -> Register {
        if let Some(host) = host(guest) {
            return host;
        }
        self.out.asm.mov(scratch, in_memory(guest));
        scratch
    }

    // ---- addresses --------------------------------------------------------------------------------------------------------------------

    /// The effective address of the memory operand, as [`Emitter::access`] takes it. Clobbers R14 and R15, and changes no flags.
    fn effective_address(&mut self, insn: &Instruction) -> Memory {
        let mut displacement = insn.memory_displacement64() as i32;
        let base = match insn.memory_base() {
            Register::None => Register::None,
            Register::RIP => {
                self.out.asm.mov(R14, cpu_field(PAGE));
                displacement += self.out.offset as i32;
                R14
            }
            guest => self.get(guest, R14),
        };
        let mut address = qword_ptr(base, displacement);
        let index = insn.memory_index();
        if index != Register::None {
            address = address.index(self.get(index, R15), insn.memory_index_scale() as u8);
        }
        let wide = displacement.unsigned_abs() > MAX_DISPLACEMENT;
        if !wide && address.index != R15 && (base != R14 || index == Register::None) {
            return address;
        }
        self.out.asm.lea(R14, address);
        qword_ptr(R14, 0)
    }

    /// The linear address of the memory operand, as [`Translation::effective_address`]. Clobbers the flags.
    pub(super) fn operand_address(&mut self, insn: &Instruction) -> Linear {
        let address = self.effective_address(insn);
        let number = match insn.memory_segment() {
            Register::FS => seg::FS,
            Register::GS => seg::GS,
            _ => {
                // What had to be computed has no displacement left.
                let whole = insn.memory_index() == Register::None && address.displacement as u64 == insn.memory_displacement64();
                let base = if whole && insn.memory_base() != Register::RIP { insn.memory_base() } else { Register::None };
                return Linear { memory: address, base };
            }
        };
        self.out.asm.lea(R14, address);
        self.out.asm.add(R14, cpu_field(std::mem::offset_of!(Cpu, bases) + 8 * number));
        qword_ptr(R14, 0).into()
    }

    // ---- the stack --------------------------------------------------------------------------------------------------------------------

    /// Host address of the 8 bytes at RSP + `displacement`.
    pub(super) fn stack_slot(&mut self, displacement: i32, kind: AccessKind, miss: Label) -> Memory {
        self.out.access(Linear { memory: qword_ptr(STACK, displacement), base: Register::RSP }, 8, kind, miss)
    }

    pub(super) fn move_stack(&mut self, by: i32) {
        self.out.asm.lea(STACK, qword_ptr(STACK, by))
    }

    fn push(&mut self, insn: &Instruction, place: Place) {
        self.out.clobber_flags(place.seen_before);
        let miss = self.out.detour(place.index);
        let slot = self.stack_slot(-8, AccessKind::Write, miss);
        if insn.op0_kind() == OpKind::Register {
            let value = self.get(insn.op0_register(), R14);
            self.out.asm.mov(slot, value);
        } else {
            self.out.asm.mov(slot, insn.immediate(0) as i32);
        }
        self.move_stack(-8);
        self.out.rejoin()
    }

    fn pop(&mut self, insn: &Instruction, place: Place) {
        self.out.clobber_flags(place.seen_before);
        let miss = self.out.detour(place.index);
        let slot = self.stack_slot(0, AccessKind::Read, miss);
        let target = insn.op0_register();
        let value = host(target).unwrap_or(R14);
        self.out.asm.mov(value, slot);
        if value != STACK {
            self.move_stack(8);
        }
        if value == R14 {
            self.set(target, R14);
        }
        self.out.rejoin()
    }

    fn leave(&mut self, place: Place) {
        self.out.clobber_flags(place.seen_before);
        let miss = self.out.detour(place.index);
        self.out.asm.mov(R14, in_memory(Register::RBP));
        let slot = self.out.access(qword_ptr(R14, 0), 8, AccessKind::Read, miss);
        let a = &mut *self.out.asm;
        a.mov(R13, slot);
        a.lea(STACK, qword_ptr(R14, 8));
        a.mov(in_memory(Register::RBP), R13);
        self.out.rejoin()
    }
}

/// Whether host code of `insn` leaves other flags than it finds.
pub(super) fn makes_flags(insn: &Instruction, plan: Plan) -> bool {
    matches!(plan, Plan::Same(_) | Plan::Media(_) | Plan::Rotate(_) | Plan::Scan) && insn.rflags_modified() & ALL_FLAGS != 0
}

/// The 64-bit registers of which `insn` changes some part.
pub(super) fn written_registers(info: &mut InstructionInfoFactory, insn: &Instruction) -> Vec<Register> {
    use OpAccess::*;
    let used = info.info(insn).used_registers().iter();
    let written = used.filter(|used| matches!(used.access(), Write | ReadWrite | CondWrite | ReadCondWrite));
    written.map(|used| used.register().full_register()).collect()
}

/// Bytes of the only operand.
fn width(insn: &Instruction) -> usize {
    if insn.op0_kind() == OpKind::Register {
        insn.op0_register().size()
    } else {
        insn.memory_size().size()
    }
}

/// The part of RAX with `bytes` bytes.
fn accumulator(bytes: usize) -> Register {
    match bytes {
        1 => Register::AL,
        2 => Register::AX,
        4 => Register::EAX,
        _ => Register::RAX,
    }
}

/// The arithmetic flags as iced names them.
pub(super) const ALL_FLAGS: u32 = {
    use iced_x86::RflagsBits as Bits;
    Bits::CF | Bits::PF | Bits::AF | Bits::ZF | Bits::SF | Bits::OF
};

/// Whether an instruction may leave flags as they were, though it can change them: a shift by zero.
pub(super) fn may_keep_flags(insn: &Instruction) -> bool {
    use iced_x86::Mnemonic::*;
    matches!(insn.mnemonic(), Shl | Sal | Shr | Sar | Shld | Shrd)
}

/// Makes `memory` the memory operand.
pub(super) fn point_to(insn: &mut Instruction, memory: Memory) {
    debug_assert!(insn.memory_size() != MemorySize::Unknown);
    insn.set_segment_prefix(Register::None);
    insn.set_memory_base(memory.base);
    insn.set_memory_index(memory.index);
    insn.set_memory_index_scale(memory.scale.into());
    insn.set_memory_displacement64(i64::from(memory.displacement) as u64);
    insn.set_memory_displ_size(u32::from(memory.displacement != 0));
}
