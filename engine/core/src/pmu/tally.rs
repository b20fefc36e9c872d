//! What happened on a core while it was watched, by privilege: the totals that every counter is derived from.

use super::branch::{Kind, KINDS};
use crate::paging::AccessKind;

/// Core cycles that a mispredicted branch costs beyond its own.
pub const MISPREDICTED: u64 = 16;
/// Core cycles that LOOPcc costs beyond its own; it is slow on Intel's processors since the Pentium Pro.
pub const LOOP: u64 = 4;

/// Bits of an outcome, which is an index.
pub mod outcome {
    pub const TAKEN: usize = 1;
    pub const MISPREDICTED: usize = 2;
    pub const COUNT: usize = 4;
}

/// Totals of one privilege class.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    pub instructions: u64,
    /// Core cycles in which no instruction retired.
    pub stalled: u64,
    /// How often the core began to stall.
    pub stalls: u64,
    pub transfers: [[u64; outcome::COUNT]; KINDS],
    /// Page walks by kind of access: those that found a page, and all.
    pub walks: [[u64; 2]; 3],
}

impl Totals {
    pub fn cycles(&self) -> u64 {
        self.instructions.wrapping_add(self.stalled)
    }

    /// Transfers of the kinds in the set `kinds` with an outcome in the set `outcomes`.
    pub fn transfers(&self, kinds: u32, outcomes: u8) -> u64 {
        let of_kind =
            |kind: &[u64; outcome::COUNT]| -> u64 { (0..outcome::COUNT).filter(|n| outcomes >> n & 1 != 0).map(|n| kind[n]).sum() };
        self.transfers.iter().enumerate().filter(|(n, _)| kinds >> n & 1 != 0).map(|(_, kind)| of_kind(kind)).sum()
    }
}

/// Totals of CPL 0, and of all others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally(pub [Totals; 2]);

impl Tally {
    /// Adds a transfer of control from privilege level `cpl`; returns the cycles for which it makes the core stall.
    #[inline(always)]
    pub fn add(&mut self, cpl: u8, kind: Kind, taken: bool, mispredicted: bool) -> u64 {
        let totals = &mut self.0[usize::from(cpl != 0)];
        let outcome = usize::from(taken) + 2 * usize::from(mispredicted);
        totals.transfers[kind as usize][outcome] += 1;
        if !mispredicted && kind != Kind::Loop {
            return 0;
        }
        let stalled = u64::from(mispredicted) * MISPREDICTED + u64::from(kind == Kind::Loop) * LOOP;
        totals.stalled += stalled;
        totals.stalls += 1;
        stalled
    }

    /// Adds the stalls of `mispredicted` branches at privilege level `cpl`; returns how many cycles they are.
    pub fn add_stalls(&mut self, cpl: u8, mispredicted: u64) -> u64 {
        let totals = &mut self.0[usize::from(cpl != 0)];
        totals.stalled += mispredicted * MISPREDICTED;
        totals.stalls += mispredicted;
        mispredicted * MISPREDICTED
    }

    /// Adds `turns` of a LOOP that are taken and predicted; returns the cycles for which they make the core stall.
    pub fn add_turns(&mut self, cpl: u8, turns: u64) -> u64 {
        let totals = &mut self.0[usize::from(cpl != 0)];
        totals.transfers[Kind::Loop as usize][outcome::TAKEN] += turns;
        totals.stalled += turns * LOOP;
        totals.stalls += turns;
        turns * LOOP
    }

    /// Adds a page walk of code at privilege level `cpl`.
    pub fn add_walk(&mut self, cpl: u8, kind: AccessKind, found: bool) {
        let [completed, all] = &mut self.0[usize::from(cpl != 0)].walks[kind as usize];
        *completed += u64::from(found);
        *all += 1;
    }

    /// Core cycles of stalls at every privilege level.
    #[inline]
    pub fn stalled(&self) -> u64 {
        self.0[0].stalled.wrapping_add(self.0[1].stalled)
    }
}
