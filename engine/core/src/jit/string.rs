//! REP MOVS and REP STOS as the host's own, where all that they touch is in one page on each side (SDM vol. 2, REP).
//!
//! RSI, RDI and RCX are the host's registers of the same names, and what the guest sees of its memory is one mapping on the host, so the
//! host's instruction does what the guest's says: overlaps included. Anything else is the interpreter's: more than a page, the direction
//! flag, pages that are not in the TLB or need a look at each store.

use std::mem::offset_of;

use iced_x86::Register::{R13, R13D, R14, R15, RBP, RCX, RDI, RSI};
use iced_x86::{Code, ConditionCode, Instruction, Register};

use super::asm::{dword_ptr, qword_ptr, Label};
use super::block::{Place, Translation};
use super::emit::cpu_field;
use super::registers::resized;
use crate::cpu::Cpu;
use crate::memory::{PAGE_OFFSET, PAGE_SIZE};
use crate::paging::tlb;
use crate::state::rflags;

/// Bytes of an element, and whether there is a source; `None` for what is not handled here.
fn shape(insn: &Instruction) -> Option<(i32, bool)> {
    Some(match insn.code() {
        Code::Movsb_m8_m8 => (1, true),
        Code::Movsw_m16_m16 => (2, true),
        Code::Movsd_m32_m32 => (4, true),
        Code::Movsq_m64_m64 => (8, true),
        Code::Stosb_m8_AL => (1, false),
        Code::Stosw_m16_AX => (2, false),
        Code::Stosd_m32_EAX => (4, false),
        Code::Stosq_m64_RAX => (8, false),
        _ => return None,
    })
}

/// Whether host code handles `insn`: repeated by F3, with 64-bit addresses and without a segment.
pub fn is_host_code(insn: &Instruction) -> bool {
    use iced_x86::OpKind::{MemoryESRDI, MemorySegRSI};
    let wide = (0..insn.op_count())
        .all(|n| insn.op_kind(n) == iced_x86::OpKind::Register || matches!(insn.op_kind(n), MemoryESRDI | MemorySegRSI));
    shape(insn).is_some() && insn.has_rep_prefix() && !insn.has_repne_prefix() && wide && insn.segment_prefix() == Register::None
}

impl Translation<'_> {
    pub(super) fn repeat(&mut self, insn: &Instruction, place: Place) {
        let Some((bytes, has_source)) = shape(insn) else { unreachable!("the plan asked `is_host_code`") };
        self.out.clobber_flags(place.seen_before);
        let miss = self.out.detour(place.index);
        let a = &mut *self.out.asm;
        a.test(dword_ptr(RBP, offset_of!(Cpu, rflags) as i32), rflags::DF as i32);
        a.jne(miss);
        a.cmp(RCX, PAGE_SIZE as i32 / bytes);
        a.jcc(ConditionCode::a, miss);
        if has_source {
            self.addend(RSI, R14, bytes, offset_of!(tlb::Entries, read), miss);
        }
        self.addend(RDI, R15, bytes, offset_of!(tlb::Entries, write), miss);
        if has_source {
            self.out.asm.add(RSI, R14);
        }
        self.out.asm.add(RDI, R15);
        self.out.add(*insn);
        if has_source {
            self.out.asm.sub(RSI, R14);
        }
        self.out.asm.sub(RDI, R15);
        self.out.rejoin();
    }

    /// `to` = what turns the address in `index` into one of the host, if RCX elements from there on lie in one page whose entry is in the
    /// column `tags`. Clobbers R13 and R15.
    fn addend(&mut self, index: Register, to: Register, bytes: i32, tags: usize, miss: Label) {
        let a = &mut *self.out.asm;
        a.mov(R13D, resized(index, R13D));
        a.shr(R13D, PAGE_SIZE.trailing_zeros() as u8);
        a.and(R13D, tlb::SLOTS as i32 - 1);
        a.shl(R13D, size_of::<u64>().trailing_zeros() as u8);
        a.add(R13, cpu_field(offset_of!(Cpu, active_table)));
        a.lea(R15, qword_ptr(index, -1).index(RCX, bytes as u8));
        a.and(R15, !(PAGE_OFFSET as i32));
        a.cmp(R15, qword_ptr(R13, tags as i32));
        a.jne(miss);
        a.mov(to, qword_ptr(R13, offset_of!(tlb::Entries, addend) as i32));
    }
}
