//! One x87 instruction on the host's unit, under the guest's control word.
//!
//! An unmasked exception does not fault in here: x87 reports it at the next waiting instruction, and FNCLEX forgets it before that. What
//! the unit leaves in ST(0) is then exactly what the guest's unit would hold (SDM vol. 1, 8.5).

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
    control: u16,
    /// The control word that Rust code expects.
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

/// Whether the unit keeps C1 in an instruction on two registers that are not empty: declares a function that has tried it.
macro_rules! keeps_c1 {
    ($(#[$doc:meta])* $name:ident, $instruction:literal) => {
        $(#[$doc])*
        pub fn $name() -> bool {
            static KEEPS: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
            *KEEPS.get_or_init(|| {
                let mut environment = [0u32; 7];
                let status: u16;
                // SAFETY: the block touches `environment` and the x87 unit alone, and leaves the unit as Rust code expects it.
                unsafe {
                    core::arch::asm!(
                        "fninit",
                        "fld1",
                        "fld1",
                        "fnstenv [{environment}]",
                        "or word ptr [{environment} + 4], 0x200",
                        "fldenv [{environment}]",
                        $instruction,
                        "fnstsw ax",
                        "fninit",
                        environment = in(reg) environment.as_mut_ptr(),
                        out("ax") status,
                        out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
                        out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _,
                        options(nostack),
                    );
                }
                status & super::stack::status::C1 != 0
            })
        }
    };
}
keeps_c1!(
    /// Whether FCOMI keeps C1.
    comparison_keeps_c1,
    "fcomi st(0), st(1)"
);
keeps_c1!(
    /// Whether FCMOVcc keeps C1.
    move_keeps_c1,
    "fcmove st(0), st(1)"
);

/// An instruction on a frame.
pub trait Operation {
    fn run(frame: &mut Frame);
}

/// Declares operations: `Name => "instruction"`, with the memory operand at `[{frame} + 32]`.
macro_rules! host_operations {
    ($($name:ident => $instruction:expr;)*) => {$(
        pub struct $name;
        impl $crate::exec::x87::host::Operation for $name {
            #[inline]
            fn run(frame: &mut $crate::exec::x87::host::Frame) {
                // SAFETY: the block touches the frame and the x87 unit alone, and leaves the unit as Rust code expects it: empty, with
                // the default control word.
                unsafe {
                    core::arch::asm!(
                        "fninit",
                        "fldcw word ptr [{frame} + 48]",
                        "fld tbyte ptr [{frame} + 16]",
                        "fld tbyte ptr [{frame}]",
                        $instruction,
                        "fnstsw ax",
                        "fnclex",
                        "fldcw word ptr [{frame} + 50]",
                        "fstp tbyte ptr [{frame}]",
                        "fstp tbyte ptr [{frame} + 16]",
                        "mov word ptr [{frame} + 52], ax",
                        "fninit",
                        frame = in(reg) frame,
                        out("ax") _,
                        out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
                        out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _,
                        options(nostack),
                    );
                }
            }
        }
    )*};
}
pub(super) use host_operations;
