//! Pieces of host code that translations are made of: flags between host and guest, the way into the interpreter and back.
//!
//! Guest flags are in the host's flags, in `Native::flags`, in both, or dead. What the interpreter would see at an instruction that may
//! fault, exit or leave the block is in memory there: state is precise at every instruction.

use std::mem::offset_of;

use iced_x86::Register::{AH, AL, AX, EAX, R13, R13D, R14, R14L, R15, R15D, R15L, RAX, RBP};
use iced_x86::{ConditionCode, IcedError, Instruction, Register};

use super::access::Refill;
use super::asm::{byte_ptr, qword_ptr, word_ptr, Asm, Label, Memory};
use super::block::Ground;
use super::exits::ExitSite;
use super::native::{detour, FLAGS, VECTORS, X87};
use super::registers;
use super::vector::{Units, Width};
use crate::cpu::Cpu;
use crate::decode::block::Block;
use crate::decode::cache::jump_salt;
use crate::memory::PAGE_OFFSET;
use crate::model::Silicon;
use crate::state::{Fpu, State};

/// Where shared code is.
#[derive(Clone, Copy)]
pub struct Places {
    /// The stub that leaves host code for a moment; see [`super::native::detour`].
    pub detour: u64,
    /// The stub that does so in a block that works on vector registers or the x87 unit.
    pub detour_keeping: u64,
    /// The stubs that bring XMM registers, YMM registers, and the x87 unit into the host's.
    pub xmm: u64,
    pub ymm: u64,
    pub x87: u64,
    /// The stub that looks for the block at RIP R15.
    pub unknown: u64,
    /// The stubs that look a page up for a site that reads, and for one that writes.
    pub refill_read: u64,
    pub refill_write: u64,
}

/// How OF follows from an instruction where host processors differ.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Overflow {
    Host,
    Clear,
    /// The host's if R15D is 1, and clear otherwise.
    HostIfOne,
    /// CF differs from SF: shifts to the left.
    CarryFromSign,
}

/// How the guest's flags come from the host's.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Rule {
    Exact,
    /// Shifts: AF is the model's, and OF as it says.
    Shift(Overflow),
    /// Multiplications: CF and OF are the host's, the others those of the low half of the product.
    Product,
    /// The same where the others stay.
    ProductAlone,
    /// CF is the host's, OF is clear, and the others are those of the result.
    CarryAndResult,
    /// CF and ZF are the host's, OF stays, and the others are clear.
    CarryAndZero,
    /// CF and OF are clear, and the others are those of the result.
    Result,
    /// ZF and PF are those of the result, AF is set, and the others are clear.
    Field,
    /// ZF is the host's, PF that of the result, or set with ZF, and the others are clear.
    Found,
}

impl Rule {
    /// Whether flags stay, although the host may change them.
    pub fn keeps_flags(self) -> bool {
        matches!(self, Rule::ProductAlone | Rule::CarryAndZero)
    }
}

/// Places of flags in the upper byte of their stored form.
const STORED_CARRY: i32 = 1;
const STORED_PARITY_SHIFT: u8 = 2;
const STORED_HALF_CARRY: i32 = 0x10;
const STORED_ZERO_SHIFT: u8 = 6;

/// Code at the end that is rarely run.
struct Cold {
    label: Label,
    /// Why host code is left: a number of [`super::native::detour`].
    why: u32,
    /// Where to go on, and whether host flags are expected there. Nowhere, if host code does not come back here.
    back: Option<(Label, bool)>,
}

/// Host code of one block in the making.
pub struct Emitter<'a> {
    pub asm: &'a mut Asm,
    pub(super) places: Places,
    block: u64,
    /// Distance of the block's first byte from the start of its page.
    pub(super) offset: u64,
    /// What sets the block's own kind apart in the jump cache.
    pub(super) salt: i32,
    /// Number of the block's last instruction.
    last: u32,
    /// What the block works on besides the general registers.
    units: Units,
    /// Whose undefined flags the guest sees.
    pub(super) silicon: Silicon,
    /// Stubs that bring that, where they are called, and where it is there.
    gates: Vec<(u64, Label, Label)>,
    pub(super) exits: Vec<ExitSite>,
    /// Calls for which the host's stack may have no room, and where they go on.
    pub(super) full_stacks: Vec<(Label, Label)>,
    cold: Vec<Cold>,
    /// Sites so far, and those that look the TLB up; see [`Block::wandering`].
    pub(super) sites: usize,
    pub(super) wandering: u64,
    /// Distance of the block's first cell from the start of the code, and the sites that have one.
    pub(super) first_cell: i32,
    pub(super) cells: Vec<u16>,
    pub(super) refills: Vec<Refill>,
    pub(super) has_bextr: bool,
    /// Where the block is named to the stub: the plain one, and the one that keeps units.
    tails: [Label; 2],
    /// The host's flags are the guest's.
    host_flags: bool,
    /// `Native::flags` are the guest's.
    saved_flags: bool,
    /// The encoder refused an instruction.
    failed: bool,
}

