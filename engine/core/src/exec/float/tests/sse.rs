//! SSE, FMA and F16C.

use super::operands::Random;
use crate::exec::float::{host, mxcsr, soft};

/// Operands for each instruction.
const COUNT: usize = 4000;

/// What a guest sees of a result: MXCSR's flags, and the result unless one of them is unmasked.
fn seen<T>(control: u32, (result, flags): (T, u32)) -> (Option<T>, u32) {
    let unmasked = flags & !(control >> mxcsr::MASK_SHIFT);
    let found = if unmasked & mxcsr::BEFORE != 0 { flags & mxcsr::BEFORE } else { flags };
    ((unmasked == 0).then_some(result), found)
}

/// An MXCSR: every direction, DAZ and FTZ, all exceptions masked or some.
fn control(random: &mut Random) -> u32 {
    let masks = match random.below(3) {
        0 => random.next() as u32 & mxcsr::MASKS,
        1 => mxcsr::MASKS & !((mxcsr::OVERFLOW | mxcsr::UNDERFLOW) << mxcsr::MASK_SHIFT),
        _ => mxcsr::MASKS,
    };
    masks | random.next() as u32 & (mxcsr::ROUNDING | mxcsr::DAZ | mxcsr::FLUSH)
}

/// Bits of fraction and exponent of what an instruction called `name` reads.
fn source(name: &str) -> (u32, u32) {
    match name {
        "vcvtph2ps" => (10, 5),
        "cvtpd2dq" | "cvttpd2dq" | "cvtpd2ps" | "cvtsd2ss" => (52, 11),
        _ if name.starts_with("cvt") || name.ends_with('s') || name.ends_with("ph") => (23, 8),
        _ => (52, 11),
    }
}

/// An instruction on two registers under an MXCSR.
type Run = fn(u32, u128, u128) -> (u128, u32);

/// Checks an instruction on two registers.
fn check(name: &str, run: [Run; 2]) {
    let (fraction, exponent) = source(name);
    let mut random = Random::new(name.bytes().map(u64::from).sum());
    for _ in 0..COUNT {
        let control = control(&mut random);
        let a = random.register(fraction, exponent, 0);
        let b = random.register(fraction, exponent, a);
        let [host, soft] = run.map(|run| seen(control, run(control, a, b)));
        assert_eq!(host, soft, "{name} {a:#034x}, {b:#034x} under {control:#x}: host {host:x?}, soft {soft:x?}");
    }
}

macro_rules! check {
    ($($name:literal)*) => {$(
        check($name, [|control, a, b| host::simd!(control, $name, a, b), |control, a, b| soft::simd!(control, $name, a, b)]);
    )*};
}

#[test]
fn arithmetic_is_the_hosts() {
    check!("addps" "addpd" "addss" "addsd" "subps" "subpd" "subss" "subsd" "mulps" "mulpd" "mulss" "mulsd" "divps" "divpd" "divss" "divsd");
    check!("minps" "minpd" "minss" "minsd" "maxps" "maxpd" "maxss" "maxsd" "sqrtps" "sqrtpd" "sqrtss" "sqrtsd");
}

#[test]
fn conversions_are_the_hosts() {
    check!("cvtdq2ps" "cvtdq2pd" "cvtps2dq" "cvttps2dq" "cvtpd2dq" "cvttpd2dq" "cvtps2pd" "cvtpd2ps" "cvtss2sd" "cvtsd2ss");
}

#[test]
fn conversions_with_general_registers_are_the_hosts() {
    let mut random = Random::new(1);
    macro_rules! from {
        ($($name:literal $width:literal)*) => {$(
            for _ in 0..COUNT {
                let (control, a, b) = (control(&mut random), u128::from(random.next()) << 64, random.runs());
                let host = seen(control, host::simd_from_integer!(control, $name, $width, a, b));
                let soft = seen(control, soft::simd_from_integer!(control, $name, $width, a, b));
                assert_eq!(host, soft, "{} {b:#x} under {control:#x}: host {host:x?}, soft {soft:x?}", $name);
            }
        )*};
    }
    from!("cvtsi2ss" ":e" "cvtsi2ss" ":r" "cvtsi2sd" ":e" "cvtsi2sd" ":r");
    macro_rules! to {
        ($($name:literal $width:literal)*) => {$(
            for _ in 0..COUNT {
                let control = control(&mut random);
                let (fraction, exponent) = if $name.contains("sd") { (52, 11) } else { (23, 8) };
                let b = random.register(fraction, exponent, 0);
                let host = seen(control, host::simd_to_integer!(control, $name, $width, b));
                let soft = seen(control, soft::simd_to_integer!(control, $name, $width, b));
                assert_eq!(host, soft, "{} {b:#x} under {control:#x}: host {host:x?}, soft {soft:x?}", $name);
            }
        )*};
    }
    to!("cvtss2si" ":e" "cvtss2si" ":r" "cvtsd2si" ":e" "cvtsd2si" ":r" "cvttss2si" ":e" "cvttss2si" ":r" "cvttsd2si" ":e" "cvttsd2si" ":r");
}

