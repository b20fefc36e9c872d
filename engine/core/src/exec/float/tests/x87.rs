//! x87.

use super::operands::Random;
use crate::exec::float::frame::{float80, Float80, Frame, Operation};
use crate::exec::x87::status::{C0, C1, C2, C3, DENORMAL, EXCEPTIONS, INVALID, OVERFLOW, UNDERFLOW, ZERO_DIVIDE};

/// Frames for each instruction.
const COUNT: usize = 4000;

const PRECISION: u16 = 1 << 5;
const FLAGS: u16 = EXCEPTIONS | C1;

/// Declares a test of instructions: `$seen` makes of a frame behind the instruction what is compared.
macro_rules! check {
    ($seen:expr, $random:expr, $frame:expr; $($instruction:literal)*) => {$({
        mod of_host {
            crate::exec::float::host::x87_operations! { Instruction => $instruction; }
        }
        mod of_soft {
            crate::exec::float::soft::x87_operations! { Instruction => $instruction; }
        }
        compare($instruction, [of_host::Instruction::run, of_soft::Instruction::run], &mut $random, $frame, $seen);
    })*};
}

/// Runs both implementations of an instruction on frames, and compares what `seen` makes of the results.
fn compare<T: PartialEq>(
    name: &str,
    run: [fn(&mut Frame); 2],
    random: &mut Random,
    frame: fn(&mut Random) -> Frame,
    seen: fn(&Frame) -> T,
) {
    for _ in 0..COUNT {
        let frame = frame(random);
        let [host, soft] = run.map(|run| {
            let mut frame = frame;
            run(&mut frame);
            frame
        });
        assert!(seen(&host) == seen(&soft), "{name} of\n {frame:x?}:\n {host:x?} by the host,\n {soft:x?} by software");
    }
}

/// A register: of every class, also of those that the unit does not support.
fn register(random: &mut Random, near: Float80) -> Float80 {
    let near = u64::from(u16::from_le_bytes([near[8], near[9]]) & 0x7fff);
    let field = random.number(0, 15, near);
    let significand = match random.below(8) {
        0 => 0,
        1 => random.runs(),
        2 => 1 << 63,
        // As few bits as the shorter formats have.
        3 => (random.runs() | 1 << 63) & u64::MAX << 40,
        4 => (random.runs() | 1 << 63) & u64::MAX << 11,
        _ => random.runs() | 1 << 63,
    };
    (u128::from(field) << 64 | u128::from(significand)).to_le_bytes()
}

/// A control word: every direction and precision, all exceptions masked or some.
fn control(random: &mut Random) -> u16 {
    let masks = if random.below(2) == 0 { EXCEPTIONS } else { random.next() as u16 & EXCEPTIONS };
    masks | (random.below(4) as u16) << 10 | random.pick(&[0, 2, 3]) << 8
}

/// A frame with registers of every class.
fn registers(random: &mut Random) -> Frame {
    let st0 = register(random, [0; 16]);
    let st1 = register(random, st0);
    Frame::new(control(random), st0, st1)
}

fn single(random: &mut Random) -> Frame {
    let number = random.number(23, 8, 127);
    with_memory(random, number)
}

fn double(random: &mut Random) -> Frame {
    let number = random.number(52, 11, 1023);
    with_memory(random, number)
}

fn integer(random: &mut Random) -> Frame {
    let number = random.runs();
    with_memory(random, number)
}

fn with_memory(random: &mut Random, bits: u64) -> Frame {
    registers(random).with_memory(&bits.to_le_bytes())
}

/// Both registers and the flags, and the registers pushed.
fn everything(frame: &Frame) -> (Float80, u16, i32) {
    (frame.st0, frame.status & FLAGS, frame.pushed())
}

/// A push moves ST(0) to ST(1).
fn loaded(frame: &Frame) -> (Float80, u16) {
    (frame.st0, frame.status & FLAGS)
}

fn masked(random: &mut Random) -> Frame {
    let mut frame = registers(random);
    frame.control |= EXCEPTIONS;
    frame
}

#[test]
fn arithmetic_on_registers_is_the_hosts() {
    let mut random = Random::new(11);
    check!(everything, random, registers; "fadd st(0), st(1)" "fsub st(0), st(1)" "fsubr st(0), st(1)" "fmul st(0), st(1)");
    check!(everything, random, registers; "fdiv st(0), st(1)" "fdivr st(0), st(1)" "fsqrt" "fabs" "fchs");
}

