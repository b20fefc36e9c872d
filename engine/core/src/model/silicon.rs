//! What the manuals leave undefined, as one stated silicon of each vendor has it, on every host and in every tier.
//!
//! - Intel: the cores since Sandy Bridge, of which `cascadelake` is one. No public document states all of it. What sandpile.org's table of
//!   undefined flags says of Intel's cores was taken where it is of one mind; what was found by earlier runs beside an Intel host, and
//!   what was supposed, is marked.
//! - AMD: Zen 5 (family 26, model 2), measured instruction by instruction and compared again by each differential run on such a host. That
//!   `epyc`, which is a Zen 2, does the same is supposed.
//!
//! | instruction | Intel | AMD |
//! |---|---|---|
//! | SHL, SHR, SAR by a count that is not 0 | AF clear | AF set |
//! | the same by more than 1 | OF as of the last step by one | the same |
//! | the same by more than the operand's width | CF is the last bit shifted out, of zeros or signs | the same |
//! | ROL, ROR by more than 1 | OF as of the last step by one | the same |
//! | RCL, RCR by a multiple of width + 1 | CF and OF stay (supposed) | CF stays, OF as of a step by one that led here |
//! | SHLD, SHRD | AF clear; OF: the sign changed | AF set; OF as of the last step by one |
//! | SHLD, SHRD of 16 bits by more than 16 | shifts in the first operand again; CF is the last bit shifted out | rotates the second operand by count - 16; CF clear; SHLD: OF clear |
//! | MUL, IMUL | SF, ZF and PF of the low half, AF clear (ZF supposed) | SF, ZF, AF and PF stay |
//! | DIV, IDIV | all stay | CF and OF stay; SF, ZF and PF clear, AF set |
//! | BSF, BSR | as TEST of the source (supposed) | PF of the number found, or set if there is none; CF, OF, SF and AF clear |
//! | TZCNT, LZCNT | SF and PF of the result, OF and AF clear (supposed) | OF stays; SF, AF and PF clear |
//! | BEXTR | SF of the result, AF clear (supposed) | SF clear, AF set |
//! | BZHI, ANDN, BLSI, BLSR, BLSMSK | PF of the result, AF clear | the same |
//! | AND, OR, XOR, TEST | AF clear | the same |
//! | BT, BTS, BTR, BTC | OF, SF, AF and PF stay | the same |
//! | AAA, AAS | SF, ZF and PF of AL, OF clear (supposed) | as ADD or SUB of 106h, or of 0, and AX, before bits 7:4 are cleared |
//! | DAA, DAS | OF clear | OF as ADD or SUB of AL and the correction |
//! | AAD | CF, OF and AF clear (supposed) | CF, OF and AF as ADD of AL and the product |
//! | AAM | CF, OF and AF clear | the same |
//! | FCOMI, FCMOVcc: C1 where no register is empty | clear (FCMOVcc: supposed) | stays |
//!
//! Silicon also differs where the manuals do define, or define for one vendor:
//!
//! | what | Intel | AMD |
//! |---|---|---|
//! | near branches behind 66 in 64-bit mode | the prefix is ignored | 16 bits |
//! | 0F 0D with a register | NOP | #UD |
//! | LOCK before MOV CR0 | #UD | MOV CR8 |
//! | CALL where both target and stack are bad | the target's fault | the stack's |
//! | FCOM, FCOMI and relatives stopped by an unmasked exception | condition codes or flags stay | they are written |
//! | CVTPI2PS from memory | enters MMX mode | does not |
//! | CVTPS2PI and relatives that raise #XM, MASKMOVQ that faults | nothing has changed | MMX mode is entered |
//! | MASKMOVQ, MASKMOVDQU | fault for selected bytes | fault for all bytes |
//! | SHA instructions with a misaligned operand | #GP | take it |
//! | FNSAVE, FRSTOR, FNSTENV, FLDENV that cross into a bad page | CR2 is the page | CR2 is the operand's last byte |
//!
//! Approximations (RCPPS, RSQRTPS) and the last bit of transcendental x87 functions are those of whatever computes floating point
//! ([`crate::exec::float`]): vendors publish bounds of the error and no tables.

use crate::flags::Flags;
use crate::state::rflags::{AF, CF, OF, PF, ZF};
use crate::word::Word;

/// Whose undefined flags and results a CPU has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Silicon {
    Intel,
    Amd,
}

impl Silicon {
    /// AF behind a shift that has moved bits.
    #[inline(always)]
    pub fn sets_half_carry(self) -> bool {
        self == Silicon::Amd
    }

    /// The flags behind a shift that has moved bits, from those without AF.
    #[inline(always)]
    pub fn shifted(self, flags: Flags) -> Flags {
        flags.with_half_carry(self.sets_half_carry())
    }

    /// The flags behind a product with low half `low`.
    #[inline(always)]
    pub fn product<W: Word>(self, before: Flags, low: W, overflow: bool) -> Flags {
        let others = if self == Silicon::Amd { before } else { Flags::logic(low) };
        others.with_carry_overflow(overflow, overflow)
    }

    /// The flags behind a quotient.
    #[inline(always)]
    pub fn quotient(self, before: Flags) -> Flags {
        match self {
            Silicon::Intel => before,
            Silicon::Amd => Flags::from_bits(before.bits() & (CF | OF) | AF),
        }
    }

    /// The flags behind a search in `source` for bit `number`, which is 0 if there is none.
    #[inline(always)]
    pub fn scan<W: Word>(self, source: W, number: u32) -> Flags {
        match self {
            Silicon::Intel => Flags::logic(source),
            Silicon::Amd => {
                let parity = if number.count_ones() & 1 == 0 { PF } else { 0 };
                Flags::from_bits(parity | if source == W::ZERO { ZF } else { 0 })
            }
        }
    }

    /// The flags behind a count of zeros in `source`.
    #[inline(always)]
    pub fn zeros<W: Word>(self, before: Flags, source: W, result: W) -> Flags {
        match self {
            Silicon::Intel => Flags::logic(result).with_carry(source == W::ZERO),
            Silicon::Amd => {
                let carry = if source == W::ZERO { CF } else { 0 };
                Flags::from_bits(before.bits() & OF | carry | if result == W::ZERO { ZF } else { 0 })
            }
        }
    }

    /// The flags behind BEXTR.
    #[inline(always)]
    pub fn extract<W: Word>(self, result: W) -> Flags {
        match self {
            Silicon::Intel => Flags::logic(result),
            Silicon::Amd => Flags::from_bits(Flags::logic(result).bits() & (ZF | PF) | AF),
        }
    }

    /// Whether C1 stays behind FCOMI and FCMOVcc where no register is empty.
    pub fn keeps_c1(self) -> bool {
        self == Silicon::Amd
    }
}
