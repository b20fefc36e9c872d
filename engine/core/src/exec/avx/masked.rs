//! Conditional moves of lanes: VMASKMOVPS, VPMASKMOVD and siblings (SDM vol. 2). A lane whose mask is clear touches no memory.

use iced_x86::{Instruction, Mnemonic};

use super::{bytes, vector};
use crate::cpu::Cpu;
use crate::exec::sse::lanes::Lane;
use crate::exec::sse::operand::{is_memory, is_wide};
use crate::paging::AccessKind;
use crate::uop::{flag, Exec, Handler, Uop};
use crate::word::Word;

/// The handler of an instruction of this file.
pub fn handler(insn: &Instruction) -> Option<Handler> {
    let double = match insn.mnemonic() {
        Mnemonic::Vmaskmovps | Mnemonic::Vpmaskmovd => false,
        Mnemonic::Vmaskmovpd | Mnemonic::Vpmaskmovq => true,
        _ => return None,
    };
    Some(match (is_memory(insn, 0), double, is_wide(insn)) {
        (false, false, false) => load::<u32, 1>,
        (false, false, true) => load::<u32, 2>,
        (false, true, false) => load::<u64, 1>,
        (false, true, true) => load::<u64, 2>,
        (true, false, false) => store::<u32, 1>,
        (true, false, true) => store::<u32, 2>,
        (true, true, false) => store::<u64, 1>,
        (true, true, true) => store::<u64, 2>,
    })
}

impl Cpu {
    /// Linear address `distance` bytes behind the memory operand, for an access of `bytes`.
    fn lane_address(&mut self, uop: &Uop, distance: u64, bytes: u64, kind: AccessKind) -> Exec<u64> {
        if uop.has(flag::SLOW_ADDRESS) {
            let offset = self.effective_any(uop).wrapping_add(distance) & uop.address_mask();
            return self.segment_address(uop.segment(), offset, bytes, kind);
        }
        Ok(self.effective(uop).wrapping_add(distance).wrapping_add(self.segment_base(uop.segment())))
    }
}

fn load<L: Lane + Word, const HALVES: usize>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_avx()?;
    let mask = bytes(cpu.ymm(uop.reg[1]));
    let mut result = [0; 32];
    for n in (0..16 * HALVES / <L as Lane>::BYTES).filter(|n| L::get(&mask, *n).top_bit()) {
        let la = cpu.lane_address(uop, (n * <L as Lane>::BYTES) as u64, <L as Word>::BYTES, AccessKind::Read)?;
        cpu.read::<L>(uop.segment(), la)?.put(&mut result, n);
    }
    cpu.set_ymm(uop.reg[0], vector(result));
    Ok(())
}

/// All lanes are probed before the first is written.
fn store<L: Lane + Word, const HALVES: usize>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_avx()?;
    let (mask, value) = (bytes(cpu.ymm(uop.reg[1])), bytes(cpu.ymm(uop.reg[2])));
    let selected = |n: &usize| L::get(&mask, *n).top_bit();
    let count = 16 * HALVES / <L as Lane>::BYTES;
    for n in (0..count).filter(selected) {
        let la = cpu.lane_address(uop, (n * <L as Lane>::BYTES) as u64, <L as Word>::BYTES, AccessKind::Write)?;
        cpu.probe_write(uop.segment(), la, <L as Word>::BYTES)?;
    }
    for n in (0..count).filter(selected) {
        let la = cpu.lane_address(uop, (n * <L as Lane>::BYTES) as u64, <L as Word>::BYTES, AccessKind::Write)?;
        cpu.write(uop.segment(), la, L::get(&value, n))?;
    }
    Ok(())
}
