//! What host code and Rust code share while a guest runs, and the ways from one to the other.

use std::any::Any;
use std::collections::HashMap;
use std::mem::offset_of;
use std::panic::{catch_unwind, resume_unwind, AssertUnwindSafe};

use iced_x86::{Code, Mnemonic};

use super::access::Cell;
use super::loops::GROUPS;
use super::{link, x87};
use crate::cpu::Cpu;
use crate::decode::block::Block;
use crate::decode::cache::Jump;
use crate::flags::Flags;
use crate::memory::PAGE_OFFSET;
use crate::pmu::Watching;
use crate::state::rflags::OF;
use crate::uop::{slot, Exec, Stop, Uop};

/// The part of a CPU that host code keeps for itself.
#[repr(C)]
pub struct Native {
    /// Arithmetic flags: OF in the low byte (0 or 1), what LAHF gives in the high byte.
    flags: u16,
    /// Operands of the operation that made the flags, where the registers that they were in are not theirs any more.
    flag_operands: [u64; 2],
    /// Linear page of the running block: with the block's place in it, its RIP.
    pub(super) page: u64,
    /// Where a call goes while its return address is pushed.
    target_rip: u64,
    /// The jump cache.
    jumps: *const Jump,
    /// RIP of the first instruction of `block`.
    pub rip: u64,
    /// How much of the guest's vector registers is in the host's: nothing, or a `vector::Width`.
    vectors: u8,
    /// 1 if the guest's x87 unit is in the host's, or just was and is in `image`.
    pub(super) x87: u8,
    /// `vectors` and `x87` as they are to be again behind an instruction in the interpreter.
    kept: u16,
    /// The x87 unit on its way from the guest to the host or back.
    pub(super) image: x87::Image,
    /// MXCSR as Rust code expects it.
    default_mxcsr: u32,
    /// Where host code goes on after a detour that says so.
    pub(super) target: *const u8,
    /// `Cpu::jump_context` when host code was entered.
    pub(super) context: u64,
    /// The host's RSP while no call of host code waits for its return, and where it has no room for more.
    stack: u64,
    stack_end: u64,
    /// What was taken from the budget; see [`Cpu::keep_from_blocks`].
    taken: i64,
    /// The epoch of the active table, as long as host code runs.
    stamp: u64,
    /// How often the budget has ended before a block.
    pub(super) samples: u64,
    /// The cell of a site that has too many pages for it, if one was found.
    pub(super) wanderer: *const Cell,
    /// What the places of groups of a loop will hold, how many turns it has in their pages but for the first, and what is left of the budget
    /// behind these (see [`super::turns`]).
    loop_places: [u64; GROUPS],
    loop_turns: u64,
    loop_rest: u64,
    /// The block that was left by a detour, or that was not begun.
    pub(super) block: *mut Block,
    /// The panic that host code must not be unwound for.
    panic: Option<Box<dyn Any + Send>>,
    pub counts: Counts,
}

/// What happened in host code.
pub struct Counts {
    /// Exits that were linked, again or for the first time.
    pub links: u64,
    /// Instructions that the interpreter ran because of their memory operand.
    pub misses: u64,
    /// Instructions that the interpreter ran because there is no host code for them, by `iced_x86::Code`.
    interpreted: Box<[u64]>,
}

impl Default for Counts {
    fn default() -> Self {
        Counts { links: 0, misses: 0, interpreted: vec![0; Code::values().len()].into() }
    }
}

impl Counts {
    /// How often instructions without host code ran, by mnemonic; the most frequent first.
    pub fn interpreted(&self) -> Vec<(Mnemonic, u64)> {
        let mut sums = HashMap::new();
        for (code, count) in Code::values().zip(&self.interpreted).filter(|(_, count)| **count != 0) {
            *sums.entry(code.mnemonic()).or_default() += count;
        }
        let mut sums: Vec<(Mnemonic, u64)> = sums.into_iter().collect();
        sums.sort_by_key(|(mnemonic, count)| (std::cmp::Reverse(*count), *mnemonic));
        sums
    }
}

