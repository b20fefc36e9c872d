//! Accesses of host code to the guest's memory.
//!
//! Each place in host code that accesses memory, a site, looks the page up in the first way of the active table; what is in the second one
//! is found by shared code.
//!
//! In blocks that run most, where to wait for the TLB's answer is what takes time, sites have cells: copies of the translations that they
//! needed last. Whether that is the right one is found out beside the access, which waits for nothing but its address. A cell holds as
//! long as the active table is in the epoch in which the cell was copied (see [`crate::paging::table`]). Where it does not hold, cold code
//! asks the table, and copies again. A site that meets another page every few instructions is told to Rust code, which has the block
//! translated again, with the TLB looked up in that place. Everywhere else cells would be more memory to touch, and be empty when they are
//! needed.

use std::mem::offset_of;

use iced_x86::Register::{R10, R13, R13D, R14, R15, R15D, R15L};
use iced_x86::{Code, ConditionCode, Instruction, Register};

use super::asm::{dword_ptr, qword_ptr, word_ptr, Asm, Label, Memory};
use super::emit::{cpu_field, Emitter};
use super::native::{STAMP, WANDERER};
use super::near::{Linear, Near};
use super::registers::{resized, BUDGET};
use crate::cpu::Cpu;
use crate::decode::block::Block;
use crate::memory::{PAGE_OFFSET, PAGE_SIZE};
use crate::paging::tlb::{Entries, SLOTS};
use crate::paging::AccessKind;

/// The translation of the page that a site accessed last.
#[repr(C, align(32))]
pub struct Cell {
    /// The epoch in which it was copied; zero if there is none.
    stamp: u64,
    page: u64,
    /// Host address minus linear address.
    addend: u64,
    /// The budget when the page changed last, and how often it did soon after the time before.
    changed_at: u32,
    changes: u16,
    /// Number of the site in its block.
    site: u16,
}

/// Changes of a site's page, each at most so many instructions behind the one before, after which it is better off without a cell.
const CHANGES: i32 = 16;
const SOON: i32 = 512;

/// Bit of [`Block::wandering`] that stands for all sites from its number on.
const LAST: usize = u64::BITS as usize - 1;

/// Displacements up to here, with the size of an access added, are ones of the host.
pub const MAX_DISPLACEMENT: u32 = i32::MAX as u32 - PAGE_SIZE as u32;

impl Cell {
    /// The empty cell of a site.
    pub fn of(site: u16) -> Self {
        Cell { stamp: 0, page: 0, addend: 0, changed_at: 0, changes: 0, site }
    }
}

/// Cold code of a site whose cell did not hold, or whose page is not in the first way of the table.
pub struct Refill {
    label: Label,
    /// Behind the check.
    back: Label,
    /// Where accesses go that the TLB has nothing for either.
    miss: Label,
    /// How far it is from the place in R15, if somebody relies on that.
    near: Option<i32>,
    /// The linear address.
    address: Memory,
    bytes: usize,
    kind: AccessKind,
    /// Where the cell is, if there is one.
    cell: Option<i32>,
}

/// Offset of the column of tags for accesses of `kind`.
pub fn tags(kind: AccessKind) -> i32 {
    (match kind {
        AccessKind::Read => offset_of!(Entries, read),
        AccessKind::Write => offset_of!(Entries, write),
        AccessKind::Fetch => offset_of!(Entries, fetch),
    }) as i32
}

/// Offset of the column of addends.
pub const ADDENDS: i32 = offset_of!(Entries, addend) as i32;

/// Code that all sites of one kind share.
#[derive(Clone, Copy)]
pub struct SitePlaces {
    /// See [`write_refill`] and [`write_ways`].
    refill: u64,
    ways: u64,
}

