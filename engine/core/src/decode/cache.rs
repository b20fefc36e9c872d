//! The code cache: decoded blocks by host address, a jump cache by RIP, and which bytes of RAM they were made from.
//!
//! Self-modified code is found by physical page: a page with blocks loses its write tags in the TLB of every core (see
//! [`crate::memory::code`]), so each store to it comes through `CodeCache::invalidate`. A block that dies has its micro-ops replaced, which
//! stops it even while it runs.

use std::ops::Range;

use super::block::{Block, Key, Link};
use crate::exec;
use crate::memory::code::{AddressMap, CodePages};
use crate::memory::PAGE_OFFSET;
use crate::pmu::Watching;
use crate::uop::Handler;

/// The jump cache has a slot for each number of so many bits.
pub const JUMP_BITS: u8 = 15;
pub const JUMP_SLOTS: usize = 1 << JUMP_BITS;
/// Blocks that may exist; one more empties the cache, which bounds its memory.
pub const MAX_BLOCKS: usize = 1 << 18;
/// Bytes of code that one bit of a page's line map stands for.
const LINE_SHIFT: u32 = 6;
/// Stores to a page whose blocks are all dead until it counts as data again. Fewer would make a page that is rewritten and run by turns
/// change its nature each time.
const IDLE_STORES: u32 = 64;

/// Number of a block, which is below [`MAX_BLOCKS`].
pub type BlockId = u32;

/// Blocks that were made from one host page, which this core has claimed.
#[derive(Default)]
struct CodePage {
    lines: u64,
    blocks: Vec<BlockId>,
    /// Stores since the last block died.
    idle_stores: u32,
}

/// What was last run at some RIP.
#[repr(C, align(32))]
#[derive(Clone, Copy)]
pub struct Jump {
    pub rip: u64,
    pub context: u64,
    pub block: *mut Block,
}

const NO_JUMP: Jump = Jump { rip: 0, context: u64::MAX, block: std::ptr::null_mut() };

/// All decoded code of a core.
pub struct CodeCache {
    blocks: Vec<Option<Box<Block>>>,
    free: Vec<BlockId>,
    /// Blocks that died while they may have been running; freed at the next dispatch that needs a slot.
    #[expect(clippy::vec_box, reason = "whoever runs a block points to it, so it must not move")]
    dead: Vec<Box<Block>>,
    by_key: AddressMap<Key, BlockId>,
    pages: AddressMap<u64, CodePage>,
    jumps: Box<[Jump]>,
    /// Host code that leads to the dispatcher, in the place of blocks' own.
    nowhere: *const u8,
    pub decoded: u64,
    pub invalidated: u64,
}

impl Default for CodeCache {
    fn default() -> Self {
        CodeCache {
            blocks: Vec::new(),
            free: Vec::new(),
            dead: Vec::new(),
            by_key: AddressMap::default(),
            pages: AddressMap::default(),
            jumps: vec![NO_JUMP; JUMP_SLOTS].into(),
            nowhere: std::ptr::null(),
            decoded: 0,
            invalidated: 0,
        }
    }
}

/// Slot of the jump cache: blocks of one page spread out, and aliases at equal page offsets do not collide, nor does code with itself when
/// it is watched.
#[inline(always)]
const fn jump_slot(rip: u64, context: u64) -> usize {
    (rip ^ rip >> JUMP_BITS) as usize & (JUMP_SLOTS - 1) ^ jump_salt(Watching::number_in(context))
}

/// What sets code with [`Watching::number`] apart in the jump cache; nothing for code that is not watched.
pub const fn jump_salt(watching: u8) -> usize {
    (watching as usize) << 11
}

impl CodeCache {
    /// The block that was last run at `rip` in `context` (translation generation, privilege and code size).
    #[inline(always)]
    pub fn jump(&self, rip: u64, context: u64) -> Option<*mut Block> {
        let jump = &self.jumps[jump_slot(rip, context)];
        if jump.rip != rip || jump.context != context {
            return None;
        }
        Some(jump.block)
    }

