//! Memory accesses of the running guest: the TLB's fast path, and everything that it does not cover.

use core::mem::size_of;

use super::walk::{walk, Mapping, WalkError};
use super::{tlb, AccessKind, Privilege};
use crate::cpu::{pending, Cpu};
use crate::fault::vector;
use crate::memory::nested::{right, Leaf};
use crate::memory::{order, PAGE_OFFSET, PAGE_SIZE};
use crate::state::seg;
use crate::uop::{flag, Exec, Uop};
use crate::virt::control::Access;
use crate::word::{Plain, Word};

/// Where the bytes of one page-bounded access are.
#[derive(Clone, Copy)]
enum Target {
    /// Host memory.
    Ram(*mut u8),
    /// An access that the hypervisor makes; only while it asked for an emulated instruction.
    Device { gpa: u64, la: u64 },
    /// Memory that holds what is to be stored, and must not be written: see [`right::SAME`].
    Unchanged,
}

/// Whether memory at a host address, in one mapped page, has these bytes already; not if there are none.
fn holds(host: u64, bytes: &[u8]) -> bool {
    let mut there = [0; 64];
    let Some(there) = there.get_mut(..bytes.len()).filter(|there| !there.is_empty()) else { return false };
    // SAFETY: the caller translated the page, and the bytes are inside it.
    unsafe { (host as *const u8).copy_to_nonoverlapping(there.as_mut_ptr(), there.len()) };
    there == bytes
}

/// Host address of `[la, la + bytes)` if `table` knows the page and allows the access.
///
/// # Safety
/// `table` must point to a table of the TLB.
#[inline(always)]
unsafe fn tag_match(table: *const tlb::Entries, la: u64, bytes: u64, kind: AccessKind) -> Option<*mut u8> {
    let page = la.wrapping_add(bytes - 1) & !PAGE_OFFSET;
    // SAFETY: the caller promises a table, and nobody changes it meanwhile.
    let (entries, slot) = (unsafe { &*table }, tlb::slot(la));
    let tag = match kind {
        AccessKind::Read => entries.read[slot],
        AccessKind::Write => entries.write[slot],
        AccessKind::Fetch => entries.fetch[slot],
    };
    (tag == page).then(|| entries.addend[slot].wrapping_add(la) as *mut u8)
}

impl Cpu {
    /// Linear address of the memory operand of `uop`, checked against its segment where the mode has segments.
    #[inline(always)]
    pub fn linear(&mut self, uop: &Uop, bytes: u64, kind: AccessKind) -> Exec<u64> {
        if uop.has(flag::SLOW_ADDRESS) {
            return self.linear_slow(uop, bytes, kind);
        }
        Ok(self.effective(uop).wrapping_add(self.segment_base(uop.segment())))
    }

    /// Effective address of the memory operand of `uop` (what LEA computes).
    #[inline(always)]
    pub fn effective(&self, uop: &Uop) -> u64 {
        let base = self.reg::<u64>(uop.base);
        let index = self.reg::<u64>(uop.index) << (uop.segment_scale & 3);
        base.wrapping_add(index).wrapping_add(uop.disp as i64 as u64)
    }

    /// [`Cpu::effective`] truncated to the address size, and absolute where the instruction has a 64-bit offset.
    pub fn effective_any(&self, uop: &Uop) -> u64 {
        let address = if uop.has(flag::ABSOLUTE) { uop.imm } else { self.effective(uop) };
        if uop.has(flag::ADDRESS_16) {
            address & 0xffff
        } else if uop.has(flag::ADDRESS_32) {
            address & 0xffff_ffff
        } else {
            address
        }
    }

    #[cold]
    #[inline(never)]
    fn linear_slow(&mut self, uop: &Uop, bytes: u64, kind: AccessKind) -> Exec<u64> {
        let offset = self.effective_any(uop);
        self.segment_address(uop.segment(), offset, bytes, kind)
    }