impl Default for Native {
    fn default() -> Self {
        Native {
            flags: 0,
            flag_operands: [0; 2],
            page: 0,
            target_rip: 0,
            jumps: std::ptr::null(),
            rip: 0,
            vectors: 0,
            x87: 0,
            kept: 0,
            image: x87::Image::default(),
            default_mxcsr: 0x1f80,
            target: std::ptr::null(),
            context: 0,
            stack: 0,
            stack_end: 0,
            taken: 0,
            stamp: 0,
            samples: 0,
            wanderer: std::ptr::null(),
            loop_places: [0; GROUPS],
            loop_turns: 0,
            loop_rest: 0,
            block: std::ptr::null_mut(),
            panic: None,
            counts: Counts::default(),
        }
    }
}

const NATIVE: usize = offset_of!(Cpu, native);
/// Offsets of fields in a CPU.
pub const FLAGS: usize = NATIVE + offset_of!(Native, flags);
pub const FLAG_OPERANDS: usize = NATIVE + offset_of!(Native, flag_operands);
pub const PAGE: usize = NATIVE + offset_of!(Native, page);
pub const TARGET_RIP: usize = NATIVE + offset_of!(Native, target_rip);
pub const WANDERER: usize = NATIVE + offset_of!(Native, wanderer);
pub const LOOP_PLACES: usize = NATIVE + offset_of!(Native, loop_places);
pub const LOOP_TURNS: usize = NATIVE + offset_of!(Native, loop_turns);
pub const LOOP_REST: usize = NATIVE + offset_of!(Native, loop_rest);
pub const STAMP: usize = NATIVE + offset_of!(Native, stamp);
pub const TARGET: usize = NATIVE + offset_of!(Native, target);
pub const HOST_STACK: usize = NATIVE + offset_of!(Native, stack);
pub const HOST_STACK_END: usize = NATIVE + offset_of!(Native, stack_end);
pub const JUMPS: usize = NATIVE + offset_of!(Native, jumps);
pub const BLOCK: usize = NATIVE + offset_of!(Native, block);
pub const VECTORS: usize = NATIVE + offset_of!(Native, vectors);
pub const X87: usize = NATIVE + offset_of!(Native, x87);
pub const KEPT: usize = NATIVE + offset_of!(Native, kept);
pub const IMAGE: usize = NATIVE + offset_of!(Native, image);
pub const DEFAULT_MXCSR: usize = NATIVE + offset_of!(Native, default_mxcsr);
pub const CONTEXT: usize = NATIVE + offset_of!(Native, context);
pub const CONTEXT_FIELD: usize = offset_of!(Cpu, jump_context);

/// More than any budget.
const EVERYTHING: i64 = 1 << 60;

/// Why host code asks Rust code: the number of an instruction of the block, which the interpreter shall run, or one of these.
pub mod detour {
    /// With the number of an instruction: host code would do, but its memory operand is not in the TLB, or is otherwise special.
    pub const MISS: u32 = 0x80;
    /// The block has not begun, and the budget does not cover it.
    pub const HEAD: u32 = 0x100;
    /// RIP has been stored, and the block there is not at hand.
    pub const FIND: u32 = 0x180;
    /// The direct exit of this number, added to it, is not linked.
    pub const LINK: u32 = 0x200;
}

/// The part of `Native::kept` that is about the x87 unit.
const KEPT_X87: u16 = 1 << 8;

/// What Rust code and host code return to each other.
pub mod status {
    /// The instruction is done, and host code goes on.
    pub const DONE: u32 = 0;
    /// Host code goes on at `Native::target`.
    pub const GO: u32 = 1;
    /// RIP is at a block that did not begin, because the dispatcher has work.
    pub const BOUNDARY: u32 = 2;
    /// A block did not begin, although it was paid for, because the interpreter must run it.
    pub const REFUSED: u32 = 3;
    /// RIP is behind `Native::block`, which the interpreter ended, or one of whose exits is not linked.
    pub const NEXT: u32 = 4;
    /// The interpreter left a block, and RIP is where it goes on.
    pub const LEFT: u32 = 5;
    /// A VM exit.
    pub const EXIT: u32 = 6;
    /// A handler panicked.
    pub const PANIC: u32 = 7;
}

/// Host code: the trampoline that enters a block.
pub type Trampoline = unsafe extern "C" fn(cpu: *mut Cpu, code: *const u8) -> u32;

impl Native {
    /// Tells host code where the jump cache is.
    pub fn set_jumps(&mut self, jumps: *const Jump) {
        self.jumps = jumps;
    }

    fn load(&mut self, flags: Flags) {
        let image = flags.bits();
        self.flags = (image as u16 & 0xff) << 8 | u16::from(image & OF != 0);
    }