impl Emitter<'_> {
    /// The host address of `bytes` at linear address `address`, or goes to `miss`. The address is made of registers of the guest and a
    /// displacement up to [`MAX_DISPLACEMENT`], or of R14 and such a displacement. Clobbers R13, R15, the flags, and R14 unless it is part of
    /// the address.
    pub fn access(&mut self, address: impl Into<Linear>, bytes: usize, kind: AccessKind, miss: Label) -> Memory {
        let (linear, site) = (address.into(), self.sites);
        let address = linear.memory;
        self.sites += 1;
        let wanders = self.wandering >> site.min(LAST) & 1 != 0;
        let near = self.near.as_ref().filter(|_| self.asm.holds() && !wanders);
        if let Some((distance, kind)) = near.and_then(|near| Some((near.distance(linear, bytes, kind)?, near.kind))) {
            self.look_beside(site, distance, address, bytes, kind, miss);
        } else {
            let has_cell = self.busy && !wanders;
            self.near = Near::to(linear, kind).filter(|_| self.shared || has_cell);
            if has_cell {
                self.look_at_cell(site, address, bytes, kind, miss);
            } else {
                self.look_up(address, bytes, kind, miss);
            }
        }
        if self.near.is_some() {
            self.asm.hold();
        }
        self.translated(address)
    }

    /// The place of the cell of a site.
    fn cell_of(&mut self, site: usize) -> i32 {
        self.cells.push(site as u16);
        self.first_cell + ((self.cells.len() - 1) * size_of::<Cell>()) as i32
    }

    /// R13 is what turns `address` into a host address, if that is `distance` behind the place in R15.
    fn look_beside(&mut self, site: usize, distance: i32, address: Memory, bytes: usize, kind: AccessKind, miss: Label) {
        let [label, back] = [(); 2].map(|()| self.asm.create_label());
        let cell = self.busy.then(|| self.cell_of(site));
        if distance < 0 {
            self.asm.lea(R15, qword_ptr(R15, distance));
            self.near.iter_mut().for_each(|near| near.shift(distance));
        }
        let ahead = distance.max(0);
        self.asm.cmp(R15, PAGE_SIZE as i32 - bytes as i32 - ahead);
        self.asm.jcc(ConditionCode::a, label);
        self.asm.set_label(back);
        self.refills.push(Refill { label, back, miss, near: Some(ahead), address, bytes, kind, cell });
    }

    /// R13 = what turns `address` into a host address, by the site's cell; R15 = how far into its page it is.
    fn look_at_cell(&mut self, site: usize, address: Memory, bytes: usize, kind: AccessKind, miss: Label) {
        let [label, back] = [(); 2].map(|()| self.asm.create_label());
        let cell = self.cell_of(site);
        let near = self.near.as_ref().map(|_| 0);
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
        self.refills.push(Refill { label, back, miss, near, address, bytes, kind, cell: Some(cell) });
    }

    /// R13 = what turns `address` into a host address, by the TLB; R15 = how far into its page it is, if somebody relies on that.
    fn look_up(&mut self, address: Memory, bytes: usize, kind: AccessKind, miss: Label) {
        let [label, back] = [(); 2].map(|()| self.asm.create_label());
        let table = cpu_field(offset_of!(Cpu, active_table));
        let last = Memory { displacement: address.displacement + bytes as i32 - 1, ..address };
        let a = &mut *self.asm;
        let la = if is_register(address) {
            address.base
        } else {
            a.lea(R13, address);
            R13
        };
        load_slot(a, R13, la, R15, self.has_bextr);
        if address.base == R14 {
            a.mov(R15, table);
            a.lea(R13, qword_ptr(R15, 0).index(R13, 8));
            load_address(a, R15, last);
            a.and(R15, !(PAGE_OFFSET as i32));
            a.cmp(R15, qword_ptr(R13, tags(kind)));
            a.jne(label);
            a.mov(R13, qword_ptr(R13, ADDENDS));
        } else {
            a.mov(R14, table);
            load_address(a, R15, last);
            a.and(R15, !(PAGE_OFFSET as i32));
            a.cmp(R15, qword_ptr(R14, tags(kind)).index(R13, 8));
            a.jne(label);
            a.mov(R13, qword_ptr(R14, ADDENDS).index(R13, 8));
        }
        let near = self.near.as_ref().map(|_| 0);
        let a = &mut *self.asm;
        if near.is_some() {
            load_address(a, R15, address);
            a.and(R15, PAGE_OFFSET as i32);
        }
        a.set_label(back);
        self.refills.push(Refill { label, back, miss, near, address, bytes, kind, cell: None });
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

    /// Goes to `miss` unless `address` is aligned: locked accesses need the bus then, which the interpreter has. Clobbers R15 and the flags.
    pub fn require_alignment(&mut self, address: Memory, bytes: usize, miss: Label) {
        if bytes > 1 {
            load_address(self.asm, R15, address);
            self.asm.test(R15L, (bytes - 1) as i32);
            self.asm.jne(miss);
        }
    }

    /// Writes the cold code of all sites.
    pub(super) fn finish_sites(&mut self) {
        for Refill { label, back, miss, near, address, bytes, kind, cell } in std::mem::take(&mut self.refills) {
            let places = if kind == AccessKind::Write { self.places.write } else { self.places.read };
            let a = &mut *self.asm;
            a.set_label(label);
            if address != qword_ptr(R14, 0) {
                load_address(a, R14, address);
            }
            a.lea(R15, qword_ptr(R14, bytes as i32 - 1));
            if let Some(cell) = cell {
                a.lea(R13, qword_ptr(Register::RIP, cell));
                a.call(places.refill);
            } else {
                a.call(places.ways);
            }
            a.jne(miss);
            if let Some(ahead) = near {
                a.mov(R15, R14);
                a.and(R15, PAGE_OFFSET as i32);
                if ahead != 0 {
                    a.sub(R15, ahead);
                }
            }
            if address.base == R14 && address.displacement != 0 {
                a.lea(R14, qword_ptr(R14, -address.displacement));
            }
            a.jmp(back);
        }
    }
}

