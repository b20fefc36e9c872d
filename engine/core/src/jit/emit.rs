//! Pieces of host code that translations are made of: the way into the interpreter and back, what a block begins and ends with.

use std::mem::offset_of;

use iced_x86::Register::{R13D, R14, R15, RBP};
use iced_x86::{ConditionCode, IcedError, Instruction, Register};

use super::access::{Refill, SitePlaces};
use super::asm::{byte_ptr, qword_ptr, Asm, Label, Memory};
use super::backend::Arrival;
use super::block::Ground;
use super::exits::{ExitSite, Way};
use super::flags::{Recipe, Whereabouts};
use super::native::{detour, VECTORS, X87};
use super::near::{Near, OUTSIDE};
use super::registers;
use super::vector::{Units, Width};
use super::watched::Doubt;
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
    /// What sites that read share, and those that write.
    pub read: SitePlaces,
    pub write: SitePlaces,
}

/// Code at the end that is rarely run.
struct Cold {
    label: Label,
    /// Why host code is left: a number of [`super::native::detour`].
    why: u32,
    /// How the guest's flags are made, if they are not in memory.
    recipe: Option<Recipe>,
    /// Where to go on, and whether host flags are expected there. Nowhere, if host code does not come back here.
    back: Option<(Label, bool)>,
    /// What is there relies on R15, which is to be outside of any page.
    near: bool,
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
    /// Where the block begins.
    pub(super) start: Label,
    /// Whose undefined flags the guest sees.
    pub(super) silicon: Silicon,
    /// Stubs that bring that, where they are called, and where it is there.
    gates: Vec<(u64, Label, Label)>,
    pub(super) exits: Vec<ExitSite>,
    /// Number of the first exit.
    pub(super) first_exit: u32,
    pub(super) ways: Vec<Way>,
    /// Calls for which the host's stack may have no room, and where they go on.
    pub(super) full_stacks: Vec<(Label, Label)>,
    cold: Vec<Cold>,
    /// Branches that somebody watches, where the predictor may be wrong.
    pub(super) doubts: Vec<Doubt>,
    /// Sites so far, and which ones have cells; see [`Block::busy`] and [`Block::wandering`].
    pub(super) sites: usize,
    pub(super) busy: bool,
    pub(super) wandering: u64,
    /// Distance of the block's first cell from the start of the code, and the sites that have one.
    pub(super) first_cell: i32,
    pub(super) cells: Vec<u16>,
    pub(super) refills: Vec<Refill>,
    /// What R13 and R15 tell of the access before, as long as they hold.
    pub(super) near: Option<Near>,
    /// The next access of the block has the base of this one.
    pub(super) shared: bool,
    pub(super) has_bextr: bool,
    /// Where the block is named to the stub: the plain one, and the one that keeps units.
    tails: [Label; 2],
    /// Where the guest's flags are, and where they are when the block begins.
    pub(super) flags: Whereabouts,
    arrival: Whereabouts,
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
    pub fn new(asm: &'a mut Asm, ground: Ground, block: &Block, units: Units, silicon: Silicon, arrival: Arrival) -> Self {
        let flags = Whereabouts::on_arrival(arrival.recipe);
        let tails = [(); 2].map(|()| asm.create_label());
        let start = asm.create_label();
        Emitter {
            asm,
            places: ground.places,
            block: std::ptr::from_ref(block) as u64,
            offset: block.key.host & PAGE_OFFSET,
            salt: jump_salt(block.key.watching.number()) as i32,
            last: block.instructions - 1,
            units,
            start,
            silicon,
            gates: Vec::new(),
            exits: Vec::new(),
            first_exit: arrival.first_exit,
            ways: Vec::new(),
            full_stacks: Vec::new(),
            cold: Vec::new(),
            doubts: Vec::new(),
            first_cell: ground.first_cell,
            cells: Vec::new(),
            sites: 0,
            busy: block.busy,
            wandering: block.wandering,
            has_bextr: ground.host.bmi1,
            refills: Vec::new(),
            near: None,
            shared: false,
            tails,
            flags,
            arrival: flags,
            failed: false,
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
        let recipe = self.flags.recipe.filter(|_| !self.flags.saved);
        self.cold.push(Cold { label, why, recipe, back, near: false });
    }

    /// The last detour comes back here.
    pub fn rejoin(&mut self) {
        let back = self.asm.create_label();
        let near = self.near.is_some() && self.asm.holds();
        self.asm.set_label(back);
        if near {
            self.asm.hold();
        }
        let host_flags = self.flags.host;
        if let Some(cold) = self.cold.last_mut() {
            (cold.back, cold.near) = (Some((back, host_flags)), near);
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
        self.flags = Whereabouts::on_arrival(None);
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
        self.finish_ways();
        self.finish_doubts();
        self.finish_sites();
        for Cold { label, why, recipe, back, near } in std::mem::take(&mut self.cold) {
            self.asm.set_label(label);
            self.flags = Whereabouts::on_arrival(recipe);
            self.save_flags();
            self.leave_for(why);
            let Some((back, host_flags)) = back else { continue };
            if host_flags {
                self.restore_flags();
            }
            if near {
                self.asm.mov(R15, OUTSIDE);
            }
            self.asm.jmp(back);
        }
        self.finish_calls();
        for (stub, missing, there) in std::mem::take(&mut self.gates) {
            self.asm.set_label(missing);
            self.flags = self.arrival;
            self.save_flags();
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
