//! The stack: PUSH and POP of any width, on stacks of any width (SDM vol. 1, 6.2).

use super::{CodeSize, Cpu};
use crate::paging::AccessKind;
use crate::state::{gpr, rights, seg};
use crate::uop::Exec;
use crate::word::Word;

impl Cpu {
    /// Bits of RSP that the stack uses.
    #[inline(always)]
    pub fn stack_mask(&self) -> u64 {
        match self.code_size {
            CodeSize::Bits64 => u64::MAX,
            _ if self.state.segments[seg::SS].has(rights::DB) => 0xffff_ffff,
            _ => 0xffff,
        }
    }

    /// Sets the bits of RSP that the stack uses.
    #[inline(always)]
    pub fn set_stack_pointer(&mut self, value: u64) {
        if self.long_mode() {
            self.regs[gpr::RSP] = value;
        } else {
            let mask = self.stack_mask();
            self.regs[gpr::RSP] = self.regs[gpr::RSP] & !mask | value & mask;
        }
    }

    /// Linear address of stack offset `offset`, checked.
    #[inline(always)]
    fn stack_address(&mut self, offset: u64, bytes: u64, kind: AccessKind) -> Exec<u64> {
        if self.long_mode() {
            return Ok(offset);
        }
        let offset = offset & self.stack_mask();
        self.segment_address(seg::SS, offset, bytes, kind)
    }

    /// Pushes `value`; RSP changes only when the write succeeded.
    #[inline(always)]
    pub fn push<W: Word>(&mut self, value: W) -> Exec {
        let top = self.regs[gpr::RSP].wrapping_sub(W::BYTES);
        let la = self.stack_address(top, W::BYTES, AccessKind::Write)?;
        self.write(seg::SS, la, value)?;
        self.set_stack_pointer(top);
        Ok(())
    }

    /// Fails as [`Cpu::push`] would, without writing.
    #[cold]
    pub fn probe_push<W: Word>(&mut self) -> Exec {
        let la = self.stack_address(self.regs[gpr::RSP].wrapping_sub(W::BYTES), W::BYTES, AccessKind::Write)?;
        self.probe_write(seg::SS, la, W::BYTES)
    }

    /// Reads the word `skip` bytes above the top of the stack, and leaves RSP alone.
    #[inline(always)]
    pub fn peek<W: Word>(&mut self, skip: u64) -> Exec<W> {
        let at = self.regs[gpr::RSP].wrapping_add(skip);
        let la = self.stack_address(at, W::BYTES, AccessKind::Read)?;
        self.read(seg::SS, la)
    }

    /// Pops a word.
    #[inline(always)]
    pub fn pop<W: Word>(&mut self) -> Exec<W> {
        let value = self.peek(0)?;
        self.set_stack_pointer(self.regs[gpr::RSP].wrapping_add(W::BYTES));
        Ok(value)
    }
}
