//! The translator: blocks that are hot become host code. The interpreter runs cold code, and every instruction that host code leaves to it.
//!
//! A translation is a cache like any other: it is thrown away with its block, and whether one exists changes no guest-visible state. Host
//! code runs on the same registers, TLB, block links and jump cache as the dispatcher, and returns to it for all work between blocks.
//!
//! | file | is |
//! |---|---|
//! | `plan` | which instructions become host code |
//! | `block` | the translation of a block |
//! | `asm` | the assembler |
//! | `emit` | pieces of host code: flags, TLB checks, ways between blocks and into the interpreter |
//! | `watched` | what a branch does for those who watch branches |
//! | `registers`, `vector_registers` | where guest registers are meanwhile |
//! | `integer` | integer instructions that take several of the host's |
//! | `vector`, `x87` | which vector, MMX and x87 instructions become host code |
//! | `stubs`, `native` | the way in and out, in host code and in Rust |
//! | `arena` | memory for host code |

mod arena;
mod asm;
mod block;
mod emit;
mod integer;
pub mod native;
mod plan;
mod registers;
mod string;
mod stubs;
mod system;
mod vector;
mod vector_registers;
mod watched;
mod x87;

use std::ptr;

use crate::cpu::{CodeSize, Cpu};
use crate::decode::block::{decode_page, Block};
use crate::decode::cache::CodeCache;
use crate::model::Model;
use arena::Arena;
use asm::Asm;
use emit::Places;
use native::Trampoline;
use plan::Host;
use stubs::Stubs;

/// Bytes of host code that a core may have.
const ARENA_SIZE: usize = 64 << 20;
/// Runs of a block before [`Tier::Auto`] translates it.
const HOT: u32 = 32;

/// Which code runs as host code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Tier {
    Interpreter,
    /// Every block, from its first run on.
    Translator,
    /// Blocks that are hot.
    #[default]
    Auto,
}

impl Tier {
    /// Every tier with its name.
    pub const NAMES: [(&'static str, Tier); 3] =
        [("interpreter", Tier::Interpreter), ("translator", Tier::Translator), ("auto", Tier::Auto)];

    /// Runs of a block before it is translated; `None` for never.
    pub const fn threshold(self) -> Option<u32> {
        match self {
            Tier::Interpreter => None,
            Tier::Translator => Some(1),
            Tier::Auto => Some(HOT),
        }
    }
}

/// Makes host code for one core.
pub struct Translator {
    arena: Arena,
    asm: Asm,
    stubs: Stubs,
    places: Places,
    /// Bytes of the arena that belong to the stubs.
    base: usize,
    host: Host,
    pub translated: u64,
    pub flushes: u64,
}

impl Translator {
    /// `None` where the host gives no memory for code.
    fn new(cpu: &Cpu) -> Option<Self> {
        let mut arena = Arena::new(ARENA_SIZE).inspect_err(|error| log::warn!("no memory for host code: {error}")).ok()?;
        let mut asm = Asm::default();
        let host = Host::new();
        let stubs = stubs::write(&mut arena, &mut asm, host.vectors.has_ymm())?;
        let places = Places {
            resume: stubs.resume,
            resume_keeping: stubs.resume_keeping,
            xmm: stubs.xmm,
            ymm: stubs.ymm,
            x87: stubs.x87,
            boundary: stubs.boundary,
            attention: cpu.signal.pending_address() as u64,
            jumps: cpu.code.jumps() as u64,
        };
        let base = arena.used();
        Some(Translator { arena, asm, stubs, places, base, host, translated: 0, flushes: 0 })
    }

    pub fn trampoline(&self) -> Trampoline {
        self.stubs.trampoline
    }

    /// Bytes of host code in use.
    pub fn bytes(&self) -> usize {
        self.arena.used()
    }

    /// Translates `block`. No host code may be running: a full arena forgets all.
    fn translate(&mut self, block: &mut Block, code: &mut CodeCache, model: &Model) {
        if block.key.size != CodeSize::Bits64 || block.second_page.is_some() || block.breakpoint {
            return;
        }
        let mut bytes = vec![0; block.length as usize];
        // SAFETY: the block's bytes are in one page of RAM, which stays mapped while the page table holds its region.
        unsafe { ptr::with_exposed_provenance::<u8>(block.key.host as usize).copy_to(bytes.as_mut_ptr(), bytes.len()) };
        let instructions = decode_page(&bytes, block.key.size, model);
        if instructions.len() != block.instructions as usize {
            return; // another core just wrote there, and the block is about to die
        }
        self.asm.begin(self.arena.next());
        let Some(body) = block::translate(&mut self.asm, block, &instructions, model, self.host, self.places) else { return };
        let Some(entry) = self.arena.add(self.asm.finish()) else {
            self.flushes += 1;
            code.forget_translations();
            return self.arena.truncate(self.base);
        };
        self.translated += 1;
        block.entry = entry;
        block.body = entry.wrapping_add(body);
    }
}

impl Cpu {
    /// Turns the translator on, for blocks that ran `threshold` times; or off.
    pub fn set_translator(&mut self, threshold: Option<u32>) {
        self.code.forget_translations();
        self.translator = threshold.and_then(|_| Translator::new(self)).map(Box::new);
        self.hot = threshold.unwrap_or(0);
    }

    /// Where the dispatcher enters host code of `block`, which it is about to run; counts the run if there is none yet.
    #[inline(always)]
    pub(crate) fn translation(&mut self, block: *mut Block) -> Option<*const u8> {
        // SAFETY: the dispatcher has just looked the block up, and nobody else has a reference to it.
        let block = unsafe { &mut *block };
        if block.body.is_null() {
            block.heat += 1;
            if block.heat == self.hot {
                self.translate(block);
            }
        }
        (!block.body.is_null()).then_some(block.body)
    }

    #[cold]
    #[inline(never)]
    fn translate(&mut self, block: &mut Block) {
        if let Some(translator) = &mut self.translator {
            translator.translate(block, &mut self.code, &self.model);
        }
    }
}
