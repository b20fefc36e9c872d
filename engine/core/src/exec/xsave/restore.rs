//! XRSTOR and XRSTORS (SDM vol. 1, 13.8 and 13.12): checks the header first, then loads what the area has and resets what it lacks.

use iced_x86::{Code, Instruction};

use super::component::{area_size, bit, places, AREA_MAX, EXTENDED};
use super::fxsave::get_mxcsr;
use super::save::{COMPACTED, MXCSR_INITIAL, XCOMP_BV, XSTATE_BV};
use crate::cpu::Cpu;
use crate::exec::sse::lanes::Lane;
use crate::model::Feature;
use crate::paging::AccessKind;
use crate::uop::{Exec, Handler, Uop};

/// The handler of an instruction of this file.
pub fn handler(insn: &Instruction) -> Option<Handler> {
    Some(match insn.code() {
        Code::Xrstor_mem => xrstor::<false, false>,
        Code::Xrstor64_mem => xrstor::<true, false>,
        Code::Xrstors_mem => xrstors::<false>,
        Code::Xrstors64_mem => xrstors::<true>,
        _ => return None,
    })
}

/// What the header says.
struct Header {
    /// Components that the area holds.
    present: u64,
    /// Components that it has room for; all of them in the standard format.
    room: u64,
    compacted: bool,
}

impl Header {
    /// The header of `area`; `None` where it breaks a rule of the instruction.
    fn parse(area: &[u8], xcr0: u64, may_be_compacted: bool) -> Option<Header> {
        let present = u64::get(&area[XSTATE_BV..], 0);
        let layout = u64::get(&area[XCOMP_BV..], 0);
        let compacted = layout & COMPACTED != 0;
        let room = if compacted { layout & !COMPACTED } else { u64::MAX };
        let reserved = if compacted { &area[XCOMP_BV + 8..EXTENDED] } else { &area[XCOMP_BV..XCOMP_BV + 16] };
        let known = if compacted { may_be_compacted && room & !xcr0 == 0 && present & !room == 0 } else { present & !xcr0 == 0 };
        (known && reserved.iter().all(|byte| *byte == 0)).then_some(Header { present, room, compacted })
    }

    /// MXCSR after loading the components of `requested`; `None` where the area's has reserved bits set.
    fn mxcsr(&self, requested: u64, area: &[u8], old: u32) -> Option<u32> {
        let wanted = if self.compacted { bit::SSE } else { bit::SSE | bit::AVX };
        if requested & wanted == 0 {
            Some(old)
        } else if self.compacted && self.present & bit::SSE == 0 {
            Some(MXCSR_INITIAL)
        } else {
            get_mxcsr(area)
        }
    }
}

/// XRSTORS: for the kernel, and of compacted areas alone. IA32_XSS has no bit yet.
fn xrstors<const WIDE: bool>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_xsave()?;
    cpu.require_cpl0()?;
    xrstor::<WIDE, true>(cpu, uop)
}

fn xrstor<const WIDE: bool, const COMPACTED_ONLY: bool>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_xsave()?;
    let la = cpu.xsave_area(uop, EXTENDED, AccessKind::Read)?;
    let mut area = [0; AREA_MAX];
    cpu.read_area(uop.segment(), la, &mut area[..EXTENDED])?;
    let compaction = cpu.model.has(Feature::Xsavec);
    let header = Header::parse(&area, cpu.state.xcr0, compaction).filter(|header| header.compacted || !COMPACTED_ONLY);
    let Some(header) = header else {
        return Err(cpu.general_protection());
    };
    let requested = cpu.requested_components();
    let Some(mxcsr) = header.mxcsr(requested, &area, cpu.state.fpu.mxcsr) else {
        return Err(cpu.general_protection());
    };
    let loaded = requested & header.present;
    let layout = if header.compacted { header.room } else { loaded };
    let end = area_size(layout, header.compacted);
    cpu.xsave_area(uop, end, AccessKind::Read)?;
    cpu.read_area(uop.segment(), la + EXTENDED as u64, &mut area[EXTENDED..end])?;

    let pkru = cpu.state.fpu.pkru;
    cpu.restore_legacy(requested, header.present, &area, WIDE);
    cpu.state.fpu.mxcsr = mxcsr;
    let count = cpu.xmm_count();
    let fpu = &mut cpu.state.fpu;
    for (component, _) in places(requested & !loaded, true) {
        component.reset(fpu, count);
    }
    for (component, at) in places(layout, header.compacted).filter(|(component, _)| loaded & component.bit != 0) {
        component.get(fpu, count, &area[at..at + component.size]);
    }
    cpu.pkru_changed(pkru);
    Ok(())
}
