//! Accesses of host code to the guest's memory.
//!
//! Each place in host code that accesses memory, a site, has a cell: a copy of the translation that it needed last. What decides whether it
//! is the right one does not wait for the address, and the host's access waits for nothing but the address; a look into the TLB would be in
//! its way. A cell holds as long as the epoch of the active table is the one that it was copied in (see [`crate::paging::table`]). Where it
//! does not, cold code asks the table itself, and copies again; a site that has another page every few instructions is left alone.

use std::mem::offset_of;

use iced_x86::Register::{R11, R11D, R13, R13D, R14, R14D, R15, R15L, RBP};
use iced_x86::{Code, ConditionCode, Instruction, Register};

use super::asm::{dword_ptr, qword_ptr, Asm, Label, Memory};
use super::emit::{cpu_field, Emitter};
use super::native::STAMP;
use crate::cpu::Cpu;
use crate::memory::{PAGE_OFFSET, PAGE_SIZE};
use crate::paging::tlb::{Entries, ENTRIES};
use crate::paging::AccessKind;

/// The translation of the page that a site accessed last.
#[repr(C, align(32))]
#[derive(Default)]
pub struct Cell {
    /// The epoch in which it was copied; zero if there is none.
    stamp: u64,
    page: u64,
    /// Host address minus linear address.
    addend: u64,
    /// The budget when the page changed last, and how often it did soon after the time before.
    changed_at: u32,
    changes: u32,
}

/// Changes of a site's page, each at most so many instructions behind the one before, after which its cell is not used any more.
const CHANGES: i32 = 16;
const SOON: i32 = 200;

/// Cold code of a site whose cell did not match.
pub struct Refill {
    label: Label,
    /// Behind the check.
    back: Label,
    /// Where accesses go that the TLB has nothing for either.
    miss: Label,
    /// The linear address.
    address: Memory,
    bytes: usize,
    stub: u64,
    /// Where the cell is.
    cell: i32,
}

impl Emitter<'_> {
    /// The host address of `bytes` at linear address `address`, which is made of registers of the guest, or of R14 and a displacement that can
    /// be taken back; or goes to `miss`. R15 is the offset in the page then. Clobbers R13, R15, the flags, and R14 unless it is in `address`.
    pub fn access(&mut self, address: Memory, bytes: usize, kind: AccessKind, miss: Label) -> Memory {
        let [label, back] = [(); 2].map(|()| self.asm.create_label());
        let (cell, stub) = (self.new_cell(), if kind == AccessKind::Write { self.places.refill_write } else { self.places.refill_read });
        let field = |offset: usize| qword_ptr(Register::RIP, cell + offset as i32);
        let a = &mut *self.asm;
        a.mov(R13, cpu_field(STAMP));
        a.cmp(R13, field(offset_of!(Cell, stamp)));
        a.jne(label);
        load_address(a, R15, address);
        a.sub(R15, field(offset_of!(Cell, page)));
        a.cmp(R15, PAGE_SIZE as i32 - bytes as i32);
        a.jcc(ConditionCode::a, label);
        a.mov(R13, field(offset_of!(Cell, addend)));
        a.set_label(back);
        self.refills.push(Refill { label, back, miss, address, bytes, stub, cell });
        self.translated(address)
    }

    /// `address` with the addend in R13 added to it.
    fn translated(&mut self, address: Memory) -> Memory {
        match (address.base, address.index) {
            (Register::None, _) => Memory { base: R13, ..address },
            (_, Register::None) => Memory { index: R13, scale: 1, ..address },
            (base, _) => {
                self.asm.add(R13, base);
                Memory { base: R13, ..address }
            }
        }
    }

    /// Locked accesses that are not aligned need the bus, which the interpreter has. R15 is the offset in the page.
    pub fn require_alignment(&mut self, bytes: usize, miss: Label) {
        if bytes > 1 {
            self.asm.test(R15L, (bytes - 1) as i32);
            self.asm.jne(miss);
        }
    }

    /// The distance of another cell from the start of the code.
    fn new_cell(&mut self) -> i32 {
        let cell = self.first_cell + self.cells as i32 * size_of::<Cell>() as i32;
        self.cells += 1;
        cell
    }

    /// Writes the cold code of all sites.
    pub(super) fn finish_sites(&mut self) {
        for Refill { label, back, miss, address, bytes, stub, cell } in std::mem::take(&mut self.refills) {
            let a = &mut *self.asm;
            a.set_label(label);
            if address != qword_ptr(R14, 0) {
                load_address(a, R14, address);
            }
            a.lea(R15, qword_ptr(R14, bytes as i32 - 1));
            a.lea(R13, qword_ptr(Register::RIP, cell));
            a.call(stub);
            if address.base == R14 && address.displacement != 0 {
                a.lea(R14, qword_ptr(R14, -address.displacement));
            }
            a.je(back);
            a.jmp(miss);
        }
    }
}

