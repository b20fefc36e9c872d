//! One x87 instruction on the host's unit, under the guest's control word.

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
                status & crate::exec::x87::status::C1 != 0
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

/// Declares operations: `Name => "instruction"`, with the memory operand at `[{frame} + 32]`.
macro_rules! x87_operations {
    ($($name:ident => $instruction:expr;)*) => {$(
        pub struct $name;
        impl $crate::exec::float::frame::Operation for $name {
            #[inline]
            fn run(frame: &mut $crate::exec::float::frame::Frame) {
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
pub(in crate::exec) use x87_operations;
