//! Where guest registers are while host code runs.
//!
//! Ten general registers live in host registers of the same number, so that instructions with implicit operands keep their encoding;
//! only RSP moves to R12, because the host needs its own stack. RBP and R11 to R15 stay in the CPU's register file; the host's RBP is the
//! address of the CPU, and its R11 the budget, from which each block takes: in memory that would be what short loops wait for.

use iced_x86::Register;

/// Scratch registers: nothing in them outlives an instruction.
pub const SCRATCH: [Register; 3] = [Register::R13, Register::R14, Register::R15];
/// Host register of `Cpu::budget`.
pub const BUDGET: Register = Register::R11;
/// Host register of the guest's RSP.
pub const STACK: Register = Register::R12;

/// Guest registers that live in host registers, with these.
pub const PINNED: [(Register, Register); 10] = [
    (Register::RAX, Register::RAX),
    (Register::RCX, Register::RCX),
    (Register::RDX, Register::RDX),
    (Register::RBX, Register::RBX),
    (Register::RSP, STACK),
    (Register::RSI, Register::RSI),
    (Register::RDI, Register::RDI),
    (Register::R8, Register::R8),
    (Register::R9, Register::R9),
    (Register::R10, Register::R10),
];

/// The 64-bit host register of a 64-bit guest register; `None` if it stays in memory.
pub fn host(guest: Register) -> Option<Register> {
    PINNED.iter().find(|(pinned, _)| *pinned == guest).map(|(_, host)| *host)
}

/// Offset of a 64-bit guest register in the CPU's register file.
pub fn offset(guest: Register) -> usize {
    guest.number() * 8
}

/// The part of `full`, a 64-bit register, that is as wide as `like`.
pub fn resized(full: Register, like: Register) -> Register {
    let number = full.number() as u32;
    match like.size() {
        8 => full,
        4 => Register::EAX + number,
        2 => Register::AX + number,
        _ => LOW_BYTES[full.number()],
    }
}

const LOW_BYTES: [Register; 16] = [
    Register::AL,
    Register::CL,
    Register::DL,
    Register::BL,
    Register::SPL,
    Register::BPL,
    Register::SIL,
    Register::DIL,
    Register::R8L,
    Register::R9L,
    Register::R10L,
    Register::R11L,
    Register::R12L,
    Register::R13L,
    Register::R14L,
    Register::R15L,
];

/// XMM, YMM, MMX or x87 registers.
pub fn is_media(register: Register) -> bool {
    register.is_xmm() || register.is_ymm() || register.is_mm() || register.is_st()
}

/// AH, CH, DH or BH, which no instruction with a REX prefix can name.
pub fn is_high_byte(register: Register) -> bool {
    matches!(register, Register::AH | Register::CH | Register::DH | Register::BH)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_keep_the_number() {
        assert_eq!(resized(Register::R12, Register::ESP), Register::R12D);
        assert_eq!(resized(Register::RSI, Register::SIL), Register::SIL);
        assert_eq!(resized(Register::R8, Register::R8W), Register::R8W);
        assert_eq!(resized(Register::RAX, Register::RAX), Register::RAX);
    }

    #[test]
    fn the_scratch_registers_hold_no_guest_register() {
        assert!(PINNED.iter().all(|(_, host)| ![Register::RBP, Register::RSP, BUDGET].contains(host)));
        assert!(PINNED.iter().all(|(_, host)| !SCRATCH.contains(host)));
    }
}