    /// The block that was last run at `rip`, whatever the context, if it is the valid one of this key.
    pub fn last_at(&self, rip: u64, key: &Key) -> Option<*mut Block> {
        let jump = &self.jumps[jump_slot(rip, key.watching.in_context())];
        if jump.rip != rip || jump.block.is_null() {
            return None;
        }
        // SAFETY: the jump cache forgets blocks before they are freed.
        let block = unsafe { &*jump.block };
        (block.valid && block.key == *key).then_some(jump.block)
    }

    /// Address of the jump cache, for host code; it never moves.
    pub fn jumps(&self) -> *const Jump {
        self.jumps.as_ptr()
    }

    /// Forgets the host code of every block; `nowhere` stands for it from now on.
    pub fn forget_translations(&mut self, nowhere: *const u8) {
        self.nowhere = nowhere;
        for block in self.blocks.iter_mut().flatten().chain(&mut self.dead) {
            (block.entry, block.body, block.links, block.heat) = (nowhere, std::ptr::null(), None, 0);
        }
    }

    /// Lets nobody enter the host code of `block` again, which may be running. It keeps what it needs for that.
    pub fn retire_translation(&self, block: &mut Block) {
        block.links.iter_mut().for_each(|links| links.cut());
        (block.entry, block.body) = (self.nowhere, std::ptr::null());
    }

    /// Forgets host code at `addresses`, whose place is needed; returns that of how many blocks.
    pub fn forget_translations_at(&mut self, addresses: &Range<u64>) -> u64 {
        let (nowhere, mut forgotten) = (self.nowhere, 0);
        for block in self.blocks.iter_mut().flatten().chain(&mut self.dead) {
            let at = addresses.contains(&(block.body as u64));
            if let Some(links) = block.links.as_mut().filter(|links| at || links.are_at(addresses)) {
                links.cut();
                (block.entry, block.body, block.links, block.heat) = (nowhere, std::ptr::null(), None, 0);
                forgotten += 1;
            }
        }
        for block in self.blocks.iter_mut().flatten().chain(&mut self.dead) {
            block.links.iter_mut().for_each(|links| links.forget(addresses));
        }
        forgotten
    }

    /// Remembers that `rip` in `context` runs `block`.
    pub fn remember(&mut self, rip: u64, context: u64, block: *mut Block) {
        self.jumps[jump_slot(rip, context)] = Jump { rip, context, block };
    }

    /// The block of a key, if there is a valid one.
    pub fn find(&mut self, key: &Key) -> Option<*mut Block> {
        let id = *self.by_key.get(key)?;
        self.blocks[id as usize].as_deref_mut().map(std::ptr::from_mut)
    }

    /// The block of a number, if it lives.
    pub fn numbered(&self, id: BlockId) -> Option<&Block> {
        self.blocks.get(id as usize)?.as_deref()
    }

    /// Adds a block, whose pages the caller has claimed.
    pub fn insert(&mut self, mut block: Block) -> *mut Block {
        block.entry = self.nowhere;
        self.decoded += 1;
        let id = self.free.pop().unwrap_or_else(|| {
            self.blocks.push(None);
            (self.blocks.len() - 1) as BlockId
        });
        block.number = id;
        for (page, lines) in spans(&block) {
            let entry = self.pages.entry(page).or_default();
            entry.lines |= lines;
            entry.blocks.push(id);
            entry.idle_stores = 0;
        }
        self.by_key.insert(block.key, id);
        std::ptr::from_mut(self.blocks[id as usize].insert(Box::new(block)).as_mut())
    }

    /// Claims the host page `page` for this core; false when cores may have write tags for it (see [`CodePages::claim`]).
    pub fn claim(&mut self, page: u64, shared: &CodePages) -> bool {
        if self.pages.contains_key(&page) {
            return true;
        }
        self.pages.insert(page, CodePage::default());
        shared.claim(page)
    }

    /// This core wrote `lines` of `page`: kills the blocks made from them. A page that is only written has its claim taken back.
    pub fn store(&mut self, page: u64, lines: u64, shared: &CodePages) {
        self.invalidate(page, lines);
        if let Some(entry) = self.pages.get_mut(&page).filter(|entry| entry.blocks.is_empty()) {
            entry.idle_stores += 1;
            if entry.idle_stores == IDLE_STORES {
                self.release(page, shared);
            }
        }
    }

