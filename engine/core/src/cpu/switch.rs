//! Stacks that a transfer of control goes to before they are the CPU's own: found in the TSS, pushed with the privilege of the target
//! (SDM vol. 3, 5.8.5, 6.12.1, 6.14.2, 7.2.1 and 7.7).

use super::descriptor::{is_null, rpl, system, within_limit, Descriptor};
use super::Cpu;
use crate::fault::vector;
use crate::memory::order;
use crate::paging::{AccessKind, Privilege};
use crate::state::{gpr, rights, seg, Segment};
use crate::uop::{Exec, Stop};

/// Offset of RSP0 and ESP0 in a TSS of 64 or 32 bits.
const TSS_STACKS: u64 = 4;
/// Offset of IST1 in a 64-bit TSS.
const TSS_IST: u64 = 36;
/// Offset of SP0 in a 16-bit TSS.
const TSS_16_STACKS: u64 = 2;

/// A stack to push on.
#[derive(Clone, Copy, Debug)]
pub struct NewStack {
    pub segment: Segment,
    pub pointer: u64,
    /// Bits of the pointer that the stack uses.
    mask: u64,
    privilege: Privilege,
    /// Error code of the #SS that a push beyond the limit raises.
    error: u32,
}

/// With which privilege code of `level` accesses its stack.
const fn privilege(level: u8) -> Privilege {
    if level == 3 {
        Privilege::User
    } else {
        Privilege::Supervisor
    }
}

impl Cpu {
    /// The current stack, for a transfer that stays on it.
    pub fn same_stack(&self) -> NewStack {
        NewStack {
            segment: self.state.segments[seg::SS],
            pointer: self.gpr(gpr::RSP),
            mask: self.stack_mask(),
            privilege: self.privilege(),
            error: 0,
        }
    }

    /// The stack of IA-32e mode for a handler of `level`: an IST entry, the TSS's stack for an inner level, or the current one.
    /// Interrupts align it, call gates do not.
    pub fn long_stack(&mut self, level: u8, ist: u8) -> Exec<NewStack> {
        let pointer = if ist != 0 {
            self.read_tss(TSS_IST + 8 * (u64::from(ist) - 1), 8)?
        } else if level < self.cpl() {
            self.read_tss(TSS_STACKS + 8 * u64::from(level), 8)?
        } else {
            self.gpr(gpr::RSP)
        };
        if !self.canonical(pointer) {
            return Err(self.raise_error(vector::SS, 0));
        }
        let segment = if level < self.cpl() { Cpu::null_stack(level) } else { self.state.segments[seg::SS] };
        Ok(NewStack { segment, pointer, mask: u64::MAX, privilege: privilege(level), error: 0 })
    }

    /// The stack that a 16- or 32-bit TSS has for the inner level `level`.
    pub fn inner_stack(&mut self, level: u8) -> Exec<NewStack> {
        let tr = self.state.segments[seg::TR];
        let (selector, pointer) = match (tr.access_rights & rights::TYPE) as u8 {
            system::TSS_16 | system::TSS_16_BUSY => {
                let at = TSS_16_STACKS + 4 * u64::from(level);
                let pair = self.read_tss(at, 4)?;
                ((pair >> 16) as u16, pair & 0xffff)
            }
            _ => {
                let pair = self.read_tss(TSS_STACKS + 8 * u64::from(level), 8)?;
                ((pair >> 32) as u16, pair & 0xffff_ffff)
            }
        };
        let segment = self.inner_stack_segment(selector, level)?;
        let mask = if segment.has(rights::DB) { 0xffff_ffff } else { 0xffff };
        Ok(NewStack { segment, pointer, mask, privilege: privilege(level), error: u32::from(selector) & !3 })
    }

    fn inner_stack_segment(&mut self, selector: u16, level: u8) -> Exec<Segment> {
        if is_null(selector) {
            return Err(self.raise_error(vector::TS, 0));
        }
        let descriptor = self.descriptor(selector, vector::TS)?;
        if rpl(selector) != level || descriptor.dpl() != level || !descriptor.is_writable_data() {
            return Err(self.selector_fault(vector::TS, selector));
        }
        if !descriptor.present() {
            return Err(self.selector_fault(vector::SS, selector));
        }
        let descriptor: Descriptor = self.accessed(selector, descriptor)?;
        Ok(descriptor.segment(selector))
    }

    fn read_tss(&mut self, offset: u64, bytes: u64) -> Exec<u64> {
        let tr = self.state.segments[seg::TR];
        if tr.has(rights::UNUSABLE) || offset + bytes - 1 > u64::from(tr.limit) {
            return Err(self.selector_fault(vector::TS, tr.selector));
        }
        let la = self.table_address(tr.base.wrapping_add(offset));
        if bytes == 8 {
            self.read_system(la)
        } else {
            self.read_system::<u32>(la).map(u64::from)
        }
    }

    /// Pushes `values`, the first one first, as words of `bytes` bytes. Only memory and `stack` change.
    #[inline]
    pub fn push_frame(&mut self, stack: &mut NewStack, values: &[u64], bytes: u64) -> Exec {
        if bytes == 8 && stack.mask == u64::MAX {
            let total = 8 * values.len() as u64;
            let bottom = stack.pointer.wrapping_sub(total);
            if let Some(host) = self.cached_for(stack.privilege, bottom, total, AccessKind::Write) {
                for (n, value) in values.iter().rev().enumerate() {
                    // SAFETY: a write tag in the TLB means that the page is mapped RAM, and all of `total` bytes are inside it.
                    unsafe { order::store(host.cast::<u64>().add(n), *value) };
                }
                stack.pointer = bottom;
                return Ok(());
            }
        }
        values.iter().try_for_each(|value| self.push_on(stack, *value, bytes))
    }

    fn push_on(&mut self, stack: &mut NewStack, value: u64, bytes: u64) -> Exec {
        let top = stack.pointer.wrapping_sub(bytes) & stack.mask;
        let la = if stack.mask == u64::MAX {
            if !self.canonical(top) || !self.canonical(top.wrapping_add(bytes - 1)) {
                return Err(self.stack_fault(stack));
            }
            top
        } else {
            if !within_limit(&stack.segment, top, bytes) {
                return Err(self.stack_fault(stack));
            }
            self.table_address(stack.segment.base.wrapping_add(top)) & 0xffff_ffff
        };
        match bytes {
            2 => self.write_for(stack.privilege, seg::SS, la, value as u16)?,
            4 => self.write_for(stack.privilege, seg::SS, la, value as u32)?,
            _ => self.write_for(stack.privilege, seg::SS, la, value)?,
        }
        stack.pointer = stack.pointer & !stack.mask | top;
        Ok(())
    }

    #[cold]
    fn stack_fault(&mut self, stack: &NewStack) -> Stop {
        self.raise_error(vector::SS, stack.error)
    }

    /// Makes `stack` the current one; the caller calls [`Cpu::refresh`] or [`Cpu::refresh_privilege`] afterwards.
    pub fn adopt_stack(&mut self, stack: &NewStack) {
        self.state.segments[seg::SS] = stack.segment;
        self.set_gpr(gpr::RSP, stack.pointer);
    }
}
