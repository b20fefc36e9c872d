//! Guest floating point on the units of an x86-64 host.

pub(in crate::exec) mod exact;
mod half;
pub(in crate::exec) mod sse;
mod x87;

pub(in crate::exec) use half::halve;
pub(in crate::exec) use sse::{simd, simd_compare, simd_from_integer, simd_ternary, simd_to_integer};
pub(in crate::exec) use x87::x87_operations;
pub(crate) use x87::{comparison_keeps_c1, move_keeps_c1};