    /// Linear address of `offset` in a segment, checked as the mode asks (SDM vol. 3, 5.3): limit, type, null.
    pub fn segment_address(&mut self, number: usize, offset: u64, bytes: u64, kind: AccessKind) -> Exec<u64> {
        let base = self.segment_base(number);
        if self.long_mode() {
            return Ok(base.wrapping_add(offset));
        }
        self.check_segment(number, offset, bytes, kind)?;
        Ok(base.wrapping_add(offset) & 0xffff_ffff)
    }

    /// Reads the memory operand of `uop`.
    #[inline(always)]
    pub fn load<T: Plain>(&mut self, uop: &Uop) -> Exec<T> {
        let la = self.linear(uop, size_of::<T>() as u64, AccessKind::Read)?;
        self.read(uop.segment(), la)
    }

    /// Writes the memory operand of `uop`.
    #[inline(always)]
    pub fn store<T: Plain>(&mut self, uop: &Uop, value: T) -> Exec {
        let la = self.linear(uop, size_of::<T>() as u64, AccessKind::Write)?;
        self.write(uop.segment(), la, value)
    }

    /// Replaces the memory operand of `uop` by `change` of it; atomically when the instruction is locked. `change` may set the
    /// arithmetic flags and must do nothing else: they are put back when the access cannot be finished, and it may run again.
    #[inline(always)]
    pub fn modify<W: Word>(&mut self, uop: &Uop, change: impl Fn(&mut Cpu, W) -> W) -> Exec {
        let la = self.linear(uop, W::BYTES, AccessKind::Write)?;
        self.modify_at(uop, la, change)
    }

    /// [`Cpu::modify`] at a linear address that the caller computed.
    #[inline(always)]
    pub fn modify_at<W: Word>(&mut self, uop: &Uop, la: u64, change: impl Fn(&mut Cpu, W) -> W) -> Exec {
        if let Some(host) = self.cached(la, W::BYTES, AccessKind::Write) {
            // SAFETY: a write tag in the TLB means that the page is mapped RAM for as long as the tag stands, and the access is inside it.
            return unsafe { self.modify_host(uop, host.cast(), change) };
        }
        self.modify_slow(uop, la, change)
    }

    /// # Safety
    /// `host` must point to `W::BYTES` bytes of mapped guest RAM.
    #[inline(always)]
    unsafe fn modify_host<W: Word>(&mut self, uop: &Uop, host: *mut W, change: impl Fn(&mut Cpu, W) -> W) -> Exec {
        if uop.has(flag::LOCK) {
            if !host.is_aligned() {
                // SAFETY: the caller's promise is ours.
                return self.with_bus_lock(|cpu| unsafe { cpu.replace(host, change) });
            }
            // SAFETY: valid by the caller's promise, aligned by the test above.
            let mut old = unsafe { host.read_volatile() };
            loop {
                let new = change(self, old);
                // SAFETY: as above.
                match unsafe { W::compare_exchange(host, old, new) } {
                    Ok(_) => {
                        order::settle();
                        return Ok(());
                    }
                    Err(found) => old = found,
                }
            }
        }
        // SAFETY: the caller's promise is ours.
        unsafe { self.replace(host, change) }
    }

    /// Replaces a word in two accesses.
    ///
    /// # Safety
    /// As for `modify_host`.
    #[inline(always)]
    unsafe fn replace<W: Word>(&mut self, host: *mut W, change: impl Fn(&mut Cpu, W) -> W) -> Exec {
        // SAFETY: valid by the caller's promise; unaligned accessors need no alignment.
        unsafe {
            let old = order::load(host);
            let new = change(self, old);
            order::store(host, new);
        }
        Ok(())
    }

    #[cold]
    #[inline(never)]
    fn modify_slow<W: Word>(&mut self, uop: &Uop, la: u64, change: impl Fn(&mut Cpu, W) -> W) -> Exec {
        let segment = uop.segment();
        self.watch(la, W::BYTES, AccessKind::Write);
        if la & PAGE_OFFSET <= PAGE_SIZE - W::BYTES {
            if let Target::Ram(host) = self.modified(segment, la)? {
                // SAFETY: `modified` just translated the page for writing, and the access is inside it.
                unsafe { self.modify_host(uop, host.cast(), change)? };
                self.note_code_write(host, W::BYTES as usize);
                return Ok(());
            }
        } else {
            self.check_canonical(segment, la.wrapping_add(W::BYTES - 1))?;
            self.modified(segment, la)?;
            self.modified(segment, (la | PAGE_OFFSET).wrapping_add(1))?;
        }
        let apart = |cpu: &mut Cpu| {
            let flags = cpu.flags;
            let old: W = cpu.read(segment, la)?;
            let new = change(cpu, old);
            cpu.write(segment, la, new).inspect_err(|_| cpu.flags = flags)
        };
        if uop.has(flag::LOCK) {
            return self.with_bus_lock(apart);
        }
        apart(self)
    }

