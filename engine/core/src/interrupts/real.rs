//! The interrupt vector table of real-address mode (SDM vol. 3, 20.1.4).

use super::gate::vector_error;
use super::Event;
use crate::cpu::Cpu;
use crate::fault::vector;
use crate::state::{rflags, seg};
use crate::uop::Exec;

impl Cpu {
    pub(super) fn vector_real(&mut self, event: &Event) -> Exec {
        let at = 4 * u64::from(event.vector);
        if at + 3 > u64::from(self.state.idtr.limit) {
            return Err(self.raise_error(vector::GP, vector_error(event.vector)));
        }
        let entry: u32 = self.read_system(self.table_address(self.state.idtr.base.wrapping_add(at)))?;
        let mut stack = self.same_stack();
        let cs = self.state.segments[seg::CS].selector;
        self.push_frame(&mut stack, &[event.flags, cs.into(), event.return_rip], 2)?;
        self.adopt_stack(&stack);
        self.rflags &= !(rflags::IF | rflags::TF | rflags::AC | rflags::RF);
        self.state.segments[seg::CS] = self.real_segment(seg::CS, (entry >> 16) as u16);
        self.refresh();
        self.set_rip(u64::from(entry & 0xffff));
        Ok(())
    }
}
