//! Delivery of exceptions and interrupts (to be written by R4).

use crate::cpu::Cpu;
use crate::uop::Exec;

impl Cpu {
    /// Delivers the exception in `fault`; RIP is the one to push.
    pub fn deliver_fault(&mut self) -> Exec {
        Ok(())
    }
}
