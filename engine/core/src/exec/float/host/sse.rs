//! Floating-point instructions on the host's own SSE2, FMA and F16C units, under the guest's MXCSR.
//!
//! Rust code may not run while MXCSR differs from its default, so each instruction is one `asm!` block that loads the guest's MXCSR with
//! its exceptions masked and its flags clear, executes, reads the flags back and restores the default.

use core::arch::x86_64::__m128i;

use crate::exec::float::mxcsr;

/// MXCSR as Rust code expects it.
pub const DEFAULT_MXCSR: u32 = 0x1f80;

/// A register for `asm!`.
#[inline(always)]
pub fn register(value: u128) -> __m128i {
    // SAFETY: both are 16 bytes and every bit pattern is valid.
    unsafe { core::mem::transmute(value) }
}

/// The value of a register of `asm!`.
#[inline(always)]
pub fn value(register: __m128i) -> u128 {
    // SAFETY: both are 16 bytes and every bit pattern is valid.
    unsafe { core::mem::transmute(register) }
}

/// MXCSR for the operation and for afterwards, in memory as LDMXCSR wants them.
#[inline(always)]
pub fn control(guest: u32) -> [u32; 2] {
    // Flush-to-zero works on masked underflow only (SDM vol. 1, 10.2.3.3), and every exception is masked for the operation.
    let flush = if mxcsr::traps_underflow(guest) { mxcsr::FLUSH } else { 0 };
    [guest & !(mxcsr::FLAGS | flush) | mxcsr::MASKS, DEFAULT_MXCSR]
}

/// Runs `$op a, b` (or `$op a, b, imm`) on XMM registers: `(a, flags)`.
///
/// Unmasked underflow means a tiny result, masked underflow an inexact one too (SDM vol. 1, 4.9.1.5). Flushing to zero tells a tiny one.
/// What the precision flag means beside it, [`super::exact`] tells.
macro_rules! simd {
    ($mxcsr:expr, $op:literal, $a:expr, $b:expr $(, imm $imm:expr)?) => {{
        use $crate::exec::float::{host::{exact, sse as host}, mxcsr};
        let (guest, operands) = ($mxcsr, [$a, $b]);
        let run = |operands: [u128; 2]| {
            let [a, b] = operands.map(host::register);
            let (result, mut flags) = host::simd_once!(host::control(guest), $op, a, b $(, imm $imm)?);
            if mxcsr::traps_underflow(guest) {
                let flushing = [host::control(guest)[0] | mxcsr::FLUSH, host::DEFAULT_MXCSR];
                flags |= host::simd_once!(flushing, $op, a, b $(, imm $imm)?).1 & mxcsr::UNDERFLOW;
            }
            (host::value(result), flags)
        };
        let (result, flags) = run(operands);
        (result, if exact::traps(guest, flags) { exact::settle($op, guest, operands, |operands| run(operands).1) } else { flags })
    }};
}
pub(in crate::exec) use simd;

/// Runs `$op a, b` under a control of [`control`]: `(a, flags)`.
macro_rules! simd_once {
    ($control:expr, $op:literal, $a:expr, $b:expr $(, imm $imm:expr)?) => {{
        let mut control: [u32; 2] = $control;
        let mut a = $a;
        // SAFETY: the instruction reads and writes only its XMM operands; MXCSR is back at the default behind it.
        unsafe {
            core::arch::asm!(
                "ldmxcsr [{control}]",
                concat!($op, " {a}, {b}" $(, ", {imm}", $crate::exec::float::host::sse::nothing!($imm))?),
                "stmxcsr [{control}]",
                "ldmxcsr [{control} + 4]",
                control = in(reg) control.as_mut_ptr(),
                a = inout(xmm_reg) a,
                b = in(xmm_reg) $b,
                $(imm = const $imm,)?
                options(nostack),
            );
        }
        (a, control[0] & $crate::exec::float::mxcsr::FLAGS)
    }};
}
pub(in crate::exec) use simd_once;

/// Runs `$op a, b, c` on XMM registers: `(a, flags)`; underflow as in [`simd`].
macro_rules! simd_ternary {
    ($mxcsr:expr, $op:literal, $a:expr, $b:expr, $c:expr) => {{
        use $crate::exec::float::{
            host::{exact, sse as host},
            mxcsr,
        };
        let (guest, operands) = ($mxcsr, [$a, $b, $c]);
        let run = |operands: [u128; 3]| {
            let operands = operands.map(host::register);
            let (result, mut flags) = host::simd_ternary_once!(host::control(guest), $op, operands);
            if mxcsr::traps_underflow(guest) {
                let flushing = [host::control(guest)[0] | mxcsr::FLUSH, host::DEFAULT_MXCSR];
                flags |= host::simd_ternary_once!(flushing, $op, operands).1 & mxcsr::UNDERFLOW;
            }
            (host::value(result), flags)
        };
        let (result, flags) = run(operands);
        (result, if exact::traps(guest, flags) { exact::settle($op, guest, operands, |operands| run(operands).1) } else { flags })
    }};
}
pub(in crate::exec) use simd_ternary;