    /// [`Cpu::target`] of an operand that is read and written.
    fn modified(&mut self, segment: usize, la: u64) -> Exec<Target> {
        self.target_with(segment, la, AccessKind::Write, right::READ | right::WRITE, self.privilege(), &[])
    }

    /// Host address of RAM at `la` for a read and a store of `bytes` in one page that the TLB does not let through; the caller reports it
    /// with [`Cpu::note_code_write`]. `None` where there is a device.
    pub fn checked_ram(&mut self, segment: usize, la: u64, bytes: u64) -> Exec<Option<*mut u8>> {
        self.watch(la, bytes, AccessKind::Write);
        Ok(match self.modified(segment, la)? {
            Target::Ram(host) => Some(host),
            Target::Device { .. } | Target::Unchanged => None,
        })
    }

    /// Fails as a write of `bytes` at `la` would, without writing.
    pub fn probe_write(&mut self, segment: usize, la: u64, bytes: u64) -> Exec {
        if self.cached(la, bytes, AccessKind::Write).is_some() {
            return Ok(());
        }
        let privilege = self.privilege();
        let last = la.wrapping_add(bytes - 1);
        self.check_canonical(segment, last)?;
        self.target(segment, la, AccessKind::Write, privilege)?;
        if (la ^ last) & !PAGE_OFFSET != 0 {
            self.target(segment, last & !PAGE_OFFSET, AccessKind::Write, privilege)?;
        }
        Ok(())
    }

    /// Reads at a linear address, with the privilege of the running code. `segment` tells #SS from #GP.
    #[inline(always)]
    pub fn read<T: Plain>(&mut self, segment: usize, la: u64) -> Exec<T> {
        match self.cached(la, size_of::<T>() as u64, AccessKind::Read) {
            // SAFETY: a read tag means that the page is mapped RAM as long as the tag stands, and the access is inside it.
            Some(host) => Ok(unsafe { order::load(host.cast::<T>()) }),
            None => self.read_slow(segment, la, self.privilege()),
        }
    }

    /// Writes at a linear address, with the privilege of the running code.
    #[inline(always)]
    pub fn write<T: Plain>(&mut self, segment: usize, la: u64, value: T) -> Exec {
        match self.cached(la, size_of::<T>() as u64, AccessKind::Write) {
            // SAFETY: a write tag means that the page is mapped RAM as long as the tag stands, and the access is inside it.
            Some(host) => unsafe { order::store(host.cast::<T>(), value) },
            None => self.write_slow(segment, la, value, self.privilege())?,
        }
        Ok(())
    }

    /// Reads as the CPU itself does (descriptor tables, TSS): as supervisor, whatever the privilege of the code, and SMAP applies.
    #[inline]
    pub fn read_system<T: Plain>(&mut self, la: u64) -> Exec<T> {
        match self.cached_for(Privilege::Supervisor, la, size_of::<T>() as u64, AccessKind::Read) {
            // SAFETY: a read tag means that the page is mapped RAM as long as the tag stands, and the access is inside it.
            Some(host) => Ok(unsafe { order::load(host.cast::<T>()) }),
            None => self.read_slow(seg::DS, la, Privilege::Supervisor),
        }
    }

    /// Writes as the CPU itself does.
    #[inline]
    pub fn write_system<T: Plain>(&mut self, la: u64, value: T) -> Exec {
        self.write_for(Privilege::Supervisor, seg::DS, la, value)
    }

