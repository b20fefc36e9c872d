//! VCMPPS, VCMPPD, VCMPSS, VCMPSD with their 32 predicates (SDM vol. 2, CMPPD and table 3-1).
//!
//! Every predicate is a set of the relations less, equal, greater and unordered, and either reports quiet NaNs or does not. Three SSE2
//! comparisons find the relations and both sets of flags.

use iced_x86::{Instruction, Mnemonic};

use crate::cpu::Cpu;
use crate::exec::float::unit::simd;
use crate::exec::sse::operand::{halves, vex_source, Source};
use crate::uop::{Exec, Handler, Uop};

/// The handler of an instruction of this file.
pub fn handler(insn: &Instruction) -> Option<Handler> {
    Some(match insn.mnemonic() {
        Mnemonic::Vcmpps => vex_source!(insn, compare, PackedSingle),
        Mnemonic::Vcmppd => vex_source!(insn, compare, PackedDouble),
        Mnemonic::Vcmpss => vex_source!(insn, compare, ScalarSingle),
        Mnemonic::Vcmpsd => vex_source!(insn, compare, ScalarDouble),
        _ => return None,
    })
}

const LESS: u8 = 1;
const EQUAL: u8 = 2;
const GREATER: u8 = 4;
const UNORDERED: u8 = 8;

/// The relations in which predicates 0 to 15 hold; the next 16 repeat them.
const PREDICATES: [u8; 16] = [
    EQUAL,
    LESS,
    LESS | EQUAL,
    UNORDERED,
    LESS | GREATER | UNORDERED,
    EQUAL | GREATER | UNORDERED,
    GREATER | UNORDERED,
    LESS | EQUAL | GREATER,
    EQUAL | UNORDERED,
    LESS | UNORDERED,
    LESS | EQUAL | UNORDERED,
    0,
    LESS | GREATER,
    EQUAL | GREATER,
    GREATER,
    LESS | EQUAL | GREATER | UNORDERED,
];

/// Whether a predicate reports quiet NaNs.
fn signals(predicate: u8) -> bool {
    matches!(predicate & 3, 1 | 2) != (predicate & 16 != 0)
}

/// Masks of the lanes in each relation, and the flags raised by predicates that report quiet NaNs and by those that do not.
struct Relations {
    less: u128,
    equal: u128,
    unordered: u128,
    signaling: u32,
    quiet: u32,
}

impl Relations {
    fn holds(&self, predicate: u8) -> u128 {
        let set = PREDICATES[usize::from(predicate & 15)];
        let greater = !(self.less | self.equal | self.unordered);
        let masks = [(LESS, self.less), (EQUAL, self.equal), (GREATER, greater), (UNORDERED, self.unordered)];
        masks.into_iter().filter(|(relation, _)| set & relation != 0).fold(0, |mask, (_, lanes)| mask | lanes)
    }
}

trait Compare {
    /// The bits that are compared.
    const LANES: u128;
    fn relations(mxcsr: u32, a: u128, b: u128) -> Relations;
}

macro_rules! comparisons {
    ($($operation:ident => $op:literal, $lanes:expr;)*) => {$(
        struct $operation;
        impl Compare for $operation {
            const LANES: u128 = $lanes;
            #[inline(always)]
            fn relations(mxcsr: u32, a: u128, b: u128) -> Relations {
                let (equal, quiet) = simd!(mxcsr, $op, a, b, imm 0);
                let (less, signaling) = simd!(mxcsr, $op, a, b, imm 1);
                let (unordered, _) = simd!(mxcsr, $op, a, b, imm 3);
                Relations { less, equal, unordered, signaling, quiet }
            }
        }
    )*};
}
comparisons! {
    PackedSingle => "cmpps", u128::MAX;
    PackedDouble => "cmppd", u128::MAX;
    ScalarSingle => "cmpss", u32::MAX as u128;
    ScalarDouble => "cmpsd", u64::MAX as u128;
}

fn compare<O: Compare, S: Source>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    S::require(cpu)?;
    let b = S::vector(cpu, uop)?;
    let a = S::first(cpu, uop);
    let mxcsr = cpu.state.fpu.mxcsr;
    let predicate = uop.imm as u8 & 31;
    // The high half of a narrow comparison is zero in both sources, which raises nothing.
    let a = halves::<S>(|n| a[n]);
    let found = [O::relations(mxcsr, a[0], b[0]), O::relations(mxcsr, a[1], if S::HALVES == 2 { b[1] } else { 0 })];
    let raised = found.iter().fold(0, |flags, half| flags | if signals(predicate) { half.signaling } else { half.quiet });
    cpu.raise_simd(raised)?;
    let result = halves::<S>(|n| a[n] & !O::LANES | found[n].holds(predicate) & O::LANES);
    S::put(cpu, uop.reg[0], result);
    Ok(())
}
