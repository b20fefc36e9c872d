//! Memory operands of fast handlers: the forms of an address, and accesses that the TLB covers.

use crate::cpu::Cpu;
use crate::memory::order;
use crate::paging::AccessKind;
use crate::state::seg;
use crate::uop::{slot, Uop};
use crate::word::{Plain, Word};

/// A form of address in 64-bit code.
pub trait Address {
    /// Linear address of the operand.
    fn linear(cpu: &Cpu, uop: &Uop) -> u64;
}

/// Base and displacement, in a segment without base.
pub struct Based;

/// Base, index, displacement and segment base.
pub struct Indexed;

impl Address for Based {
    #[inline(always)]
    fn linear(cpu: &Cpu, uop: &Uop) -> u64 {
        cpu.reg::<u64>(uop.base).wrapping_add(uop.disp as i64 as u64)
    }
}

impl Address for Indexed {
    #[inline(always)]
    fn linear(cpu: &Cpu, uop: &Uop) -> u64 {
        cpu.effective(uop).wrapping_add(cpu.segment_base(uop.segment()))
    }
}

/// Whether the memory operand of `uop` has the form [`Based`].
pub fn is_based(uop: &Uop) -> bool {
    uop.index == slot::ZERO * 8 && !matches!(uop.segment(), seg::FS | seg::GS)
}

/// Picks `$pick::<.., Address>(..)` by the form of the address of `$uop`.
macro_rules! by_address {
    ($uop:expr, $bytes:expr, $handler:ident $(, $type:ty)*) => {
        if $crate::exec::fast::operand::is_based($uop) {
            by_width_chained!($bytes, $handler $(, $type)*, $crate::exec::fast::operand::Based)
        } else {
            by_width_chained!($bytes, $handler $(, $type)*, $crate::exec::fast::operand::Indexed)
        }
    };
}

/// Picks `$body::<$type.., W>` for the width of `$bytes` bytes, chained.
macro_rules! by_width_chained {
    ($bytes:expr, $body:ident $(, $type:ty)*) => {
        match $bytes {
            1 => Some($crate::exec::fast::chained($body::<$($type,)* u8>)),
            2 => Some($crate::exec::fast::chained($body::<$($type,)* u16>)),
            4 => Some($crate::exec::fast::chained($body::<$($type,)* u32>)),
            8 => Some($crate::exec::fast::chained($body::<$($type,)* u64>)),
            _ => None,
        }
    };
}

pub(super) use {by_address, by_width_chained};

/// Reads the operand, if the TLB covers it.
#[inline(always)]
pub fn load<A: Address, T: Plain>(cpu: &Cpu, uop: &Uop) -> Option<T> {
    let host = cpu.cached(A::linear(cpu, uop), size_of::<T>() as u64, AccessKind::Read)?;
    // SAFETY: a read tag means that the page is mapped RAM as long as the tag stands, and the access is inside it.
    Some(unsafe { order::load(host.cast::<T>()) })
}

/// Where the operand may be written, if the TLB covers it.
#[inline(always)]
pub fn place<A: Address, W: Word>(cpu: &Cpu, uop: &Uop) -> Option<Place<W>> {
    cpu.cached(A::linear(cpu, uop), W::BYTES, AccessKind::Write).map(|host| Place(host.cast()))
}

/// Mapped guest RAM that may be written.
#[derive(Clone, Copy)]
pub struct Place<W>(*mut W);

impl<W: Word> Place<W> {
    #[inline(always)]
    pub fn read(self) -> W {
        // SAFETY: `place` made it from a write tag, which means mapped RAM as long as the tag stands; no TLB change came between.
        unsafe { order::load(self.0) }
    }
    #[inline(always)]
    pub fn write(self, value: W) {
        // SAFETY: as in `read`.
        unsafe { order::store(self.0, value) }
    }
}
