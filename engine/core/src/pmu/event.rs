//! Event select and unit mask to what is counted (SDM vol. 3, 20.2.1 and 20.3.1; events of Skylake and of AMD's family 17h).
//!
//! One instruction retires per cycle, and a cycle has at most one event of a kind: that is what CMASK, INV and EDGE work on.

use super::branch::Kind;
use super::tally::{outcome, Totals};
use crate::paging::AccessKind;

/// Fields of an event select register that both vendors have.
pub mod select {
    pub const USR: u64 = 1 << 16;
    pub const OS: u64 = 1 << 17;
    pub const EDGE: u64 = 1 << 18;
    pub const INT: u64 = 1 << 20;
    pub const EN: u64 = 1 << 22;
    pub const INV: u64 = 1 << 23;
    pub const CMASK_SHIFT: u32 = 24;
}

const CONDITIONAL: u32 = Kind::Conditional.bit() | Kind::Loop.bit();
const CALLS: u32 = Kind::Call.bit() | Kind::ZeroCall.bit() | Kind::IndirectCall.bit();
const INDIRECT: u32 = Kind::IndirectJump.bit() | Kind::IndirectCall.bit();
const NEAR: u32 = CONDITIONAL | CALLS | Kind::Jump.bit() | Kind::IndirectJump.bit() | Kind::Return.bit();
/// Far branches that are instructions.
const FAR: u32 = Kind::FarJump.bit()
    | Kind::FarCall.bit()
    | Kind::FarReturn.bit()
    | Kind::Syscall.bit()
    | Kind::Sysret.bit()
    | Kind::Iret.bit()
    | Kind::SoftwareInterrupt.bit();
const DELIVERED: u32 = Kind::Exception.bit() | Kind::Interrupt.bit();

const ANY: u8 = 0b1111;
const TAKEN: u8 = 1 << outcome::TAKEN | 1 << (outcome::TAKEN | outcome::MISPREDICTED);
const NOT_TAKEN: u8 = ANY & !TAKEN;
const MISPREDICTED: u8 = 1 << outcome::MISPREDICTED | 1 << (outcome::TAKEN | outcome::MISPREDICTED);

/// What happens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Event {
    /// What the engine does not have.
    #[default]
    Nothing,
    Instructions,
    Cycles,
    /// The core begins to stall.
    Stalls,
    /// Transfers of control: a set of kinds and a set of outcomes.
    Transfers(u32, u8),
    /// Page walks for an access of this kind, and whether only those count that find a page.
    Walks(AccessKind, bool),
    /// Page walks for data.
    DataWalks,
}

/// What a counter adds up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Measure {
    pub event: Event,
    /// Cycles without the event.
    pub inverted: bool,
}

impl Measure {
    pub const fn plain(event: Event) -> Self {
        Measure { event, inverted: false }
    }

    /// What an event select register says, on silicon of either vendor.
    pub fn selected(select: u64, amd: bool) -> Self {
        let event = if amd { amd_event(select) } else { intel_event(select) };
        let edge = if select & select::EDGE != 0 { edges(event) } else { event };
        let inverted = select & select::INV != 0;
        match select >> select::CMASK_SHIFT as u64 & 0xff {
            0 => Measure::plain(edge),
            1 => Measure { event: edge, inverted },
            _ => Measure { event: Event::Nothing, inverted },
        }
    }

    /// The count so far.
    pub fn of(&self, totals: &Totals) -> u64 {
        let count = match self.event {
            Event::Nothing => 0,
            Event::Instructions => totals.instructions,
            Event::Cycles => totals.cycles(),
            Event::Stalls => totals.stalls,
            Event::Transfers(kinds, outcomes) => totals.transfers(kinds, outcomes),
            Event::Walks(kind, completed) => totals.walks[kind as usize][usize::from(!completed)],
            Event::DataWalks => totals.walks[AccessKind::Read as usize][0].wrapping_add(totals.walks[AccessKind::Write as usize][0]),
        };
        if self.inverted {
            totals.cycles().wrapping_sub(count)
        } else {
            count
        }
    }

    /// Whether it can change at all.
    pub fn counts(&self) -> bool {
        self.inverted || self.event != Event::Nothing
    }

    /// Whether it can change at an instruction that is no branch.
    pub fn follows_instructions(&self) -> bool {
        self.inverted || matches!(self.event, Event::Instructions | Event::Cycles)
    }

    /// Whether it depends on branches.
    pub fn follows_branches(&self) -> bool {
        self.inverted || matches!(self.event, Event::Cycles | Event::Stalls | Event::Transfers(..))
    }
}

/// How often a condition begins to hold: instructions retire in a row until the core stalls, and it is never halted between two of them.
fn edges(event: Event) -> Event {
    match event {
        Event::Instructions => Event::Stalls,
        Event::Cycles => Event::Nothing,
        other => other,
    }
}

fn intel_event(select: u64) -> Event {
    match select & 0xffff {
        0x003c | 0x013c => Event::Cycles,
        0x00c0 | 0x01c0 => Event::Instructions,
        0x00c4 | 0x04c4 => Event::Transfers(NEAR | FAR, ANY),
        0x01c4 => Event::Transfers(CONDITIONAL, ANY),
        0x02c4 => Event::Transfers(CALLS, ANY),
        0x08c4 => Event::Transfers(Kind::Return.bit(), ANY),
        0x10c4 => Event::Transfers(CONDITIONAL, NOT_TAKEN),
        0x20c4 => Event::Transfers(NEAR, TAKEN),
        0x40c4 => Event::Transfers(FAR, ANY),
        0x00c5 | 0x04c5 => Event::Transfers(NEAR, MISPREDICTED),
        0x01c5 => Event::Transfers(CONDITIONAL, MISPREDICTED),
        0x02c5 => Event::Transfers(CALLS, MISPREDICTED),
        0x20c5 => Event::Transfers(NEAR, MISPREDICTED & TAKEN),
        // No cache is modelled: what the last level sees, and misses, are the walks for data.
        0x4f2e | 0x412e => Event::DataWalks,
        0x0108 => Event::Walks(AccessKind::Read, false),
        0x0e08 => Event::Walks(AccessKind::Read, true),
        0x0149 => Event::Walks(AccessKind::Write, false),
        0x0e49 => Event::Walks(AccessKind::Write, true),
        0x0185 => Event::Walks(AccessKind::Fetch, false),
        0x0e85 => Event::Walks(AccessKind::Fetch, true),
        _ => Event::Nothing,
    }
}

/// Bits 35:32 are the event's upper ones.
fn amd_event(select: u64) -> Event {
    match select & 0xff | (select >> 32 & 0xf) << 8 {
        0x45 => Event::DataWalks,
        0x76 => Event::Cycles,
        0x85 => Event::Walks(AccessKind::Fetch, true),
        0xc0 => Event::Instructions,
        0xc2 => Event::Transfers(NEAR | FAR, ANY),
        0xc3 => Event::Transfers(NEAR, MISPREDICTED),
        0xc4 => Event::Transfers(NEAR | FAR, TAKEN),
        0xc5 => Event::Transfers(NEAR, MISPREDICTED & TAKEN),
        0xc6 => Event::Transfers(FAR | DELIVERED, ANY),
        0xc8 => Event::Transfers(Kind::Return.bit(), ANY),
        0xc9 => Event::Transfers(Kind::Return.bit(), MISPREDICTED),
        0xca => Event::Transfers(INDIRECT, MISPREDICTED),
        0xd1 => Event::Transfers(CONDITIONAL, ANY),
        _ => Event::Nothing,
    }
}
