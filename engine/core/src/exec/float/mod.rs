//! The seam between guest floating point and what computes it: [`unit`] is `host`, the units of an x86-64 host, or `soft`, which needs
//! none. Both offer the same:
//!
//! | name | runs |
//! |---|---|
//! | `simd!(mxcsr, "name", a, b [, imm n])` | an SSE instruction on XMM registers: `(a, flags)` |
//! | `simd_ternary!(mxcsr, "name", a, b, c)` | a fused multiply-add: `(a, flags)` |
//! | `simd_to_integer!(mxcsr, "name", modifier, b)`, `simd_from_integer!(mxcsr, "name", modifier, a, b)` | a conversion with a general register |
//! | `simd_compare!(mxcsr, "name", a, b)` | a comparison into EFLAGS |
//! | `halve(mxcsr, b)` | VCVTPS2PH |
//! | `x87_operations! { Type => "instruction"; }` | declares x87 instructions on a [`frame::Frame`] |
//!
//! An instruction is its text in the assembler, which `host` gives to the assembler and `soft` reads when it is compiled. The answers are
//! equal to the last bit and flag, but for the approximations RCPPS, RSQRTPS and the transcendental x87 instructions, of which
//! silicon of different vendors differs as well. The feature `soft-float` chooses `soft` on every host.

pub mod frame;
#[cfg(target_arch = "x86_64")]
#[cfg_attr(feature = "soft-float", allow(dead_code, unused_imports, unused_macros))]
pub(crate) mod host;
pub mod mxcsr;
#[cfg(any(test, feature = "soft-float", not(target_arch = "x86_64")))]
pub(crate) mod soft;

#[cfg(all(target_arch = "x86_64", not(feature = "soft-float")))]
pub(crate) use host as unit;
#[cfg(not(all(target_arch = "x86_64", not(feature = "soft-float"))))]
pub(crate) use soft as unit;

#[cfg(all(test, target_arch = "x86_64"))]
mod tests;
