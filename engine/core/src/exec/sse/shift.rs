//! Packed shifts, by an immediate or by the low 64 bits of an operand (SDM vol. 2: PSLLW, PSRLW, PSRAW, PSLLDQ and siblings).

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::lanes::map;
use super::operand::{is_mm, vector_source, Source};
use crate::cpu::Cpu;
use crate::uop::{Exec, Handler, Uop};

/// A shift of every lane by the same count.
trait Shift {
    fn apply<const N: usize>(a: [u8; N], count: u64) -> [u8; N];
}

/// Declares the shifts of this file, and the `handler` that picks among them.
macro_rules! shifts {
    ($($mnemonic:ident => |$a:ident, $count:ident| $value:expr;)*) => {
        /// The handler of an instruction of this file.
        pub fn handler(insn: &Instruction) -> Option<Handler> {
            match insn.mnemonic() {
                $(Mnemonic::$mnemonic => {
                    struct Operation;
                    impl Shift for Operation {
                        #[inline(always)]
                        fn apply<const N: usize>($a: [u8; N], $count: u64) -> [u8; N] {
                            $value
                        }
                    }
                    form::<Operation>(insn)
                })*
                _ => None,
            }
        }
    };
}

shifts! {
    Psllw => |a, count| map(a, |x: u16| if count < 16 { x << count } else { 0 });
    Pslld => |a, count| map(a, |x: u32| if count < 32 { x << count } else { 0 });
    Psllq => |a, count| map(a, |x: u64| if count < 64 { x << count } else { 0 });
    Psrlw => |a, count| map(a, |x: u16| if count < 16 { x >> count } else { 0 });
    Psrld => |a, count| map(a, |x: u32| if count < 32 { x >> count } else { 0 });
    Psrlq => |a, count| map(a, |x: u64| if count < 64 { x >> count } else { 0 });
    Psraw => |a, count| map(a, |x: i16| x >> count.min(15));
    Psrad => |a, count| map(a, |x: i32| x >> count.min(31));
    Pslldq => |a, count| move_up(a, count);
    Psrldq => |a, count| move_down(a, count);
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

fn form<O: Shift>(insn: &Instruction) -> Option<Handler> {
    let by_immediate = insn.op1_kind() == OpKind::Immediate8;
    Some(match (is_mm(insn, 0), by_immediate) {
        (true, true) => mm_immediate::<O>,
        (true, false) => vector_source!(insn, mm_operand, O),
        (false, true) => xmm_immediate::<O>,
        (false, false) => vector_source!(insn, xmm_operand, O),
    })
}

fn shift_xmm<O: Shift>(cpu: &mut Cpu, n: u8, count: u64) {
    let a = cpu.xmm(n).to_le_bytes();
    cpu.set_xmm(n, u128::from_le_bytes(O::apply(a, count)));
}

fn shift_mm<O: Shift>(cpu: &mut Cpu, n: u8, count: u64) {
    let a = cpu.mm(n).to_le_bytes();
    cpu.touch_mmx();
    cpu.set_mm(n, u64::from_le_bytes(O::apply(a, count)));
}

fn xmm_immediate<O: Shift>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_sse()?;
    shift_xmm::<O>(cpu, uop.reg[0], uop.imm & 0xff);
    Ok(())
}

fn xmm_operand<O: Shift, S: Source>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_sse()?;
    let count = S::xmm(cpu, uop)? as u64;
    shift_xmm::<O>(cpu, uop.reg[0], count);
    Ok(())
}

fn mm_immediate<O: Shift>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_mmx()?;
    shift_mm::<O>(cpu, uop.reg[0], uop.imm & 0xff);
    Ok(())
}

fn mm_operand<O: Shift, S: Source>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_mmx()?;
    let count = S::mm(cpu, uop)?;
    shift_mm::<O>(cpu, uop.reg[0], count);
    Ok(())
}
