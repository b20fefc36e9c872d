//! The page walk: the guest's tables, read through the nested page table (SDM vol. 3, ch. 4 and 29.3.2).

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use super::{AccessKind, Privilege};
use crate::fault::pf;
use crate::memory::nested::{right, Leaf, Tree};
use crate::memory::waivers::Waivers;
use crate::memory::PAGE_OFFSET;
use crate::state::{cr0, cr4, efer, State};

const PRESENT: u64 = 1;
const WRITABLE: u64 = 2;
const USER: u64 = 4;
const ACCESSED: u64 = 0x20;
const DIRTY: u64 = 0x40;
const LARGE: u64 = 0x80;
const GLOBAL: u64 = 0x100;
const NO_EXECUTE: u64 = 1 << 63;
const KEY_SHIFT: u32 = 59;

/// The registers that decide how addresses are translated.
#[derive(Clone, Copy, Debug, Default)]
pub struct Context {
    pub cr0: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub efer: u64,
    pub pdpte: [u64; 4],
    pub pkru: u32,
    pub pkrs: u32,
    /// Bits of a physical address that the CPU has.
    pub physical_bits: u32,
}

impl Context {
    /// The context of `state`.
    pub fn new(state: &State, physical_bits: u32) -> Self {
        Context {
            cr0: state.cr0,
            cr3: state.cr3,
            cr4: state.cr4,
            efer: state.efer,
            pdpte: state.pdpte,
            pkru: state.fpu.pkru,
            pkrs: state.pkrs as u32,
            physical_bits,
        }
    }
    fn wide(&self) -> bool {
        self.cr4 & cr4::PAE != 0
    }
    fn nx(&self) -> bool {
        self.efer & efer::NXE != 0
    }
    /// Address field of a wide entry.
    fn frame_mask(&self) -> u64 {
        ((1u64 << self.physical_bits) - 1) & !PAGE_OFFSET
    }
    /// Bits that must be zero in every wide entry.
    fn reserved(&self) -> u64 {
        let high = 0x000f_ffff_ffff_ffff & !((1u64 << self.physical_bits) - 1);
        let legacy = if self.efer & efer::LMA == 0 { 0x7ff0_0000_0000_0000 } else { 0 };
        high | legacy | if self.nx() { 0 } else { NO_EXECUTE }
    }
}

/// A translation, with what the tables allow.
#[derive(Clone, Copy, Debug)]
pub struct Mapping {
    /// Guest-physical address of the byte.
    pub gpa: u64,
    pub writable: bool,
    pub user: bool,
    pub no_execute: bool,
    pub dirty: bool,
    pub global: bool,
    /// Protection key.
    pub key: u8,
    /// Bits of an address within the page: 12, or more for a large page.
    pub page_shift: u32,
}

impl Mapping {
    fn identity(gpa: u64) -> Self {
        Mapping { gpa, writable: true, user: true, no_execute: false, dirty: true, global: false, key: 0, page_shift: 12 }
    }

    /// Whether the access is allowed.
    pub fn allows(&self, context: &Context, privilege: Privilege, kind: AccessKind) -> bool {
        context.cr0 & cr0::PG == 0 || self.has_rights(context, privilege, kind) && !self.is_locked(context, privilege, kind)
    }

    /// Whether PKRU denies access to a user page with this key, or IA32_PKRS to a supervisor page (SDM vol. 3, 4.6.2).
    fn is_locked(&self, context: &Context, privilege: Privilege, kind: AccessKind) -> bool {
        let (enable, rights) = if self.user { (cr4::PKE, context.pkru) } else { (cr4::PKS, context.pkrs) };
        if context.cr4 & enable == 0 || context.efer & efer::LMA == 0 || kind == AccessKind::Fetch {
            return false;
        }
        let bits = rights >> (2 * self.key);
        let protects_writes = privilege == Privilege::User || context.cr0 & cr0::WP != 0;
        bits & 1 != 0 || bits & 2 != 0 && kind == AccessKind::Write && protects_writes
    }

    /// Whether the rights of the page allow the access (SDM vol. 3, 4.6.1).
    fn has_rights(&self, context: &Context, privilege: Privilege, kind: AccessKind) -> bool {
        match (privilege, kind) {
            (Privilege::User, AccessKind::Read) => self.user,
            (Privilege::User, AccessKind::Write) => self.user && self.writable,
            (Privilege::User, AccessKind::Fetch) => self.user && !self.no_execute,
            (_, AccessKind::Fetch) => !(self.no_execute || self.user && context.cr4 & cr4::SMEP != 0),
            (_, _) if self.user && privilege == Privilege::Supervisor && context.cr4 & cr4::SMAP != 0 => false,
            (_, AccessKind::Read) => true,
            (_, AccessKind::Write) => self.writable || context.cr0 & cr0::WP == 0,
        }
    }
}