/// A field of the CPU.
pub fn cpu_field(offset: usize) -> Memory {
    qword_ptr(RBP, offset as i32)
}

/// A 64-bit guest register that stays in memory.
pub fn in_memory(guest: Register) -> Memory {
    cpu_field(offset_of!(Cpu, regs) + registers::offset(guest))
}

impl<'a> Emitter<'a> {
    pub fn new(asm: &'a mut Asm, ground: Ground, block: &Block, units: Units, silicon: Silicon) -> Self {
        let tails = [(); 2].map(|()| asm.create_label());
        Emitter {
            asm,
            places: ground.places,
            block: std::ptr::from_ref(block) as u64,
            offset: block.key.host & PAGE_OFFSET,
            salt: jump_salt(block.key.watching.number()) as i32,
            last: block.instructions - 1,
            units,
            silicon,
            gates: Vec::new(),
            exits: Vec::new(),
            full_stacks: Vec::new(),
            cold: Vec::new(),
            first_cell: ground.first_cell,
            cells: Vec::new(),
            sites: 0,
            wandering: block.wandering,
            has_bextr: ground.host.bmi1,
            refills: Vec::new(),
            tails,
            host_flags: false,
            saved_flags: true,
            failed: false,
        }
    }

    // ---- flags ----------------------------------------------------------------------------------------------------------------------

    /// Keeps the guest's flags in memory, from where the interpreter takes them.
    pub fn save_flags(&mut self) {
        if self.host_flags && !self.saved_flags {
            self.store_flags(Overflow::Host, None);
        }
    }

    /// Stores the guest's flags, which are the host's but for OF, and AF where `half_carry` tells it.
    fn store_flags(&mut self, overflow: Overflow, half_carry: Option<bool>) {
        let a = &mut *self.asm;
        a.mov(R13, RAX);
        a.lahf();
        match overflow {
            Overflow::Host => a.setcc(ConditionCode::o, AL),
            Overflow::Clear => a.mov(AL, 0),
            Overflow::HostIfOne => {
                a.setcc(ConditionCode::o, AL);
                a.cmp(R15D, 1);
                a.setcc(ConditionCode::e, R15L);
                a.and(AL, R15L);
            }
            Overflow::CarryFromSign => {
                a.mov(AL, AH);
                a.rol(AL, 1);
                a.xor(AL, AH);
                a.and(AL, 1);
            }
        }
        match half_carry {
            Some(true) => a.or(AH, STORED_HALF_CARRY),
            Some(false) => a.and(AH, !STORED_HALF_CARRY),
            None => {}
        }
        self.keep_stored_flags(R13)
    }

    /// A shift by something else than zero has left the guest's flags in the host's, but for AF, and for OF, of which `overflow` tells.
    pub fn store_flags_of_shift(&mut self, overflow: Overflow) {
        self.host_flags = false;
        self.store_flags(overflow, Some(self.silicon.sets_half_carry()));
    }

    /// Stores the flags of `result`, with the host's CF if `carry`.
    fn store_result_flags(&mut self, result: Register, carry: bool) {
        let result = if result.full_register() == Register::RAX { registers::resized(Register::R14, result) } else { result };
        let a = &mut *self.asm;
        a.mov(R14, RAX);
        a.setcc(ConditionCode::b, AL);
        a.test(result, result);
        a.lahf();
        if carry {
            a.or(AH, AL);
        }
        a.mov(AL, 0);
        self.keep_stored_flags(R14)
    }

    /// Stores the flags of a multiplication with the low half `product`.
    fn store_product_flags(&mut self, product: Register) {
        let low = if product.full_register() == Register::RAX { registers::resized(Register::R14, product) } else { product };
        let a = &mut *self.asm;
        a.mov(R14, RAX);
        a.setcc(ConditionCode::o, AL);
        a.test(low, low);
        a.lahf();
        a.or(AH, AL);
        self.keep_stored_flags(R14)
    }

