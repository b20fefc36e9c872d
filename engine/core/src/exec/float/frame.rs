//! One x87 instruction: its operands, the control word, and what comes of them. That is what both implementations of the unit work on.
//!
//! An unmasked exception does not fault in here: x87 reports it at the next waiting instruction, and FNCLEX forgets it before that. What
//! an implementation leaves in ST(0) is exactly what the guest's unit would hold (SDM vol. 1, 8.5).

/// A register of the unit: ten bytes of it, and zeros.
pub type Float80 = [u8; 16];

/// The default NaN, answer to masked invalid operations.
pub const INDEFINITE: Float80 = float80(0xffff, 0xc000_0000_0000_0000);

/// A value from sign and exponent, and significand.
pub const fn float80(sign_exponent: u16, significand: u64) -> Float80 {
    ((sign_exponent as u128) << 64 | significand as u128).to_le_bytes()
}

/// Operands and results of one instruction.
#[repr(C, align(16))]
#[derive(Clone, Copy, Debug)]
pub struct Frame {
    /// ST(0) before and after.
    pub st0: Float80,
    /// ST(1) before and after.
    pub st1: Float80,
    /// The memory operand.
    pub memory: [u8; 16],
    /// The guest's control word.
    pub control: u16,
    /// The control word that Rust code expects on the host's unit.
    default_control: u16,
    /// Status word after the instruction; TOP is 6 where the instruction neither pushed nor popped.
    pub status: u16,
}

impl Frame {
    /// A frame for an instruction under control word `fcw`.
    pub fn new(fcw: u16, st0: Float80, st1: Float80) -> Self {
        Frame { st0, st1, memory: [0; 16], control: fcw, default_control: 0x37f, status: 0 }
    }

    /// The same with a memory operand.
    pub fn with_memory(mut self, bytes: &[u8]) -> Self {
        self.memory[..bytes.len()].copy_from_slice(bytes);
        self
    }

    /// How many registers the instruction pushed (1), or popped (-1).
    pub fn pushed(&self) -> i32 {
        6 - i32::from(self.status >> 11 & 7)
    }
}

/// An instruction on a frame.
pub trait Operation {
    fn run(frame: &mut Frame);
}
