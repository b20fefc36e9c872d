//! Guest floating point in integers, for hosts without the guest's units.
//!
//! An operation is computed exactly (`number`, `value`) and rounded once. That is what x86 asks for: an unmasked overflow, a tiny result and
//! C1 are found on a number that no format bounds, and x87 rounds to fewer bits than its registers have. Libraries round in each operation.
//!
//! | file | is |
//! |---|---|
//! | `number` | finite numbers: operations and rounding |
//! | `value` | with zeros, infinities and NaNs: operations, and the formats in memory |
//! | `name` | instructions by name |
//! | `sse` | SSE, FMA and F16C under an MXCSR |
//! | `escape` | x87 instructions by their text |
//! | `x87`, `x87_function`, `x87_store`, `decimal` | x87 under a control word |
//! | `elementary` | transcendental functions |

mod decimal;
mod elementary;
pub(in crate::exec) mod escape;
pub(in crate::exec) mod name;
mod number;
pub(in crate::exec) mod sse;
mod value;
pub(in crate::exec) mod x87;
mod x87_function;
mod x87_store;

pub(in crate::exec) use sse::halve;

/// Runs an SSE instruction on XMM registers: `(a, flags)`.
macro_rules! simd {
    ($mxcsr:expr, $op:literal, $a:expr, $b:expr $(, imm $imm:expr)?) => {{
        use $crate::exec::float::soft::{name::Simd, sse};
        sse::binary(const { Simd::of($op) }, $mxcsr, $a, $b, 0 $(+ $imm)?)
    }};
}
pub(in crate::exec) use simd;

/// Runs a fused multiply-add: `(a, flags)`.
macro_rules! simd_ternary {
    ($mxcsr:expr, $op:literal, $a:expr, $b:expr, $c:expr) => {{
        use $crate::exec::float::soft::{name::Fused, sse};
        sse::fused(const { Fused::of($op) }, $mxcsr, [$a, $b, $c])
    }};
}
pub(in crate::exec) use simd_ternary;

/// Runs a conversion to a general register: `(general register, flags)`.
macro_rules! simd_to_integer {
    ($mxcsr:expr, $op:literal, $width:literal, $b:expr) => {{
        use $crate::exec::float::soft::{name::General, sse};
        sse::to_general(const { General::of($op, $width) }, $mxcsr, $b)
    }};
}
pub(in crate::exec) use simd_to_integer;

/// Runs a conversion from a general register: `(a, flags)`.
macro_rules! simd_from_integer {
    ($mxcsr:expr, $op:literal, $width:literal, $a:expr, $b:expr) => {{
        use $crate::exec::float::soft::{name::General, sse};
        sse::from_general(const { General::of($op, $width) }, $mxcsr, $a, $b)
    }};
}
pub(in crate::exec) use simd_from_integer;

/// Runs a comparison that answers in EFLAGS: `(CF, PF and ZF, flags)`.
macro_rules! simd_compare {
    ($mxcsr:expr, $op:literal, $a:expr, $b:expr) => {{
        use $crate::exec::float::soft::{name::Comparison, sse};
        sse::compare_low(const { Comparison::of($op) }, $mxcsr, $a, $b)
    }};
}
pub(in crate::exec) use simd_compare;

/// Declares x87 instructions: `Name => "instruction"`, whose operand in memory is the frame's.
macro_rules! x87_operations {
    ($($name:ident => $instruction:expr;)*) => {$(
        pub struct $name;
        impl $crate::exec::float::frame::Operation for $name {
            fn run(frame: &mut $crate::exec::float::frame::Frame) {
                use $crate::exec::float::soft::{escape::Escape, x87};
                x87::run(const { Escape::of($instruction) }, frame);
            }
        }
    )*};
}
pub(in crate::exec) use x87_operations;