/// Whether `address` is what is in a register.
fn is_register(address: Memory) -> bool {
    address.base != Register::None && address.index == Register::None && address.displacement == 0
}

/// `to` = `address`.
fn load_address(a: &mut Asm, to: Register, address: Memory) {
    if is_register(address) {
        a.mov(to, address.base);
    } else {
        a.lea(to, address);
    }
}

/// `to` = the slot of linear address `la` in a table. Clobbers `scratch`, which may be `to` if that is not `la`.
pub fn load_slot(a: &mut Asm, to: Register, la: Register, scratch: Register, has_bextr: bool) {
    const SHIFT: u8 = PAGE_SIZE.trailing_zeros() as u8;
    const BITS: u8 = SLOTS.trailing_zeros() as u8;
    let low = |register| resized(register, R15D);
    if has_bextr {
        a.mov(low(scratch), i32::from(BITS) << 8 | i32::from(SHIFT));
        a.must_add(Instruction::with3(Code::VEX_Bextr_r64_rm64_r64, to, la, scratch));
    } else {
        a.mov(low(to), low(la));
        a.shr(low(to), SHIFT);
        a.and(low(to), SLOTS as i32 - 1);
    }
}

/// Writes the code that sites of `kind` share, and tells where it is when it begins at `start`.
pub fn write_shared(a: &mut Asm, kind: AccessKind, has_bextr: bool, start: u64) -> SitePlaces {
    let [refill, ways] = [write_refill, write_ways].map(|write| {
        let place = start + a.len() as u64;
        write(a, kind, has_bextr);
        place
    });
    SitePlaces { refill, ways }
}

