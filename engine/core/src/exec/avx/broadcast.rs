//! One lane to all lanes: VBROADCASTSS, VBROADCASTF128, VPBROADCASTB and siblings (SDM vol. 2).

use iced_x86::{Instruction, Mnemonic};

use crate::cpu::Cpu;
use crate::exec::sse::lanes::{build, Lane};
use crate::exec::sse::operand::{is_memory, is_ymm, Source, VexMemory, VexRegister};
use crate::uop::{Exec, Handler, Uop};

/// Picks the handler for lanes of `$bytes` bytes.
macro_rules! broadcast {
    ($insn:ident, $lane:ty, $bytes:literal) => {
        match (is_memory($insn, 1), is_ymm($insn, 0)) {
            (false, false) => broadcast::<$lane, VexRegister<1, 1>, 1>,
            (false, true) => broadcast::<$lane, VexRegister<1, 1>, 2>,
            (true, false) => broadcast::<$lane, VexMemory<$bytes>, 1>,
            (true, true) => broadcast::<$lane, VexMemory<$bytes>, 2>,
        }
    };
}

/// The handler of an instruction of this file.
pub fn handler(insn: &Instruction) -> Option<Handler> {
    Some(match insn.mnemonic() {
        Mnemonic::Vpbroadcastb => broadcast!(insn, u8, 1),
        Mnemonic::Vpbroadcastw => broadcast!(insn, u16, 2),
        Mnemonic::Vpbroadcastd | Mnemonic::Vbroadcastss => broadcast!(insn, u32, 4),
        Mnemonic::Vpbroadcastq | Mnemonic::Vbroadcastsd => broadcast!(insn, u64, 8),
        Mnemonic::Vbroadcastf128 | Mnemonic::Vbroadcasti128 => broadcast_half,
        _ => return None,
    })
}

fn broadcast<L: Lane, S: Source, const HALVES: usize>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    S::require(cpu)?;
    let lane = L::get(&S::xmm(cpu, uop)?.to_le_bytes(), 0);
    let half = u128::from_le_bytes(build(|_| lane));
    S::put(cpu, uop.reg[0], [half, if HALVES == 2 { half } else { 0 }]);
    Ok(())
}

fn broadcast_half(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_avx()?;
    let [half, _] = cpu.load_vector::<1, false>(uop)?;
    cpu.set_ymm(uop.reg[0], [half, half]);
    Ok(())
}
