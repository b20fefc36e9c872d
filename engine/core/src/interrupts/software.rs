//! INT n, INT3, INTO and INT1 (SDM vol. 2, "INT n/INTO/INT3/INT1"; vol. 3, 6.4.4).

use super::{Event, Kind};
use crate::cpu::Cpu;
use crate::state::rflags;
use crate::uop::{Exec, Uop};

impl Cpu {
    /// Delivers the event that the instruction of `uop` asks for; it returns behind the instruction.
    pub fn deliver_software(&mut self, vector: u8, kind: Kind, uop: &Uop) -> Exec {
        if !self.software_interrupt_allowed(kind) {
            return Err(self.general_protection());
        }
        let event = Event { vector, kind, error: None, payload: 0, return_rip: self.rip_at(uop.next_offset()), flags: self.rflags() };
        self.step_settled = self.rflags & rflags::TF != 0;
        self.deliver_at(event, self.rip_at(uop.offset.into()))
    }
}