/// Looks the page of R14 up in both ways for an access whose last byte is at R15. ZF tells whether what it finds lets the access through, and
/// then R13 is the addend. Clobbers R15.
fn write_ways(a: &mut Asm, kind: AccessKind, has_bextr: bool) {
    let [found, done] = [(); 2].map(|()| a.create_label());
    a.push(R10);
    load_slot(a, R10, R14, R10, has_bextr);
    a.mov(R13, cpu_field(offset_of!(Cpu, active_table)));
    a.and(R15, !(PAGE_OFFSET as i32));
    a.cmp(R15, qword_ptr(R13, tags(kind)).index(R10, 8));
    a.je(found);
    a.lea(R10, qword_ptr(R10, SLOTS as i32));
    a.cmp(R15, qword_ptr(R13, tags(kind)).index(R10, 8));
    a.jne(done);
    a.set_label(found);
    a.mov(R13, qword_ptr(R13, ADDENDS).index(R10, 8));
    a.set_label(done);
    a.pop(R10);
    a.ret();
}

/// Looks the page of R14 up in both ways for an access whose last byte is at R15, and copies what it finds to the cell in R13. ZF tells
/// whether that lets the access through, and then R13 is the addend. Clobbers R15.
fn write_refill(a: &mut Asm, kind: AccessKind, has_bextr: bool) {
    let [found, copy, seldom, missed, done] = [(); 5].map(|()| a.create_label());
    let cell = |offset: usize| qword_ptr(R10, offset as i32);
    let (changed_at, changes) = (dword_ptr(R10, offset_of!(Cell, changed_at) as i32), word_ptr(R10, offset_of!(Cell, changes) as i32));
    a.push(R10);
    load_slot(a, R10, R14, R10, has_bextr);
    a.push(R13);
    a.mov(R13, cpu_field(offset_of!(Cpu, active_table)));
    a.and(R15, !(PAGE_OFFSET as i32));
    a.cmp(R15, qword_ptr(R13, tags(kind)).index(R10, 8));
    a.je(found);
    a.add(R10, SLOTS as i32);
    a.cmp(R15, qword_ptr(R13, tags(kind)).index(R10, 8));
    a.jne(missed);
    a.set_label(found);
    a.mov(R15, cpu_field(STAMP));
    a.mov(qword_ptr(R13, offset_of!(Entries, copied) as i32).index(R10, 8), R15);
    a.mov(R13, qword_ptr(R13, ADDENDS).index(R10, 8));
    a.pop(R10);
    // R10 is the cell from here on.
    a.cmp(R15, cell(offset_of!(Cell, stamp)));
    a.jne(copy);
    // It was of another page.
    let budget = resized(BUDGET, R13D);
    a.sub(changed_at, budget);
    a.cmp(changed_at, SOON);
    a.mov(changed_at, budget);
    a.jcc(ConditionCode::ae, seldom);
    a.add(changes, 1);
    a.cmp(changes, CHANGES - 1);
    a.jcc(ConditionCode::be, copy);
    a.mov(cpu_field(WANDERER), R10);
    a.jmp(done);
    a.set_label(seldom);
    a.mov(changes, 0);
    a.set_label(copy);
    a.mov(cell(offset_of!(Cell, stamp)), R15);
    a.mov(cell(offset_of!(Cell, addend)), R13);
    a.mov(R15, R14);
    a.and(R15, !(PAGE_OFFSET as i32));
    a.mov(cell(offset_of!(Cell, page)), R15);
    a.cmp(R15, R15);
    a.set_label(done);
    a.pop(R10);
    a.ret();
    a.set_label(missed);
    a.pop(R10);
    a.jmp(done);
}

impl Cpu {
    /// Has `block`, whose host code is running, translated again if one of its cells was just found to be of no use.
    pub(super) fn settle_wanderer(&mut self, block: &mut Block) {
        let cell = std::mem::replace(&mut self.native.wanderer, std::ptr::null());
        // SAFETY: host code of the running block named one of its own cells, which lasts as long as the code.
        let Some(site) = (unsafe { cell.as_ref() }).map(|cell| usize::from(cell.site)) else { return };
        block.wandering |= 1 << site.min(LAST);
        self.code.retire_translation(block);
        block.heat = self.hot - 1;
    }
}
