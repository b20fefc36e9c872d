//! IDT gates and the code segments that they lead to (SDM vol. 3, 6.11 to 6.14).

use super::Event;
use crate::cpu::descriptor::{is_null, system, Descriptor};
use crate::cpu::Cpu;
use crate::fault::vector;
use crate::state::{rflags, rights};
use crate::uop::Exec;

/// Error code that names an IDT entry.
pub(super) const fn vector_error(vector: u8) -> u32 {
    (vector as u32) << 3 | 2
}

/// A gate of any width.
#[derive(Clone, Copy, Debug)]
pub(super) struct Gate {
    pub selector: u16,
    pub offset: u64,
    pub kind: u8,
    /// Interrupt stack table entry; IA-32e mode only.
    pub ist: u8,
}

impl Gate {
    /// Flags that the gate clears.
    pub fn clears(&self) -> u64 {
        let interrupts = if matches!(self.kind, system::INTERRUPT_GATE | system::INTERRUPT_GATE_16) { rflags::IF } else { 0 };
        interrupts | rflags::TF | rflags::NT | rflags::RF | rflags::VM
    }
}

impl Cpu {
    /// The gate of `event`, checked as far as the gate itself goes. `bytes`: size of an IDT entry.
    pub(super) fn gate(&mut self, event: &Event, bytes: u64) -> Exec<Gate> {
        let at = bytes * u64::from(event.vector);
        if at + bytes - 1 > u64::from(self.state.idtr.limit) {
            return Err(self.raise_error(vector::GP, vector_error(event.vector)));
        }
        let la = self.table_address(self.state.idtr.base.wrapping_add(at));
        let low: u64 = self.read_system(la)?;
        let descriptor = Descriptor(low);
        let wide = matches!(descriptor.kind(), system::INTERRUPT_GATE | system::TRAP_GATE);
        let narrow = matches!(descriptor.kind(), system::INTERRUPT_GATE_16 | system::TRAP_GATE_16 | system::TASK_GATE);
        let known = descriptor.is_system() && (wide || narrow && bytes == 8);
        if !known || event.kind.checks_gate() && descriptor.dpl() < self.cpl() {
            return Err(self.raise_error(vector::GP, vector_error(event.vector)));
        }
        if !descriptor.present() {
            return Err(self.raise_error(vector::NP, vector_error(event.vector)));
        }
        let mut gate = Gate { selector: (low >> 16) as u16, offset: low & 0xffff, kind: descriptor.kind(), ist: 0 };
        if wide {
            gate.offset |= low >> 32 & 0xffff_0000;
        }
        if bytes == 16 {
            let high: u32 = self.read_system(la + 8)?;
            gate.offset |= u64::from(high) << 32;
            gate.ist = (low >> 32) as u8 & 7;
        }
        Ok(gate)
    }

    /// The code segment of a handler, and the privilege level that it runs at.
    pub(super) fn handler_code(&mut self, selector: u16) -> Exec<(Descriptor, u8)> {
        if is_null(selector) {
            return Err(self.general_protection());
        }
        let descriptor = self.descriptor(selector, vector::GP)?;
        let width = descriptor.rights() & (rights::LONG | rights::DB);
        let fits = !self.ia32e() || width == rights::LONG;
        if !descriptor.is_code() || descriptor.dpl() > self.cpl() || !fits {
            return Err(self.selector_fault(vector::GP, selector));
        }
        if !descriptor.present() {
            return Err(self.selector_fault(vector::NP, selector));
        }
        let level = if descriptor.is_conforming_code() { self.cpl() } else { descriptor.dpl() };
        Ok((self.accessed(selector, descriptor)?, level))
    }
}
