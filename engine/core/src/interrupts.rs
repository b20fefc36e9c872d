//! Delivery of exceptions and interrupts (to be written by R4).

use crate::cpu::Cpu;
use crate::uop::Exec;

impl Cpu {
    /// Delivers the exception in `fault`; RIP is the one to push.
    pub fn deliver_fault(&mut self) -> Exec {
        Ok(())
    }
    /// Event injection.
    pub fn deliver_event(&mut self, _info: u32, _error: u32, _length: u32) -> Exec {
        Ok(())
    }
}
