//! One counter of 48 bits. It holds what it was written, plus what happened since: nothing is done while it counts.

use super::event::{Event, Measure};
use super::tally::Tally;

/// Width of every counter.
pub const BITS: u32 = 48;
/// Values that a counter can have.
pub const MASK: u64 = (1 << BITS) - 1;

/// Bits of `Counter::rings`.
pub mod ring {
    pub const KERNEL: u8 = 1;
    pub const USER: u8 = 2;
}

/// See the head of the file.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counter {
    value: u64,
    /// The measured total that `value` is right for.
    seen: u64,
    measure: Measure,
    /// Privilege that counts; none while the counter stands still.
    rings: u8,
    /// Overflow requests an interrupt.
    pub interrupts: bool,
}

impl Counter {
    /// The value that [`Counter::fold`] has brought up to date.
    pub fn value(&self) -> u64 {
        self.value
    }

    pub fn set(&mut self, value: u64) {
        self.value = value & MASK;
    }

    /// Takes a new set-up into force; the counter has been folded.
    pub fn configure(&mut self, measure: Measure, rings: u8, interrupts: bool, tally: &Tally) {
        (self.measure, self.rings, self.interrupts) = (measure, if measure.counts() { rings } else { 0 }, interrupts);
        self.seen = self.total(tally);
    }

    fn total(&self, tally: &Tally) -> u64 {
        let [kernel, user] = [ring::KERNEL, ring::USER].map(|bit| self.rings & bit != 0);
        let part = |on: bool, n: usize| if on { self.measure.of(&tally.0[n]) } else { 0 };
        part(kernel, 0).wrapping_add(part(user, 1))
    }

    /// Adds what happened since the last call; tells whether the counter wrapped.
    pub fn fold(&mut self, tally: &Tally) -> bool {
        if self.rings == 0 {
            return false;
        }
        let total = self.total(tally);
        let value = self.value + total.wrapping_sub(self.seen);
        self.seen = total;
        self.value = value & MASK;
        value > MASK
    }

    /// Whether the counter stands still.
    pub fn stopped(&self) -> bool {
        self.rings == 0
    }

    /// What the counter adds up, if code at privilege level `cpl` can change it.
    pub fn running_at(&self, cpl: u8) -> Option<&Measure> {
        let bit = if cpl == 0 { ring::KERNEL } else { ring::USER };
        (self.rings & bit != 0).then_some(&self.measure)
    }

    /// Whether branches must be watched for the counter.
    pub fn follows_branches(&self) -> bool {
        self.rings != 0 && self.measure.follows_branches()
    }

    /// Whether transfers must be counted by kind for the counter.
    pub fn follows_kinds(&self) -> bool {
        self.rings != 0 && matches!(self.measure.event, Event::Transfers(..))
    }

    /// Events until the counter wraps.
    pub fn remaining(&self) -> u64 {
        (1 << BITS) - self.value
    }
}
