//! The translator: blocks that are hot become host code. The interpreter runs cold code, and every instruction that host code leaves to it.
//!
//! A translation is a cache like any other: it is thrown away with its block, and whether one exists changes no guest-visible state. Host
//! code runs on the same registers, TLB, block links and jump cache as the dispatcher, and returns to it for all work between blocks.
//!
//! | file | is |
//! |---|---|
//! | `backend` | the seam: what makes host code |
//! | `link`, `native` | what every back end's host code needs of Rust code: ways from block to block, and out of host code |
//! | `x64` | the back end for x86-64 hosts, of which the rest are parts |
//! | `plan` | which instructions become host code |
//! | `block` | the translation of a block |
//! | `asm` | the assembler |
//! | `emit` | pieces of host code: ways into the interpreter and back |
//! | `flags` | where the guest's flags are meanwhile |
//! | `access` | accesses to the guest's memory |
//! | `near` | accesses beside the one before |
//! | `exits` | the head of a block, and the ways to the next one |
//! | `loops`, `turns` | loops whose accesses are checked once for many turns |
//! | `watched` | what a branch does for those who watch branches |
//! | `registers`, `vector_registers` | where guest registers are meanwhile |
//! | `integer`, `string`, `system`, `calls` | instructions that take several of the host's |
//! | `vector`, `x87` | which vector, MMX and x87 instructions become host code |
//! | `stubs` | code that all blocks share |
//! | `arena` | memory for host code |
//! | `tier` | which code runs as host code |
//! | `absent` | what stands for all of this on hosts without a back end |

mod access;
mod arena;
mod asm;
pub mod backend;
mod block;
mod branches;
mod calls;
mod emit;
mod exits;
pub mod flags;
mod integer;
pub mod link;
mod loops;
pub mod native;
mod near;
mod plan;
mod registers;
mod string;
mod stubs;
mod system;
mod tier;
mod turns;
mod vector;
mod vector_registers;
mod watched;
mod x64;
mod x87;

use std::{io, ptr};

use crate::cpu::{CodeSize, Cpu};
use crate::decode::block::{decode_page, Block};
use crate::decode::cache::CodeCache;
use crate::model::Model;
use backend::{Arrival, Backend, HostCode, Made};
use flags::Recipe;
use iced_x86::Instruction;
use link::Links;
use native::Trampoline;

pub use tier::Tier;

/// Bytes of host code that a core may have.
const CODE_BYTES: usize = 64 << 20;
/// The translations of one core.
pub struct Translator {
    backend: Box<dyn Backend>,
    translated: u64,
    evicted: u64,
}

impl Translator {
    /// `None` where the host has no back end, or gives no memory for code.
    fn new(bytes: usize) -> Option<Self> {
        let backend = backend::of_host(bytes).inspect_err(|error| log::info!("no host code: {error}")).ok()?;
        Some(Translator { backend, translated: 0, evicted: 0 })
    }

    /// Translations made.
    pub fn translated(&self) -> u64 {
        self.translated
    }

    /// Translations that were forgotten to make room.
    pub fn evicted(&self) -> u64 {
        self.evicted
    }

    pub fn trampoline(&self) -> Trampoline {
        self.backend.trampoline()
    }

    /// Bytes of memory that host code has been in.
    pub fn bytes(&self) -> usize {
        self.backend.bytes()
    }

    /// Translates `block`. No host code may be running, because old code may be forgotten for it.
    fn translate(&mut self, block: &mut Block, code: &mut CodeCache, model: &Model) {
        if block.key.size == CodeSize::Bits64 && block.second_page.is_none() && !block.breakpoint {
            while self.translate_once(block, code, model).is_none() {}
        }
    }

    /// Translates `block`, in place of the translation that it has, if any. `None` if host code was forgotten to make room instead.
    fn translate_once(&mut self, block: &mut Block, code: &mut CodeCache, model: &Model) -> Option<()> {
        let Some(instructions) = decode_again(block, model) else { return Some(()) };
        match self.backend.translate(block, &instructions, model, Arrival::default()) {
            Made::Code(HostCode { entry, body, exits, takes_recipes }) => {
                self.translated += 1;
                (block.entry, block.body) = (entry, body);
                block.links.replace(Box::new(Links::new(exits, takes_recipes))).iter_mut().for_each(|old| old.cut());
            }
            Made::Refused => {}
            Made::Full(addresses) => {
                self.evicted += code.forget_translations_at(&addresses);
                return None;
            }
        }
        Some(())
    }

    /// Gives cells to the accesses of `block`, which has a translation. `None` if host code was forgotten to make room instead.
    fn give_cells(&mut self, block: &mut Block, code: &mut CodeCache, model: &Model) -> Option<()> {
        if block.busy {
            return Some(());
        }
        block.busy = true;
        self.translate_once(block, code, model).or_else(|| {
            block.busy = false;
            None
        })
    }
}

impl Translator {
    /// Translates `block`, which has a translation, for who comes with `recipe`. `None` if host code was forgotten to make room instead.
    fn translate_for(&mut self, recipe: Recipe, block: &mut Block, code: &mut CodeCache, model: &Model) -> Option<()> {
        let (Some(instructions), Some(links)) = (decode_again(block, model), &block.links) else { return Some(()) };
        let arrival = Arrival { recipe: Some(recipe), first_exit: links.exits() };
        match self.backend.translate(block, &instructions, model, arrival) {
            Made::Code(made) => {
                self.translated += 1;
                block.links.iter_mut().for_each(|links| links.add_shortcut(recipe, made.entry, &made.exits));
            }
            Made::Refused => {}
            Made::Full(addresses) => {
                self.evicted += code.forget_translations_at(&addresses);
                return None;
            }
        }
        Some(())
    }
}

/// The instructions of `block`, which are all in one page; `None` if they are not the ones that it was made of.
fn decode_again(block: &Block, model: &Model) -> Option<Vec<Instruction>> {
    let mut bytes = vec![0; block.length as usize];
    // SAFETY: the block's bytes are in one page of RAM, which stays mapped while the page table holds its region.
    unsafe { ptr::with_exposed_provenance::<u8>(block.key.host as usize).copy_to(bytes.as_mut_ptr(), bytes.len()) };
    let instructions = decode_page(&bytes, block.key.size, model);
    // Otherwise another core just wrote there, and the block is about to die.
    (instructions.len() == block.instructions as usize).then_some(instructions)
}

/// Why there is no host code, if there is none.
pub fn check() -> io::Result<()> {
    backend::of_host(1).map(drop)
}

/// What makes host code here, or why nothing does.
pub fn describe() -> String {
    check().map_or_else(|error| format!("none: {error}"), |()| std::env::consts::ARCH.into())
}

impl Cpu {
    /// Turns the translator on, for blocks that ran `threshold` times; or off.
    pub fn set_translator(&mut self, threshold: Option<u32>) {
        self.set_translator_within(CODE_BYTES, threshold);
    }

    /// [`Cpu::set_translator`] with about `bytes` for host code.
    pub fn set_translator_within(&mut self, bytes: usize, threshold: Option<u32>) {
        self.translator = threshold.and_then(|_| Translator::new(bytes)).map(Box::new);
        self.hot = threshold.unwrap_or(0);
        self.native.set_jumps(self.code.jumps());
        self.code.forget_translations(self.translator.as_ref().map_or(ptr::null(), |translator| translator.backend.nowhere()));
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
        block.busy |= self.hot == 1;
        if let Some(translator) = &mut self.translator {
            translator.translate(block, &mut self.code, &self.model);
        }
    }
}
