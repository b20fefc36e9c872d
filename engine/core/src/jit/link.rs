//! Links between translations: the jump at the end of one block goes straight to the next one, as long as both live.
//!
//! A jump inside a page is right wherever the page is mapped. One to another page is right in one place and for one generation of
//! translations, which its guards compare; whoever fails them comes here and has them changed. A block that dies has every jump to it sent
//! back to its own way here.

use std::ops::Range;

use super::native::status;
use crate::cpu::Cpu;
use crate::decode::block::Block;
use crate::memory::PAGE_OFFSET;
use crate::pmu::Watching;
use crate::uop::slot;

/// A direct way out of a translation.
#[derive(Clone, Copy)]
pub struct Exit {
    /// Distance of the target from the block's first byte.
    pub distance: i64,
    /// The distance in the jump, where it can be written.
    pub field: *mut u8,
    /// Address of the byte behind it, where it runs.
    pub end: u64,
    /// What leads here.
    pub unlinked: i32,
    /// The page and the context that the guards compare with, where they can be written.
    pub guards: Option<[*mut u8; 2]>,
}

/// In the place of a page or a context that a guard compares with: what none is.
pub const NO_GUARD: u64 = 1;

impl Exit {
    /// Makes the exit lead here.
    fn unlink(&self) {
        // SAFETY: the fields are part of a translation, and all of these are forgotten before their memory is used again.
        unsafe {
            match self.guards {
                // Behind its guards the target's page is entered already.
                Some([_, context]) => context.cast::<u64>().write_unaligned(NO_GUARD),
                None => self.field.cast::<i32>().write_unaligned(self.unlinked),
            }
        }
    }

    /// Makes the exit of a block at host address `host`, which runs in linear page `page` in `context`, jump to `target`; false if it cannot.
    fn link(&self, host: u64, page: u64, context: u64, target: &Block) -> bool {
        if self.guards.is_none() && target.key.host != host.wrapping_add(self.distance as u64) {
            return false;
        }
        // SAFETY: as above.
        unsafe {
            if let Some([page_guard, context_guard]) = self.guards {
                page_guard.cast::<u64>().write_unaligned(page);
                context_guard.cast::<u64>().write_unaligned(context);
            }
            self.field.cast::<i32>().write_unaligned((target.entry as u64).wrapping_sub(self.end) as i32);
        }
        true
    }
}

/// What a block with a translation has besides.
pub struct Links {
    exits: Vec<Exit>,
    /// Exits that were linked to this block.
    incoming: Vec<Exit>,
}

impl Links {
    pub fn new(exits: Vec<Exit>) -> Self {
        Links { exits, incoming: Vec::new() }
    }

    /// `exit` leads to this block now. One that is linked to several by turns, as processes that share code are run, comes again and again.
    fn add(&mut self, exit: Exit) {
        if self.incoming.len() == self.incoming.capacity() {
            self.incoming.sort_unstable_by_key(|exit| exit.end);
            self.incoming.dedup_by_key(|exit| exit.end);
            self.incoming.reserve(self.incoming.len()); // or most of the next ones would be looked for as well
        }
        self.incoming.push(exit);
    }

    /// Forgets exits of code at `addresses`, which is not used any more.
    pub fn forget(&mut self, addresses: &Range<u64>) {
        self.incoming.retain(|exit| !addresses.contains(&exit.end));
    }

    /// Sends every jump to this block back to where it came from.
    pub fn cut(&mut self) {
        self.incoming.drain(..).for_each(|exit| exit.unlink());
    }
}

/// Exit `number` of `block` leads nowhere yet, or somewhere else: links it to the block at its target if that one is translated. Tells where
/// host code goes on, in `Native::target`, or that the dispatcher does.
///
/// # Safety
/// Host code of `block` asks for this on the CPU that runs it.
pub unsafe fn follow(cpu: &mut Cpu, block: *mut Block, number: usize) -> u32 {
    // SAFETY: by the caller's promise; the references end here.
    let (exit, host) = unsafe { ((*block).links.as_ref().and_then(|links| links.exits.get(number).copied()), (*block).key.host) };
    let Some(exit) = exit else { unreachable!("host code has its exits") };
    let page = cpu.native.page;
    cpu.regs[slot::RIP as usize] = (page | host & PAGE_OFFSET).wrapping_add(exit.distance as u64);
    if cpu.native.context != cpu.jump_context {
        return status::BOUNDARY;
    }
    let Some(found) = cpu.translated_at(cpu.rip()) else { return cpu.left_after(block) };
    // SAFETY: the cache forgets blocks before they are freed; nobody else has a reference.
    let target = unsafe { &mut *found };
    if exit.link(host, page, cpu.jump_context, target) {
        cpu.native.counts.links += 1;
        target.links.as_mut().into_iter().for_each(|links| links.add(exit));
    }
    cpu.keep_from_blocks();
    cpu.go_to(found)
}

/// Host code knows RIP, and nothing of the block there: tells where it goes on, as [`follow`] does.
pub fn find(cpu: &mut Cpu) -> u32 {
    let Some(target) = cpu.translated_at(cpu.rip()) else { return status::BOUNDARY };
    cpu.keep_from_blocks();
    cpu.go_to(target)
}

impl Cpu {
    /// The block at `rip`, where code of 64 bits runs, if it has host code and no translation has changed since host code was entered.
    pub(super) fn translated_at(&mut self, rip: u64) -> Option<*mut Block> {
        let block = self.known_block(rip)?;
        // SAFETY: the cache forgets blocks before they are freed.
        let ready = unsafe { !(*block).body.is_null() };
        (ready && self.native.context == self.jump_context).then_some(block)
    }

    /// The dispatcher goes on at RIP, behind `block`. One that watches branches must not learn from which: this one has been noted.
    fn left_after(&mut self, block: *mut Block) -> u32 {
        if self.pmu.watching != Watching::NONE {
            return status::BOUNDARY;
        }
        self.flags = self.native.flags();
        self.native.block = block;
        status::NEXT
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exit_that_comes_again_and_again_takes_no_more_room() {
        let mut links = Links::new(Vec::new());
        let exit = |end| Exit { distance: 0, field: std::ptr::null_mut(), end, unlinked: 0, guards: None };
        (0..100_000).for_each(|n| links.add(exit(n % 10)));
        assert!(links.incoming.capacity() < 100, "{}", links.incoming.capacity());
        links.forget(&(3..10));
        assert!((0..10).all(|end| links.incoming.iter().any(|exit| exit.end == end) == (end < 3)));
    }
}
