//! FSQRT, FABS, FCHS, FRNDINT, FSCALE, FPREM, FXTRACT, and the transcendental instructions (SDM vol. 1, 8.3.5 to 8.3.8).
//!
//! Transcendental results are the unit's: they may differ from another vendor's in the last bit, as silicon does.

use iced_x86::{Instruction, Mnemonic};

use super::control::set_conditions;
use super::stack::status::{C0, C1, C2, C3, INVALID, STACK_FAULT};
use crate::cpu::Cpu;
use crate::exec::float::frame::{Operation, INDEFINITE};
use crate::exec::float::unit::x87_operations;
use crate::uop::{Exec, Handler, Uop};

x87_operations! {
    Chs => "fchs";
    Abs => "fabs";
    Sqrt => "fsqrt";
    Rndint => "frndint";
    TwoToXMinus1 => "f2xm1";
    Sin => "fsin";
    Cos => "fcos";
    Scale => "fscale";
    Prem => "fprem";
    Prem1 => "fprem1";
    YLog2X => "fyl2x";
    YLog2XPlus1 => "fyl2xp1";
    Patan => "fpatan";
    Xtract => "fxtract";
    SinCos => "fsincos";
    Ptan => "fptan";
}

/// The handler of an instruction of this file.
pub fn handler(insn: &Instruction) -> Option<Handler> {
    Some(match insn.mnemonic() {
        Mnemonic::Fchs => unary::<Chs, 0>,
        Mnemonic::Fabs => unary::<Abs, 0>,
        Mnemonic::Fsqrt => unary::<Sqrt, 0>,
        Mnemonic::Frndint => unary::<Rndint, 0>,
        Mnemonic::F2xm1 => unary::<TwoToXMinus1, 0>,
        Mnemonic::Fsin => unary::<Sin, C2>,
        Mnemonic::Fcos => unary::<Cos, C2>,
        Mnemonic::Fscale => with_second::<Scale, 0>,
        Mnemonic::Fprem => with_second::<Prem, { C0 | C1 | C2 | C3 }>,
        Mnemonic::Fprem1 => with_second::<Prem1, { C0 | C1 | C2 | C3 }>,
        Mnemonic::Fyl2x => into_second::<YLog2X>,
        Mnemonic::Fyl2xp1 => into_second::<YLog2XPlus1>,
        Mnemonic::Fpatan => into_second::<Patan>,
        Mnemonic::Fxtract => pushing::<Xtract, 0>,
        Mnemonic::Fsincos => pushing::<SinCos, C2>,
        Mnemonic::Fptan => pushing::<Ptan, C2>,
        _ => return None,
    })
}

/// Takes over the condition bits of `mask` behind C1.
fn conditions(cpu: &mut Cpu, mask: u16, status: u16) {
    let fsw = cpu.state.fpu.fsw;
    set_conditions(cpu, fsw & (C0 | C1 | C2 | C3) & !mask | status & mask);
}

/// `ST(0) = f(ST(0))`; `CONDITIONS` are the condition bits that it sets besides C1.
fn unary<O: Operation, const CONDITIONS: u16>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.begin_x87()?;
    let Some(st0) = cpu.st(0) else {
        cpu.underflow(uop, Some(0));
        conditions(cpu, CONDITIONS & C2, 0);
        return Ok(());
    };
    let frame = cpu.operate::<O>(st0, st0, &[]);
    if cpu.conclude(uop, frame.status) {
        cpu.set_st(0, frame.st0);
    }
    conditions(cpu, CONDITIONS, frame.status);
    Ok(())
}

/// `ST(0) = f(ST(0), ST(1))`.
fn with_second<O: Operation, const CONDITIONS: u16>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.begin_x87()?;
    let (Some(st0), Some(st1)) = (cpu.st(0), cpu.st(1)) else {
        cpu.underflow(uop, Some(0));
        conditions(cpu, CONDITIONS & C2, 0);
        return Ok(());
    };
    let frame = cpu.operate::<O>(st0, st1, &[]);
    if cpu.conclude(uop, frame.status) {
        cpu.set_st(0, frame.st0);
    }
    conditions(cpu, CONDITIONS, frame.status);
    Ok(())
}

/// `ST(1) = f(ST(0), ST(1))`, then a pop. An instruction that an unmasked exception stopped has not popped in the unit either.
fn into_second<O: Operation>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.begin_x87()?;
    let (Some(st0), Some(st1)) = (cpu.st(0), cpu.st(1)) else {
        if cpu.underflow(uop, Some(1)) {
            cpu.pop_x87(1);
        }
        return Ok(());
    };
    let frame = cpu.operate::<O>(st0, st1, &[]);
    cpu.conclude(uop, frame.status);
    if frame.pushed() < 0 {
        cpu.set_st(1, frame.st0);
        cpu.pop_x87(1);
    }
    Ok(())
}

/// `ST(0) = f(ST(0))`, then a push of a second result. An argument out of range (C2) pushes nothing.
fn pushing<O: Operation, const CONDITIONS: u16>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.begin_x87()?;
    let st0 = match cpu.st(0) {
        Some(st0) if !cpu.stack_full() => st0,
        source => {
            let overflow = if source.is_some() { C1 } else { 0 };
            if cpu.conclude(uop, INVALID | STACK_FAULT | overflow) {
                cpu.set_st(0, INDEFINITE);
                cpu.push_x87(INDEFINITE);
            }
            conditions(cpu, CONDITIONS & C2, 0);
            return Ok(());
        }
    };
    let frame = cpu.operate::<O>(st0, st0, &[]);
    cpu.conclude(uop, frame.status);
    if frame.pushed() > 0 {
        cpu.set_st(0, frame.st1);
        cpu.push_x87(frame.st0);
    }
    conditions(cpu, CONDITIONS, frame.status);
    Ok(())
}
