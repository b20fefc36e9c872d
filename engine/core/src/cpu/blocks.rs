//! Which block is at RIP: by the links between blocks, by the jump cache, by the TLB and the code cache, or decoded anew.

use super::Cpu;
use crate::decode::block::{self, Block};
use crate::memory::PAGE_OFFSET;
use crate::paging::AccessKind;
use crate::uop::Exec;

impl Cpu {
    /// The block at RIP, to which `previous` led.
    #[inline(always)]
    pub(super) fn successor(&mut self, previous: *mut Block) -> Exec<*mut Block> {
        // SAFETY: null or a block that `execute` just ran, and only `find_block` frees blocks.
        if let Some(previous) = unsafe { previous.as_ref() } {
            if let Some(block) = previous.successor(self.rip(), self.jump_context) {
                // SAFETY: links are forgotten before the blocks that they name are freed.
                if unsafe { (*block).valid } {
                    return Ok(block);
                }
            }
        }
        self.unlinked(previous)
    }

    /// The block at RIP, by the jump cache or from scratch; `previous` gets a link to it in the first case only, because the search may
    /// free `previous`.
    #[inline(never)]
    fn unlinked(&mut self, previous: *mut Block) -> Exec<*mut Block> {
        let (rip, context) = (self.rip(), self.jump_context);
        let Some(block) = self.cached_block(rip) else { return self.find_block(rip) };
        // SAFETY: as in `successor`.
        if let Some(previous) = unsafe { previous.as_mut() } {
            previous.link(rip, context, block);
        }
        Ok(block)
    }

    /// The block at RIP.
    pub(super) fn next_block(&mut self) -> Exec<*mut Block> {
        let rip = self.rip();
        self.cached_block(rip).map_or_else(|| self.find_block(rip), Ok)
    }

    /// The block that the jump cache has for `rip`.
    #[inline(always)]
    fn cached_block(&self, rip: u64) -> Option<*mut Block> {
        // SAFETY: the jump cache forgets blocks before they are freed.
        self.code.jump(rip, self.jump_context).filter(|block| unsafe { (**block).valid })
    }

    /// [`Cpu::next_block`] for code of 64 bits as far as that frees nothing, raises nothing and makes nothing new.
    #[cfg(target_arch = "x86_64")]
    #[inline]
    pub(crate) fn known_block(&mut self, rip: u64) -> Option<*mut Block> {
        self.cached_block(rip).or_else(|| self.find_again(rip))
    }

    /// A block in one page that the jump cache does not have, or has for another time.
    #[cfg(target_arch = "x86_64")]
    #[inline(never)]
    fn find_again(&mut self, rip: u64) -> Option<*mut Block> {
        if !self.waivers.is_empty() {
            return None;
        }
        let host = self.cached(rip, 1, AccessKind::Fetch).or_else(|| self.recalled(rip))?;
        let key = self.code_key(host as u64);
        // SAFETY: the cache forgets blocks before they are freed.
        let whole = |block: &*mut Block| unsafe { (**block).second_page }.is_none();
        let block = self.code.last_at(rip, &key).or_else(|| self.code.find(&key)).filter(whole)?;
        self.remember(rip, rip, block);
        Some(block)
    }

    /// Where code at `rip` is that the second way of the TLB knows.
    #[cfg(target_arch = "x86_64")]
    #[cold]
    fn recalled(&mut self, rip: u64) -> Option<*mut u8> {
        let known = self.tlb.recall(self.privilege(), rip, AccessKind::Fetch);
        known.then(|| self.cached(rip, 1, AccessKind::Fetch))?
    }

    #[cold]
    #[inline(never)]
    fn find_block(&mut self, rip: u64) -> Exec<*mut Block> {
        self.code.collect(&self.npt.code);
        let la = self.segment_address(crate::state::seg::CS, rip, 1, AccessKind::Fetch)?;
        let host = self.fetch_address(la)? as u64;
        let key = self.code_key(host);
        let known = self.code.last_at(rip, &key).or_else(|| self.code.find(&key));
        let block = match known {
            Some(block) if self.second_page_matches(block, la)? => block,
            _ => {
                let block = block::decode(self)?;
                self.code.insert(block)
            }
        };
        // What only a waiver allows to be fetched is not found again without one.
        if self.waivers.is_empty() {
            self.remember(rip, la, block);
        }
        Ok(block)
    }

    /// Lets the jump cache find `block` at `rip`, which is linear address `la`, as long as the translation of its pages stands.
    fn remember(&mut self, rip: u64, la: u64, block: *mut Block) {
        // SAFETY: the cache just returned it, and frees blocks only in `collect`.
        let crosses = unsafe { (*block).second_page }.is_some();
        self.tlb.note_code(self.cpl() == 3, la, crosses.then_some((la | PAGE_OFFSET).wrapping_add(1)));
        self.refresh_table();
        self.code.remember(rip, self.jump_context, block);
    }

    /// Whether the tail of a block that crosses a page is where it was when the block was made.
    fn second_page_matches(&mut self, block: *mut Block, la: u64) -> Exec<bool> {
        // SAFETY: the cache just returned it, and frees blocks only in `collect`.
        let Some(second) = (unsafe { (*block).second_page }) else { return Ok(true) };
        let next = (la | PAGE_OFFSET).wrapping_add(1);
        Ok(self.fetch_address(next)? as u64 == second)
    }
}