#[test]
fn arithmetic_with_memory_is_the_hosts() {
    let mut random = Random::new(12);
    check!(everything, random, single; "fadd dword ptr [{frame} + 32]" "fsubr dword ptr [{frame} + 32]" "fdiv dword ptr [{frame} + 32]");
    check!(everything, random, double; "fsub qword ptr [{frame} + 32]" "fmul qword ptr [{frame} + 32]" "fdivr qword ptr [{frame} + 32]");
    check!(everything, random, integer; "fiadd word ptr [{frame} + 32]" "fisubr dword ptr [{frame} + 32]" "fidiv dword ptr [{frame} + 32]");
}

#[test]
fn loads_are_the_hosts() {
    let mut random = Random::new(13);
    check!(loaded, random, single; "fld dword ptr [{frame} + 32]");
    check!(loaded, random, double; "fld qword ptr [{frame} + 32]");
    check!(loaded, random, integer; "fild word ptr [{frame} + 32]" "fild dword ptr [{frame} + 32]" "fild qword ptr [{frame} + 32]");
    check!(loaded, random, registers; "fld1" "fldl2t" "fldl2e" "fldpi" "fldlg2" "fldln2");
    let decimal = |random: &mut Random| {
        let mut digits = [0; 10];
        digits.iter_mut().for_each(|byte| *byte = random.below(10) as u8 | (random.below(10) as u8) << 4);
        digits[9] = random.pick(&[0, 0x80]);
        registers(random).with_memory(&digits)
    };
    check!(loaded, random, decimal; "fbld tbyte ptr [{frame} + 32]");
}

#[test]
fn stores_are_the_hosts() {
    /// Numbers near the bounds of what is stored.
    fn near(random: &mut Random) -> Frame {
        let field = 0x3fff
            + random.pick(&[
                -150i64, -149, -127, -126, -125, 0, 13, 14, 15, 16, 29, 30, 31, 32, 59, 60, 61, 62, 63, 64, 127, 128, 1023, 1024, -1022,
                -1023, -1075,
            ]);
        let sign = random.below(2) << 15;
        let frame = registers(random);
        let significand = random.runs() | 1 << 63;
        let close = (u128::from(field as u64 | sign) << 64 | u128::from(significand)).to_le_bytes();
        if random.below(3) == 0 {
            frame
        } else {
            Frame::new(frame.control, close, frame.st1)
        }
    }
    /// The memory, unless an unmasked exception keeps it from being written.
    fn stored(frame: &Frame) -> (Option<[u8; 16]>, u16) {
        let stops = frame.status & !frame.control & (INVALID | OVERFLOW | UNDERFLOW) != 0;
        // Whether what is not stored was rounded is the silicon's affair.
        let flags = if stops { FLAGS & !(C1 | PRECISION) } else { FLAGS };
        ((!stops).then_some(frame.memory), frame.status & flags)
    }
    let mut random = Random::new(14);
    check!(stored, random, near; "fst dword ptr [{frame} + 32]" "fst qword ptr [{frame} + 32]" "fbstp tbyte ptr [{frame} + 32]");
    check!(stored, random, near; "fistp word ptr [{frame} + 32]" "fistp dword ptr [{frame} + 32]" "fistp qword ptr [{frame} + 32]");
    check!(stored, random, near; "fisttp word ptr [{frame} + 32]" "fisttp dword ptr [{frame} + 32]" "fisttp qword ptr [{frame} + 32]");
}

#[test]
fn comparisons_are_the_hosts() {
    let mut random = Random::new(15);
    let seen = |frame: &Frame| frame.status & (EXCEPTIONS | C0 | C1 | C2 | C3);
    check!(seen, random, masked; "fcom st(1)" "fucom st(1)" "ftst" "fxam");
    let memory = |random: &mut Random| {
        let number = random.number(52, 11, 1023);
        masked(random).with_memory(&number.to_le_bytes())
    };
    check!(seen, random, memory; "fcom dword ptr [{frame} + 32]" "fcom qword ptr [{frame} + 32]" "ficom word ptr [{frame} + 32]" "ficom dword ptr [{frame} + 32]");
}

#[test]
fn functions_are_the_hosts() {
    let mut random = Random::new(16);
    check!(everything, random, registers; "frndint");
    /// Whether a result that is out of range even with a wrapped exponent was rounded is the silicon's affair.
    fn scaled(frame: &Frame) -> (Float80, u16) {
        let unmasked = frame.status & !frame.control & (OVERFLOW | UNDERFLOW) != 0;
        (frame.st0, frame.status & if unmasked { FLAGS & !(C1 | PRECISION) } else { FLAGS })
    }
    check!(scaled, random, registers; "fscale");
    let pushed = |frame: &Frame| (frame.st0, frame.st1, frame.status & FLAGS, frame.pushed());
    check!(pushed, random, registers; "fxtract");
}