/// `to` = `address`.
fn load_address(a: &mut Asm, to: Register, address: Memory) {
    if address.index == Register::None && address.displacement == 0 && address.base != Register::None {
        a.mov(to, address.base);
    } else {
        a.lea(to, address);
    }
}

/// Shared code: looks the page of R14 up for an access whose last byte is at R15, and copies what it finds to the cell in R13. ZF tells
/// whether that lets the access through; then R13 is the addend and R15 the offset in the page.
pub fn write_refill(a: &mut Asm, kind: AccessKind, has_bextr: bool) {
    const { assert!(ENTRIES == 1 << 12) };
    let tags = if kind == AccessKind::Write { offset_of!(Entries, write) } else { offset_of!(Entries, read) };
    let column = |offset: usize| qword_ptr(R13, offset as i32).index(R11, 8);
    let [copy, again, found, missed] = [(); 4].map(|()| a.create_label());
    a.push(R11);
    if has_bextr {
        a.mov(R11D, 12 << 8 | 12);
        a.must_add(Instruction::with3(Code::VEX_Bextr_r64_rm64_r64, R11, R14, R11));
    } else {
        a.mov(R11D, R14D);
        a.shr(R11D, 12);
        a.and(R11D, ENTRIES as i32 - 1);
    }
    a.push(R13);
    a.mov(R13, cpu_field(offset_of!(Cpu, active_table)));
    a.and(R15, !(PAGE_OFFSET as i32));
    a.cmp(R15, column(tags));
    a.mov(R13, column(offset_of!(Entries, addend)));
    a.pop(R11);
    a.jne(missed);
    // R11 is the cell and R15 the page from here on.
    let cell = |offset: usize| qword_ptr(R11, offset as i32);
    let counter = |offset: usize| dword_ptr(R11, offset as i32);
    a.cmp(counter(offset_of!(Cell, changes)), CHANGES);
    a.jcc(ConditionCode::ae, found);
    a.mov(cell(offset_of!(Cell, addend)), R13);
    a.mov(R13, cpu_field(STAMP));
    a.cmp(R13, cell(offset_of!(Cell, stamp)));
    a.jne(copy);
    // The page is another one, or the access crosses pages.
    a.mov(R13D, dword_ptr(RBP, offset_of!(Cpu, budget) as i32));
    a.sub(counter(offset_of!(Cell, changed_at)), R13D);
    a.cmp(counter(offset_of!(Cell, changed_at)), SOON);
    a.mov(counter(offset_of!(Cell, changed_at)), R13D);
    a.jcc(ConditionCode::b, again);
    a.mov(counter(offset_of!(Cell, changes)), 0);
    a.jmp(copy);
    a.set_label(again);
    a.add(counter(offset_of!(Cell, changes)), 1);
    a.cmp(counter(offset_of!(Cell, changes)), CHANGES);
    a.jcc(ConditionCode::b, copy);
    a.mov(cell(offset_of!(Cell, stamp)), 0);
    a.mov(R13, cell(offset_of!(Cell, addend)));
    a.jmp(found);
    a.set_label(copy);
    a.mov(R13, cpu_field(STAMP));
    a.mov(cell(offset_of!(Cell, stamp)), R13);
    a.mov(cell(offset_of!(Cell, page)), R15);
    a.mov(R13, cell(offset_of!(Cell, addend)));
    a.set_label(found);
    a.mov(R15, R14);
    a.and(R15, PAGE_OFFSET as i32);
    a.cmp(R11, R11);
    a.set_label(missed);
    a.pop(R11);
    a.ret();
}
