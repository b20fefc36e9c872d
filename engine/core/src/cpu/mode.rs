//! What the control registers, segments and flags together mean: privilege, code size, which units may run (SDM vol. 3, ch. 2, 3, 5).

use super::{pending, CodeSize, Cpu};
use crate::fault::vector;
use crate::paging::{AccessKind, Privilege};
use crate::state::{cr0, cr4, efer, interruptibility, rflags, rights, seg};
use crate::uop::Exec;
use crate::virt::control::intercept;

/// Reasons why vector and x87 instructions may not run; bits of `Cpu::media`.
pub mod media {
    /// CR0.TS: #NM.
    pub const TASK_SWITCHED: u8 = 1;
    /// CR0.EM: x87 is #NM, SSE is #UD.
    pub const EMULATED: u8 = 2;
    /// CR4.OSFXSR is clear: SSE is #UD.
    pub const NO_SSE: u8 = 4;
    /// CR4.OSXSAVE or XCR0 forbid AVX: #UD.
    pub const NO_AVX: u8 = 8;
    /// Real or virtual-8086 mode, which know no VEX prefix: #UD.
    pub const NO_VEX: u8 = 16;
}

impl Cpu {
    pub(super) fn current_privilege(&self) -> u8 {
        if self.state.cr0 & cr0::PE == 0 {
            0
        } else if self.rflags & rflags::VM != 0 {
            3
        } else {
            self.state.segments[seg::SS].dpl()
        }
    }

    /// Raises #GP where UMIP hides the system registers from user code (SDM vol. 3, 2.5, CR4.UMIP).
    pub fn check_umip(&mut self) -> Exec {
        if self.state.cr4 & cr4::UMIP != 0 {
            self.require_cpl0()?;
        }
        Ok(())
    }

    /// I/O privilege level (EFLAGS.IOPL).
    pub fn io_privilege(&self) -> u8 {
        ((self.rflags & rflags::IOPL) >> rflags::IOPL.trailing_zeros()) as u8
    }

    pub(super) fn current_code_size(&self) -> CodeSize {
        let cs = &self.state.segments[seg::CS];
        if self.state.efer & efer::LMA != 0 && cs.has(rights::LONG) {
            CodeSize::Bits64
        } else if self.protected() && cs.has(rights::DB) || !self.protected() && cs.has(rights::DB) && self.rflags & rflags::VM == 0 {
            CodeSize::Bits32
        } else {
            CodeSize::Bits16
        }
    }

    pub(super) fn current_media(&self) -> u8 {
        let mut reasons = 0;
        if self.state.cr0 & cr0::TS != 0 {
            reasons |= media::TASK_SWITCHED;
        }
        if self.state.cr0 & cr0::EM != 0 {
            reasons |= media::EMULATED;
        }
        if self.state.cr4 & cr4::OSFXSR == 0 {
            reasons |= media::NO_SSE;
        }
        if self.state.cr4 & cr4::OSXSAVE == 0 || self.state.xcr0 & 6 != 6 {
            reasons |= media::NO_AVX;
        }
        if !self.protected() {
            reasons |= media::NO_VEX;
        }
        reasons
    }

    /// Raises what keeps an SSE instruction from running.
    #[inline(always)]
    pub fn require_sse(&mut self) -> Exec {
        if self.media & (media::TASK_SWITCHED | media::EMULATED | media::NO_SSE) != 0 {
            return Err(self.sse_blocked());
        }
        Ok(())
    }

    /// #UD where the mode knows no VEX prefix (SDM vol. 2, 2.8).
    #[inline(always)]
    pub fn require_vex(&mut self) -> Exec {
        if self.media & media::NO_VEX != 0 {
            return Err(self.undefined());
        }
        Ok(())
    }

