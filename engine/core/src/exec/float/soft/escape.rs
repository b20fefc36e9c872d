//! x87 instructions by their text in the assembler. One that is not known does not compile.

/// Where the second operand of an instruction is, and what it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// ST(1).
    Register,
    Single,
    Double,
    /// A signed integer of so many bits.
    Integer(u32),
    /// 18 digits.
    Decimal,
}

/// A constant that an instruction loads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Constant {
    One,
    Log2Of10,
    Log2OfE,
    Pi,
    Log10Of2,
    LogEOf2,
}

/// What an instruction does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Escape {
    Add(Source),
    Subtract(Source),
    SubtractFrom(Source),
    Multiply(Source),
    Divide(Source),
    DivideInto(Source),
    Compare { source: Source, ordered: bool },
    Test,
    Examine,
    Load(Source),
    LoadConstant(Constant),
    Store(Source),
    Truncate(Source),
    ChangeSign,
    Absolute,
    Root,
    RoundToInteger,
    Scale,
    Remainder { nearest: bool },
    Extract,
    TwoToXMinusOne,
    Sine,
    Cosine,
    SineAndCosine,
    Tangent,
    ArcTangent,
    Logarithm,
    LogarithmPlusOne,
}

impl Source {
    /// The source that `operand` names, of an instruction on integers or on numbers.
    const fn of(operand: &[u8], integer: bool) -> Self {
        match (operand, integer) {
            ([] | [b's', ..], _) => Source::Register,
            ([b'w', ..], true) => Source::Integer(16),
            ([b'd', ..], true) => Source::Integer(32),
            ([b'q', ..], true) => Source::Integer(64),
            ([b'd', ..], false) => Source::Single,
            ([b'q', ..], false) => Source::Double,
            ([b't', ..], false) => Source::Decimal,
            _ => panic!("not an x87 operand"),
        }
    }
}

impl Escape {
    /// The instruction whose text is `text`.
    pub const fn of(text: &str) -> Self {
        let text = text.as_bytes();
        let mut end = 0;
        while end < text.len() && text[end] != b' ' {
            end += 1;
        }
        let (name, operand) = text.split_at(end);
        let operand = if let [b' ', operand @ ..] = operand { operand } else { operand };
        let number = Source::of(operand, matches!(name, [_, b'i', ..]));
        match name {
            b"fadd" | b"fiadd" => Escape::Add(number),
            b"fsub" | b"fisub" => Escape::Subtract(number),
            b"fsubr" | b"fisubr" => Escape::SubtractFrom(number),
            b"fmul" | b"fimul" => Escape::Multiply(number),
            b"fdiv" | b"fidiv" => Escape::Divide(number),
            b"fdivr" | b"fidivr" => Escape::DivideInto(number),
            b"fcom" | b"ficom" => Escape::Compare { source: number, ordered: true },
            b"fucom" => Escape::Compare { source: number, ordered: false },
            b"ftst" => Escape::Test,
            b"fxam" => Escape::Examine,
            b"fld" | b"fild" | b"fbld" => Escape::Load(number),
            b"fst" | b"fistp" | b"fbstp" => Escape::Store(number),
            b"fisttp" => Escape::Truncate(number),
            b"fld1" => Escape::LoadConstant(Constant::One),
            b"fldl2t" => Escape::LoadConstant(Constant::Log2Of10),
            b"fldl2e" => Escape::LoadConstant(Constant::Log2OfE),
            b"fldpi" => Escape::LoadConstant(Constant::Pi),
            b"fldlg2" => Escape::LoadConstant(Constant::Log10Of2),
            b"fldln2" => Escape::LoadConstant(Constant::LogEOf2),
            b"fchs" => Escape::ChangeSign,
            b"fabs" => Escape::Absolute,
            b"fsqrt" => Escape::Root,
            b"frndint" => Escape::RoundToInteger,
            b"fscale" => Escape::Scale,
            b"fprem" => Escape::Remainder { nearest: false },
            b"fprem1" => Escape::Remainder { nearest: true },
            b"fxtract" => Escape::Extract,
            b"f2xm1" => Escape::TwoToXMinusOne,
            b"fsin" => Escape::Sine,
            b"fcos" => Escape::Cosine,
            b"fsincos" => Escape::SineAndCosine,
            b"fptan" => Escape::Tangent,
            b"fpatan" => Escape::ArcTangent,
            b"fyl2x" => Escape::Logarithm,
            b"fyl2xp1" => Escape::LogarithmPlusOne,
            _ => panic!("not an x87 instruction"),
        }
    }
}
