//! Memory for host code: one memfd mapped twice, so that no address is ever writable and executable.
//!
//! Code is added segment by segment. When all are full, the oldest is used again, whose code the owner forgets first; so the cache is
//! bounded, and room is never made by forgetting all of it. Behind the code, near enough to be named from there and in no line with it, is
//! memory for the cells of its accesses; each segment of code has one of cells.

use std::io;
use std::ops::Range;
use std::ptr::NonNull;

use super::access::Cell;
use crate::memory::region::Region;
use crate::memory::{PAGE_OFFSET, PAGE_SIZE};

const SEGMENTS: usize = 16;
const ALIGNMENT: usize = 16;
/// Bytes of code that an access takes at least: there is one cell for so many.
const CODE_PER_CELL: usize = 64;

/// A ring of segments of host code.
pub struct Arena {
    memory: Region,
    /// Where the code runs, and behind it the cells.
    executable: NonNull<u8>,
    /// Offset of the first byte of the first segment, behind what stays for ever.
    base: usize,
    /// Where the next code goes, and the end of its segment.
    next: usize,
    end: usize,
    /// Number of the next cell, and of the first one that is not the segment's.
    next_cell: usize,
    end_cell: usize,
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
        let executable = map_with_cells(&memory)?;
        Ok(Arena { memory, executable, base: 0, next: 0, end: size / SEGMENTS, next_cell: 0, end_cell: 0, full: false })
    }

    /// Keeps what was added so far, which has no cells, for ever.
    pub fn keep(&mut self) {
        self.base = self.next.next_multiple_of(PAGE_SIZE as usize);
        self.begin_segment(self.base, 0);
    }

    fn begin_segment(&mut self, start: usize, first_cell: usize) {
        (self.next, self.end) = (start, start + self.segment());
        (self.next_cell, self.end_cell) = (first_cell, first_cell + self.segment() / CODE_PER_CELL);
    }

    /// Bytes of a segment.
    fn segment(&self) -> usize {
        ((self.memory.size() - self.base) / SEGMENTS) & !(PAGE_OFFSET as usize)
    }

    /// Whether a segment has room for so many bytes of code and so many cells.
    pub fn has_room_for(&self, code: usize, cells: usize) -> bool {
        code <= self.segment() && cells <= self.segment() / CODE_PER_CELL
    }

    /// The distance of the next cell from the next code.
    pub fn next_cell(&self) -> i32 {
        (self.memory.size() + self.next_cell * size_of::<Cell>() - self.next) as i32
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

    /// Adds `code`, which was assembled for [`Arena::next`], and empty cells for these sites of it; `None` when they do not fit in the
    /// segment.
    pub fn add(&mut self, code: &[u8], cells: &[u16]) -> Option<*const u8> {
        if code.len() > self.end - self.next || cells.len() > self.end_cell - self.next_cell {
            return None;
        }
        let start = self.executable.as_ptr().wrapping_add(self.next);
        // SAFETY: the bytes are inside the mapping by the test above, and no code is running there.
        unsafe { self.writable(start).copy_from_nonoverlapping(code.as_ptr(), code.len()) };
        for site in cells {
            let cell = self.executable.as_ptr().wrapping_add(self.memory.size()).cast::<Cell>().wrapping_add(self.next_cell);
            // SAFETY: the mapping has cells for every segment, and no code that uses this one is running.
            unsafe { cell.write(Cell::of(*site)) };
            self.next_cell += 1;
        }
        self.next = (self.next + code.len()).next_multiple_of(ALIGNMENT).min(self.end);
        Some(start)
    }

    /// Goes on in the next segment, and returns the addresses in it: none of the code there may be running, or run again.
    pub fn take_segment(&mut self) -> Range<u64> {
        if self.end + self.segment() > self.memory.size() {
            self.begin_segment(self.base, 0);
            self.full = true;
        } else {
            self.begin_segment(self.end, self.end_cell);
        }
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
        // SAFETY: exactly the mappings that `new` made; the other one is the region's own.
        unsafe { libc::munmap(self.executable.as_ptr().cast(), self.memory.size() + cell_bytes(self.memory.size())) };
    }
}

/// Bytes of all cells for `code` bytes of code.
const fn cell_bytes(code: usize) -> usize {
    code / CODE_PER_CELL * size_of::<Cell>()
}

/// Maps code to be executed, with zeroed memory for its cells behind it.
fn map_with_cells(code: &Region) -> io::Result<NonNull<u8>> {
    let size = code.size() + cell_bytes(code.size());
    let (data, private) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE);
    // SAFETY: a fresh mapping at an address of the kernel's choice takes nobody's place.
    let start = unsafe { libc::mmap(std::ptr::null_mut(), size, data, private, -1, 0) };
    if start == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let (run, in_place) = (libc::PROT_READ | libc::PROT_EXEC, libc::MAP_SHARED | libc::MAP_NORESERVE | libc::MAP_FIXED);
    // SAFETY: the place is the first part of the mapping above, which nobody uses yet.
    if unsafe { libc::mmap(start, code.size(), run, in_place, code.fd(), 0) } == libc::MAP_FAILED {
        let error = io::Error::last_os_error();
        // SAFETY: as above.
        unsafe { libc::munmap(start, size) };
        return Err(error);
    }
    NonNull::new(start.cast()).ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_runs_where_it_was_added() {
        let mut arena = Arena::new(4096).unwrap();
        let at = arena.next();
        // mov eax, 42; ret
        let code = arena.add(&[0xb8, 42, 0, 0, 0, 0xc3], &[]).unwrap();
        assert_eq!(code as u64, at);
        // SAFETY: the bytes above are a function without arguments.
        let answer: extern "C" fn() -> u32 = unsafe { std::mem::transmute(code) };
        assert_eq!(answer(), 42);
    }

    #[test]
    fn segments_are_used_again_in_turn() {
        let mut arena = Arena::new(1 << 20).unwrap();
        assert!(arena.add(&[0x90; 100], &[]).is_some());
        arena.keep();
        let (first, mut taken) = (arena.next(), Vec::new());
        for _ in 0..2 * SEGMENTS {
            assert!(arena.add(&vec![0x90; arena.segment()], &[]).is_some());
            assert!(arena.add(&[0x90], &[]).is_none());
            taken.push(arena.take_segment());
        }
        assert!(taken.windows(2).any(|pair| pair[1].start < pair[0].start), "none was used again");
        assert!(taken.iter().all(|range| range.start >= first && range.end - range.start == arena.segment() as u64));
        assert_eq!(arena.used(), arena.memory.size());
    }
}