    /// Changes CF and OF of the stored flags to the host's.
    fn store_carry_overflow(&mut self) {
        let a = &mut *self.asm;
        a.setcc(ConditionCode::o, R14L);
        a.and(byte_ptr(RBP, FLAGS as i32 + 1), !STORED_CARRY);
        a.or(byte_ptr(RBP, FLAGS as i32 + 1), R14L);
        a.mov(byte_ptr(RBP, FLAGS as i32), R14L);
        self.saved_flags = true;
    }

    /// Changes all of the stored flags but OF: CF and ZF are the host's, the others clear.
    fn store_carry_zero(&mut self) {
        let a = &mut *self.asm;
        a.setcc(ConditionCode::b, R14L);
        a.setcc(ConditionCode::e, R15L);
        a.shl(R15L, STORED_ZERO_SHIFT);
        a.or(R14L, R15L);
        a.mov(byte_ptr(RBP, FLAGS as i32 + 1), R14L);
        self.saved_flags = true;
    }

    /// Stores ZF and PF of `result`, a set AF, and the others clear.
    fn store_field_flags(&mut self, result: Register) {
        let a = &mut *self.asm;
        a.test(result, result);
        a.setcc(ConditionCode::e, R14L);
        a.setcc(ConditionCode::p, R15L);
        self.store_zero_parity(STORED_HALF_CARRY);
    }

    /// Stores the host's ZF, PF of `result` or of zero, and the others clear.
    fn store_found_flags(&mut self, result: Register) {
        let a = &mut *self.asm;
        a.setcc(ConditionCode::e, R14L);
        a.test(result, result);
        a.setcc(ConditionCode::p, R15L);
        a.or(R15L, R14L);
        self.store_zero_parity(0);
    }

    /// Stores ZF from R14, PF from R15, and `others`.
    fn store_zero_parity(&mut self, others: i32) {
        let a = &mut *self.asm;
        a.shl(R14L, STORED_ZERO_SHIFT);
        a.shl(R15L, STORED_PARITY_SHIFT);
        a.or(R14L, R15L);
        a.or(R14L, others);
        a.mov(byte_ptr(RBP, FLAGS as i32 + 1), R14L);
        a.mov(byte_ptr(RBP, FLAGS as i32), 0);
        self.saved_flags = true;
    }

    /// Changes the stored flags as a quotient does.
    pub fn store_flags_of_quotient(&mut self) {
        if self.silicon == Silicon::Amd {
            self.asm.and(byte_ptr(RBP, FLAGS as i32 + 1), STORED_CARRY);
            self.asm.or(byte_ptr(RBP, FLAGS as i32 + 1), STORED_HALF_CARRY);
        }
    }

    /// Ends a sequence that has made the flags' stored form in AX: puts it in its place, and RAX back from `rax_copy`.
    fn keep_stored_flags(&mut self, rax_copy: Register) {
        self.asm.mov(word_ptr(RBP, FLAGS as i32), AX);
        self.asm.mov(RAX, rax_copy);
        self.saved_flags = true;
    }

    /// Makes the host's flags the guest's.
    pub fn need_flags(&mut self) {
        if !self.host_flags {
            self.restore_flags();
            self.host_flags = true;
        }
    }

    fn restore_flags(&mut self) {
        let a = &mut *self.asm;
        a.mov(R15, RAX);
        a.movzx(EAX, word_ptr(RBP, FLAGS as i32));
        a.add(AL, 0x7f);
        a.sahf();
        a.mov(RAX, R15)
    }

    /// Host code is about to destroy the host's flags; `live` tells whether the guest's are seen again.
    pub fn clobber_flags(&mut self, live: bool) {
        if live {
            self.save_flags();
        }
        self.host_flags = false;
    }

    /// An instruction has left the guest's flags in the host's, as `rule` tells; `result` is its first register.
    pub fn new_flags(&mut self, rule: Rule, result: Register, live: bool) {
        self.host_flags = live && rule == Rule::Exact;
        self.saved_flags = false;
        match rule {
            Rule::Shift(overflow) if live => self.store_flags(overflow, Some(self.silicon.sets_half_carry())),
            Rule::Product if live => self.store_product_flags(result),
            Rule::ProductAlone if live => self.store_carry_overflow(),
            Rule::CarryAndResult if live => self.store_result_flags(result, true),
            Rule::CarryAndZero if live => self.store_carry_zero(),
            Rule::Result if live => self.store_result_flags(result, false),
            Rule::Field if live => self.store_field_flags(result),
            Rule::Found if live => self.store_found_flags(result),
            _ => {}
        }
    }

    // ---- the interpreter --------------------------------------------------------------------------------------------------------------