/// Why a walk found no translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WalkError {
    /// A page fault with this error code.
    Guest(u32),
    /// A table at `gpa` is not readable (or not writable, for accessed and dirty bits) in the nested page table.
    Nested { gpa: u64, write: bool },
}

/// Translates `la` and sets accessed and dirty bits as the access asks for. Like silicon, it sets them only in an entry that still says
/// what the walk found there; else it walks again.
/// `waivers` are rights that the nested page table does not have to grant (see [`crate::memory::waivers`]).
/// `find` tells where guest-physical pages are.
pub fn walk(
    context: &Context,
    find: impl FnMut(u64) -> Option<Leaf>,
    waivers: &Waivers,
    la: u64,
    privilege: Privilege,
    kind: AccessKind,
) -> Result<Mapping, WalkError> {
    run_to_end(Walker { context, find, waivers: Some(waivers), la, privilege, kind })
}

/// Translates `la` for an observer: nothing in guest memory changes, and what is mapped may be read.
pub fn probe(context: &Context, tree: &Tree, la: u64, privilege: Privilege, kind: AccessKind) -> Result<Mapping, WalkError> {
    run_to_end(Walker { context, find: |gpa| tree.lookup(gpa), waivers: None, la, privilege, kind })
}

/// Why a walk goes no further.
enum Obstacle {
    Error(WalkError),
    /// Somebody changed an entry between the look at it and the update of its accessed or dirty bit.
    Changed,
}

fn run_to_end(mut walker: Walker<'_, impl FnMut(u64) -> Option<Leaf>>) -> Result<Mapping, WalkError> {
    loop {
        match walker.run() {
            Ok(mapping) => return Ok(mapping),
            Err(Obstacle::Error(error)) => return Err(error),
            Err(Obstacle::Changed) => {}
        }
    }
}

struct Walker<'a, F> {
    context: &'a Context,
    find: F,
    la: u64,
    privilege: Privilege,
    kind: AccessKind,
    /// None for an observer.
    waivers: Option<&'a Waivers>,
}

/// What the levels above agreed on.
struct Path {
    writable: bool,
    user: bool,
    no_execute: bool,
}

