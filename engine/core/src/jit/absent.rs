//! What stands for the translator on hosts that no back end makes code for: there are no translations, and the interpreter runs everything.

#[path = "tier.rs"]
mod tier;

use std::io;

use crate::cpu::Cpu;
use crate::decode::block::Block;
use crate::uop::Exec;

pub use tier::Tier;

/// Why there is no host code.
pub fn check() -> io::Result<()> {
    let why = format!("there is no translator for {} hosts, only for x86_64", std::env::consts::ARCH);
    Err(io::Error::new(io::ErrorKind::Unsupported, why))
}

/// What makes host code here, or why nothing does.
pub fn describe() -> String {
    check().map_or_else(|error| format!("none: {error}"), |()| std::env::consts::ARCH.into())
}

/// The translations of one core. There is none.
pub enum Translator {}

pub mod native {
    //! The part of a CPU that host code would keep for itself.

    use iced_x86::Mnemonic;

    #[derive(Default)]
    pub struct Native {
        /// RIP of the first instruction of the last block.
        pub rip: u64,
        pub counts: Counts,
    }

    /// What happened in host code: nothing.
    #[derive(Default)]
    pub struct Counts {
        pub links: u64,
        pub misses: u64,
    }

    impl Counts {
        /// How often instructions without host code ran, by mnemonic.
        pub fn interpreted(&self) -> Vec<(Mnemonic, u64)> {
            Vec::new()
        }
    }
}

pub mod link {
    //! Ways from translation to translation.

    use std::ops::Range;

    /// What a block with a translation has besides. No block has one.
    pub enum Links {}

    impl Links {
        pub fn cut(&mut self) {
            match *self {}
        }

        pub fn are_at(&self, _addresses: &Range<u64>) -> bool {
            match *self {}
        }

        pub fn forget(&mut self, _addresses: &Range<u64>) {
            match *self {}
        }
    }
}

impl Translator {
    pub fn translated(&self) -> u64 {
        match *self {}
    }

    pub fn evicted(&self) -> u64 {
        match *self {}
    }

    pub fn bytes(&self) -> usize {
        match *self {}
    }
}

impl Cpu {
    /// Changes nothing: no block runs often enough.
    pub fn set_translator(&mut self, _threshold: Option<u32>) {}

    /// As [`Cpu::set_translator`].
    pub fn set_translator_within(&mut self, _bytes: usize, _threshold: Option<u32>) {}

    /// Where the dispatcher enters host code of a block: nowhere.
    #[inline(always)]
    pub(crate) fn translation(&mut self, _block: *mut Block) -> Option<*const u8> {
        None
    }

    /// Runs `block`, which has no host code.
    pub(crate) fn run_native(&mut self, block: *mut Block, _body: *const u8) -> Exec<*mut Block> {
        self.interpret(block)
    }
}

#[cfg(test)]
mod tests {
    use super::describe;

    #[test]
    fn a_host_without_a_back_end_is_named() {
        assert!(describe().starts_with("none: ") && describe().contains(std::env::consts::ARCH), "{}", describe());
    }
}
