//! Floating-point instructions on the host's own SSE2, under the guest's MXCSR.
//!
//! Rust code may not run while MXCSR differs from its default, so each instruction is one `asm!` block that loads the guest's MXCSR with
//! its exceptions masked and its flags clear, executes, reads the flags back and restores the default. Hosts other than x86-64 need a
//! software implementation of this file; the clock (`cpu::clock`) and x87 are the other two places that rely on the host.

#[cfg(not(target_arch = "x86_64"))]
compile_error!("the engine executes guest floating point on the host's SSE2 and x87 units: it needs an x86-64 host");

use core::arch::x86_64::__m128i;

use crate::cpu::Cpu;
use crate::fault::vector;
use crate::state::cr4;
use crate::uop::{Exec, Stop};

/// Bits of MXCSR (SDM vol. 1, 10.2.3).
pub mod mxcsr {
    /// Sticky exception flags: invalid, denormal, divide by zero, overflow, underflow, precision.
    pub const FLAGS: u32 = 0x3f;
    /// Flags of exceptions that are found before the operation.
    pub const BEFORE: u32 = 0x07;
    /// Exception masks, the flags' order.
    pub const MASKS: u32 = 0x1f80;
    pub const MASK_SHIFT: u32 = 7;
    /// Rounding control.
    pub const ROUNDING: u32 = 3 << ROUNDING_SHIFT;
    pub const ROUNDING_SHIFT: u32 = 13;
    pub const OVERFLOW: u32 = 0x08;
    pub const UNDERFLOW: u32 = 0x10;
    pub const PRECISION: u32 = 0x20;
    /// Denormals are zeros.
    pub const DAZ: u32 = 1 << 6;
    /// Flush-to-zero.
    pub const FLUSH: u32 = 1 << 15;
}

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
    let flush = if traps_underflow(guest) { mxcsr::FLUSH } else { 0 };
    [guest & !(mxcsr::FLAGS | flush) | mxcsr::MASKS, DEFAULT_MXCSR]
}

/// Whether underflow is unmasked.
#[inline(always)]
pub fn traps_underflow(guest: u32) -> bool {
    guest & mxcsr::UNDERFLOW << mxcsr::MASK_SHIFT == 0
}

/// Runs `$op a, b` (or `$op a, b, imm`) on XMM registers: `(a, flags)`.
///
/// Unmasked underflow means a tiny result, masked underflow an inexact one too (SDM vol. 1, 4.9.1.5). Flushing to zero tells a tiny one.
/// What the precision flag means beside it, [`super::exact`] tells.
macro_rules! simd {
    ($mxcsr:expr, $op:literal, $a:expr, $b:expr $(, imm $imm:expr)?) => {{
        use $crate::exec::sse::{exact, host};
        let (guest, operands) = ($mxcsr, [$a, $b]);
        let run = |operands: [u128; 2]| {
            let [a, b] = operands.map(host::register);
            let (result, mut flags) = host::simd_once!(host::control(guest), $op, a, b $(, imm $imm)?);
            if host::traps_underflow(guest) {
                let flushing = [host::control(guest)[0] | host::mxcsr::FLUSH, host::DEFAULT_MXCSR];
                flags |= host::simd_once!(flushing, $op, a, b $(, imm $imm)?).1 & host::mxcsr::UNDERFLOW;
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
                concat!($op, " {a}, {b}" $(, ", {imm}", $crate::exec::sse::host::nothing!($imm))?),
                "stmxcsr [{control}]",
                "ldmxcsr [{control} + 4]",
                control = in(reg) control.as_mut_ptr(),
                a = inout(xmm_reg) a,
                b = in(xmm_reg) $b,
                $(imm = const $imm,)?
                options(nostack),
            );
        }
        (a, control[0] & $crate::exec::sse::host::mxcsr::FLAGS)
    }};
}
pub(in crate::exec) use simd_once;

/// Runs `$op a, b, c` on XMM registers: `(a, flags)`; underflow as in [`simd`].
macro_rules! simd_ternary {
    ($mxcsr:expr, $op:literal, $a:expr, $b:expr, $c:expr) => {{
        use $crate::exec::sse::{exact, host};
        let (guest, operands) = ($mxcsr, [$a, $b, $c]);
        let run = |operands: [u128; 3]| {
            let operands = operands.map(host::register);
            let (result, mut flags) = host::simd_ternary_once!(host::control(guest), $op, operands);
            if host::traps_underflow(guest) {
                let flushing = [host::control(guest)[0] | host::mxcsr::FLUSH, host::DEFAULT_MXCSR];
                flags |= host::simd_ternary_once!(flushing, $op, operands).1 & host::mxcsr::UNDERFLOW;
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
        (a, control[0] & $crate::exec::sse::host::mxcsr::FLAGS)
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
        let mut control = $crate::exec::sse::host::control($mxcsr);
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
                b = in(xmm_reg) $crate::exec::sse::host::register($b),
                options(nostack),
            );
        }
        (result, control[0] & $crate::exec::sse::host::mxcsr::FLAGS)
    }};
}
pub(super) use simd_to_integer;

/// Runs `$op xmm, gpr`: `(xmm, flags)`.
macro_rules! simd_from_integer {
    ($mxcsr:expr, $op:literal, $width:literal, $a:expr, $b:expr) => {{
        let mut control = $crate::exec::sse::host::control($mxcsr);
        let mut a = $crate::exec::sse::host::register($a);
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
        ($crate::exec::sse::host::value(a), control[0] & $crate::exec::sse::host::mxcsr::FLAGS)
    }};
}
pub(super) use simd_from_integer;

/// Runs a comparison that answers in EFLAGS: `(EFLAGS 7:0, flags)`.
macro_rules! simd_compare {
    ($mxcsr:expr, $op:literal, $a:expr, $b:expr) => {{
        let mut control = $crate::exec::sse::host::control($mxcsr);
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
                a = in(xmm_reg) $crate::exec::sse::host::register($a),
                b = in(xmm_reg) $crate::exec::sse::host::register($b),
                out("ax") flags,
                options(nostack),
            );
        }
        (u64::from(flags >> 8), control[0] & $crate::exec::sse::host::mxcsr::FLAGS)
    }};
}
pub(super) use simd_compare;

impl Cpu {
    /// Adds the flags that an operation raised to MXCSR; #XM when one of them is unmasked.
    #[inline(always)]
    pub(in crate::exec) fn raise_simd(&mut self, flags: u32) -> Exec {
        let unmasked = flags & !(self.state.fpu.mxcsr >> mxcsr::MASK_SHIFT);
        if unmasked != 0 {
            return Err(self.simd_exception(flags, unmasked));
        }
        self.state.fpu.mxcsr |= flags;
        Ok(())
    }

    /// SDM vol. 1, 11.5.2: exceptions found before the operation keep those behind it from being found.
    #[cold]
    fn simd_exception(&mut self, flags: u32, unmasked: u32) -> Stop {
        self.state.fpu.mxcsr |= if unmasked & mxcsr::BEFORE != 0 { flags & mxcsr::BEFORE } else { flags };
        if self.state.cr4 & cr4::OSXMMEXCPT != 0 {
            self.raise(vector::XM)
        } else {
            self.undefined()
        }
    }
}
