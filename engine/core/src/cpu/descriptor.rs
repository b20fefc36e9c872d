//! Selectors and segment descriptors: the tables, their bits, and how the CPU reads them (SDM vol. 3, 3.4, 3.5, 5.2 and 6.11).

use std::sync::atomic::{AtomicU8, Ordering};

use super::Cpu;
use crate::fault::vector;
use crate::paging::{AccessKind, Privilege};
use crate::state::{efer, rights, seg, Segment};
use crate::uop::{Exec, Stop};

/// Types of system descriptors (SDM vol. 3, table 3-2).
pub mod system {
    pub const TSS_16: u8 = 1;
    pub const LDT: u8 = 2;
    pub const TSS_16_BUSY: u8 = 3;
    pub const CALL_GATE_16: u8 = 4;
    pub const TASK_GATE: u8 = 5;
    pub const INTERRUPT_GATE_16: u8 = 6;
    pub const TRAP_GATE_16: u8 = 7;
    pub const TSS: u8 = 9;
    pub const TSS_BUSY: u8 = 11;
    pub const CALL_GATE: u8 = 12;
    pub const INTERRUPT_GATE: u8 = 14;
    pub const TRAP_GATE: u8 = 15;
}

/// Bit of a TSS descriptor's type that says that the task is busy.
const BUSY: u64 = 1 << 41;

/// Access rights of a present, writable, accessed data segment of ring 0.
pub const DATA_RIGHTS: u32 = rights::PRESENT | rights::S | rights::RW | rights::ACCESSED;

/// Whether `selector` is a null selector, whatever its RPL.
pub const fn is_null(selector: u16) -> bool {
    selector & !3 == 0
}

/// Requested privilege level of `selector`.
pub const fn rpl(selector: u16) -> u8 {
    (selector & 3) as u8
}

/// Error code that names `selector`.
pub const fn error_code(selector: u16) -> u32 {
    selector as u32 & !3
}

/// The eight bytes of a descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor(pub u64);

impl Descriptor {
    /// Access rights in the format of [`rights`].
    pub const fn rights(self) -> u32 {
        (self.0 >> 40) as u32 & 0xf0ff
    }
    /// Whether any of the bits of `mask` (see [`rights`]) is set.
    pub const fn has(self, mask: u32) -> bool {
        self.rights() & mask != 0
    }
    pub const fn dpl(self) -> u8 {
        (self.0 >> 45) as u8 & 3
    }
    pub const fn present(self) -> bool {
        self.has(rights::PRESENT)
    }
    /// Type field; what it means depends on `is_system`.
    pub const fn kind(self) -> u8 {
        (self.0 >> 40) as u8 & 0xf
    }
    pub const fn is_system(self) -> bool {
        !self.has(rights::S)
    }
    pub const fn is_code(self) -> bool {
        self.has(rights::S) && self.has(rights::CODE)
    }
    pub const fn is_conforming_code(self) -> bool {
        self.is_code() && self.has(rights::DC)
    }
    pub const fn is_readable(self) -> bool {
        self.has(rights::S) && (!self.has(rights::CODE) || self.has(rights::RW))
    }
    pub const fn is_writable_data(self) -> bool {
        self.has(rights::S) && !self.has(rights::CODE) && self.has(rights::RW)
    }
    /// Limit in bytes, the granularity applied.
    pub const fn limit(self) -> u32 {
        let limit = (self.0 & 0xffff) as u32 | (self.0 >> 32) as u32 & 0xf_0000;
        if self.has(rights::GRANULARITY) {
            limit << 12 | 0xfff
        } else {
            limit
        }
    }
    /// The low 32 bits of the base.
    pub const fn base(self) -> u64 {
        self.0 >> 16 & 0xff_ffff | self.0 >> 32 & 0xff00_0000
    }
    /// The segment register that a load of this descriptor makes.
    pub const fn segment(self, selector: u16) -> Segment {
        Segment::new(selector, self.rights(), self.limit(), self.base())
    }
    /// The same TSS descriptor, marked busy.
    pub const fn busy(self) -> Self {
        Descriptor(self.0 | BUSY)
    }
}

/// Whether `[offset, offset + bytes)` lies in `segment` (SDM vol. 3, 5.3).
pub fn within_limit(segment: &Segment, offset: u64, bytes: u64) -> bool {
    let last = offset.wrapping_add(bytes - 1);
    let limit = u64::from(segment.limit);
    if segment.access_rights & (rights::S | rights::CODE | rights::DC) == rights::S | rights::DC {
        let top = if segment.has(rights::DB) { 0xffff_ffff } else { 0xffff };
        offset > limit && last <= top && last >= offset
    } else {
        last <= limit && last >= offset
    }
}