    /// Others wrote `lines` of `page`: kills the blocks made from them, and takes the claim back when none is left.
    pub fn written(&mut self, page: u64, lines: u64, shared: &CodePages) {
        self.invalidate(page, lines);
        if self.pages.get(&page).is_some_and(|entry| entry.blocks.is_empty()) {
            self.release(page, shared);
        }
    }

    fn release(&mut self, page: u64, shared: &CodePages) {
        self.pages.remove(&page);
        shared.release(page);
    }

    /// Kills the blocks made from any of the lines `written` of a page.
    fn invalidate(&mut self, page: u64, written: u64) {
        let Some(entry) = self.pages.get_mut(&page) else { return };
        if entry.lines & written == 0 {
            return;
        }
        let ids = std::mem::take(&mut entry.blocks);
        let mut kept = Vec::with_capacity(ids.len());
        let mut lines = 0;
        for id in ids {
            let Some(block) = &self.blocks[id as usize] else { continue };
            let own = spans(block).filter(|(at, _)| *at == page).fold(0, |all, (_, lines)| all | lines);
            if own & written == 0 {
                lines |= own;
                kept.push(id);
            } else {
                self.kill(id, page);
            }
        }
        if let Some(entry) = self.pages.get_mut(&page) {
            (entry.blocks, entry.lines) = (kept, lines);
        }
    }

    /// Forgets every block, and takes back every claim.
    pub fn clear(&mut self, shared: &CodePages) {
        for id in 0..self.blocks.len() as BlockId {
            if self.blocks[id as usize].is_some() {
                self.kill(id, u64::MAX);
            }
        }
        self.pages.drain().for_each(|(page, _)| shared.release(page));
        self.forget_jumps();
    }

    /// Frees the blocks that died, and makes room for another one. No block may be running.
    pub fn collect(&mut self, shared: &CodePages) {
        if self.blocks.len() - self.free.len() >= MAX_BLOCKS {
            self.clear(shared);
        }
        if self.dead.len() >= 1024 {
            self.forget_jumps();
            self.dead.clear();
        }
    }

    /// Forgets every way to a block that does not go through `by_key`.
    fn forget_jumps(&mut self) {
        self.jumps.fill(NO_JUMP);
        for block in self.blocks.iter_mut().flatten().chain(&mut self.dead) {
            block.followers = [Link::NONE; 2];
        }
    }

    /// Takes a block out of every index but page `except`, which the caller keeps itself, and stops it where it runs.
    fn kill(&mut self, id: BlockId, except: u64) {
        let Some(mut block) = self.blocks[id as usize].take() else { return };
        self.invalidated += 1;
        self.free.push(id);
        self.by_key.remove(&block.key);
        for (page, _) in spans(&block) {
            if page != except {
                if let Some(entry) = self.pages.get_mut(&page) {
                    entry.blocks.retain(|other| *other != id);
                }
            }
        }
        block.valid = false;
        block.entry = self.nowhere;
        if let Some(links) = &mut block.links {
            links.cut();
        }
        for uop in &mut block.uops {
            uop.run = exec::resume as Handler;
        }
        self.dead.push(block);
    }

    /// Blocks that are cached.
    pub fn len(&self) -> usize {
        self.by_key.len()
    }

    /// Whether no block is cached.
    pub fn is_empty(&self) -> bool {
        self.by_key.is_empty()
    }
}

/// Host pages of a block, each with the lines that its bytes cover.
fn spans(block: &Block) -> impl Iterator<Item = (u64, u64)> {
    let page = block.key.host & !PAGE_OFFSET;
    let start = block.key.host & PAGE_OFFSET;
    let length = u64::from(block.length);
    let first = length.min(PAGE_OFFSET + 1 - start);
    let head = (page, line_mask(start, first));
    let tail = block.second_page.map(|second| (second & !PAGE_OFFSET, line_mask(0, length - first)));
    std::iter::once(head).chain(tail)
}

/// Bits of the lines that `[offset, offset + bytes)` of a page touches.
pub fn line_mask(offset: u64, bytes: u64) -> u64 {
    if bytes == 0 {
        return 0;
    }
    let first = offset >> LINE_SHIFT;
    let last = (offset + bytes - 1).min(PAGE_OFFSET) >> LINE_SHIFT;
    (u64::MAX >> (63 - (last - first))) << first
}
