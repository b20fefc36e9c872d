//! The kinds of code segment that a Linux process can run in: its own, the kernel's 32-bit one, and a 16-bit one of its LDT.
//!
//! With EFER.LMA set both smaller sizes are compatibility mode (SDM vol. 3, 5.2.1), with the paging of 64-bit mode under them. The stack
//! stays flat and 32 bits wide. 16-bit code has a data segment of its own, so that 16-bit addresses reach the operands.

use softkvm_engine::cpu::CodeSize;

use super::arena::{DATA_OFFSET, SLOT_OFFSET, SLOT_PAGE_OFFSET};

/// Selectors that Linux gives a process.
pub const USER_CODE: u16 = 0x33;
pub const USER_CODE_32: u16 = 0x23;
pub const USER_DATA: u16 = 0x2b;

/// A size of code at one of the places that comparisons run at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mode {
    pub size: CodeSize,
    /// Linear address of the arena.
    pub arena: u64,
    /// Number of the arena, of which each has two entries of the LDT.
    pub number: u16,
}

/// The selector of a segment register and its base.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    pub selector: u16,
    pub base: u64,
}

impl Mode {
    pub fn bits(&self) -> u32 {
        match self.size {
            CodeSize::Bits16 => 16,
            CodeSize::Bits32 => 32,
            CodeSize::Bits64 => 64,
        }
    }

    pub fn is_64(&self) -> bool {
        self.size == CodeSize::Bits64
    }

    fn local(&self, entry: u16) -> u16 {
        (2 * self.number + entry) << 3 | 7
    }

    pub fn code(&self) -> Place {
        match self.size {
            CodeSize::Bits64 => Place { selector: USER_CODE, base: 0 },
            CodeSize::Bits32 => Place { selector: USER_CODE_32, base: 0 },
            CodeSize::Bits16 => Place { selector: self.local(0), base: self.arena + SLOT_PAGE_OFFSET },
        }
    }

    /// DS and ES.
    pub fn data(&self) -> Place {
        match self.size {
            CodeSize::Bits64 => Place { selector: 0, base: 0 },
            CodeSize::Bits32 => Place { selector: USER_DATA, base: 0 },
            CodeSize::Bits16 => Place { selector: self.local(1), base: self.arena + DATA_OFFSET },
        }
    }

    /// Offset of the instruction in its segment.
    pub fn slot(&self) -> u64 {
        self.arena + SLOT_PAGE_OFFSET + SLOT_OFFSET as u64 - self.code().base
    }

    /// Bits of a general register that count.
    pub fn mask(&self) -> u64 {
        if self.is_64() {
            u64::MAX
        } else {
            u32::MAX.into()
        }
    }
}