    pub(super) fn flags(&self) -> Flags {
        Flags::from_bits(u64::from(self.flags >> 8) | if self.flags & 1 != 0 { OF } else { 0 })
    }
}

impl Cpu {
    /// Runs the host code of `block`, and of the blocks that it leads to, until one of them stops.
    #[inline(never)]
    pub(crate) fn run_native(&mut self, block: *mut Block, body: *const u8) -> Exec<*mut Block> {
        let Some(translator) = &self.translator else { unreachable!("host code without a translator") };
        let trampoline = translator.trampoline();
        // SAFETY: the dispatcher has just looked the block up.
        self.budget -= i64::from(unsafe { (*block).instructions });
        self.blocks_run += 1;
        self.native.load(self.flags);
        (self.native.page, self.native.context) = (self.rip() & !PAGE_OFFSET, self.jump_context);
        self.keep_from_blocks();
        self.stamp_cells();
        // SAFETY: `body` is the start of a live block's host code, which keeps to the rules of this module.
        let status = unsafe { trampoline(self, body) };
        self.give_back();
        self.take_units();
        match status {
            status::BOUNDARY => {
                self.flags = self.native.flags();
                Ok(std::ptr::null_mut())
            }
            status::REFUSED => {
                self.flags = self.native.flags();
                let block = self.native.block;
                // SAFETY: host code named the block that it did not begin.
                let (instructions, host) = unsafe { ((*block).instructions, (*block).key.host) };
                self.budget += i64::from(instructions);
                self.regs[slot::RIP as usize] = self.native.page | host & PAGE_OFFSET;
                self.native.rip = self.rip();
                self.interpret(block)
            }
            status::NEXT => Ok(self.native.block),
            status::LEFT => Ok(std::ptr::null_mut()),
            status::EXIT => Err(Stop::Exit),
            status::PANIC => resume_unwind(self.native.panic.take().unwrap_or_else(|| Box::new("a handler panicked"))),
            _ => unreachable!("host code returned {status}"),
        }
    }

    /// Takes what host code has for the PMU, and of the x87 unit.
    fn take_units(&mut self) {
        if self.pmu.watching != Watching::NONE {
            self.take_notes();
        }
        if self.native.x87 != 0 {
            self.take_x87(None);
        }
    }

    /// Host code is about to go on: its cells must be of the epoch that the active table is in now.
    fn stamp_cells(&mut self) {
        // SAFETY: `active_table` points to a table that lives as long as the TLB.
        self.native.stamp = unsafe { (*self.active_table).epoch };
    }

    /// Takes the budget away if the dispatcher shall look at the CPU before the next block, or find it itself: host code looks at nothing
    /// else there.
    pub(super) fn keep_from_blocks(&mut self) {
        if self.pending != 0 || self.native.context != self.jump_context {
            self.native.taken = EVERYTHING;
            self.budget -= EVERYTHING;
        }
    }

    /// Takes [`Cpu::keep_from_blocks`] back; tells whether there was something.
    pub(super) fn give_back(&mut self) -> bool {
        let taken = std::mem::take(&mut self.native.taken);
        self.budget += taken;
        taken != 0
    }

    /// The interpreter has left a block, by a branch or in any other way: goes on as host code if the block at RIP is some, and neither the
    /// dispatcher nor who watches must know.
    fn go_on(&mut self) -> Option<u32> {
        if self.pending != 0 || self.pmu.watched != 0 || !self.long_mode() {
            return None;
        }
        self.native.context = self.jump_context;
        let target = self.translated_at(self.rip())?;
        self.native.load(self.flags);
        Some(self.go_to(target))
    }

    /// Host code goes on with `block`, which is that at RIP.
    pub(super) fn go_to(&mut self, block: *mut Block) -> u32 {
        self.native.page = self.rip() & !PAGE_OFFSET;
        // SAFETY: whoever found the block has just done so.
        self.native.target = unsafe { (*block).entry };
        status::GO
    }

    /// The handler of `uop`, an instruction of the running block with `left` that are paid for, did not go on with the next one: does what
    /// the dispatcher does then, and returns a number of [`status`].
    fn ended(&mut self, uop: &Uop, stop: Stop, left: i64) -> u32 {
        if stop == Stop::Next {
            return self.go_on().unwrap_or(status::NEXT);
        }
        match self.leave(uop, stop, left) {
            Ok(()) => self.go_on().unwrap_or(status::LEFT),
            Err(_) => status::EXIT,
        }
    }
}

