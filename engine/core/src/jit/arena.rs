//! Memory for host code: one memfd mapped twice, so that no address is ever writable and executable.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;

/// Host code that grows until it is full, and is then forgotten as a whole.
pub struct Arena {
    writable: NonNull<u8>,
    executable: NonNull<u8>,
    size: usize,
    used: usize,
}

// SAFETY: the mappings belong to the arena alone and move between threads with it.
unsafe impl Send for Arena {}

impl Arena {
    /// An arena of `size` bytes, a multiple of the page size.
    pub fn new(size: usize) -> io::Result<Self> {
        // SAFETY: the name is a valid C string and the flags are valid.
        let raw = unsafe { libc::memfd_create(c"softkvm-code".as_ptr(), libc::MFD_CLOEXEC) };
        if raw < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: `raw` is a descriptor that we just opened and nobody else owns.
        let fd = unsafe { OwnedFd::from_raw_fd(raw) };
        // SAFETY: plain call on our own descriptor.
        if unsafe { libc::ftruncate(fd.as_raw_fd(), size as libc::off_t) } < 0 {
            return Err(io::Error::last_os_error());
        }
        let writable = map(&fd, size, libc::PROT_READ | libc::PROT_WRITE)?;
        match map(&fd, size, libc::PROT_READ | libc::PROT_EXEC) {
            Ok(executable) => Ok(Arena { writable, executable, size, used: 0 }),
            Err(error) => {
                unmap(writable, size);
                Err(error)
            }
        }
    }

    /// Address at which the next code will run.
    pub fn next(&self) -> u64 {
        self.executable.as_ptr() as u64 + self.used as u64
    }

    /// Bytes in use.
    pub fn used(&self) -> usize {
        self.used
    }

    /// Adds `code`, which was assembled for [`Arena::next`]; `None` when it does not fit.
    pub fn add(&mut self, code: &[u8]) -> Option<*const u8> {
        const ALIGNMENT: usize = 16;
        if code.len() + ALIGNMENT > self.size - self.used {
            return None;
        }
        // SAFETY: `used + code.len()` is at most `size`, by the test above, and no code is running there yet.
        let start = unsafe {
            self.writable.as_ptr().add(self.used).copy_from_nonoverlapping(code.as_ptr(), code.len());
            self.executable.as_ptr().add(self.used)
        };
        self.used = (self.used + code.len()).next_multiple_of(ALIGNMENT);
        Some(start)
    }

    /// Where the byte that runs at `at` can be written.
    pub fn writable(&self, at: *const u8) -> *mut u8 {
        let offset = at as usize - self.executable.as_ptr() as usize;
        debug_assert!(offset < self.size);
        self.writable.as_ptr().wrapping_add(offset)
    }

    /// Forgets all code behind the first `used` bytes. None of it may be running, or run again.
    pub fn truncate(&mut self, used: usize) {
        debug_assert!(used <= self.used);
        self.used = used;
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        unmap(self.writable, self.size);
        unmap(self.executable, self.size);
    }
}

fn map(fd: &OwnedFd, size: usize, protection: libc::c_int) -> io::Result<NonNull<u8>> {
    // SAFETY: a fresh mapping at an address of the kernel's choice cannot alias anything but its twin, and nobody forms references there.
    let start = unsafe { libc::mmap(std::ptr::null_mut(), size, protection, libc::MAP_SHARED | libc::MAP_NORESERVE, fd.as_raw_fd(), 0) };
    if start == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    NonNull::new(start.cast()).ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))
}

fn unmap(start: NonNull<u8>, size: usize) {
    // SAFETY: `start` and `size` are those of a mapping of ours, which nobody uses any more.
    unsafe { libc::munmap(start.as_ptr().cast(), size) };
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
        let answer: extern "sysv64" fn() -> u32 = unsafe { std::mem::transmute(code) };
        assert_eq!(answer(), 42);
    }

    #[test]
    fn a_full_arena_takes_no_more() {
        let mut arena = Arena::new(4096).unwrap();
        assert!(arena.add(&[0x90; 4000]).is_some());
        assert!(arena.add(&[0x90; 100]).is_none());
        arena.truncate(0);
        assert!(arena.add(&[0x90; 100]).is_some());
    }
}