#[test]
fn comparisons_are_the_hosts() {
    macro_rules! predicates {
        ($($name:literal)*) => {$(
            predicates!($name: 0 1 2 3 4 5 6 7);
        )*};
        ($name:literal: $($predicate:literal)*) => {$(
            check($name, [
                |control, a, b| host::simd!(control, $name, a, b, imm $predicate),
                |control, a, b| soft::simd!(control, $name, a, b, imm $predicate),
            ]);
        )*};
    }
    predicates!("cmpps" "cmppd" "cmpss" "cmpsd");
    const IMAGE: u64 = crate::state::rflags::CF | crate::state::rflags::PF | crate::state::rflags::ZF;
    macro_rules! flags {
        ($($name:literal)*) => {$(
            check($name, [
                |control, a, b| { let (image, flags) = host::simd_compare!(control, $name, a, b); (u128::from(image & IMAGE), flags) },
                |control, a, b| { let (image, flags) = soft::simd_compare!(control, $name, a, b); (u128::from(image & IMAGE), flags) },
            ]);
        )*};
    }
    flags!("comiss" "comisd" "ucomiss" "ucomisd");
}

#[test]
fn half_precision_is_the_hosts() {
    if std::arch::is_x86_feature_detected!("f16c") {
        check!("vcvtph2ps");
        check("vcvtps2ph", [|control, _, b| host::halve(control, b), |control, _, b| soft::halve(control, b)]);
    }
}

/// SDM vol. 2, RCPPS and RSQRTPS: the relative error is at most `1.5 * 2^-12`; what is not approximated is as the host has it.
#[test]
fn approximations_are_within_their_bounds() {
    let mut random = Random::new(2);
    let single = |bits: u128| f64::from(f32::from_bits(bits as u32));
    for _ in 0..COUNT {
        let a = u128::from(random.number(23, 8, 127));
        let checks = [
            (host::simd!(mxcsr::MASKS, "rcpss", 0, a), soft::simd!(mxcsr::MASKS, "rcpss", 0, a), 1.0 / single(a)),
            (host::simd!(mxcsr::MASKS, "rsqrtss", 0, a), soft::simd!(mxcsr::MASKS, "rsqrtss", 0, a), 1.0 / single(a).sqrt()),
        ];
        for ((host, host_flags), (soft, soft_flags), exact) in checks {
            assert_eq!((host_flags, soft_flags), (0, 0));
            let near = (single(soft) / exact - 1.0).abs() <= 1.5 / 4096.0;
            assert!(host == soft || near, "{a:#x}: host {host:#x}, soft {soft:#x}, exactly {exact}");
        }
    }
}

macro_rules! check_fused {
    ($($name:literal)*) => {$(
        let (fraction, exponent) = source($name);
        let mut random = Random::new($name.bytes().map(u64::from).sum());
        for _ in 0..COUNT {
            let control = control(&mut random);
            let a = random.register(fraction, exponent, 0);
            let b = random.register(fraction, exponent, a);
            // Near the product, so that sums cancel.
            let product = host::simd!(mxcsr::MASKS, "mulps", a, b).0;
            let c = if random.below(2) == 0 { random.register(fraction, exponent, a) } else { random.register(fraction, exponent, product) };
            let host = seen(control, host::simd_ternary!(control, $name, a, b, c));
            let soft = seen(control, soft::simd_ternary!(control, $name, a, b, c));
            assert_eq!(host, soft, "{} {a:#034x}, {b:#034x}, {c:#034x} under {control:#x}: host {host:x?}, soft {soft:x?}", $name);
        }
    )*};
}

#[test]
fn fused_multiply_add_is_the_hosts() {
    if !std::arch::is_x86_feature_detected!("fma") {
        return;
    }
    check_fused!("vfmadd132ps" "vfmadd132pd" "vfmadd132ss" "vfmadd132sd" "vfmadd213ps" "vfmadd213pd" "vfmadd213ss" "vfmadd213sd");
    check_fused!("vfmadd231ps" "vfmadd231pd" "vfmadd231ss" "vfmadd231sd" "vfmsub132ps" "vfmsub132pd" "vfmsub213sd" "vfmsub231ps");
    check_fused!("vfnmadd132ps" "vfnmadd213pd" "vfnmadd231ss" "vfnmsub132sd" "vfnmsub213ps" "vfnmsub231pd");
    check_fused!("vfmaddsub132ps" "vfmaddsub213pd" "vfmaddsub231ps" "vfmsubadd132pd" "vfmsubadd213ps" "vfmsubadd231pd");
}