impl Cpu {
    /// Whether IA-32e mode is active (64-bit or compatibility mode).
    pub fn ia32e(&self) -> bool {
        self.state.efer & efer::LMA != 0
    }

    /// A fault that names a selector.
    #[cold]
    pub fn selector_fault(&mut self, vector: u8, selector: u16) -> Stop {
        self.raise_error(vector, error_code(selector))
    }

    /// Linear address of a descriptor of `bytes` bytes, `None` when it is not in its table.
    fn descriptor_address(&self, selector: u16, bytes: u64) -> Option<u64> {
        let at = u64::from(selector & !7);
        let (base, limit) = if selector & 4 == 0 {
            (self.state.gdtr.base, self.state.gdtr.limit)
        } else {
            let table = &self.state.segments[seg::LDTR];
            if table.has(rights::UNUSABLE) {
                return None;
            }
            (table.base, table.limit)
        };
        let inside = at + bytes - 1 <= u64::from(limit);
        inside.then(|| self.table_address(base.wrapping_add(at)))
    }

    /// A linear address in a system table; outside IA-32e mode addresses have 32 bits.
    pub fn table_address(&self, la: u64) -> u64 {
        if self.ia32e() {
            la
        } else {
            la & 0xffff_ffff
        }
    }

    /// The descriptor that `selector` names; `vector` with the selector when it is not in its table.
    pub fn descriptor(&mut self, selector: u16, vector: u8) -> Exec<Descriptor> {
        match self.descriptor_address(selector, 8) {
            Some(la) => Ok(Descriptor(self.read_system(la)?)),
            None => Err(self.selector_fault(vector, selector)),
        }
    }

    /// The descriptor that `selector` names, or `None` when it is not in its table.
    pub fn find_descriptor(&mut self, selector: u16) -> Exec<Option<Descriptor>> {
        match self.descriptor_address(selector, 8) {
            Some(la) if !is_null(selector) => Ok(Some(Descriptor(self.read_system(la)?))),
            _ => Ok(None),
        }
    }

    /// The upper half of a 16-byte system descriptor of IA-32e mode.
    pub fn upper_descriptor(&mut self, selector: u16) -> Exec<u64> {
        match self.descriptor_address(selector, 16) {
            Some(la) => self.read_system(la + 8),
            None => Err(self.selector_fault(vector::GP, selector)),
        }
    }

    /// The descriptor with its accessed bit set, in the table too.
    #[inline]
    pub fn accessed(&mut self, selector: u16, descriptor: Descriptor) -> Exec<Descriptor> {
        if descriptor.has(rights::ACCESSED) {
            return Ok(descriptor);
        }
        let marked = Descriptor(descriptor.0 | u64::from(rights::ACCESSED) << 40);
        self.write_descriptor_type(selector, marked)?;
        Ok(marked)
    }

    /// Sets the accessed or busy bit that `descriptor` has in its table, in a locked operation (SDM vol. 3, 9.1.2.1).
    pub fn write_descriptor_type(&mut self, selector: u16, descriptor: Descriptor) -> Exec {
        let Some(la) = self.descriptor_address(selector, 8).map(|la| la + 5) else {
            return Err(self.selector_fault(vector::GP, selector));
        };
        let bits = (descriptor.0 >> 40) as u8;
        match self.cached_for(Privilege::Supervisor, la, 1, AccessKind::Write) {
            Some(host) => {
                // SAFETY: a write tag in the TLB means that the byte is mapped RAM, which other cores only access as a byte or more.
                unsafe { AtomicU8::from_ptr(host) }.fetch_or(bits, Ordering::SeqCst);
                Ok(())
            }
            None => self.with_bus_lock(|cpu| {
                let old: u8 = cpu.read_system(la)?;
                cpu.write_system(la, old | bits)
            }),
        }
    }

    /// The segment register that `selector` gives in real-address or virtual-8086 mode. Real mode keeps the limit that protected mode left.
    pub fn real_segment(&self, number: usize, selector: u16) -> Segment {
        let base = u64::from(selector) << 4;
        if self.virtual_8086() {
            return Segment::new(selector, DATA_RIGHTS | 3 << rights::DPL_SHIFT, 0xffff, base);
        }
        let old = &self.state.segments[number];
        if old.has(rights::UNUSABLE) {
            return Segment::new(selector, DATA_RIGHTS, 0xffff, base);
        }
        Segment::new(selector, old.access_rights & (rights::DB | rights::GRANULARITY) | DATA_RIGHTS, old.limit, base)
    }

    /// SS after a transfer to inner 64-bit code: null, and its DPL is the privilege level.
    pub const fn null_stack(level: u8) -> Segment {
        Segment::new(level as u16, rights::UNUSABLE | (level as u32) << rights::DPL_SHIFT, 0, 0)
    }
}
