//! Delivery in IA-32e mode (SDM vol. 3, 6.14): 64-bit handlers, aligned stacks, interrupt stack tables.

use super::Event;
use crate::cpu::Cpu;
use crate::state::{gpr, seg};
use crate::uop::{slot, Exec};

impl Cpu {
    pub(super) fn vector_long(&mut self, event: &Event) -> Exec {
        let gate = self.gate(event, 16)?;
        let (descriptor, level) = self.handler_code(gate.selector)?;
        let mut stack = self.long_stack(level, gate.ist)?;
        stack.pointer &= !15;
        if !self.canonical(gate.offset) {
            return Err(self.general_protection());
        }
        let [ss, cs] = [seg::SS, seg::CS].map(|number| u64::from(self.state.segments[number].selector));
        let frame = [ss, self.gpr(gpr::RSP), event.flags, cs, event.return_rip, event.error.unwrap_or(0).into()];
        let words = if event.error.is_some() { 6 } else { 5 };
        self.push_frame(&mut stack, &frame[..words], 8)?;
        let was_long = self.long_mode();
        self.adopt_stack(&stack);
        self.state.segments[seg::CS] = descriptor.segment(gate.selector & !3 | u16::from(level));
        self.rflags &= !gate.clears();
        if was_long {
            self.refresh_privilege();
        } else {
            self.refresh();
        }
        self.regs[slot::RIP as usize] = gate.offset;
        Ok(())
    }
}
