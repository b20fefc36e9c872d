//! Both implementations of floating point against each other: every instruction on special and random operands, in every rounding mode,
//! with exceptions masked and not.

mod operands;
mod sse;
mod x87;
