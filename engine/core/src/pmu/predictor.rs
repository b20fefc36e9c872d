//! The branch predictor that decides which branches are mispredicted: a fixed, simple one, so that counts are the same in every run.
//!
//! - Jcc, JrCXZ and LOOPcc: 4096 two-bit counters by the low bits of the address, which begin as weakly not taken.
//! - Indirect jumps and calls: the last target, by the low bits of the address, in 1024 places.
//! - RET: a stack of the last sixteen near calls. A call to the next instruction is none, as on Intel's processors.
//! - Relative jumps and calls are always right, far transfers are not predicted.
//!
//! An indirect branch prediction barrier (PRED_CMD, SDM vol. 4) makes it forget everything. It learns only while branches are watched.

use super::branch::Kind;

pub const DIRECTIONS: usize = 4096;
pub const TARGETS: usize = 1024;
pub const RETURNS: usize = 16;
/// A two-bit counter's weakest "not taken"; "taken" begins above it.
pub const NOT_TAKEN: u8 = 1;
pub const STRONGLY_TAKEN: u8 = 3;

/// See the head of the file.
pub struct Predictor {
    pub directions: [u8; DIRECTIONS],
    pub targets: [u64; TARGETS],
    pub returns: [u64; RETURNS],
    pub top: usize,
}

impl Default for Predictor {
    fn default() -> Self {
        Predictor { directions: [NOT_TAKEN; DIRECTIONS], targets: [0; TARGETS], returns: [0; RETURNS], top: 0 }
    }
}

/// The place of an address in a table of `entries`: within its page, so that host code knows it.
#[inline(always)]
pub const fn place(address: u64, entries: usize) -> usize {
    address as usize & (entries - 1)
}

impl Predictor {
    /// After so many equal outcomes of a conditional branch, more of them change nothing and are predicted.
    pub const LEARNS: u64 = STRONGLY_TAKEN as u64;

    /// Learns from a branch at `from` with the next instruction at `next`, which went to `to`; tells whether it was mispredicted.
    #[inline(always)]
    pub fn mispredicts(&mut self, kind: Kind, from: u64, next: u64, to: u64, taken: bool) -> bool {
        if matches!(kind, Kind::Conditional | Kind::Loop) {
            return self.direction(from, taken);
        }
        match kind {
            Kind::IndirectJump => self.target(from, to),
            Kind::IndirectCall => {
                self.push(next);
                self.target(from, to)
            }
            Kind::Call => {
                self.push(next);
                false
            }
            Kind::Return => self.pop() != to,
            _ => false,
        }
    }

    #[inline(always)]
    fn direction(&mut self, from: u64, taken: bool) -> bool {
        let counter = &mut self.directions[place(from, DIRECTIONS)];
        let predicted = *counter > NOT_TAKEN;
        *counter = if taken { (*counter + 1).min(STRONGLY_TAKEN) } else { counter.saturating_sub(1) };
        predicted != taken
    }

    fn target(&mut self, from: u64, to: u64) -> bool {
        std::mem::replace(&mut self.targets[place(from, TARGETS)], to) != to
    }

    fn push(&mut self, next: u64) {
        self.top = (self.top + 1) % RETURNS;
        self.returns[self.top] = next;
    }

    fn pop(&mut self) -> u64 {
        let predicted = self.returns[self.top];
        self.top = (self.top + RETURNS - 1) % RETURNS;
        predicted
    }

    /// Forgets what it learned.
    pub fn forget(&mut self) {
        *self = Predictor::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn conditional(predictor: &mut Predictor, taken: bool) -> bool {
        predictor.mispredicts(Kind::Conditional, 0x1000, 0x1002, if taken { 0x2000 } else { 0x1002 }, taken)
    }

    #[test]
    fn a_loop_mispredicts_at_its_ends() {
        let mut predictor = Predictor::default();
        let wrong: Vec<bool> = [true, true, true, true, false].map(|taken| conditional(&mut predictor, taken)).into();
        assert_eq!(wrong, [true, false, false, false, true]);
        assert!(!conditional(&mut predictor, true));
    }

    #[test]
    fn returns_match_their_calls_sixteen_deep() {
        let mut predictor = Predictor::default();
        for n in 0..17 {
            assert!(!predictor.mispredicts(Kind::Call, n * 16, n * 16 + 5, 0x9000, true));
        }
        let wrong: Vec<bool> = (0..17).rev().map(|n| predictor.mispredicts(Kind::Return, 0x9000, 0x9001, n * 16 + 5, true)).collect();
        assert_eq!(wrong.iter().position(|wrong| *wrong), Some(16));
    }

    #[test]
    fn indirect_branches_repeat_their_target_until_a_barrier() {
        let mut predictor = Predictor::default();
        let mut jump = |to| predictor.mispredicts(Kind::IndirectJump, 0x5000, 0x5002, to, true);
        assert_eq!([jump(1), jump(1), jump(2), jump(2)], [true, false, true, false]);
        predictor.forget();
        assert!(predictor.mispredicts(Kind::IndirectJump, 0x5000, 0x5002, 2, true));
    }

    #[test]
    fn far_and_relative_transfers_are_never_wrong() {
        let mut predictor = Predictor::default();
        for kind in [Kind::Jump, Kind::ZeroCall, Kind::FarJump, Kind::Syscall, Kind::Iret, Kind::SoftwareInterrupt] {
            assert!(!predictor.mispredicts(kind, 0x5000, 0x5002, 0x7000, true));
        }
        assert!(predictor.mispredicts(Kind::Return, 0x5000, 0x5001, 0x5002, true), "nothing was pushed");
    }
}
