//! Rights that an instruction has although the nested page table does not grant them.
//!
//! A hypervisor that takes rights away to see accesses must sometimes let one through: it names the pages in the control block, and they
//! count for one instruction, or for the delivery of one event, of one CPU. Nothing of it gets into the TLB. (On silicon the hypervisor
//! emulates the instruction, or changes the table and single-steps, while other CPUs see the change.)

use super::nested::right;
use super::PAGE_OFFSET;

/// In the place of a right: the page walker may read the page and set accessed and dirty bits in it, and software still may not.
pub const WALK: u64 = 8;

/// Pages with the rights that are waived for them, in the low bits.
#[derive(Debug, Default)]
pub struct Waivers(Vec<u64>);

impl Waivers {
    /// Replaces all.
    pub fn set(&mut self, waivers: &[u64]) {
        self.0.clear();
        self.0.extend_from_slice(waivers);
    }

    /// Forgets all.
    pub fn clear(&mut self) {
        self.0.clear();
    }

    /// Whether there is any.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The rights to the page of `gpa`, of which the table grants `granted`.
    #[inline]
    pub fn rights(&self, granted: u8, gpa: u64) -> u8 {
        self.of_page(gpa).fold(granted, |rights, waiver| rights | waiver as u8 & 7)
    }

    /// The page walker's rights to the page of `gpa`.
    #[inline]
    pub fn walk_rights(&self, granted: u8, gpa: u64) -> u8 {
        let walks = self.of_page(gpa).any(|waiver| waiver & WALK != 0);
        granted | if walks { right::READ | right::WRITE } else { 0 }
    }

    fn of_page(&self, gpa: u64) -> impl Iterator<Item = u64> + '_ {
        self.0.iter().copied().filter(move |waiver| (waiver ^ gpa) & !PAGE_OFFSET == 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rights_add_up_for_the_page_alone() {
        let mut waivers = Waivers::default();
        waivers.set(&[0x5000 | 2, 0x6000 | 4, 0x5000 | 1, 0x8000 | WALK]);
        assert_eq!(waivers.rights(4, 0x5fff), 7);
        assert_eq!(waivers.rights(0, 0x6000), 4);
        assert_eq!(waivers.rights(1, 0x7000), 1);
        assert_eq!((waivers.rights(0, 0x8000), waivers.walk_rights(0, 0x8000)), (0, 3));
        assert_eq!(waivers.walk_rights(1, 0x5000), 1);
        waivers.clear();
        assert!(waivers.is_empty());
    }
}
