//! Gathers: VGATHERDPS, VPGATHERQQ and siblings (SDM vol. 2): one load per lane, at a base and the index of the lane.
//!
//! An exception keeps the lanes before it: they are in the destination and their masks are clear, so the instruction goes on where it
//! stopped. A VM exit keeps nothing, and the instruction starts over.

use iced_x86::{Instruction, Mnemonic};

use super::{bytes, vector};
use crate::cpu::Cpu;
use crate::exec::sse::lanes::Lane;
use crate::paging::AccessKind;
use crate::uop::{Exec, Handler, Stop, Uop};
use crate::word::Word;

/// The handler of an instruction of this file.
pub fn handler(insn: &Instruction) -> Option<Handler> {
    let wide = insn.op0_register().is_ymm() || insn.memory_index().is_ymm();
    Some(match (insn.mnemonic(), wide) {
        (Mnemonic::Vgatherdps | Mnemonic::Vpgatherdd, false) => gather::<u32, i32, 4>,
        (Mnemonic::Vgatherdps | Mnemonic::Vpgatherdd, true) => gather::<u32, i32, 8>,
        (Mnemonic::Vgatherdpd | Mnemonic::Vpgatherdq, false) => gather::<u64, i32, 2>,
        (Mnemonic::Vgatherdpd | Mnemonic::Vpgatherdq, true) => gather::<u64, i32, 4>,
        (Mnemonic::Vgatherqps | Mnemonic::Vpgatherqd, false) => gather::<u32, i64, 2>,
        (Mnemonic::Vgatherqps | Mnemonic::Vpgatherqd, true) => gather::<u32, i64, 4>,
        (Mnemonic::Vgatherqpd | Mnemonic::Vpgatherqq, false) => gather::<u64, i64, 2>,
        (Mnemonic::Vgatherqpd | Mnemonic::Vpgatherqq, true) => gather::<u64, i64, 4>,
        _ => return None,
    })
}

impl Cpu {
    /// Linear address of the lane with this index. The address has no index register in the sense of [`Uop::index`].
    fn gather_address(&mut self, uop: &Uop, index: i64, bytes: u64) -> Exec<u64> {
        let displacement = (uop.disp as i64).wrapping_add(index.wrapping_shl((uop.segment_scale & 3).into()));
        let offset = self.reg::<u64>(uop.base).wrapping_add(displacement as u64) & uop.address_mask();
        self.segment_address(uop.segment(), offset, bytes, AccessKind::Read)
    }
}

/// Gathers `COUNT` lanes `L` at the addresses of signed indices `I`.
fn gather<L: Lane + Word, I: Lane + Into<i64>, const COUNT: usize>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_avx()?;
    let indices = bytes(cpu.ymm(uop.index));
    let mut result = bytes(cpu.ymm(uop.reg[0]));
    let mut mask = bytes(cpu.ymm(uop.reg[2]));
    for n in 0..COUNT {
        if L::get(&mask, n).top_bit() {
            let lane = cpu.gather_address(uop, I::get(&indices, n).into(), <L as Word>::BYTES);
            match lane.and_then(|la| cpu.read::<L>(uop.segment(), la)) {
                Ok(lane) => lane.put(&mut result, n),
                Err(Stop::Fault) => {
                    cpu.set_ymm(uop.reg[0], vector(result));
                    cpu.set_ymm(uop.reg[2], vector(mask));
                    return Err(Stop::Fault);
                }
                Err(stop) => return Err(stop),
            }
        }
        L::ZERO.put(&mut mask, n);
    }
    result[COUNT * <L as Lane>::BYTES..].fill(0);
    cpu.set_ymm(uop.reg[0], vector(result));
    cpu.set_ymm(uop.reg[2], [0; 2]);
    Ok(())
}
