//! The register stack, its tags, and the exceptions that wait in the status word (SDM vol. 1, 8.1 and 8.5).

use crate::cpu::Cpu;
use crate::exec::float::frame::{Float80, Frame, Operation, INDEFINITE};
use crate::fault::vector;
use crate::paging::AccessKind;
use crate::state::{cr0, seg};
use crate::uop::{Exec, Uop};

/// Bits of the status word.
pub mod status {
    pub const INVALID: u16 = 1 << 0;
    pub const DENORMAL: u16 = 1 << 1;
    pub const ZERO_DIVIDE: u16 = 1 << 2;
    pub const OVERFLOW: u16 = 1 << 3;
    pub const UNDERFLOW: u16 = 1 << 4;
    pub const EXCEPTIONS: u16 = 0x3f;
    pub const STACK_FAULT: u16 = 1 << 6;
    pub const SUMMARY: u16 = 1 << 7;
    pub const C0: u16 = 1 << 8;
    pub const C1: u16 = 1 << 9;
    pub const C2: u16 = 1 << 10;
    pub const TOP: u16 = 7 << 11;
    pub const C3: u16 = 1 << 14;
    pub const CONDITIONS: u16 = C0 | C1 | C2 | C3;
    pub const BUSY: u16 = 1 << 15;
    /// Exceptions found before the operation: unmasked ones keep it from happening.
    pub const BEFORE: u16 = INVALID | DENORMAL | ZERO_DIVIDE;
}
use status::*;

/// Number in `Uop::segment` of an instruction without memory operand.
const NO_SEGMENT: usize = 6;

impl Cpu {
    /// First step of every waiting x87 instruction: #NM, then #MF for an exception that waits. Without CR0.NE a PC reports exceptions
    /// through FERR# and IRQ 13; that wire does not exist here, so execution goes on as with IGNNE#. VMX keeps CR0.NE at 1 in every guest
    /// and shows it another one where it wants to (SDM vol. 3, A.7).
    #[inline]
    pub(super) fn begin_x87(&mut self) -> Exec {
        self.require_x87()?;
        self.check_pending_x87()
    }

    /// #MF if an unmasked exception waits in the status word.
    #[inline]
    pub(in crate::exec) fn check_pending_x87(&mut self) -> Exec {
        if self.state.fpu.fsw & SUMMARY != 0 && (self.state.cr0 & cr0::NE != 0 || !self.model.is_amd()) {
            return Err(self.raise(vector::MF));
        }
        Ok(())
    }

    /// First step of every MMX instruction (SDM vol. 3, 12.1): #UD with CR0.EM, #NM with CR0.TS, #MF if an x87 exception waits.
    #[inline]
    pub(in crate::exec) fn require_mmx(&mut self) -> Exec {
        if self.state.cr0 & cr0::EM != 0 {
            return Err(self.undefined());
        }
        self.begin_x87()
    }

    /// Physical number of ST(`i`).
    #[inline]
    fn physical(&self, i: u8) -> usize {
        usize::from((self.state.fpu.fsw >> 11) as u8 + i) & 7
    }

    /// ST(`i`), or `None` when it is empty.
    #[inline]
    pub(super) fn st(&self, i: u8) -> Option<Float80> {
        let n = self.physical(i);
        (self.state.fpu.ftw >> n & 1 != 0).then(|| self.state.fpu.st[n])
    }

    /// Writes ST(`i`), which is not empty any more.
    #[inline]
    pub(super) fn set_st(&mut self, i: u8, value: Float80) {
        let n = self.physical(i);
        self.state.fpu.st[n] = value;
        self.state.fpu.ftw |= 1 << n;
    }

    /// Marks ST(`i`) empty.
    pub(super) fn free_st(&mut self, i: u8) {
        self.state.fpu.ftw &= !(1 << self.physical(i));
    }

    /// Moves TOP by `step`, modulo 8.
    pub(super) fn rotate(&mut self, step: i32) {
        let top = (i32::from(self.state.fpu.fsw >> 11) + step) as u16 & 7;
        self.state.fpu.fsw = self.state.fpu.fsw & !TOP | top << 11;
    }

    /// Pops `count` registers.
    #[inline]
    pub(super) fn pop_x87(&mut self, count: u8) {
        for _ in 0..count {
            self.free_st(0);
            self.rotate(1);
        }
    }