#[test]
fn remainders_are_the_hosts() {
    let mut random = Random::new(17);
    /// How far an incomplete remainder goes is the silicon's affair.
    fn seen(frame: &Frame) -> (u16, Option<(Float80, u16)>) {
        let complete = frame.status & C2 == 0;
        (frame.status & (EXCEPTIONS | C2), complete.then_some((frame.st0, frame.status & (C0 | C1 | C3))))
    }
    check!(seen, random, registers; "fprem" "fprem1");
}

/// What is special about transcendental functions is the same everywhere; the rest is within a unit of the last place of the exact
/// result, as the host's is.
#[test]
fn transcendental_functions_are_as_near_as_the_hosts() {
    let mut random = Random::new(18);
    check!(Near::of, random, moderate; "fyl2x" "fpatan" "fsin" "fcos" "fsincos" "fptan");
    check!(Near::of, random, below_one; "f2xm1");
    check!(Near::of, random, near_zero; "fyl2xp1");
}

/// Registers that are below one, or special.
fn moderate(random: &mut Random) -> Frame {
    let mut frame = registers(random);
    for register in [&mut frame.st0, &mut frame.st1] {
        if random.below(4) != 0 {
            let field = 0x3ffe - random.pick(&[0, 1, 2, 3, 4, 8, 20, 40, 70]);
            let sign = random.below(2) << 15;
            *register = (u128::from(field | sign) << 64 | u128::from(random.runs() | 1 << 63)).to_le_bytes();
        }
    }
    frame
}

/// The same, with an ST(0) whose exponent field is below `limit`.
fn limited(random: &mut Random, limit: u16) -> Frame {
    loop {
        let frame = moderate(random);
        let field = u16::from_le_bytes([frame.st0[8], frame.st0[9]]) & 0x7fff;
        if field < limit {
            return frame;
        }
    }
}

fn below_one(random: &mut Random) -> Frame {
    limited(random, 0x3fff)
}

fn near_zero(random: &mut Random) -> Frame {
    limited(random, 0x3ffd)
}

/// What is seen of a transcendental instruction: results that are close are equal.
struct Near(Frame);

impl Near {
    fn of(frame: &Frame) -> Self {
        Near(*frame)
    }

    /// A register as an integer that grows by one from number to number.
    fn place(register: Float80) -> i128 {
        let bits = u128::from_le_bytes(register);
        let magnitude = (bits >> 64 & 0x7fff) << 63 | bits & u128::from(u64::MAX >> 1);
        let sign = if bits >> 79 != 0 { -1 } else { 1 };
        sign * magnitude as i128
    }
}

impl PartialEq for Near {
    fn eq(&self, other: &Self) -> bool {
        /// One for each implementation, in places of the last bit.
        const BOUND: u128 = 2;
        // Silicon also reports exact results as inexact.
        let state = |frame: &Frame| (frame.status & (INVALID | DENORMAL | ZERO_DIVIDE | OVERFLOW | C2), frame.pushed());
        let near = |a, b| Near::place(a).abs_diff(Near::place(b)) <= BOUND;
        let popped = self.0.pushed() < 0;
        state(&self.0) == state(&other.0) && near(self.0.st0, other.0.st0) && (popped || near(self.0.st1, other.0.st1))
    }
}

/// Without a host to compare with: numbers of the manual and of mathematics.
#[test]
fn transcendental_functions_are_right() {
    use crate::exec::float::soft::x87_operations;
    x87_operations! {
        Sine => "fsin";
        Patan => "fpatan";
        Power => "f2xm1";
        Logarithm => "fyl2x";
    }
    fn of(run: fn(&mut Frame), st0: (u16, u64), st1: (u16, u64)) -> (u16, u64) {
        let mut frame = Frame::new(0x37f, float80(st0.0, st0.1), float80(st1.0, st1.1));
        run(&mut frame);
        let bits = u128::from_le_bytes(frame.st0);
        ((bits >> 64) as u16, bits as u64)
    }
    const ONE: (u16, u64) = (0x3fff, 1 << 63);
    const TEN: (u16, u64) = (0x4002, 0xa000_0000_0000_0000);
    assert_eq!(of(Sine::run, ONE, ONE), (0x3ffe, 0xd76a_a478_4867_7021));
    assert_eq!(of(Patan::run, ONE, ONE), (0x3ffe, 0xc90f_daa2_2168_c235));
    assert_eq!(of(Power::run, (0x3ffe, 1 << 63), ONE), (0x3ffd, 0xd413_cccf_e779_9211));
    assert_eq!(of(Logarithm::run, TEN, ONE), (0x4000, 0xd49a_784b_cd1b_8afe));
}
