//! FADD, FSUB, FSUBR, FMUL, FDIV, FDIVR with register, memory and integer operands (SDM vol. 1, 8.3.5).

use iced_x86::{Instruction, Mnemonic, OpKind};

use crate::cpu::Cpu;
use crate::exec::float::frame::Operation;
use crate::uop::{Exec, Handler, Uop};
use crate::word::Word;

/// Declares the five forms of an operation in a module of its own.
macro_rules! forms {
    ($($module:ident => $float:literal $integer:literal;)*) => {$(
        mod $module {
            use crate::exec::float::unit::x87_operations;
            x87_operations! {
                Registers => concat!($float, " st(0), st(1)");
                Single => concat!($float, " dword ptr [{frame} + 32]");
                Double => concat!($float, " qword ptr [{frame} + 32]");
                Short => concat!($integer, " word ptr [{frame} + 32]");
                Long => concat!($integer, " dword ptr [{frame} + 32]");
            }
        }
    )*};
}
forms! {
    add => "fadd" "fiadd";
    sub => "fsub" "fisub";
    subr => "fsubr" "fisubr";
    mul => "fmul" "fimul";
    div => "fdiv" "fidiv";
    divr => "fdivr" "fidivr";
}

/// Picks the form of an operation.
macro_rules! form {
    ($insn:ident, $module:ident) => {
        match ($insn.op0_kind() == OpKind::Memory, $insn.memory_size().size()) {
            (false, _) => registers::<$module::Registers, 0>,
            (true, 4) => memory::<$module::Single, u32>,
            (true, _) => memory::<$module::Double, u64>,
        }
    };
}

/// Picks the form of an operation with an integer in memory.
macro_rules! integer_form {
    ($insn:ident, $module:ident) => {
        match $insn.memory_size().size() {
            2 => memory::<$module::Short, u16>,
            _ => memory::<$module::Long, u32>,
        }
    };
}

/// The handler of an instruction of this file.
pub fn handler(insn: &Instruction) -> Option<Handler> {
    Some(match insn.mnemonic() {
        Mnemonic::Fadd => form!(insn, add),
        Mnemonic::Fsub => form!(insn, sub),
        Mnemonic::Fsubr => form!(insn, subr),
        Mnemonic::Fmul => form!(insn, mul),
        Mnemonic::Fdiv => form!(insn, div),
        Mnemonic::Fdivr => form!(insn, divr),
        Mnemonic::Faddp => registers::<add::Registers, 1>,
        Mnemonic::Fsubp => registers::<sub::Registers, 1>,
        Mnemonic::Fsubrp => registers::<subr::Registers, 1>,
        Mnemonic::Fmulp => registers::<mul::Registers, 1>,
        Mnemonic::Fdivp => registers::<div::Registers, 1>,
        Mnemonic::Fdivrp => registers::<divr::Registers, 1>,
        Mnemonic::Fiadd => integer_form!(insn, add),
        Mnemonic::Fisub => integer_form!(insn, sub),
        Mnemonic::Fisubr => integer_form!(insn, subr),
        Mnemonic::Fimul => integer_form!(insn, mul),
        Mnemonic::Fidiv => integer_form!(insn, div),
        Mnemonic::Fidivr => integer_form!(insn, divr),
        _ => return None,
    })
}

/// `ST(reg 0) = ST(reg 0) op ST(reg 1)`, then `POPS` pops.
fn registers<O: Operation, const POPS: u8>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.begin_x87()?;
    let [destination, source, _] = uop.reg;
    let done = match (cpu.st(destination), cpu.st(source)) {
        (Some(a), Some(b)) => {
            let frame = cpu.operate::<O>(a, b, &[]);
            let done = cpu.conclude(uop, frame.status);
            if done {
                cpu.set_st(destination, frame.st0);
            }
            done
        }
        _ => cpu.underflow(uop, Some(destination)),
    };
    if done {
        cpu.pop_x87(POPS);
    }
    Ok(())
}

/// `ST(0) = ST(0) op memory`.
fn memory<O: Operation, W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.begin_x87()?;
    let operand = cpu.load::<W>(uop)?.zero_extend().to_le_bytes();
    let Some(st0) = cpu.st(0) else {
        cpu.underflow(uop, Some(0));
        return Ok(());
    };
    let frame = cpu.operate::<O>(st0, st0, &operand);
    if cpu.conclude(uop, frame.status) {
        cpu.set_st(0, frame.st0);
    }
    Ok(())
}
