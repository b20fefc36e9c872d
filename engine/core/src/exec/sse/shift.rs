//! Packed shifts, by an immediate or by the low 64 bits of an operand (SDM vol. 2: PSLLW, PSRLW, PSRAW, PSLLDQ and siblings).

use iced_x86::{Instruction, Mnemonic};

use super::lanes::map;
use super::operand::{
    is_byte, is_memory, is_mm, is_vex, is_ymm, mmx_source, Encoding, Legacy, Memory, MmxSource, Register, Source, Vex, VexMemory,
    VexRegister,
};
use crate::cpu::Cpu;
use crate::uop::{Exec, Handler, Uop};

/// A shift of every lane by the same count.
trait Shift {
    fn apply<const N: usize>(a: [u8; N], count: u64) -> [u8; N];
}

/// Declares the shifts of this file, and the `handler` that picks among them.
macro_rules! shifts {
    ($($($mnemonic:ident)|+ => |$a:ident, $count:ident| $value:expr;)*) => {
        /// The handler of an instruction of this file.
        pub fn handler(insn: &Instruction) -> Option<Handler> {
            Some(match insn.mnemonic() {
                $($(Mnemonic::$mnemonic)|+ => {
                    struct Operation;
                    impl Shift for Operation {
                        #[inline(always)]
                        fn apply<const N: usize>($a: [u8; N], $count: u64) -> [u8; N] {
                            $value
                        }
                    }
                    form::<Operation>(insn)
                })*
                _ => return None,
            })
        }
    };
}

shifts! {
    Psllw | Vpsllw => |a, count| map(a, |x: u16| if count < 16 { x << count } else { 0 });
    Pslld | Vpslld => |a, count| map(a, |x: u32| if count < 32 { x << count } else { 0 });
    Psllq | Vpsllq => |a, count| map(a, |x: u64| if count < 64 { x << count } else { 0 });
    Psrlw | Vpsrlw => |a, count| map(a, |x: u16| if count < 16 { x >> count } else { 0 });
    Psrld | Vpsrld => |a, count| map(a, |x: u32| if count < 32 { x >> count } else { 0 });
    Psrlq | Vpsrlq => |a, count| map(a, |x: u64| if count < 64 { x >> count } else { 0 });
    Psraw | Vpsraw => |a, count| map(a, |x: i16| x >> count.min(15));
    Psrad | Vpsrad => |a, count| map(a, |x: i32| x >> count.min(31));
    Pslldq | Vpslldq => |a, count| move_up(a, count);
    Psrldq | Vpsrldq => |a, count| move_down(a, count);
}

/// Bytes move towards the top, zeros come in below.
#[inline(always)]
fn move_up<const N: usize>(a: [u8; N], count: u64) -> [u8; N] {
    let count = count.min(N as u64) as usize;
    let mut result = [0; N];
    result[count..].copy_from_slice(&a[..N - count]);
    result
}

/// Bytes move towards the bottom, zeros come in above.
#[inline(always)]
fn move_down<const N: usize>(a: [u8; N], count: u64) -> [u8; N] {
    let count = count.min(N as u64) as usize;
    let mut result = [0; N];
    result[..N - count].copy_from_slice(&a[count..]);
    result
}

fn form<O: Shift>(insn: &Instruction) -> Handler {
    let by_immediate = is_byte(insn, insn.op_count() - 1);
    match (is_mm(insn, 0), by_immediate, is_vex(insn), is_ymm(insn, 0)) {
        (true, true, ..) => mm_immediate::<O>,
        (true, false, ..) => mmx_source!(insn, mm_operand, O),
        (_, true, false, _) => immediate::<O, Legacy, 1>,
        (_, true, true, false) => immediate::<O, Vex, 1>,
        (_, true, true, true) => immediate::<O, Vex, 2>,
        (_, false, false, _) if is_memory(insn, 1) => operand::<O, Memory, 1>,
        (_, false, false, _) => operand::<O, Register, 1>,
        (_, false, true, false) if is_memory(insn, 2) => operand::<O, VexMemory<16>, 1>,
        (_, false, true, false) => operand::<O, VexRegister<2, 1>, 1>,
        (_, false, true, true) if is_memory(insn, 2) => operand::<O, VexMemory<16>, 2>,
        (_, false, true, true) => operand::<O, VexRegister<2, 1>, 2>,
    }
}

/// Shifts the first source; the count is one for all lanes.
#[inline(always)]
fn shift<O: Shift, E: Encoding, const HALVES: usize>(cpu: &mut Cpu, uop: &Uop, count: u64) {
    let a = cpu.ymm(E::first(uop));
    let half = |n: usize| u128::from_le_bytes(O::apply(a[n].to_le_bytes(), count));
    E::put(cpu, uop.reg[0], [half(0), if HALVES == 2 { half(1) } else { 0 }]);
}

fn shift_mm<O: Shift>(cpu: &mut Cpu, n: u8, count: u64) {
    let a = cpu.mm(n).to_le_bytes();
    cpu.touch_mmx();
    cpu.set_mm(n, u64::from_le_bytes(O::apply(a, count)));
}

fn immediate<O: Shift, E: Encoding, const HALVES: usize>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    E::require(cpu)?;
    shift::<O, E, HALVES>(cpu, uop, uop.imm & 0xff);
    Ok(())
}

fn operand<O: Shift, S: Source, const HALVES: usize>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    S::require(cpu)?;
    let count = S::xmm(cpu, uop)? as u64;
    shift::<O, S::Encoding, HALVES>(cpu, uop, count);
    Ok(())
}

fn mm_immediate<O: Shift>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_mmx()?;
    shift_mm::<O>(cpu, uop.reg[0], uop.imm & 0xff);
    Ok(())
}

fn mm_operand<O: Shift, S: MmxSource>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_mmx()?;
    let count = S::mm(cpu, uop)?;
    shift_mm::<O>(cpu, uop.reg[0], count);
    Ok(())
}