/// Runs `$op a, b, c` under a control of [`control`]: `(a, flags)`.
macro_rules! simd_ternary_once {
    ($control:expr, $op:literal, $operands:expr) => {{
        let mut control: [u32; 2] = $control;
        let [mut a, b, c] = $operands;
        // SAFETY: as in `simd_once`; a model offers the instruction only where the host has it.
        unsafe {
            core::arch::asm!(
                "ldmxcsr [{control}]",
                concat!($op, " {a}, {b}, {c}"),
                "stmxcsr [{control}]",
                "ldmxcsr [{control} + 4]",
                control = in(reg) control.as_mut_ptr(),
                a = inout(xmm_reg) a,
                b = in(xmm_reg) b,
                c = in(xmm_reg) c,
                options(nostack),
            );
        }
        (a, control[0] & $crate::exec::float::mxcsr::FLAGS)
    }};
}
pub(in crate::exec) use simd_ternary_once;

/// Expands to an empty string, so that a repetition can name its variable.
macro_rules! nothing {
    ($token:expr) => {
        ""
    };
}
pub(in crate::exec) use nothing;

/// Runs `$op gpr, xmm`: `(gpr, flags)`. `$width` is the operand modifier of the general register.
macro_rules! simd_to_integer {
    ($mxcsr:expr, $op:literal, $width:literal, $b:expr) => {{
        let mut control = $crate::exec::float::host::sse::control($mxcsr);
        let result: u64;
        // SAFETY: as in `simd`.
        unsafe {
            core::arch::asm!(
                "ldmxcsr [{control}]",
                concat!($op, " {a", $width, "}, {b}"),
                "stmxcsr [{control}]",
                "ldmxcsr [{control} + 4]",
                control = in(reg) control.as_mut_ptr(),
                a = out(reg) result,
                b = in(xmm_reg) $crate::exec::float::host::sse::register($b),
                options(nostack),
            );
        }
        (result, control[0] & $crate::exec::float::mxcsr::FLAGS)
    }};
}
pub(in crate::exec) use simd_to_integer;

/// Runs `$op xmm, gpr`: `(xmm, flags)`.
macro_rules! simd_from_integer {
    ($mxcsr:expr, $op:literal, $width:literal, $a:expr, $b:expr) => {{
        let mut control = $crate::exec::float::host::sse::control($mxcsr);
        let mut a = $crate::exec::float::host::sse::register($a);
        // SAFETY: as in `simd`.
        unsafe {
            core::arch::asm!(
                "ldmxcsr [{control}]",
                concat!($op, " {a}, {b", $width, "}"),
                "stmxcsr [{control}]",
                "ldmxcsr [{control} + 4]",
                control = in(reg) control.as_mut_ptr(),
                a = inout(xmm_reg) a,
                b = in(reg) $b,
                options(nostack),
            );
        }
        ($crate::exec::float::host::sse::value(a), control[0] & $crate::exec::float::mxcsr::FLAGS)
    }};
}
pub(in crate::exec) use simd_from_integer;

/// Runs a comparison that answers in EFLAGS: `(EFLAGS 7:0, flags)`.
macro_rules! simd_compare {
    ($mxcsr:expr, $op:literal, $a:expr, $b:expr) => {{
        let mut control = $crate::exec::float::host::sse::control($mxcsr);
        let flags: u16;
        // SAFETY: as in `simd`.
        unsafe {
            core::arch::asm!(
                "ldmxcsr [{control}]",
                concat!($op, " {a}, {b}"),
                "lahf",
                "stmxcsr [{control}]",
                "ldmxcsr [{control} + 4]",
                control = in(reg) control.as_mut_ptr(),
                a = in(xmm_reg) $crate::exec::float::host::sse::register($a),
                b = in(xmm_reg) $crate::exec::float::host::sse::register($b),
                out("ax") flags,
                options(nostack),
            );
        }
        (u64::from(flags >> 8), control[0] & $crate::exec::float::mxcsr::FLAGS)
    }};
}
pub(in crate::exec) use simd_compare;
