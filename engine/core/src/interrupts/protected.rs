//! Delivery in protected and virtual-8086 mode, through 16- and 32-bit gates (SDM vol. 3, 6.12 and 20.3).

use super::gate::Gate;
use super::Event;
use crate::cpu::descriptor::{system, Descriptor};
use crate::cpu::switch::NewStack;
use crate::cpu::Cpu;
use crate::exec::far::task::TaskSwitch;
use crate::fault::vector;
use crate::state::{gpr, rights, seg, Segment};
use crate::uop::Exec;

impl Cpu {
    pub(super) fn vector_protected(&mut self, event: &Event) -> Exec {
        let gate = self.gate(event, 8)?;
        if gate.kind == system::TASK_GATE {
            return Err(self.exit_task_switch(gate.selector, TaskSwitch::Gate, event.error));
        }
        let (descriptor, level) = self.handler_code(gate.selector)?;
        if self.virtual_8086() && level != 0 {
            return Err(self.selector_fault(vector::GP, gate.selector));
        }
        let inner = level < self.cpl();
        let stack = if inner { self.inner_stack(level)? } else { self.same_stack() };
        if gate.offset > u64::from(descriptor.limit()) {
            return Err(self.general_protection());
        }
        let (frame, words) = self.protected_frame(event, inner);
        self.enter_handler(&gate, descriptor, level, stack, &frame[..words])
    }

    /// The words to push, and how many there are.
    fn protected_frame(&self, event: &Event, inner: bool) -> ([u64; 10], usize) {
        let selector = |number: usize| u64::from(self.state.segments[number].selector);
        let mut frame = [0; 10];
        let mut words = 0;
        let mut add = |value: u64| {
            frame[words] = value;
            words += 1;
        };
        if self.virtual_8086() {
            [seg::GS, seg::FS, seg::DS, seg::ES].into_iter().for_each(|number| add(selector(number)));
        }
        if inner {
            add(selector(seg::SS));
            add(self.gpr(gpr::RSP));
        }
        [event.flags, selector(seg::CS), event.return_rip].into_iter().for_each(&mut add);
        if let Some(error) = event.error {
            add(error.into());
        }
        (frame, words)
    }

    fn enter_handler(&mut self, gate: &Gate, descriptor: Descriptor, level: u8, mut stack: NewStack, frame: &[u64]) -> Exec {
        let bytes = if matches!(gate.kind, system::INTERRUPT_GATE | system::TRAP_GATE) { 4 } else { 2 };
        self.push_frame(&mut stack, frame, bytes)?;
        if self.virtual_8086() {
            for number in [seg::ES, seg::DS, seg::FS, seg::GS] {
                self.state.segments[number] = Segment::new(0, rights::UNUSABLE, 0, 0);
            }
        }
        self.adopt_stack(&stack);
        self.state.segments[seg::CS] = descriptor.segment(gate.selector & !3 | u16::from(level));
        self.rflags &= !gate.clears();
        self.refresh();
        self.set_rip(gate.offset);
        Ok(())
    }
}