    /// Raises what keeps an AVX instruction from running (SDM vol. 2, 2.4). CR0.EM and CR4.OSFXSR are for legacy SSE alone.
    #[inline(always)]
    pub fn require_avx(&mut self) -> Exec {
        if self.media & (media::TASK_SWITCHED | media::NO_AVX | media::NO_VEX) != 0 {
            return Err(self.avx_blocked());
        }
        Ok(())
    }

    #[cold]
    fn avx_blocked(&mut self) -> crate::uop::Stop {
        if self.media & (media::NO_AVX | media::NO_VEX) != 0 {
            self.undefined()
        } else {
            self.raise(vector::NM)
        }
    }

    #[cold]
    fn sse_blocked(&mut self) -> crate::uop::Stop {
        if self.media & (media::EMULATED | media::NO_SSE) != 0 {
            self.undefined()
        } else {
            self.raise(vector::NM)
        }
    }

    /// Raises what keeps an x87 instruction from running (SDM vol. 3, 2.5: EM or TS gives #NM).
    #[inline(always)]
    pub fn require_x87(&mut self) -> Exec {
        if self.media & (media::TASK_SWITCHED | media::EMULATED) != 0 {
            return Err(self.raise(vector::NM));
        }
        Ok(())
    }

    /// Whether accesses of the running code are checked for alignment (SDM vol. 3, 6.15, #AC).
    pub fn alignment_checked(&self) -> bool {
        self.cpl() == 3 && self.state.cr0 & cr0::AM != 0 && self.rflags & rflags::AC != 0
    }

    /// Raises #AC for a misaligned access where alignment is checked.
    pub fn check_alignment(&mut self, la: u64, bytes: u64, privilege: Privilege) -> Exec {
        let checked = privilege == Privilege::User && self.alignment_checked() && bytes.is_power_of_two();
        if checked && la & (bytes.min(8) - 1) != 0 {
            return Err(self.raise_error(vector::AC, 0));
        }
        Ok(())
    }

    /// Checks `[offset, offset + bytes)` against limit and type of a segment (SDM vol. 3, 5.3 and 5.5); not for 64-bit code.
    pub fn check_segment(&mut self, number: usize, offset: u64, bytes: u64, kind: AccessKind) -> Exec {
        let segment = self.state.segments[number];
        let last = offset.wrapping_add(bytes - 1);
        let expand_down = segment.access_rights & (rights::CODE | rights::DC | rights::S) == rights::DC | rights::S;
        let inside = if expand_down {
            let top = if segment.has(rights::DB) { 0xffff_ffff } else { 0xffff };
            offset > segment.limit as u64 && last <= top && last >= offset
        } else {
            last <= segment.limit as u64 && last >= offset
        };
        let code = segment.has(rights::CODE);
        let allowed = match kind {
            AccessKind::Write => !code && segment.has(rights::RW),
            AccessKind::Read => !code || segment.has(rights::RW),
            AccessKind::Fetch => true,
        };
        let typed = !self.protected() || allowed && !segment.has(rights::UNUSABLE);
        if inside && typed {
            return Ok(());
        }
        let vector = if number == seg::SS { vector::SS } else { vector::GP };
        Err(self.raise_error(vector, 0))
    }

    pub(super) fn refresh_pending(&mut self) {
        const KEPT: u32 = pending::DEBUG
            | pending::HALTED
            | pending::EMULATE
            | pending::BUDGET
            | pending::BREAKPOINTS
            | pending::WATCHED
            | pending::VIRTUAL
            | pending::APIC_EXIT;
        let mut bits = self.pending & KEPT;
        if self.state.interruptibility & (interruptibility::STI | interruptibility::MOV_SS) != 0 {
            bits |= pending::SHADOW;
        }
        if self.rflags & rflags::TF != 0 || self.control.intercepts(intercept::MONITOR_TRAP) {
            bits |= pending::STEP;
        }
        if self.control.intercepts & (1 << intercept::INTERRUPT_WINDOW | 1 << intercept::NMI_WINDOW) != 0 {
            bits |= pending::WINDOW;
        }
        self.pending = bits;
    }
}
