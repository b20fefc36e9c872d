//! Links between translations: the jump at the end of one block goes straight to the next one, as long as both live.
//!
//! A jump inside a page is right wherever the page is mapped. One to another page is right in one place and for one generation of
//! translations, which its guards compare; whoever fails them comes here and has them changed. A block that dies has every jump to it sent
//! back to its own way here.

use std::ops::Range;

use super::asm::{JUMP, NO_JUMP};
use super::flags::Recipe;
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
    pub shortcut: Option<Shortcut>,
}

/// A jump past the code that saves the flags of an exit, to a translation that knows their recipe.
#[derive(Clone, Copy)]
pub struct Shortcut {
    pub recipe: Recipe,
    /// The distance in the jump, where it can be written, and the address of the byte behind it, where it runs.
    pub field: *mut u8,
    pub end: u64,
    /// The distance while there is no such translation. `None` for a jump that is not there then.
    pub otherwise: Option<i32>,
}

impl Shortcut {
    /// Makes the jump lead to `target`, or away.
    fn point(&self, target: Option<*const u8>) {
        let distance = target.map(|target| (target as u64).wrapping_sub(self.end) as i32);
        // SAFETY: as in `Exit::unlink`.
        unsafe {
            match (distance, self.otherwise) {
                (Some(distance), None) => {
                    self.field.sub(1).write(JUMP);
                    self.field.cast::<i32>().write_unaligned(distance);
                }
                (None, None) => self.field.sub(1).cast::<[u8; 5]>().write_unaligned(NO_JUMP),
                (distance, Some(otherwise)) => self.field.cast::<i32>().write_unaligned(distance.unwrap_or(otherwise)),
            }
        }
    }
}

/// Translations that a block may have besides the first one, and how often the budget ends before it until it gets them.
const SHORTCUTS: usize = 3;
const SAMPLES: u32 = 2;
/// Blocks that get some at once.
const REGION: usize = 8;
/// A block with so many samples, each at most so many of all behind the one before, is what runs now.
const STREAK: u32 = 8;
const CLOSE: u64 = 8;

/// In the place of a page or a context that a guard compares with: what none is.
pub const NO_GUARD: u64 = 1;

impl Exit {
    /// Makes the exit lead here.
    fn unlink(&self) {
        self.shortcut.iter().for_each(|shortcut| shortcut.point(None));
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
        if let (Some(shortcut), Some(links)) = (self.shortcut, &target.links) {
            shortcut.point(links.shortcut(shortcut.recipe));
        }
        true
    }
}

/// What a block with a translation has besides.
pub struct Links {
    exits: Vec<Exit>,
    /// Exits that were linked to this block.
    incoming: Vec<Exit>,
    /// It is of use to come with flags that are not in memory.
    takes_recipes: bool,
    /// How often the budget ended before the block.
    samples: u32,
    /// Number of the last of these times among those of all blocks, and how many followed each other closely.
    sampled_at: u64,
    streak: u32,
    /// Translations for who comes with the flags of a recipe.
    shortcuts: Vec<(Recipe, *const u8)>,
}

/// What a block that turns out to run much is to get, with those around it.
enum Wanted {
    Nothing,
    Shortcuts,
    Cells,
}

impl Links {
    pub fn new(exits: Vec<Exit>, takes_recipes: bool) -> Self {
        Links { exits, incoming: Vec::new(), takes_recipes, samples: 0, sampled_at: 0, streak: 0, shortcuts: Vec::new() }
    }

    /// How many exits there are.
    pub fn exits(&self) -> u32 {
        self.exits.len() as u32
    }

    /// Another translation of the block, for who comes with `recipe`.
    pub fn add_shortcut(&mut self, recipe: Recipe, entry: *const u8, exits: &[Exit]) {
        self.shortcuts.push((recipe, entry));
        self.exits.extend(exits);
        let known = self.incoming.iter().filter_map(|exit| exit.shortcut);
        known.filter(|shortcut| shortcut.recipe == recipe).for_each(|shortcut| shortcut.point(Some(entry)));
    }

    /// The translation for who comes with `recipe`.
    fn shortcut(&self, recipe: Recipe) -> Option<*const u8> {
        self.shortcuts.iter().find(|(known, _)| *known == recipe).map(|(_, entry)| *entry)
    }