    /// Cold code that runs instruction `index` in the interpreter instead. It comes back where [`Emitter::rejoin`] says, if that is called
    /// before the next one.
    pub fn detour(&mut self, index: usize) -> Label {
        let label = self.asm.create_label();
        self.cold(label, index as u32 | detour::MISS, None);
        label
    }

    /// Cold code at `label` that leaves host code.
    pub(super) fn cold(&mut self, label: Label, why: u32, back: Option<(Label, bool)>) {
        self.cold.push(Cold { label, why, back });
    }

    /// The last detour comes back here.
    pub fn rejoin(&mut self) {
        let back = self.asm.create_label();
        self.asm.set_label(back);
        let host_flags = self.host_flags;
        if let Some(cold) = self.cold.last_mut() {
            cold.back = Some((back, host_flags));
        }
    }

    /// Whether `index` is the number of the block's last instruction.
    pub fn is_last(&self, index: usize) -> bool {
        index as u32 == self.last
    }

    /// Runs instruction `index` in the interpreter.
    pub fn interpret(&mut self, index: usize) {
        self.save_flags();
        self.leave_for(index as u32);
        (self.host_flags, self.saved_flags) = (false, true);
    }

    fn leave_for(&mut self, why: u32) {
        self.asm.mov(R13D, why as i32);
        // Behind the last instruction nobody needs them, and it may have changed who may use them.
        let keep = self.units.any() && why & !detour::MISS < self.last;
        self.asm.call(self.tails[usize::from(keep)]);
    }

    // ---- the end --------------------------------------------------------------------------------------------------------------------

    /// The vector registers and the x87 unit that the block works on are in the host's from here on.
    pub fn enter_units(&mut self) {
        // The x87 unit comes first, because its gate takes the vector registers away.
        if self.units.x87 {
            self.gate(X87, 1, self.places.x87);
        }
        match self.units.vectors {
            Some(Width::Xmm) => self.gate(VECTORS, Width::Xmm as i32, self.places.xmm),
            Some(Width::Ymm) => self.gate(VECTORS, Width::Ymm as i32, self.places.ymm),
            None => {}
        }
    }

    /// Calls `stub` if the byte at `offset` of the CPU is below `wanted`.
    fn gate(&mut self, offset: usize, wanted: i32, stub: u64) {
        let (missing, there) = (self.asm.create_label(), self.asm.create_label());
        self.asm.cmp(byte_ptr(RBP, offset as i32), wanted);
        self.asm.jcc(ConditionCode::b, missing);
        self.asm.set_label(there);
        self.gates.push((stub, missing, there));
    }

    /// The last x87 instruction is the one `distance` bytes behind the block's first byte. Changes R15 alone.
    pub fn point_x87(&mut self, distance: u64) {
        const FIP: usize = offset_of!(Cpu, state) + offset_of!(State, fpu) + offset_of!(Fpu, fip);
        self.rip_at(R15, distance as i64);
        self.asm.mov(cpu_field(FIP), R15);
    }

    /// Ends the code with its cold part, and gives the exits and the sites with cells. `None` if there was an instruction that the encoder
    /// refused.
    pub fn finish(mut self) -> Option<(Vec<ExitSite>, Vec<u16>)> {
        self.finish_sites();
        for Cold { label, why, back } in std::mem::take(&mut self.cold) {
            self.asm.set_label(label);
            self.leave_for(why);
            let Some((back, host_flags)) = back else { continue };
            if host_flags {
                self.restore_flags();
            }
            self.asm.jmp(back);
        }
        self.finish_calls();
        for (stub, missing, there) in std::mem::take(&mut self.gates) {
            self.asm.set_label(missing);
            self.asm.mov(R14, self.block);
            self.asm.call(stub);
            self.asm.jmp(there);
        }
        let stubs = [self.places.detour, self.places.detour_keeping];
        for (tail, stub) in self.tails.into_iter().zip(stubs).take(1 + usize::from(self.units.any())) {
            self.asm.set_label(tail);
            self.asm.mov(R14, self.block);
            self.asm.jmp(stub);
        }
        (!self.failed).then_some((self.exits, self.cells))
    }

    /// An instruction of the host's.
    pub fn add_made(&mut self, insn: Result<Instruction, IcedError>) {
        match insn {
            Ok(insn) => self.add(insn),
            Err(_) => self.failed = true,
        }
    }

    /// A guest instruction whose operands have been replaced by host registers and addresses.
    pub fn add(&mut self, insn: Instruction) {
        self.failed |= self.asm.add_instruction(&insn).is_err();
    }
}