    /// Pushes a register; the caller knows that it is empty.
    pub(super) fn push_x87(&mut self, value: Float80) {
        self.rotate(-1);
        self.set_st(0, value);
    }

    /// Whether a push would overflow the stack.
    pub(super) fn stack_full(&self) -> bool {
        self.st(7).is_some()
    }

    /// Loads `value` as FLD does: a full stack is an invalid operation that pushes the default NaN when masked. Of the exceptions of a
    /// conversion, an unmasked invalid operation alone keeps the value from being pushed; a denormal one is reported behind the push.
    pub(super) fn load_x87(&mut self, uop: &Uop, frame_status: u16, value: Float80) {
        if self.stack_full() {
            if self.conclude(uop, INVALID | STACK_FAULT | C1) {
                self.push_x87(INDEFINITE);
            }
            return;
        }
        self.conclude(uop, frame_status);
        if frame_status & INVALID & !self.state.fpu.fcw == 0 {
            self.push_x87(value);
        }
    }

    /// Runs `O` on this ST(0) and ST(1).
    #[inline]
    pub(super) fn operate<O: Operation>(&self, st0: Float80, st1: Float80, memory: &[u8]) -> Frame {
        let mut frame = Frame::new(self.state.fpu.fcw, st0, st1).with_memory(memory);
        O::run(&mut frame);
        frame
    }

    /// The same with all exceptions masked, for an instruction whose result is nothing but condition bits.
    pub(super) fn operate_masked<O: Operation>(&self, st0: Float80, st1: Float80, memory: &[u8]) -> Frame {
        let mut frame = Frame::new(self.state.fpu.fcw | EXCEPTIONS, st0, st1).with_memory(memory);
        O::run(&mut frame);
        frame
    }

    /// Takes over the exceptions and C1 of an instruction. False when an unmasked one keeps its result from being used.
    #[inline]
    pub(super) fn conclude(&mut self, uop: &Uop, frame_status: u16) -> bool {
        let fpu = &mut self.state.fpu;
        fpu.fsw = fpu.fsw & !C1 | frame_status & (EXCEPTIONS | STACK_FAULT | C1);
        self.state.fpu.fip = self.rip_at(uop.offset.into());
        self.summarize();
        let unmasked = frame_status & EXCEPTIONS & !self.state.fpu.fcw;
        if unmasked != 0 {
            self.note_exception(uop);
        }
        unmasked & BEFORE == 0
    }

    /// Result of an instruction with an empty source: the default NaN in ST(`destination`) when masked. True when it is.
    #[cold]
    pub(super) fn underflow(&mut self, uop: &Uop, destination: Option<u8>) -> bool {
        let masked = self.conclude(uop, INVALID | STACK_FAULT);
        if let (true, Some(i)) = (masked, destination) {
            self.set_st(i, INDEFINITE);
        }
        masked
    }

    /// Sets ES and B as the exception flags and masks ask.
    pub(super) fn summarize(&mut self) {
        let fpu = &mut self.state.fpu;
        if fpu.fsw & EXCEPTIONS & !fpu.fcw != 0 {
            fpu.fsw |= SUMMARY | BUSY;
        } else {
            fpu.fsw &= !(SUMMARY | BUSY);
        }
    }

    /// Last opcode and data pointer, which the silicon keeps for unmasked exceptions only (SDM vol. 1, 8.1.8 and 8.1.9).
    #[cold]
    fn note_exception(&mut self, uop: &Uop) {
        if uop.segment() != NO_SEGMENT {
            self.state.fpu.fdp = self.effective_any(uop);
        }
        let start = self.rip_at(uop.offset.into()).wrapping_add(self.segment_base(seg::CS));
        let mut bytes = (0..u64::from(uop.length)).map(|n| {
            let host = self.cached(start.wrapping_add(n), 1, AccessKind::Fetch)?;
            // SAFETY: a fetch tag in the TLB means that the byte is mapped RAM.
            Some(unsafe { host.read_volatile() })
        });
        let escape = bytes.by_ref().flatten().find(|byte| byte & 0xf8 == 0xd8);
        if let (Some(escape), Some(Some(modrm))) = (escape, bytes.next()) {
            self.state.fpu.fop = u16::from(escape & 7) << 8 | u16::from(modrm);
        }
    }
}
