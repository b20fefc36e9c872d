//! Memory for host code: one memfd mapped twice, so that no address is ever writable and executable.
//!
//! Code is added segment by segment. When all are full, the oldest is used again, whose code the owner forgets first; so the cache is
//! bounded, and room is never made by forgetting all of it.

use std::io;
use std::ops::Range;
use std::ptr::NonNull;

use crate::memory::region::{map, Region};
use crate::memory::{PAGE_OFFSET, PAGE_SIZE};

const SEGMENTS: usize = 16;
const ALIGNMENT: usize = 16;

/// A ring of segments of host code.
pub struct Arena {
    memory: Region,
    executable: NonNull<u8>,
    /// Offset of the first byte of the first segment, behind what stays for ever.
    base: usize,
    /// Where the next code goes, and the end of its segment.
    next: usize,
    end: usize,
    /// Segments have been used again.
    full: bool,
}

// SAFETY: the mappings belong to the arena alone and move between threads with it.
unsafe impl Send for Arena {}

impl Arena {
    /// An arena of at least `size` bytes.
    pub fn new(size: usize) -> io::Result<Self> {
        let size = size.next_multiple_of(SEGMENTS * PAGE_SIZE as usize);
        let memory = Region::named(c"softkvm-code", size)?;
        let executable = map(&memory, size, libc::PROT_READ | libc::PROT_EXEC)?;
        Ok(Arena { memory, executable, base: 0, next: 0, end: size / SEGMENTS, full: false })
    }

    /// Keeps what was added so far for ever.
    pub fn keep(&mut self) {
        self.base = self.next.next_multiple_of(PAGE_SIZE as usize);
        (self.next, self.end) = (self.base, self.base + self.segment());
    }

    /// Bytes of a segment, which no code may exceed.
    pub fn segment(&self) -> usize {
        ((self.memory.size() - self.base) / SEGMENTS) & !(PAGE_OFFSET as usize)
    }

    fn address(&self, offset: usize) -> u64 {
        self.executable.as_ptr() as u64 + offset as u64
    }

    /// Address at which the next code will run.
    pub fn next(&self) -> u64 {
        self.address(self.next)
    }

    /// Bytes that have been in use.
    pub fn used(&self) -> usize {
        if self.full {
            self.memory.size()
        } else {
            self.next
        }
    }

    /// Adds `code`, which was assembled for [`Arena::next`]; `None` when it does not fit in the segment.
    pub fn add(&mut self, code: &[u8]) -> Option<*const u8> {
        if code.len() > self.end - self.next {
            return None;
        }
        let start = self.executable.as_ptr().wrapping_add(self.next);
        // SAFETY: the bytes are inside the mapping by the test above, and no code is running there.
        unsafe { self.writable(start).copy_from_nonoverlapping(code.as_ptr(), code.len()) };
        self.next = (self.next + code.len()).next_multiple_of(ALIGNMENT).min(self.end);
        Some(start)
    }

    /// Goes on in the next segment, and returns the addresses in it: none of the code there may be running, or run again.
    pub fn take_segment(&mut self) -> Range<u64> {
        if self.end + self.segment() > self.memory.size() {
            self.end = self.base;
            self.full = true;
        }
        self.next = self.end;
        self.end += self.segment();
        self.address(self.next)..self.address(self.end)
    }

    /// Where the byte that runs at `at` can be written.
    pub fn writable(&self, at: *const u8) -> *mut u8 {
        let offset = at as usize - self.executable.as_ptr() as usize;
        debug_assert!(offset < self.memory.size());
        self.memory.start().wrapping_add(offset)
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping that `new` made; the other one is the region's own.
        unsafe { libc::munmap(self.executable.as_ptr().cast(), self.memory.size()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_runs_where_it_was_added() {
        let mut arena = Arena::new(4096).unwrap();
        let at = arena.next();
        // mov eax, 42; ret
        let code = arena.add(&[0xb8, 42, 0, 0, 0, 0xc3]).unwrap();
        assert_eq!(code as u64, at);
        // SAFETY: the bytes above are a function without arguments.
        let answer: extern "C" fn() -> u32 = unsafe { std::mem::transmute(code) };
        assert_eq!(answer(), 42);
    }

    #[test]
    fn segments_are_used_again_in_turn() {
        let mut arena = Arena::new(1 << 20).unwrap();
        assert!(arena.add(&[0x90; 100]).is_some());
        arena.keep();
        let (first, mut taken) = (arena.next(), Vec::new());
        for _ in 0..2 * SEGMENTS {
            assert!(arena.add(&vec![0x90; arena.segment()]).is_some());
            assert!(arena.add(&[0x90]).is_none());
            taken.push(arena.take_segment());
        }
        assert!(taken.windows(2).any(|pair| pair[1].start < pair[0].start), "none was used again");
        assert!(taken.iter().all(|range| range.start >= first && range.end - range.start == arena.segment() as u64));
        assert_eq!(arena.used(), arena.memory.size());
    }
}