/// The way out of host code, which has stored all registers; `why` is one of [`detour`].
///
/// # Safety
/// Host code of `block` calls this on the CPU that runs it.
pub unsafe extern "C" fn leave(cpu: *mut Cpu, block: *mut Block, why: u32) -> u32 {
    // SAFETY: by the caller's promise, and host code holds no references.
    let cpu = unsafe { &mut *cpu };
    // SAFETY: as above.
    let status = unsafe { act(cpu, block, why) };
    cpu.stamp_cells();
    status
}

/// Does what [`leave`] is called for.
unsafe fn act(cpu: &mut Cpu, block: *mut Block, why: u32) -> u32 {
    if why < detour::HEAD {
        // SAFETY: as above.
        return unsafe { resume(cpu, block, why) };
    }
    let kept = cpu.give_back();
    cpu.take_units();
    // SAFETY: as above.
    unsafe {
        match why {
            detour::HEAD => head(cpu, block, kept),
            detour::FIND => link::find(cpu),
            _ => link::follow(cpu, block, (why - detour::LINK) as usize),
        }
    }
}

/// `block` has been paid for with more than there was: that is too late only where nothing was left before, or where the budget was `kept`.
unsafe fn head(cpu: &mut Cpu, block: *mut Block, kept: bool) -> u32 {
    // SAFETY: the caller's promise is that of `leave`.
    let (instructions, host) = unsafe { ((*block).instructions, (*block).key.host) };
    let before = cpu.budget + i64::from(instructions);
    if !kept && before > 0 {
        return status::DONE;
    }
    cpu.budget = before;
    let rip = cpu.native.page | host & PAGE_OFFSET;
    cpu.regs[slot::RIP as usize] = rip;
    if !kept {
        // SAFETY: as above, and host code is left.
        unsafe { cpu.sampled(block, rip) };
    }
    status::BOUNDARY
}

/// Runs the instruction of `block` that a detour names with its reference handler.
unsafe fn resume(cpu: &mut Cpu, block: *mut Block, instruction: u32) -> u32 {
    // SAFETY: by the caller's promise; the reference ends here.
    cpu.settle_wanderer(unsafe { &mut *block });
    let index = (instruction & !detour::MISS) as usize;
    // SAFETY: the caller's promise is that of `leave`. The handler may kill the block, which stays allocated, so nothing is borrowed from it
    // meanwhile.
    let (first, uop, handler, left, host) = unsafe {
        let (uops, reference) = (&(*block).uops, &(*block).reference);
        let handler = reference.get(index).copied().unwrap_or(uops[index].run);
        (uops.as_ptr(), uops[index], handler, i64::from((*block).instructions) - index as i64, (*block).key.host)
    };
    cpu.at = first.wrapping_add(index);
    match instruction & detour::MISS {
        0 => cpu.native.counts.interpreted[usize::from(uop.code)] += 1,
        _ => cpu.native.counts.misses += 1,
    }
    cpu.give_back();
    cpu.flags = cpu.native.flags();
    cpu.native.block = block;
    cpu.regs[slot::RIP as usize] = cpu.native.page | host & PAGE_OFFSET;
    cpu.native.rip = cpu.rip();
    if cpu.native.x87 != 0 {
        // SAFETY: as above.
        cpu.take_x87(Some((unsafe { &*block }, index)));
    }
    cpu.take_units();
    let result = catch_unwind(AssertUnwindSafe(|| {
        let stop = match handler(cpu, &uop) {
            // SAFETY: as above.
            Ok(()) if unsafe { (*block).valid } => return status::DONE,
            // SAFETY: as above; behind the last micro-op of an instruction there is one that ends the block.
            Ok(()) => return cpu.ended(&unsafe { *first.add(index + 1) }, Stop::Retry, left - 1),
            Err(stop) => stop,
        };
        cpu.ended(&uop, stop, left)
    }));
    let status = result.unwrap_or_else(|panic| {
        cpu.native.panic = Some(panic);
        status::PANIC
    });
    if status == status::DONE {
        cpu.native.load(cpu.flags);
        if cpu.native.kept & KEPT_X87 != 0 {
            cpu.give_x87();
        }
        cpu.keep_from_blocks();
    }
    status
}