impl<F: FnMut(u64) -> Option<Leaf>> Walker<'_, F> {
    fn run(&mut self) -> Result<Mapping, Obstacle> {
        let context = self.context;
        if context.cr0 & cr0::PG == 0 {
            return Ok(Mapping::identity(self.la & 0xffff_ffff));
        }
        if context.efer & efer::LMA != 0 {
            let levels = if context.cr4 & cr4::LA57 != 0 { 5 } else { 4 };
            self.wide(context.cr3 & context.frame_mask(), levels, 0)
        } else if context.wide() {
            let entry = context.pdpte[(self.la >> 30) as usize & 3];
            if entry & PRESENT == 0 {
                return Err(self.fault(0));
            }
            self.wide(entry & context.frame_mask(), 2, 0)
        } else {
            self.narrow()
        }
    }

    /// PAE, 4-level and 5-level paging, from the table at `table` of level `level` down.
    fn wide(&mut self, mut table: u64, mut level: u32, extra_reserved: u64) -> Result<Mapping, Obstacle> {
        let context = self.context;
        let mut path = Path { writable: true, user: true, no_execute: false };
        loop {
            let shift = 12 + 9 * (level - 1);
            let at = table | (self.la >> shift & 0x1ff) << 3;
            let entry = self.read(at, 8)?;
            if entry & PRESENT == 0 {
                return Err(self.fault(0));
            }
            let large = entry & LARGE != 0 && (level == 2 || level == 3);
            let mut reserved = context.reserved() | extra_reserved;
            if large {
                reserved |= ((1u64 << shift) - 1) & !0x1fff;
            } else if level >= 4 {
                reserved |= LARGE;
            }
            if entry & reserved != 0 {
                return Err(self.fault(pf::PRESENT | pf::RESERVED));
            }
            path.writable &= entry & WRITABLE != 0;
            path.user &= entry & USER != 0;
            path.no_execute |= entry & NO_EXECUTE != 0;
            if level == 1 || large {
                return self.leaf(at, 8, entry, entry & context.frame_mask(), shift, path);
            }
            self.set(at, 8, entry, ACCESSED)?;
            table = entry & context.frame_mask();
            level -= 1;
        }
    }

    /// 32-bit paging.
    fn narrow(&mut self) -> Result<Mapping, Obstacle> {
        let at = self.context.cr3 & 0xffff_f000 | (self.la >> 22 & 0x3ff) << 2;
        let entry = self.read(at, 4)?;
        if entry & PRESENT == 0 {
            return Err(self.fault(0));
        }
        let mut path = Path { writable: entry & WRITABLE != 0, user: entry & USER != 0, no_execute: false };
        if entry & LARGE != 0 && self.context.cr4 & cr4::PSE != 0 {
            // PSE-36: bits 20:13 of the entry are bits 39:32 of the frame.
            if entry & 1 << 21 != 0 {
                return Err(self.fault(pf::PRESENT | pf::RESERVED));
            }
            let frame = entry & 0xffc0_0000 | (entry >> 13 & 0xff) << 32;
            return self.leaf(at, 4, entry, frame, 22, path);
        }
        self.set(at, 4, entry, ACCESSED)?;
        let at = entry & 0xffff_f000 | (self.la >> 12 & 0x3ff) << 2;
        let entry = self.read(at, 4)?;
        if entry & PRESENT == 0 {
            return Err(self.fault(0));
        }
        path.writable &= entry & WRITABLE != 0;
        path.user &= entry & USER != 0;
        self.leaf(at, 4, entry, entry & 0xffff_f000, 12, path)
    }

    fn leaf(&mut self, at: u64, bytes: u64, entry: u64, frame: u64, shift: u32, path: Path) -> Result<Mapping, Obstacle> {
        let within = (1u64 << shift) - 1;
        let mapping = Mapping {
            gpa: frame & !within | self.la & within,
            writable: path.writable,
            user: path.user,
            no_execute: path.no_execute && self.context.nx(),
            dirty: entry & DIRTY != 0 || self.kind == AccessKind::Write,
            global: entry & GLOBAL != 0 && self.context.cr4 & cr4::PGE != 0,
            key: (entry >> KEY_SHIFT) as u8 & 15,
            page_shift: shift,
        };
        if !mapping.allows(self.context, self.privilege, self.kind) {
            let locked = mapping.is_locked(self.context, self.privilege, self.kind);
            return Err(self.fault(pf::PRESENT | if locked { pf::KEY } else { 0 }));
        }
        let bits = if self.kind == AccessKind::Write { ACCESSED | DIRTY } else { ACCESSED };
        self.set(at, bytes, entry, bits)?;
        Ok(mapping)
    }

    fn fault(&self, reason: u32) -> Obstacle {
        let mut code = reason;
        if self.kind == AccessKind::Write {
            code |= pf::WRITE;
        }
        if self.privilege == Privilege::User {
            code |= pf::USER;
        }
        let fetches_are_told = self.context.nx() && self.context.wide() || self.context.cr4 & cr4::SMEP != 0;
        if self.kind == AccessKind::Fetch && fetches_are_told {
            code |= pf::FETCH;
        }
        Obstacle::Error(WalkError::Guest(code))
    }

    fn host(&mut self, gpa: u64, needed: u8) -> Result<u64, Obstacle> {
        let waivers = self.waivers;
        let allows = |leaf: &Leaf| {
            let memory = leaf.rights & right::DEVICE == 0; // an observer needs no right, but a device has no bytes
            memory && waivers.is_none_or(|waivers| waivers.walk_rights(leaf.rights, gpa) & needed == needed)
        };
        match (self.find)(gpa).filter(allows) {
            Some(leaf) => Ok(leaf.host + (gpa & PAGE_OFFSET)),
            None => Err(Obstacle::Error(WalkError::Nested { gpa, write: needed & right::WRITE != 0 })),
        }
    }

    fn read(&mut self, gpa: u64, bytes: u64) -> Result<u64, Obstacle> {
        let host = self.host(gpa, right::READ)?;
        // SAFETY: the page is in the nested page table, which keeps its region alive, and a naturally aligned entry cannot cross it.
        Ok(unsafe {
            if bytes == 8 {
                AtomicU64::from_ptr(host as *mut u64).load(Ordering::Acquire)
            } else {
                u64::from(AtomicU32::from_ptr(host as *mut u32).load(Ordering::Acquire))
            }
        })
    }

    /// Sets bits of an entry, if it is still `entry`.
    fn set(&mut self, gpa: u64, bytes: u64, entry: u64, bits: u64) -> Result<(), Obstacle> {
        if entry & bits == bits || self.waivers.is_none() {
            return Ok(());
        }
        let host = self.host(gpa, right::READ | right::WRITE)?;
        // SAFETY: as in `read`, and the page is writable.
        let set = unsafe {
            if bytes == 8 {
                let at = AtomicU64::from_ptr(host as *mut u64);
                at.compare_exchange(entry, entry | bits, Ordering::SeqCst, Ordering::Relaxed).is_ok()
            } else {
                let at = AtomicU32::from_ptr(host as *mut u32);
                at.compare_exchange(entry as u32, (entry | bits) as u32, Ordering::SeqCst, Ordering::Relaxed).is_ok()
            }
        };
        set.then_some(()).ok_or(Obstacle::Changed)
    }
}
