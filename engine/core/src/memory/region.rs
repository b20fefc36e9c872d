//! A RAM region: a memfd mapped shared, so that other processes (vhost-user, vfio-user) can map it too.
//!
//! Guests, devices and Python all write here at any time, so nobody ever forms a Rust reference to its bytes; access goes through raw
//! pointers.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::ptr::NonNull;

use super::{PAGE_OFFSET, PAGE_SIZE};

/// A mapped memfd. Dropping it unmaps, so whoever holds its address holds an `Arc` of it.
pub struct Region {
    start: NonNull<u8>,
    size: usize,
    fd: OwnedFd,
}

// SAFETY: the region is plain shared memory; all access goes through raw pointers and is as racy as real RAM.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    /// Maps `size` bytes of zeroed memory; `size` must be a positive multiple of the page size.
    pub fn new(size: usize) -> io::Result<Self> {
        Region::named(c"softkvm-ram", size)
    }

    /// [`Region::new`] with a name that the host shows for it.
    pub fn named(name: &CStr, size: usize) -> io::Result<Self> {
        if size == 0 || size as u64 & PAGE_OFFSET != 0 {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        // SAFETY: the name is a valid C string and the flags are valid.
        let raw = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) };
        if raw < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: `raw` is a descriptor that we just opened and nobody else owns.
        let fd = unsafe { OwnedFd::from_raw_fd(raw) };
        // SAFETY: plain call on our own descriptor.
        if unsafe { libc::ftruncate(fd.as_raw_fd(), size as libc::off_t) } < 0 {
            return Err(io::Error::last_os_error());
        }
        // Whoever maps the region too, the VMM above all, must not fault because somebody has cut it off.
        let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
        // SAFETY: plain call on our own descriptor.
        if unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_ADD_SEALS, seals) } < 0 {
            return Err(io::Error::last_os_error());
        }
        let start = map(&fd, size, libc::PROT_READ | libc::PROT_WRITE)?;
        Ok(Region { start, size, fd })
    }

    /// Host address of the first byte.
    pub fn start(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// Size in bytes.
    pub fn size(&self) -> usize {
        self.size
    }

    /// The memfd.
    pub fn fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    /// Bytes of the region that have been touched.
    pub fn resident(&self) -> io::Result<u64> {
        // SAFETY: `stat` is plain data that fstat fills.
        let mut stat: libc::stat = unsafe { std::mem::zeroed() };
        // SAFETY: our own descriptor and a valid buffer.
        if unsafe { libc::fstat(self.fd(), &mut stat) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(stat.st_blocks as u64 * 512)
    }
}

/// Maps all `size` bytes of a memfd once more.
fn map(fd: &impl AsRawFd, size: usize, protection: libc::c_int) -> io::Result<NonNull<u8>> {
    // SAFETY: a fresh mapping at an address of the kernel's choice takes nobody's place, and nobody forms references there.
    let start = unsafe { libc::mmap(std::ptr::null_mut(), size, protection, libc::MAP_SHARED | libc::MAP_NORESERVE, fd.as_raw_fd(), 0) };
    if start == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    NonNull::new(start.cast()).ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))
}

impl AsRawFd for Region {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping that `new` made; nobody uses it after the last `Arc` is gone.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.size) };
    }
}

const _: () = assert!(PAGE_SIZE == 4096);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_sizes_that_are_not_pages() {
        assert!(Region::new(0).is_err());
        assert!(Region::new(4097).is_err());
    }

    #[test]
    fn memory_is_zeroed_and_counted_when_touched() {
        let region = Region::new(1 << 20).unwrap();
        assert_eq!(region.resident().unwrap(), 0);
        // SAFETY: inside the mapping.
        unsafe {
            assert_eq!(region.start().add(5000).read(), 0);
            region.start().add(5000).write(1);
        }
        assert!(region.resident().unwrap() >= PAGE_SIZE);
    }
}