    /// Writes with a privilege that is not (yet) the running code's.
    #[inline]
    pub fn write_for<T: Plain>(&mut self, privilege: Privilege, segment: usize, la: u64, value: T) -> Exec {
        match self.cached_for(privilege, la, size_of::<T>() as u64, AccessKind::Write) {
            // SAFETY: a write tag means that the page is mapped RAM as long as the tag stands, and the access is inside it.
            Some(host) => unsafe { order::store(host.cast::<T>(), value) },
            None => self.write_slow(segment, la, value, privilege)?,
        }
        Ok(())
    }

    /// [`Cpu::cached`] for accesses of any privilege.
    #[inline(always)]
    pub fn cached_for(&self, privilege: Privilege, la: u64, bytes: u64, kind: AccessKind) -> Option<*mut u8> {
        // SAFETY: tables of the TLB live as long as it.
        unsafe { tag_match(self.tlb.table(privilege), la, bytes, kind) }
    }

    /// Host address of `[la, la + bytes)` if the TLB knows the page and allows the access.
    #[inline(always)]
    pub fn cached(&self, la: u64, bytes: u64, kind: AccessKind) -> Option<*mut u8> {
        // SAFETY: `active_table` points to a table that lives as long as the TLB.
        unsafe { tag_match(self.active_table, la, bytes, kind) }
    }

    /// Host address of RAM at `la`, and how many bytes of `wanted` lie in its page: the chunk that a string instruction may work on at
    /// once. `None` where accesses must be made one by one (a device, or a page that holds translated code).
    pub fn chunk(&mut self, segment: usize, la: u64, wanted: u64, kind: AccessKind) -> Exec<Option<(*mut u8, u64)>> {
        let bytes = wanted.min(PAGE_SIZE - (la & PAGE_OFFSET));
        if bytes == 0 {
            return Ok(None);
        }
        if self.cached(la, 1, kind).is_none() {
            self.target(segment, la, kind, self.privilege())?;
        }
        Ok(self.cached(la, 1, kind).map(|host| (host, bytes)))
    }

    #[cold]
    #[inline(never)]
    fn read_slow<T: Plain>(&mut self, segment: usize, la: u64, privilege: Privilege) -> Exec<T> {
        let mut value = T::default();
        let bytes = size_of::<T>();
        self.check_alignment(la, bytes as u64, privilege)?;
        self.watch(la, bytes as u64, AccessKind::Read);
        // SAFETY: `Plain` types are bytes without padding, and `value` is ours.
        let buffer = unsafe { core::slice::from_raw_parts_mut((&raw mut value).cast::<u8>(), bytes) };
        let first = bytes.min((PAGE_SIZE - (la & PAGE_OFFSET)) as usize);
        let (low, high) = buffer.split_at_mut(first);
        self.check_canonical(segment, la.wrapping_add(bytes as u64 - 1))?;
        let low_target = self.target(segment, la, AccessKind::Read, privilege)?;
        if !high.is_empty() {
            let target = self.target(segment, la.wrapping_add(first as u64), AccessKind::Read, privilege)?;
            self.read_target(low_target, low)?;
            self.read_target(target, high)?;
        } else if let Target::Ram(host) = low_target {
            // SAFETY: `target` translated the page, and the access is inside it. One access, because other cores may write meanwhile.
            return Ok(unsafe { order::load(host.cast::<T>()) });
        } else {
            self.read_target(low_target, low)?;
        }
        Ok(value)
    }

    #[cold]
    #[inline(never)]
    fn write_slow<T: Plain>(&mut self, segment: usize, la: u64, value: T, privilege: Privilege) -> Exec {
        let bytes = size_of::<T>();
        self.check_alignment(la, bytes as u64, privilege)?;
        self.watch(la, bytes as u64, AccessKind::Write);
        // SAFETY: `Plain` types are bytes without padding, and `value` outlives the slice.
        let buffer = unsafe { core::slice::from_raw_parts((&raw const value).cast::<u8>(), bytes) };
        let first = bytes.min((PAGE_SIZE - (la & PAGE_OFFSET)) as usize);
        let (low, high) = buffer.split_at(first);
        self.check_canonical(segment, la.wrapping_add(bytes as u64 - 1))?;
        let low_target = self.target_with(segment, la, AccessKind::Write, right::WRITE, privilege, low)?;
        if !high.is_empty() {
            let next = la.wrapping_add(first as u64);
            let target = self.target_with(segment, next, AccessKind::Write, right::WRITE, privilege, high)?;
            self.write_target(low_target, low)?;
            return self.write_target(target, high);
        }
        if let Target::Ram(host) = low_target {
            // SAFETY: as in `read_slow`.
            unsafe { order::store(host.cast::<T>(), value) };
            self.note_code_write(host, bytes);
            return Ok(());
        }
        self.write_target(low_target, low)
    }

