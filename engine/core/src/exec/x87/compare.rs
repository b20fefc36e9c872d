//! FCOM, FUCOM, FICOM, FCOMI, FTST, FXAM and FCMOVcc (SDM vol. 1, 8.3.3 and 8.3.6).
//!
//! What becomes of C1 in FCOMI and FCMOVcc where no register is empty differs between vendors ([`crate::model::silicon`]).

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::control::set_conditions;
use super::stack::status::{C0, C1, C2, C3, CONDITIONS};
use crate::cpu::Cpu;
use crate::exec::float::frame::{Float80, Operation};
use crate::exec::float::unit::x87_operations;
use crate::flags::Flags;
use crate::model::Silicon;
use crate::state::rflags::{CF, PF, ZF};
use crate::uop::{Exec, Handler, Uop};
use crate::word::Word;

x87_operations! {
    Ordered => "fcom st(1)";
    Unordered => "fucom st(1)";
    Single => "fcom dword ptr [{frame} + 32]";
    Double => "fcom qword ptr [{frame} + 32]";
    Short => "ficom word ptr [{frame} + 32]";
    Long => "ficom dword ptr [{frame} + 32]";
    Zero => "ftst";
    Examine => "fxam";
}

/// The handler of an instruction of this file.
pub fn handler(insn: &Instruction) -> Option<Handler> {
    let memory_operand = insn.op0_kind() == OpKind::Memory;
    let size = insn.memory_size().size();
    Some(match insn.mnemonic() {
        Mnemonic::Fcom if memory_operand && size == 4 => memory::<Single, u32, 0>,
        Mnemonic::Fcom if memory_operand => memory::<Double, u64, 0>,
        Mnemonic::Fcomp if memory_operand && size == 4 => memory::<Single, u32, 1>,
        Mnemonic::Fcomp if memory_operand => memory::<Double, u64, 1>,
        Mnemonic::Ficom if size == 2 => memory::<Short, u16, 0>,
        Mnemonic::Ficom => memory::<Long, u32, 0>,
        Mnemonic::Ficomp if size == 2 => memory::<Short, u16, 1>,
        Mnemonic::Ficomp => memory::<Long, u32, 1>,
        Mnemonic::Fcom => registers::<Ordered, 0>,
        Mnemonic::Fcomp => registers::<Ordered, 1>,
        Mnemonic::Fcompp => below_top::<Ordered>,
        Mnemonic::Fucom => registers::<Unordered, 0>,
        Mnemonic::Fucomp => registers::<Unordered, 1>,
        Mnemonic::Fucompp => below_top::<Unordered>,
        Mnemonic::Fcomi => into_eflags::<Ordered, 0>,
        Mnemonic::Fcomip => into_eflags::<Ordered, 1>,
        Mnemonic::Fucomi => into_eflags::<Unordered, 0>,
        Mnemonic::Fucomip => into_eflags::<Unordered, 1>,
        Mnemonic::Ftst => ftst,
        Mnemonic::Fxam => fxam,
        Mnemonic::Fcmovb => conditional::<Below, false>,
        Mnemonic::Fcmovnb => conditional::<Below, true>,
        Mnemonic::Fcmove => conditional::<Equal, false>,
        Mnemonic::Fcmovne => conditional::<Equal, true>,
        Mnemonic::Fcmovbe => conditional::<BelowEqual, false>,
        Mnemonic::Fcmovnbe => conditional::<BelowEqual, true>,
        Mnemonic::Fcmovu => conditional::<Parity, false>,
        Mnemonic::Fcmovnu => conditional::<Parity, true>,
        _ => return None,
    })
}

/// Condition bits of "unordered".
const UNORDERED: u16 = C0 | C2 | C3;

impl Cpu {
    /// What a comparison makes of ST(0) and another register or memory, `None` where a register is empty: the condition bits, and whether no
    /// unmasked exception stopped it.
    fn compare<O: Operation>(&mut self, uop: &Uop, operands: Option<(Float80, Float80)>, memory: &[u8]) -> (u16, bool) {
        match operands {
            Some((a, b)) => {
                let frame = self.operate_masked::<O>(a, b, memory);
                (frame.status & UNORDERED, self.conclude(uop, frame.status))
            }
            None => (UNORDERED, self.underflow(uop, None)),
        }
    }

