//! IRET in every mode (SDM vol. 2, "IRET/IRETD/IRETQ"; vol. 3, 6.12.1, 6.14.4 and 20.2).

use super::task::TaskSwitch;
use crate::cpu::breakpoint::dr7;
use crate::cpu::descriptor::{rpl, system};
use crate::cpu::Cpu;
use crate::fault::vector;
use crate::paging::Privilege;
use crate::state::{cr4, gpr, interruptibility, rflags, rights, seg};
use crate::uop::{Exec, Stop, Uop};
use crate::word::Word;

/// Flags that an IRET of any operand size and privilege loads.
const FLAGS: u64 = rflags::ARITHMETIC | rflags::TF | rflags::DF | rflags::NT;
/// Flags in the upper half that any privilege loads.
const FLAGS_HIGH: u64 = rflags::RF | rflags::AC | rflags::ID;

/// The three words that every IRET pops.
struct Frame {
    rip: u64,
    selector: u16,
    flags: u64,
}

fn frame<W: Word>(cpu: &mut Cpu) -> Exec<Frame> {
    let rip = cpu.peek::<W>(0)?.zero_extend();
    let selector = cpu.peek::<W>(W::BYTES)?.zero_extend() as u16;
    let flags = cpu.peek::<W>(2 * W::BYTES)?.zero_extend();
    Ok(Frame { rip, selector, flags })
}

/// IRET of 64-bit code, which always pops SS:RSP.
pub(super) fn iret_long<W: Word>(cpu: &mut Cpu, _uop: &Uop) -> Exec {
    if cpu.rflags & rflags::NT != 0 {
        return Err(cpu.general_protection());
    }
    let Frame { rip, selector, flags } = frame::<W>(cpu)?;
    let rsp = cpu.peek::<W>(3 * W::BYTES)?.zero_extend();
    let ss = cpu.peek::<W>(4 * W::BYTES)?.zero_extend() as u16;
    let code = cpu.return_code(selector)?;
    let level = rpl(selector);
    let stack = cpu.return_stack(ss, level, code)?;
    cpu.check_target(code, rip)?;
    let image = cpu.iret_flags::<W>(flags);
    if level == cpu.cpl() && cpu.is_long_code(code) {
        cpu.state.segments[seg::SS] = stack;
        cpu.set_gpr(gpr::RSP, rsp);
    } else {
        cpu.leave_to_outer(stack, rsp, level, code);
    }
    cpu.load_rflags(image);
    cpu.enter_code(selector, code, level, rip);
    cpu.unblock_nmi();
    Err(Stop::Next)
}

/// IRET of 16- and 32-bit code.
pub(super) fn iret_legacy<W: Word>(cpu: &mut Cpu, _uop: &Uop) -> Exec {
    if cpu.protected() {
        cpu.iret_protected::<W>()?;
    } else {
        cpu.iret_real::<W>()?;
    }
    cpu.unblock_nmi();
    Err(Stop::Next)
}

impl Cpu {
    fn unblock_nmi(&mut self) {
        self.state.interruptibility &= !interruptibility::NMI;
    }

    /// RFLAGS after an IRET from the current privilege.
    fn iret_flags<W: Word>(&self, image: u64) -> u64 {
        let mut writable = FLAGS;
        if W::BYTES > 2 {
            writable |= FLAGS_HIGH;
        }
        if self.cpl() <= self.io_privilege() {
            writable |= rflags::IF;
        }
        if self.cpl() == 0 {
            writable |= rflags::IOPL;
            if W::BYTES > 2 {
                writable |= rflags::VIF | rflags::VIP;
            }
        }
        // RF lasts for one instruction, and matters only where an instruction breakpoint could hit that one.
        if self.state.dr7 & dr7::ENABLES == 0 {
            writable &= !rflags::RF;
        }
        let old = self.rflags() & !rflags::RF;
        old & !writable | image & writable
    }

