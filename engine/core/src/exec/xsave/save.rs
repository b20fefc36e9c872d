//! XSAVE, XSAVEOPT, XSAVEC, XSAVES (SDM vol. 1, 13.7 to 13.11).
//!
//! XSAVEOPT uses the init optimisation only: the modified optimisation is optional, and pays on silicon alone.

use iced_x86::{Code, Instruction};

use super::component::{area_size, bit, places, EXTENDED};
use super::fxsave::{offset, put_mxcsr, put_x87, put_xmm, LEGACY_SIZE};
use crate::cpu::Cpu;
use crate::fault::vector;
use crate::paging::AccessKind;
use crate::state::{cr0, cr4, gpr};
use crate::uop::{Exec, Handler, Uop};

/// Bit of XCOMP_BV that says that an area is compacted.
pub const COMPACTED: u64 = 1 << 63;
/// Places in the area of the header's bitmaps.
pub const XSTATE_BV: usize = LEGACY_SIZE;
pub const XCOMP_BV: usize = LEGACY_SIZE + 8;
/// MXCSR after reset.
pub const MXCSR_INITIAL: u32 = 0x1f80;

/// The handler of an instruction of this file.
pub fn handler(insn: &Instruction) -> Option<Handler> {
    Some(match insn.code() {
        Code::Xsave_mem => xsave::<false, false>,
        Code::Xsave64_mem => xsave::<true, false>,
        Code::Xsaveopt_mem => xsave::<false, true>,
        Code::Xsaveopt64_mem => xsave::<true, true>,
        Code::Xsavec_mem => xsavec::<false>,
        Code::Xsavec64_mem => xsavec::<true>,
        Code::Xsaves_mem => xsaves::<false>,
        Code::Xsaves64_mem => xsaves::<true>,
        _ => return None,
    })
}

impl Cpu {
    /// First step of the XSAVE family: #UD without CR4.OSXSAVE, #NM with CR0.TS.
    pub(super) fn require_xsave(&mut self) -> Exec {
        if self.state.cr4 & cr4::OSXSAVE == 0 {
            return Err(self.undefined());
        }
        if self.state.cr0 & cr0::TS != 0 {
            return Err(self.raise(vector::NM));
        }
        Ok(())
    }

    /// Components that the instruction works on: those of EDX:EAX that XCR0 enables.
    pub(super) fn requested_components(&self) -> u64 {
        let mask = self.gpr(gpr::RDX) << 32 | self.gpr(gpr::RAX) & 0xffff_ffff;
        self.state.xcr0 & mask
    }

    /// Address of an area of `bytes`, which must be aligned to 64.
    pub(super) fn xsave_area(&mut self, uop: &Uop, bytes: usize, kind: AccessKind) -> Exec<u64> {
        let la = self.linear(uop, bytes as u64, kind)?;
        if la & 63 != 0 {
            return Err(self.general_protection());
        }
        Ok(la)
    }

    /// Writes the components of `mask`: x87 and XMM to the legacy region, the others to their places.
    fn save_components(&mut self, segment: usize, la: u64, mask: u64, places: impl Iterator<Item = Place>, wide: bool) -> Exec {
        let count = self.xmm_count();
        let mut image = [0; LEGACY_SIZE];
        if mask & bit::X87 != 0 {
            put_x87(&self.state.fpu, &mut image, wide);
            self.write_area(segment, la, &image[..offset::MXCSR])?;
            self.write_area(segment, la + offset::ST as u64, &image[offset::ST..offset::XMM])?;
        }
        if mask & bit::SSE != 0 {
            put_xmm(&self.state.fpu, &mut image, count);
            self.write_area(segment, la + offset::XMM as u64, &image[offset::XMM..offset::XMM + 16 * count])?;
        }
        for (component, at) in places.filter(|(component, _)| mask & component.bit != 0) {
            let mut slot = [0; 1024];
            component.put(&self.state.fpu, count, &mut slot[..component.size]);
            self.write_area(segment, la + at as u64, &slot[..component.size])?;
        }
        Ok(())
    }

    fn save_mxcsr(&mut self, segment: usize, la: u64) -> Exec {
        let mut image = [0; LEGACY_SIZE];
        put_mxcsr(&self.state.fpu, &mut image);
        self.write_area(segment, la + offset::MXCSR as u64, &image[offset::MXCSR..offset::ST])
    }
}

/// A component and where it is.
type Place = (&'static super::component::Component, usize);

/// XSAVE and XSAVEOPT: the standard format. `INIT` leaves out components in their initial configuration.
fn xsave<const WIDE: bool, const INIT: bool>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_xsave()?;
    let requested = cpu.requested_components();
    let size = area_size(requested, false);
    let la = cpu.xsave_area(uop, size, AccessKind::Write)?;
    let segment = uop.segment();
    cpu.probe_write(segment, la, size as u64)?;
    let in_use = cpu.components_in_use();
    let old: u64 = cpu.read(segment, la + XSTATE_BV as u64)?;
    let saved = if INIT { requested & in_use } else { requested };
    cpu.save_components(segment, la, saved, places(requested, false), WIDE)?;
    if requested & (bit::SSE | bit::AVX) != 0 {
        cpu.save_mxcsr(segment, la)?;
    }
    cpu.write(segment, la + XSTATE_BV as u64, old & !requested | in_use & requested)
}

fn xsavec<const WIDE: bool>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_xsave()?;
    let requested = cpu.requested_components();
    let size = area_size(requested, true);
    let la = cpu.xsave_area(uop, size, AccessKind::Write)?;
    let segment = uop.segment();
    cpu.probe_write(segment, la, size as u64)?;
    let mut saved = cpu.components_in_use();
    if cpu.state.fpu.mxcsr != MXCSR_INITIAL {
        saved |= bit::SSE;
    }
    saved &= requested;
    cpu.save_components(segment, la, saved, places(requested, true), WIDE)?;
    if saved & bit::SSE != 0 {
        cpu.save_mxcsr(segment, la)?;
    }
    let mut header = [0; EXTENDED - LEGACY_SIZE];
    header[..8].copy_from_slice(&saved.to_le_bytes());
    header[8..16].copy_from_slice(&(requested | COMPACTED).to_le_bytes());
    cpu.write_area(segment, la + LEGACY_SIZE as u64, &header)
}

/// XSAVEC for the kernel. IA32_XSS has no bit yet, so there is no component that it alone could save.
fn xsaves<const WIDE: bool>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_xsave()?;
    cpu.require_cpl0()?;
    xsavec::<WIDE>(cpu, uop)
}