    /// ST(0) and ST(`other`), where neither is empty.
    fn pair(&self, other: u8) -> Option<(Float80, Float80)> {
        self.st(0).zip(self.st(other))
    }

    /// The end of a comparison: AMD's silicon tells its result even where an unmasked exception stops it.
    fn finish_comparison(&mut self, (conditions, done): (u16, bool), pops: u8) {
        if done || self.silicon == Silicon::Amd {
            set_conditions(self, conditions);
        }
        if done {
            self.pop_x87(pops);
        }
    }
}

fn registers<O: Operation, const POPS: u8>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.begin_x87()?;
    let result = cpu.compare::<O>(uop, cpu.pair(uop.reg[1]), &[]);
    cpu.finish_comparison(result, POPS);
    Ok(())
}

fn below_top<O: Operation>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.begin_x87()?;
    let result = cpu.compare::<O>(uop, cpu.pair(1), &[]);
    cpu.finish_comparison(result, 2);
    Ok(())
}

fn into_eflags<O: Operation, const POPS: u8>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.begin_x87()?;
    let operands = cpu.pair(uop.reg[1]);
    let kept = if operands.is_some() && cpu.silicon.keeps_c1() { cpu.state.fpu.fsw & C1 } else { 0 };
    let (conditions, done) = cpu.compare::<O>(uop, operands, &[]);
    cpu.state.fpu.fsw |= kept;
    if done || cpu.silicon == Silicon::Amd {
        let image =
            [(C0, CF), (C2, PF), (C3, ZF)].iter().fold(0, |image, (c, flag)| if conditions & c != 0 { image | flag } else { image });
        cpu.flags = Flags::from_bits(image);
    }
    if done {
        cpu.pop_x87(POPS);
    }
    Ok(())
}

fn memory<O: Operation, W: Word, const POPS: u8>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.begin_x87()?;
    let operand = cpu.load::<W>(uop)?.zero_extend().to_le_bytes();
    let result = cpu.compare::<O>(uop, cpu.st(0).map(|st0| (st0, st0)), &operand);
    cpu.finish_comparison(result, POPS);
    Ok(())
}

fn ftst(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.begin_x87()?;
    let result = cpu.compare::<Zero>(uop, cpu.st(0).map(|st0| (st0, st0)), &[]);
    cpu.finish_comparison(result, 0);
    Ok(())
}

/// FXAM looks at an empty register too, and C1 is its sign.
fn fxam(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.begin_x87()?;
    let conditions = match cpu.st(0) {
        Some(st0) => cpu.operate::<Examine>(st0, st0, &[]).status & CONDITIONS,
        None => C0 | C3 | if cpu.raw_st0()[9] & 0x80 != 0 { C1 } else { 0 },
    };
    cpu.conclude(uop, 0);
    set_conditions(cpu, conditions);
    Ok(())
}

// ---- FCMOVcc ------------------------------------------------------------------------------------------------------------------------

/// A condition of FCMOVcc.
trait Condition {
    fn holds(flags: Flags) -> bool;
}
struct Below;
struct Equal;
struct BelowEqual;
struct Parity;
impl Condition for Below {
    fn holds(flags: Flags) -> bool {
        flags.cf()
    }
}
impl Condition for Equal {
    fn holds(flags: Flags) -> bool {
        flags.zf()
    }
}
impl Condition for BelowEqual {
    fn holds(flags: Flags) -> bool {
        flags.cf() || flags.zf()
    }
}
impl Condition for Parity {
    fn holds(flags: Flags) -> bool {
        flags.pf()
    }
}

fn conditional<C: Condition, const NOT: bool>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.begin_x87()?;
    let (Some(_), Some(source)) = (cpu.st(0), cpu.st(uop.reg[1])) else {
        cpu.underflow(uop, Some(0));
        return Ok(());
    };
    let kept = if cpu.silicon.keeps_c1() { cpu.state.fpu.fsw & C1 } else { 0 };
    cpu.conclude(uop, 0);
    cpu.state.fpu.fsw |= kept;
    if C::holds(cpu.flags) != NOT {
        cpu.set_st(0, source);
    }
    Ok(())
}
