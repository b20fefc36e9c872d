//! Far JMP and CALL: direct, through call gates, to tasks (SDM vol. 2, "JMP" and "CALL"; vol. 3, 5.8).

use super::task::TaskSwitch;
use crate::cpu::descriptor::{is_null, rpl, system, Descriptor};
use crate::cpu::Cpu;
use crate::fault::vector;
use crate::paging::AccessKind;
use crate::state::{rights, seg};
use crate::uop::{Exec, Stop, Uop};
use crate::word::Word;

/// Most parameters that a call gate copies.
const PARAMETERS: usize = 31;

/// A far pointer, and where the instruction after the transfer is.
struct Transfer {
    selector: u16,
    offset: u64,
    /// Bytes of a word on the stack.
    bytes: u64,
    call: bool,
    return_rip: u64,
}

impl Transfer {
    fn immediate<W: Word>(cpu: &Cpu, uop: &Uop, call: bool) -> Self {
        let return_rip = cpu.rip_at(uop.next_offset());
        Transfer { selector: uop.disp as u16, offset: W::truncate(uop.imm).zero_extend(), bytes: W::BYTES, call, return_rip }
    }

    fn memory<W: Word>(cpu: &mut Cpu, uop: &Uop, call: bool) -> Exec<Self> {
        let la = cpu.linear(uop, W::BYTES + 2, AccessKind::Read)?;
        let offset: W = cpu.read(uop.segment(), la)?;
        let selector: u16 = cpu.read(uop.segment(), la.wrapping_add(W::BYTES))?;
        let return_rip = cpu.rip_at(uop.next_offset());
        Ok(Transfer { selector, offset: offset.zero_extend(), bytes: W::BYTES, call, return_rip })
    }

    fn source(&self) -> TaskSwitch {
        if self.call {
            TaskSwitch::Call
        } else {
            TaskSwitch::Jump
        }
    }
}

pub(super) fn jump_immediate<W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let transfer = Transfer::immediate::<W>(cpu, uop, false);
    cpu.transfer(&transfer)
}

pub(super) fn jump_memory<W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let transfer = Transfer::memory::<W>(cpu, uop, false)?;
    cpu.transfer(&transfer)
}

pub(super) fn call_immediate<W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let transfer = Transfer::immediate::<W>(cpu, uop, true);
    cpu.transfer(&transfer)
}

pub(super) fn call_memory<W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let transfer = Transfer::memory::<W>(cpu, uop, true)?;
    cpu.transfer(&transfer)
}

impl Cpu {
    fn transfer(&mut self, to: &Transfer) -> Exec {
        if self.protected() {
            self.transfer_protected(to)?;
        } else {
            self.transfer_real(to)?;
        }
        Err(Stop::Next)
    }

    fn transfer_real(&mut self, to: &Transfer) -> Exec {
        if to.offset > u64::from(self.state.segments[seg::CS].limit) {
            return Err(self.general_protection());
        }
        if to.call {
            self.push_return(to)?;
        }
        self.enter_real_code(to.selector, to.offset)
    }

    /// Pushes CS and the return address on the current stack.
    fn push_return(&mut self, to: &Transfer) -> Exec {
        let mut stack = self.same_stack();
        let cs = self.state.segments[seg::CS].selector;
        self.push_frame(&mut stack, &[cs.into(), to.return_rip], to.bytes)?;
        self.adopt_stack(&stack);
        Ok(())
    }

    fn transfer_protected(&mut self, to: &Transfer) -> Exec {
        if is_null(to.selector) {
            return Err(self.general_protection());
        }
        let descriptor = self.descriptor(to.selector, vector::GP)?;
        if descriptor.is_system() {
            return self.transfer_system(to, descriptor);
        }
        let level = self.cpl();
        let privileged = if descriptor.is_conforming_code() {
            descriptor.dpl() <= level
        } else {
            rpl(to.selector) <= level && descriptor.dpl() == level
        };
        if !descriptor.is_code() || !privileged || self.is_reserved_code(descriptor) {
            return Err(self.selector_fault(vector::GP, to.selector));
        }
        if !descriptor.present() {
            return Err(self.selector_fault(vector::NP, to.selector));
        }
        self.check_target(descriptor, to.offset)?;
        let descriptor = self.accessed(to.selector, descriptor)?;
        if to.call {
            self.push_return(to)?;
        }
        self.enter_code(to.selector, descriptor, level, to.offset);
        Ok(())
    }

