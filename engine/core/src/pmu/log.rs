//! The branch log: every taken transfer of control, exact and in order, in a buffer that the host empties.
//!
//! A debugging facility of this silicon, shaped like the branch trace store (SDM vol. 3, 18.4.9): a buffer, a threshold at which the core
//! interrupts the host, and an end behind which records are lost and counted. `softkvm/silicon/pmu.py` declares the record.

use super::branch::Kind;
use super::counter::ring;
use super::lbr::Transfer;

/// Bytes of a record in the host's view.
pub const RECORD_SIZE: usize = 24;
/// Flag of a mispredicted branch.
const MISPREDICTED: u8 = 1;

/// Which transfers the log takes: by ring and address of where they come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Filter {
    /// Bits of [`ring`].
    pub rings: u8,
    pub low: u64,
    pub high: u64,
}

impl Filter {
    #[inline]
    fn takes(&self, transfer: &Transfer) -> bool {
        let bit = if transfer.before == 0 { ring::KERNEL } else { ring::USER };
        self.rings & bit != 0 && (self.low..=self.high).contains(&transfer.from)
    }
}

/// See the head of the file.
pub struct BranchLog {
    filter: Filter,
    capacity: usize,
    bytes: Vec<u8>,
    /// CR3 that the host knows of.
    cr3: Option<u64>,
    pub lost: u64,
}

impl BranchLog {
    /// An empty log of at most `capacity` records.
    pub fn new(capacity: usize, filter: Filter) -> Self {
        BranchLog { filter, capacity, bytes: Vec::new(), cr3: None, lost: 0 }
    }

    /// Writes a transfer in the address space of `cr3`; tells whether the host should now read.
    #[inline]
    pub fn record(&mut self, transfer: &Transfer, cr3: u64) -> bool {
        if !self.filter.takes(transfer) {
            return false;
        }
        let before = self.records();
        if self.cr3 != Some(cr3) {
            let switch = Transfer { kind: Kind::None, to: cr3, mispredicted: false, vector: 0, ..*transfer };
            if !self.push(&switch) {
                return false;
            }
            self.cr3 = Some(cr3);
        }
        self.push(transfer);
        let threshold = self.capacity - self.capacity / 4;
        before < threshold && self.records() >= threshold
    }

    fn records(&self) -> usize {
        self.bytes.len() / RECORD_SIZE
    }

    fn push(&mut self, transfer: &Transfer) -> bool {
        if self.records() >= self.capacity {
            self.lost += 1;
            return false;
        }
        let flags = if transfer.mispredicted { MISPREDICTED } else { 0 };
        self.bytes.extend_from_slice(&transfer.from.to_le_bytes());
        self.bytes.extend_from_slice(&transfer.to.to_le_bytes());
        self.bytes.extend_from_slice(&[transfer.kind as u8, flags, transfer.before, transfer.after, transfer.vector, 0, 0, 0]);
        true
    }

    /// Takes the records out, oldest first.
    pub fn take(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EVERYTHING: Filter = Filter { rings: ring::KERNEL | ring::USER, low: 0, high: u64::MAX };

    fn jump(from: u64, before: u8) -> Transfer {
        Transfer { kind: Kind::Jump, from, to: from + 1, mispredicted: true, before, after: 3, vector: 9 }
    }

    fn froms(log: &mut BranchLog) -> Vec<(u8, u64)> {
        let word = |bytes: &[u8]| bytes[..8].iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte));
        log.take().chunks(RECORD_SIZE).map(|record| (record[16], word(if record[16] == 0 { &record[8..] } else { record }))).collect()
    }

    #[test]
    fn records_name_the_address_space_once() {
        let mut log = BranchLog::new(100, EVERYTHING);
        for (from, cr3) in [(1, 0x1000), (2, 0x1000), (3, 0x2000)] {
            log.record(&jump(from, 0), cr3);
        }
        assert_eq!(froms(&mut log), [(0, 0x1000), (3, 1), (3, 2), (0, 0x2000), (3, 3)]);
    }

    #[test]
    fn a_record_is_laid_out_as_declared() {
        let mut log = BranchLog::new(2, EVERYTHING);
        log.record(&jump(0x1122, 0), 0);
        let bytes = log.take();
        assert_eq!(bytes[RECORD_SIZE..], [0x22, 0x11, 0, 0, 0, 0, 0, 0, 0x23, 0x11, 0, 0, 0, 0, 0, 0, 3, 1, 0, 3, 9, 0, 0, 0]);
    }

    #[test]
    fn filters_look_at_where_a_branch_comes_from() {
        let mut log = BranchLog::new(100, Filter { rings: ring::USER, low: 10, high: 20 });
        for (from, before) in [(9, 3), (10, 3), (15, 0), (20, 3), (21, 3)] {
            log.record(&jump(from, before), 0);
        }
        assert_eq!(froms(&mut log), [(0, 0), (3, 10), (3, 20)]);
    }

    #[test]
    fn a_full_log_calls_once_and_counts_what_it_loses() {
        let mut log = BranchLog::new(8, EVERYTHING);
        let calls: Vec<bool> = (1..10).map(|from| log.record(&jump(from, 0), 0)).collect();
        assert_eq!(calls.iter().position(|call| *call), Some(4));
        assert_eq!((calls.iter().filter(|call| **call).count(), log.lost), (1, 2));
        assert_eq!(froms(&mut log).len(), 8);
        assert!(!log.record(&jump(1, 0), 0));
    }
}
