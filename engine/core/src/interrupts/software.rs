//! INT n, INT3, INTO and INT1 (SDM vol. 2, "INT n/INTO/INT3/INT1"; vol. 3, 6.4.4), and INT n of virtual-8086 mode (vol. 3, 20.3.3).

use super::{Event, Kind};
use crate::cpu::Cpu;
use crate::state::{cr4, rflags, seg};
use crate::uop::{Exec, Stop, Uop};

/// Offset of the I/O map base in a 32-bit TSS. The redirection bitmap for INT n ends where the map begins.
const TSS_MAP_BASE: u32 = 102;
/// Bytes of the redirection bitmap.
const REDIRECTION: u32 = 32;

impl Cpu {
    /// Delivers the event that the instruction of `uop` asks for; it returns behind the instruction.
    pub fn deliver_software(&mut self, vector: u8, kind: Kind, uop: &Uop) -> Exec {
        let return_rip = self.rip_at(uop.next_offset());
        let steps = self.rflags & rflags::TF != 0;
        if kind == Kind::Software && self.virtual_8086() {
            if self.is_redirected(vector)? {
                self.vector_redirected(vector, return_rip)?;
                self.step_settled = steps;
                return Err(Stop::Next);
            }
            if self.io_privilege() != 3 {
                return Err(self.general_protection());
            }
        }
        let event = Event { vector, kind, error: None, payload: 0, return_rip, flags: self.rflags() };
        self.step_settled = steps;
        self.deliver_at(event, self.rip_at(uop.offset.into()))
    }

    /// Whether INT n of a virtual-8086 program goes to its own handler: with CR4.VME, where the TSS's bitmap has a zero.
    fn is_redirected(&mut self, vector: u8) -> Exec<bool> {
        if self.state.cr4 & cr4::VME == 0 {
            return Ok(false);
        }
        let tr = self.state.segments[seg::TR];
        if tr.limit <= TSS_MAP_BASE {
            return Err(self.general_protection());
        }
        let map: u16 = self.read_system(self.table_address(tr.base.wrapping_add(TSS_MAP_BASE.into())))?;
        let Some(at) = (u32::from(map) + u32::from(vector / 8)).checked_sub(REDIRECTION).filter(|at| *at <= tr.limit) else {
            return Err(self.general_protection());
        };
        let bits: u8 = self.read_system(self.table_address(tr.base.wrapping_add(at.into())))?;
        Ok(bits >> (vector % 8) & 1 == 0)
    }

    /// Runs the program's own handler, as in real-address mode. Below IOPL 3 it is VIF that it sees as IF.
    fn vector_redirected(&mut self, vector: u8, return_rip: u64) -> Exec {
        let entry: u32 = self.read_system(4 * u64::from(vector))?;
        let image = if self.io_privilege() == 3 { self.rflags() } else { self.virtual_flags() };
        let cs = self.state.segments[seg::CS].selector;
        let mut stack = self.same_stack();
        self.push_frame(&mut stack, &[image & 0xffff, cs.into(), return_rip], 2)?;
        self.adopt_stack(&stack);
        self.rflags &= !(rflags::TF | rflags::RF | if self.io_privilege() == 3 { rflags::IF } else { rflags::VIF });
        self.state.segments[seg::CS] = self.real_segment(seg::CS, (entry >> 16) as u16);
        self.refresh();
        self.set_rip(u64::from(entry & 0xffff));
        Ok(())
    }

    /// RFLAGS as a virtual-8086 program below IOPL 3 sees them with CR4.VME: IOPL 3, and VIF in the place of IF.
    pub fn virtual_flags(&self) -> u64 {
        let flags = self.rflags();
        let interrupts = if flags & rflags::VIF != 0 { rflags::IF } else { 0 };
        flags & !rflags::IF | rflags::IOPL | interrupts
    }

    /// RFLAGS after such a program loads the 16 bits of `image`: IF goes to VIF. #GP for what the monitor must see.
    pub fn load_virtual_flags(&mut self, image: u64) -> Exec<u64> {
        let pending = image & rflags::IF != 0 && self.rflags & rflags::VIP != 0;
        if pending || image & rflags::TF != 0 {
            return Err(self.general_protection());
        }
        let changed = rflags::WRITABLE & 0xffff & !(rflags::IOPL | rflags::IF);
        let interrupts = if image & rflags::IF != 0 { rflags::VIF } else { 0 };
        Ok(self.rflags() & !changed & !rflags::VIF | image & changed | interrupts)
    }
}