    /// A transfer to a gate or a task.
    fn transfer_system(&mut self, to: &Transfer, descriptor: Descriptor) -> Exec {
        let legacy = !self.ia32e();
        let known = match descriptor.kind() {
            system::CALL_GATE => true,
            system::CALL_GATE_16 | system::TASK_GATE | system::TSS | system::TSS_16 => legacy,
            _ => false,
        };
        if !known || descriptor.dpl() < self.cpl().max(rpl(to.selector)) {
            return Err(self.selector_fault(vector::GP, to.selector));
        }
        if !descriptor.present() {
            return Err(self.selector_fault(vector::NP, to.selector));
        }
        match descriptor.kind() {
            system::TSS | system::TSS_16 => Err(self.exit_task_switch(to.selector, to.source(), None)),
            system::TASK_GATE => Err(self.exit_task_switch((descriptor.0 >> 16) as u16, to.source(), None)),
            _ => self.through_gate(to, descriptor),
        }
    }

    fn through_gate(&mut self, to: &Transfer, gate: Descriptor) -> Exec {
        let mut offset = gate.0 & 0xffff;
        if gate.kind() == system::CALL_GATE {
            offset |= gate.0 >> 32 & 0xffff_0000;
        }
        if self.ia32e() {
            let upper = self.upper_descriptor(to.selector)?;
            if upper >> 40 & 0x1f != 0 {
                return Err(self.selector_fault(vector::GP, to.selector));
            }
            offset |= upper << 32;
        }
        let selector = (gate.0 >> 16) as u16;
        let (code, level) = self.gate_code(to, selector)?;
        self.check_target(code, offset)?;
        if level < self.cpl() {
            self.call_inner(to, gate, level)?;
        } else if to.call {
            self.push_return(&Transfer { bytes: self.gate_width(gate), ..*to })?;
        }
        self.enter_code(selector, code, level, offset);
        Ok(())
    }

    /// Bytes of the words that a call through `gate` pushes.
    fn gate_width(&self, gate: Descriptor) -> u64 {
        match gate.kind() {
            system::CALL_GATE_16 => 2,
            _ if self.ia32e() => 8,
            _ => 4,
        }
    }

    /// The code segment behind a call gate, and the privilege level that it runs at.
    fn gate_code(&mut self, to: &Transfer, selector: u16) -> Exec<(Descriptor, u8)> {
        if is_null(selector) {
            return Err(self.general_protection());
        }
        let code = self.descriptor(selector, vector::GP)?;
        let width = code.rights() & (rights::LONG | rights::DB);
        let conforming = code.is_conforming_code();
        let reachable = if to.call || conforming { code.dpl() <= self.cpl() } else { code.dpl() == self.cpl() };
        if !code.is_code() || !reachable || self.ia32e() && width != rights::LONG {
            return Err(self.selector_fault(vector::GP, selector));
        }
        if !code.present() {
            return Err(self.selector_fault(vector::NP, selector));
        }
        let level = if conforming { self.cpl() } else { code.dpl() };
        Ok((self.accessed(selector, code)?, level))
    }

    /// Switches to the stack of the inner `level` and pushes what its RET needs.
    fn call_inner(&mut self, to: &Transfer, gate: Descriptor, level: u8) -> Exec {
        let bytes = self.gate_width(gate);
        let mut stack = if self.ia32e() { self.long_stack(level, 0)? } else { self.inner_stack(level)? };
        let [ss, cs] = [seg::SS, seg::CS].map(|number| u64::from(self.state.segments[number].selector));
        let mut frame = [0; PARAMETERS + 4];
        (frame[0], frame[1]) = (ss, self.gpr(crate::state::gpr::RSP));
        let parameters = if self.ia32e() { 0 } else { (gate.0 >> 32) as usize & PARAMETERS };
        for n in 0..parameters {
            let skip = bytes * (parameters - 1 - n) as u64;
            frame[2 + n] = if bytes == 2 { self.peek::<u16>(skip)?.into() } else { self.peek::<u32>(skip)?.into() };
        }
        (frame[2 + parameters], frame[3 + parameters]) = (cs, to.return_rip);
        self.push_frame(&mut stack, &frame[..4 + parameters], bytes)?;
        self.adopt_stack(&stack);
        Ok(())
    }
}