    fn read_target(&mut self, target: Target, buffer: &mut [u8]) -> Exec {
        match target {
            // SAFETY: `target` translated the page, and the buffer is not longer than what is left of it.
            Target::Ram(host) => unsafe {
                host.copy_to_nonoverlapping(buffer.as_mut_ptr(), buffer.len());
                order::settle();
            },
            Target::Device { gpa, la } => {
                for (n, piece) in buffer.chunks_mut(8).enumerate() {
                    let data = self.device_access(gpa + 8 * n as u64, la + 8 * n as u64, piece.len(), None)?;
                    piece.copy_from_slice(&data.to_le_bytes()[..piece.len()]);
                }
            }
            Target::Unchanged => unreachable!("a read is no store"),
        }
        Ok(())
    }

    fn write_target(&mut self, target: Target, buffer: &[u8]) -> Exec {
        match target {
            Target::Ram(host) => {
                order::settle();
                // SAFETY: `target` translated the page for writing, and the buffer is not longer than what is left of it.
                unsafe { host.copy_from_nonoverlapping(buffer.as_ptr(), buffer.len()) };
                self.note_code_write(host, buffer.len());
            }
            Target::Device { gpa, la } => {
                for (n, piece) in buffer.chunks(8).enumerate() {
                    let mut data = [0; 8];
                    data[..piece.len()].copy_from_slice(piece);
                    self.device_access(gpa + 8 * n as u64, la + 8 * n as u64, piece.len(), Some(u64::from_le_bytes(data)))?;
                }
            }
            Target::Unchanged => {}
        }
        Ok(())
    }

    /// Takes the next completed device access of the instruction, if it is emulated, or asks the hypervisor to make it.
    fn device_access(&mut self, gpa: u64, la: u64, size: usize, write: Option<u64>) -> Exec<u64> {
        let wanted = Access { gpa, size: size as u32, write: write.is_some().into(), data: [write.unwrap_or(0), 0] };
        match self.accesses.get(self.access_next).filter(|_| self.control.emulate != 0) {
            Some(done) if (done.gpa, done.size, done.write) == (gpa, wanted.size, wanted.write) => {
                self.access_next += 1;
                Ok(done.data[0])
            }
            _ => Err(self.exit_access(wanted, la)),
        }
    }

    /// Raises #SS or #GP for an address that is not canonical. An access that crosses a page asks for its last byte first: its whole
    /// address range is checked before any of it is translated (SDM vol. 1, 3.3.7.1).
    fn check_canonical(&mut self, segment: usize, la: u64) -> Exec {
        if self.long_mode() && !self.canonical(la) {
            let vector = if segment == seg::SS { vector::SS } else { vector::GP };
            return Err(self.raise_error(vector, 0));
        }
        Ok(())
    }

    /// Translates one page-bounded access, or raises what stands in its way.
    fn target(&mut self, segment: usize, la: u64, kind: AccessKind, privilege: Privilege) -> Exec<Target> {
        self.target_with(segment, la, kind, kind.right(), privilege, &[])
    }