    /// Recipes that jumps to the block come with, which are to have translations of their own.
    fn wanted(&self) -> Vec<Recipe> {
        let mut wanted = Vec::new();
        for recipe in self.incoming.iter().filter_map(|exit| exit.shortcut).map(|shortcut| shortcut.recipe) {
            let room = self.takes_recipes && self.shortcuts.len() + wanted.len() < SHORTCUTS;
            if room && self.shortcut(recipe).is_none() && !wanted.contains(&recipe) {
                wanted.push(recipe);
            }
        }
        wanted
    }

    /// Whether a translation for some recipe is at `addresses`.
    pub fn are_at(&self, addresses: &Range<u64>) -> bool {
        self.shortcuts.iter().any(|(_, entry)| addresses.contains(&(*entry as u64)))
    }

    /// The budget ended before the block, as the sample of this number.
    fn sample(&mut self, number: u64) -> Wanted {
        self.samples += 1;
        self.streak = if number - self.sampled_at <= CLOSE { self.streak + 1 } else { 1 };
        self.sampled_at = number;
        match self.streak {
            STREAK => Wanted::Cells,
            _ if self.samples >= SAMPLES && self.samples.is_power_of_two() => Wanted::Shortcuts,
            _ => Wanted::Nothing,
        }
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
    if cpu.hot == 1 && !cpu.make_shortcuts(target) {
        return cpu.left_after(block);
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

    /// The budget ended before `block` at `rip`, so it is one of those that run much: it gets translations for who comes with a recipe. One
    /// before which it ends almost always gets cells. So do those that it leads to in its page, before which the budget may never end.
    ///
    /// # Safety
    /// Host code is about to be left for good.
    pub(super) unsafe fn sampled(&mut self, block: *mut Block, rip: u64) {
        self.native.samples += 1;
        // SAFETY: blocks are freed by `collect` only; nobody else has a reference.
        let Some(links) = (unsafe { (*block).links.as_mut() }) else { return };
        let cells = match links.sample(self.native.samples) {
            Wanted::Nothing => return,
            Wanted::Shortcuts => false,
            Wanted::Cells => true,
        };
        let mut region = vec![(block, rip)];
        for n in 0..REGION {
            let Some((block, rip)) = region.get(n).copied() else { return };
            // SAFETY: as above.
            let block = unsafe { &mut *block };
            if cells && !self.give_cells(block) || !self.make_shortcuts(block) {
                return;
            }
            for exit in block.links.iter().flat_map(|links| &links.exits).filter(|exit| exit.guards.is_none()) {
                let rip = rip.wrapping_add(exit.distance as u64);
                let next = self.translated_at(rip).filter(|next| region.iter().all(|(known, _)| known != next));
                region.extend(next.map(|next| (next, rip)));
            }
        }
    }

    /// Gives cells to the accesses of `block`. False if host code was forgotten to make room instead, perhaps the block's.
    fn give_cells(&mut self, block: &mut Block) -> bool {
        let (code, model) = (&mut self.code, &self.model);
        self.translator.as_mut().is_none_or(|translator| translator.give_cells(block, code, model).is_some())
    }

    /// Translates `block` for those who come with a recipe. False if host code was forgotten to make room instead, perhaps the block's.
    fn make_shortcuts(&mut self, block: &mut Block) -> bool {
        let (Some(links), Some(translator)) = (&block.links, &mut self.translator) else { return true };
        let (code, model) = (&mut self.code, &self.model);
        links.wanted().into_iter().all(|recipe| translator.translate_for(recipe, block, code, model).is_some())
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
        let mut links = Links::new(Vec::new(), false);
        let exit = |end| Exit { distance: 0, field: std::ptr::null_mut(), end, unlinked: 0, guards: None, shortcut: None };
        (0..100_000).for_each(|n| links.add(exit(n % 10)));
        assert!(links.incoming.capacity() < 100, "{}", links.incoming.capacity());
        links.forget(&(3..10));
        assert!((0..10).all(|end| links.incoming.iter().any(|exit| exit.end == end) == (end < 3)));
    }
}