    fn iret_real<W: Word>(&mut self) -> Exec {
        let guarded = self.virtual_8086() && self.io_privilege() != 3;
        if guarded && (W::BYTES != 2 || self.state.cr4 & cr4::VME == 0) {
            return Err(self.general_protection());
        }
        let Frame { rip, selector, flags } = frame::<W>(self)?;
        let keep = if self.virtual_8086() { rflags::IOPL | rflags::VIF | rflags::VIP } else { 0 };
        let image = if guarded { self.load_virtual_flags(flags)? } else { self.iret_flags::<W>(flags) & !keep | self.rflags & keep };
        self.enter_real_code(selector, rip)?;
        self.release(3 * W::BYTES);
        self.load_rflags(image);
        self.refresh();
        Ok(())
    }

    fn iret_protected<W: Word>(&mut self) -> Exec {
        if self.rflags & rflags::NT != 0 {
            return Err(self.task_return());
        }
        let Frame { rip, selector, flags } = frame::<W>(self)?;
        if W::BYTES == 4 && flags & rflags::VM != 0 && self.cpl() == 0 && !self.ia32e() {
            return self.iret_to_virtual_8086(rip, selector, flags);
        }
        let code = self.return_code(selector)?;
        let level = rpl(selector);
        if level == self.cpl() {
            self.check_target(code, rip)?;
            let image = self.iret_flags::<W>(flags);
            self.release(3 * W::BYTES);
            self.load_rflags(image);
        } else {
            let rsp = self.peek::<W>(3 * W::BYTES)?.zero_extend();
            let ss = self.peek::<W>(4 * W::BYTES)?.zero_extend() as u16;
            let stack = self.return_stack(ss, level, code)?;
            self.check_target(code, rip)?;
            let image = self.iret_flags::<W>(flags);
            self.leave_to_outer(stack, rsp, level, code);
            self.load_rflags(image);
        }
        self.enter_code(selector, code, level, rip);
        Ok(())
    }

    /// IRET of a nested task: back to the task that the current TSS links to.
    #[cold]
    fn task_return(&mut self) -> Stop {
        if self.ia32e() {
            return self.general_protection();
        }
        let tr = self.state.segments[seg::TR];
        let link = match self.read_system::<u16>(self.table_address(tr.base)) {
            Ok(link) => link,
            Err(stop) => return stop,
        };
        let descriptor = match self.find_descriptor(link) {
            Ok(descriptor) => descriptor,
            Err(stop) => return stop,
        };
        match descriptor {
            Some(tss) if link & 4 == 0 && tss.is_system() && matches!(tss.kind(), system::TSS_BUSY | system::TSS_16_BUSY) => {
                if !tss.present() {
                    return self.selector_fault(vector::NP, link);
                }
                self.exit_task_switch(link, TaskSwitch::Iret, None)
            }
            _ => self.selector_fault(vector::TS, link),
        }
    }

    fn iret_to_virtual_8086(&mut self, rip: u64, selector: u16, flags: u64) -> Exec {
        let mut words = [0; 6];
        for (n, word) in words.iter_mut().enumerate() {
            *word = self.peek::<u32>(12 + 4 * n as u64)?;
        }
        let [esp, ss, es, ds, fs, gs] = words;
        if rip > 0xffff {
            return Err(self.general_protection());
        }
        self.load_rflags(flags);
        for (number, value) in [(seg::CS, u32::from(selector)), (seg::SS, ss), (seg::ES, es), (seg::DS, ds), (seg::FS, fs), (seg::GS, gs)] {
            self.state.segments[number] = self.real_segment(number, value as u16);
        }
        self.set_gpr(gpr::RSP, esp.into());
        self.refresh();
        self.set_rip(rip);
        debug_assert!(self.privilege() == Privilege::User && self.state.segments[seg::SS].has(rights::PRESENT));
        Ok(())
    }
}
