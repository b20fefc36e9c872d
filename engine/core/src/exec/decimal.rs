//! Decimal arithmetic: AAA, AAS, AAD, AAM, DAA, DAS (SDM vol. 2); and SALC, undocumented but in every x86 CPU (opcode D6). None of them exists in 64-bit mode.
//!
//! What vendors differ in is said in [`crate::model::silicon`].

use iced_x86::{Instruction, Mnemonic};

use crate::cpu::{CodeSize, Cpu};
use crate::fault::vector;
use crate::flags::Flags;
use crate::model::Silicon;
use crate::state::gpr;
use crate::uop::{Exec, Handler, RegOffset, Uop};

const AL: RegOffset = gpr::RAX as u8 * 8;
const AH: RegOffset = AL + 1;

/// The handler of an instruction of this family.
pub fn handler(insn: &Instruction, _size: CodeSize) -> Option<Handler> {
    Some(match insn.mnemonic() {
        Mnemonic::Aaa => ascii_adjust::<false>,
        Mnemonic::Aas => ascii_adjust::<true>,
        Mnemonic::Daa => decimal_adjust::<false>,
        Mnemonic::Das => decimal_adjust::<true>,
        Mnemonic::Aam => aam,
        Mnemonic::Aad => aad,
        Mnemonic::Salc => salc,
        _ => return None,
    })
}

/// AAA and, when `SUBTRACT`, AAS: the digit that does not fit AL goes to AH.
fn ascii_adjust<const SUBTRACT: bool>(cpu: &mut Cpu, _uop: &Uop) -> Exec {
    let ax: u16 = cpu.reg(AL);
    let adjust = ax & 15 > 9 || cpu.flags.af();
    let adjusted = match (adjust, SUBTRACT) {
        (false, _) => ax,
        (true, false) => ax.wrapping_add(0x106),
        (true, true) => ax.wrapping_sub(0x106),
    };
    let digit = adjusted & 0xff0f;
    cpu.set_reg(AL, digit);
    let correction = if adjust { 0x106 } else { 0 };
    let others = match (cpu.silicon, SUBTRACT) {
        (Silicon::Intel, _) => Flags::logic(digit as u8),
        (Silicon::Amd, false) => Flags::add(ax, correction, adjusted),
        (Silicon::Amd, true) => Flags::sub(ax, correction, adjusted),
    };
    cpu.flags = others.with_carry(adjust).with_half_carry(adjust);
    Ok(())
}

/// DAA and, when `SUBTRACT`, DAS.
fn decimal_adjust<const SUBTRACT: bool>(cpu: &mut Cpu, _uop: &Uop) -> Exec {
    let al: u8 = cpu.reg(AL);
    let low = al & 15 > 9 || cpu.flags.af();
    let high = al > 0x99 || cpu.flags.cf();
    let correction = if low { 6 } else { 0 } + if high { 0x60 } else { 0 };
    let result = if SUBTRACT { al.wrapping_sub(correction) } else { al.wrapping_add(correction) };
    // DAS also reports the borrow of its first step.
    let carry = high || SUBTRACT && low && al < 6;
    cpu.set_reg(AL, result);
    let others = match (cpu.silicon, SUBTRACT) {
        (Silicon::Intel, _) => Flags::logic(result),
        (Silicon::Amd, false) => Flags::add(al, correction, result),
        (Silicon::Amd, true) => Flags::sub(al, correction, result),
    };
    cpu.flags = others.with_carry(carry).with_half_carry(low);
    Ok(())
}

/// AL becomes all copies of the carry flag.
fn salc(cpu: &mut Cpu, _uop: &Uop) -> Exec {
    cpu.set_reg(AL, if cpu.flags.cf() { 0xff_u8 } else { 0 });
    Ok(())
}

fn aam(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let base = uop.imm as u8;
    let al: u8 = cpu.reg(AL);
    let (Some(tens), Some(ones)) = (al.checked_div(base), al.checked_rem(base)) else { return Err(cpu.raise(vector::DE)) };
    cpu.set_reg(AH, tens);
    cpu.set_reg(AL, ones);
    cpu.flags = Flags::logic(ones);
    Ok(())
}

fn aad(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let (al, ah): (u8, u8) = (cpu.reg(AL), cpu.reg(AH));
    let product = ah.wrapping_mul(uop.imm as u8);
    let result = al.wrapping_add(product);
    cpu.set_reg(AL, u16::from(result));
    cpu.flags = match cpu.silicon {
        Silicon::Intel => Flags::logic(result),
        Silicon::Amd => Flags::add(al, product, result),
    };
    Ok(())
}
