//! Far RET, and what it shares with IRET: the checks of a return's CS and SS (SDM vol. 2, "RET" and "IRET"; vol. 3, 5.8.6).

use crate::cpu::descriptor::{is_null, rpl, Descriptor};
use crate::cpu::Cpu;
use crate::fault::vector;
use crate::state::{gpr, rights, seg, Segment};
use crate::uop::{Exec, Stop, Uop};
use crate::word::Word;

pub(super) fn return_far<W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let rip = cpu.peek::<W>(0)?.zero_extend();
    let selector = cpu.peek::<W>(W::BYTES)?.zero_extend() as u16;
    let release = uop.imm & 0xffff;
    if !cpu.protected() {
        cpu.enter_real_code(selector, rip)?;
        cpu.release(2 * W::BYTES + release);
        return Err(Stop::Next);
    }
    let code = cpu.return_code(selector)?;
    if rpl(selector) == cpu.cpl() {
        cpu.check_target(code, rip)?;
        cpu.release(2 * W::BYTES + release);
    } else {
        let rsp = cpu.peek::<W>(2 * W::BYTES + release)?.zero_extend();
        let ss = cpu.peek::<W>(3 * W::BYTES + release)?.zero_extend() as u16;
        let stack = cpu.return_stack(ss, rpl(selector), code)?;
        cpu.check_target(code, rip)?;
        cpu.leave_to_outer(stack, rsp.wrapping_add(release), rpl(selector), code);
    }
    cpu.enter_code(selector, code, rpl(selector), rip);
    Err(Stop::Next)
}

impl Cpu {
    /// Drops `bytes` from the stack.
    pub(super) fn release(&mut self, bytes: u64) {
        self.set_stack_pointer(self.gpr(gpr::RSP).wrapping_add(bytes));
    }

    /// The code segment that a return goes to.
    pub(super) fn return_code(&mut self, selector: u16) -> Exec<Descriptor> {
        if is_null(selector) {
            return Err(self.general_protection());
        }
        let code = self.descriptor(selector, vector::GP)?;
        let level = rpl(selector);
        let privileged = if code.is_conforming_code() { code.dpl() <= level } else { code.dpl() == level };
        if !code.is_code() || level < self.cpl() || !privileged || self.is_reserved_code(code) {
            return Err(self.selector_fault(vector::GP, selector));
        }
        if !code.present() {
            return Err(self.selector_fault(vector::NP, selector));
        }
        self.accessed(selector, code)
    }

    /// The stack segment of a return to `level`; 64-bit code below ring 3 may have a null one.
    pub(super) fn return_stack(&mut self, selector: u16, level: u8, code: Descriptor) -> Exec<Segment> {
        if is_null(selector) {
            if self.is_long_code(code) && level != 3 && rpl(selector) == level {
                return Ok(Cpu::null_stack(level));
            }
            return Err(self.general_protection());
        }
        let stack = self.descriptor(selector, vector::GP)?;
        if rpl(selector) != level || stack.dpl() != level || !stack.is_writable_data() {
            return Err(self.selector_fault(vector::GP, selector));
        }
        if !stack.present() {
            return Err(self.selector_fault(vector::SS, selector));
        }
        Ok(self.accessed(selector, stack)?.segment(selector))
    }

    /// Takes the stack of the outer `level`, and hides what inner data segments would show it. The base stays, as 64-bit code can tell.
    pub(super) fn leave_to_outer(&mut self, stack: Segment, rsp: u64, level: u8, code: Descriptor) {
        self.state.segments[seg::SS] = stack;
        let mask = match (self.is_long_code(code), stack.has(rights::DB)) {
            (true, _) => u64::MAX,
            (false, true) => 0xffff_ffff,
            (false, false) => 0xffff,
        };
        let kept = if mask == 0xffff { self.gpr(gpr::RSP) & 0xffff_0000 } else { 0 };
        self.set_gpr(gpr::RSP, kept | rsp & mask);
        for number in [seg::ES, seg::DS, seg::FS, seg::GS] {
            let segment = self.state.segments[number];
            let shared = segment.has(rights::CODE) && segment.has(rights::DC);
            if !segment.has(rights::UNUSABLE) && segment.dpl() < level && !shared {
                self.set_segment(number, Segment::new(0, rights::UNUSABLE, 0, segment.base));
            }
        }
    }
}
