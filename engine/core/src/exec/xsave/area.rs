//! Save areas: images of tens to thousands of bytes that one instruction reads or writes.

use crate::cpu::Cpu;
use crate::exec::sse::lanes::Lane;
use crate::uop::Exec;

impl Cpu {
    /// Reads `[la, la + area.len())`.
    pub(in crate::exec) fn read_area(&mut self, segment: usize, la: u64, area: &mut [u8]) -> Exec {
        let mut at = la;
        let mut words = area.chunks_exact_mut(8);
        for word in &mut words {
            word.copy_from_slice(&self.read::<u64>(segment, at)?.to_le_bytes());
            at = at.wrapping_add(8);
        }
        for byte in words.into_remainder() {
            *byte = self.read(segment, at)?;
            at = at.wrapping_add(1);
        }
        Ok(())
    }

    /// Writes `area` to `[la, la + area.len())`, all of it or nothing. An area is shorter than a page.
    pub(in crate::exec) fn write_area(&mut self, segment: usize, la: u64, area: &[u8]) -> Exec {
        self.probe_write(segment, la, area.len() as u64)?;
        let mut at = la;
        let words = area.chunks_exact(8);
        let rest = words.remainder();
        for word in words {
            self.write(segment, at, u64::get(word, 0))?;
            at = at.wrapping_add(8);
        }
        for byte in rest {
            self.write(segment, at, *byte)?;
            at = at.wrapping_add(1);
        }
        Ok(())
    }
}