    /// [`Cpu::target`] for an access that needs the rights `needed` in the nested page table: one that reads and writes is a write to the
    /// guest's tables, and both to the hypervisor's. `store` is what a plain store is about to write; empty for any other access.
    fn target_with(&mut self, segment: usize, la: u64, kind: AccessKind, needed: u8, privilege: Privilege, store: &[u8]) -> Exec<Target> {
        self.check_canonical(segment, la)?;
        if self.tlb.recall(privilege, la, kind) {
            if let Some(host) = self.cached_for(privilege, la, 1, kind) {
                return Ok(Target::Ram(host));
            }
        }
        let (mapping, found) = self.map(la, kind, privilege)?;
        let Some(leaf) = found.filter(|leaf| self.waivers.rights(leaf.rights, mapping.gpa) & needed == needed) else {
            if found.is_some_and(|leaf| leaf.rights & right::SAME != 0 && holds(leaf.host + (la & PAGE_OFFSET), store)) {
                return Ok(Target::Unchanged);
            }
            // What a hypervisor waives rights for it answers page by page, before anything is done.
            let asks_first = found.is_some() && !self.waivers.is_empty();
            let asks_for_data =
                self.control.emulate != 0 || self.vectoring == 0 && found.is_some_and(|leaf| leaf.rights & right::DEVICE != 0);
            if asks_for_data && kind != AccessKind::Fetch && !asks_first {
                return Ok(Target::Device { gpa: mapping.gpa, la });
            }
            let rights = found.map_or(0, |leaf| leaf.rights);
            let unreadable = found.is_some() && needed & right::READ & !self.waivers.rights(rights, mapping.gpa) != 0;
            let kind = if unreadable { AccessKind::Read } else { kind };
            return Err(self.exit_nested(mapping.gpa, Some(la), kind, rights, false));
        };
        let host = leaf.host + (la & PAGE_OFFSET);
        self.fill_tlb(la, host, leaf.rights, &mapping, privilege, kind);
        Ok(Target::Ram(host as *mut u8))
    }

    /// The guest's mapping of `la`, and the hypervisor's of where that is.
    fn map(&mut self, la: u64, kind: AccessKind, privilege: Privilege) -> Exec<(Mapping, Option<Leaf>)> {
        let (frames, npt) = (&mut self.frames, &*self.npt);
        let found = walk(&self.paging, |gpa| frames.lookup(npt, gpa), &self.waivers, la, privilege, kind)
            .map(|mapping| (mapping, frames.lookup(npt, mapping.gpa)));
        self.walks += 1;
        if self.pmu.watched != 0 {
            self.note_walk(kind, found.is_ok());
        }
        found.map_err(|error| match error {
            WalkError::Guest(code) => self.raise_page_fault(la, code),
            WalkError::Nested { gpa, write } => {
                let kind = if write { AccessKind::Write } else { AccessKind::Read };
                self.exit_nested(gpa, Some(la), kind, 0, true)
            }
        })
    }

    /// A page that may be written and not read gets no write tag, because accesses that do both go by it. A supervisor page that is not
    /// global gets a fetch tag only from a fetch, because code there costs each change of address space (see [`tlb::Tlb`]).
    fn fill_tlb(&mut self, la: u64, host: u64, rights: u8, mapping: &Mapping, privilege: Privilege, kind: AccessKind) {
        const BOTH: u8 = right::READ | right::WRITE;
        let allows = |kind| mapping.allows(&self.paging, privilege, kind);
        let checked = || self.npt.code.contains(host & !PAGE_OFFSET);
        let watched = self.pending & pending::BREAKPOINTS != 0 && self.breakpoints.watch_page(la);
        let code_expected = kind == AccessKind::Fetch || mapping.global || privilege == Privilege::User;
        let fill = tlb::Fill {
            la,
            host,
            read: !watched && rights & right::READ != 0 && allows(AccessKind::Read),
            write: !watched && rights & BOTH == BOTH && mapping.dirty && allows(AccessKind::Write) && !checked(),
            fetch: rights & right::EXECUTE != 0 && code_expected && allows(AccessKind::Fetch),
            global: mapping.global,
            page_shift: mapping.page_shift,
        };
        self.tlb.fill(privilege, fill);
    }

    /// Host address of the instruction byte at `la`.
    pub fn fetch_address(&mut self, la: u64) -> Exec<*const u8> {
        if let Some(host) = self.cached(la, 1, AccessKind::Fetch) {
            return Ok(host);
        }
        match self.target(seg::CS, la, AccessKind::Fetch, self.privilege())? {
            Target::Ram(host) => Ok(host),
            Target::Device { .. } | Target::Unchanged => unreachable!("a fetch is neither a device access nor a store"),
        }
    }
}
