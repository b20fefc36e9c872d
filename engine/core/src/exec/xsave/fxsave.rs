//! FXSAVE and FXRSTOR, and the legacy region that XSAVE shares with them (SDM vol. 1, 10.5.1; vol. 2, FXSAVE).

use iced_x86::{Code, Instruction};

use crate::cpu::Cpu;
use crate::fault::vector;
use crate::paging::AccessKind;
use crate::state::{cr0, efer, Fpu};
use crate::uop::{Exec, Handler, Uop};

/// Bytes of the legacy region.
pub const LEGACY_SIZE: usize = 512;
/// Writable bits of MXCSR, as FXSAVE reports them.
pub const MXCSR_MASK: u32 = 0xffff;

/// Places in the legacy region.
pub mod offset {
    pub const FCW: usize = 0;
    pub const FSW: usize = 2;
    pub const FTW: usize = 4;
    pub const FOP: usize = 6;
    pub const FIP: usize = 8;
    pub const FDP: usize = 16;
    pub const MXCSR: usize = 24;
    pub const MXCSR_MASK: usize = 28;
    pub const ST: usize = 32;
    pub const XMM: usize = 160;
    pub const XMM_END: usize = 416;
}

/// The handler of an instruction of this file.
pub fn handler(insn: &Instruction) -> Option<Handler> {
    Some(match insn.code() {
        Code::Fxsave_m512byte => fxsave::<false>,
        Code::Fxsave64_m512byte => fxsave::<true>,
        Code::Fxrstor_m512byte => fxrstor::<false>,
        Code::Fxrstor64_m512byte => fxrstor::<true>,
        _ => return None,
    })
}

/// A little-endian field of an image.
fn field<const N: usize>(image: &[u8], at: usize) -> [u8; N] {
    let mut bytes = [0; N];
    bytes.copy_from_slice(&image[at..at + N]);
    bytes
}

/// Writes the x87 part of the legacy region. `wide`: 64-bit instruction pointers instead of 32-bit ones with selectors.
pub fn put_x87(fpu: &Fpu, image: &mut [u8], wide: bool) {
    image[offset::FCW..][..2].copy_from_slice(&fpu.fcw.to_le_bytes());
    image[offset::FSW..][..2].copy_from_slice(&fpu.fsw.to_le_bytes());
    image[offset::FTW..][..2].copy_from_slice(&u16::from(fpu.ftw).to_le_bytes());
    image[offset::FOP..][..2].copy_from_slice(&fpu.fop.to_le_bytes());
    // The selectors behind 32-bit pointers read as zero, as on silicon with CPUID.7.0:EBX[13].
    let kept = if wide { u64::MAX } else { u32::MAX.into() };
    image[offset::FIP..][..8].copy_from_slice(&(fpu.fip & kept).to_le_bytes());
    image[offset::FDP..][..8].copy_from_slice(&(fpu.fdp & kept).to_le_bytes());
    for (i, slot) in image[offset::ST..offset::XMM].chunks_exact_mut(16).enumerate() {
        slot[..10].copy_from_slice(&fpu.st[physical(fpu.fsw, i)][..10]);
        slot[10..].fill(0);
    }
}

/// Loads the x87 part of the legacy region.
pub fn get_x87(cpu: &mut Cpu, image: &[u8], wide: bool) {
    let fpu = &mut cpu.state.fpu;
    fpu.fsw = u16::from_le_bytes(field(image, offset::FSW));
    fpu.ftw = image[offset::FTW];
    fpu.fop = u16::from_le_bytes(field(image, offset::FOP)) & 0x7ff;
    let kept = if wide { u64::MAX } else { u32::MAX.into() };
    fpu.fip = u64::from_le_bytes(field(image, offset::FIP)) & kept;
    fpu.fdp = u64::from_le_bytes(field(image, offset::FDP)) & kept;
    for (i, slot) in image[offset::ST..offset::XMM].chunks_exact(16).enumerate() {
        fpu.st[physical(fpu.fsw, i)][..10].copy_from_slice(&slot[..10]);
    }
    cpu.set_fcw(u16::from_le_bytes(field(image, offset::FCW)));
}

/// Physical number of ST(`i`).
fn physical(fsw: u16, i: usize) -> usize {
    (usize::from(fsw >> 11) + i) & 7
}

/// Writes `count` XMM registers.
pub fn put_xmm(fpu: &Fpu, image: &mut [u8], count: usize) {
    for (register, slot) in fpu.vector.iter().zip(image[offset::XMM..offset::XMM_END].chunks_exact_mut(16)).take(count) {
        slot.copy_from_slice(&register[..16]);
    }
}

/// Loads `count` XMM registers.
pub fn get_xmm(fpu: &mut Fpu, image: &[u8], count: usize) {
    for (register, slot) in fpu.vector.iter_mut().zip(image[offset::XMM..offset::XMM_END].chunks_exact(16)).take(count) {
        register[..16].copy_from_slice(slot);
    }
}

/// Writes MXCSR and its mask.
pub fn put_mxcsr(fpu: &Fpu, image: &mut [u8]) {
    image[offset::MXCSR..][..4].copy_from_slice(&fpu.mxcsr.to_le_bytes());
    image[offset::MXCSR_MASK..][..4].copy_from_slice(&MXCSR_MASK.to_le_bytes());
}

/// MXCSR of an image; `None` where reserved bits are set.
pub fn get_mxcsr(image: &[u8]) -> Option<u32> {
    let value = u32::from_le_bytes(field(image, offset::MXCSR));
    (value & !MXCSR_MASK == 0).then_some(value)
}

impl Cpu {
    /// How many XMM registers the running code sees.
    pub(in crate::exec) fn xmm_count(&self) -> usize {
        if self.long_mode() {
            16
        } else {
            8
        }
    }

    /// XMM registers that FXSAVE moves: none with EFER.FFXSR at CPL 0 of 64-bit code (APM vol. 2, 11.4.4). Without CR4.OSFXSR they
    /// are moved all the same, as on Intel silicon.
    fn fxsave_registers(&self) -> usize {
        if self.state.efer & efer::FFXSR != 0 && self.long_mode() && self.cpl() == 0 {
            0
        } else {
            self.xmm_count()
        }
    }

    /// #NM with CR0.EM or CR0.TS; then the address of the area, which must be aligned to 16 bytes.
    fn fx_area(&mut self, uop: &Uop, kind: AccessKind) -> Exec<u64> {
        if self.state.cr0 & (cr0::EM | cr0::TS) != 0 {
            return Err(self.raise(vector::NM));
        }
        let la = self.linear(uop, LEGACY_SIZE as u64, kind)?;
        if la & 15 != 0 {
            return Err(self.general_protection());
        }
        Ok(la)
    }
}

/// Bytes 464 to 511 belong to software and stay; the reserved ones below are kept as well.
fn fxsave<const WIDE: bool>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let la = cpu.fx_area(uop, AccessKind::Write)?;
    let registers = cpu.fxsave_registers();
    let mut image = [0; offset::XMM_END];
    put_x87(&cpu.state.fpu, &mut image, WIDE);
    put_mxcsr(&cpu.state.fpu, &mut image);
    put_xmm(&cpu.state.fpu, &mut image, registers);
    cpu.probe_write(uop.segment(), la, LEGACY_SIZE as u64)?;
    cpu.write_area(uop.segment(), la, &image[..offset::XMM + 16 * registers])
}

fn fxrstor<const WIDE: bool>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let la = cpu.fx_area(uop, AccessKind::Read)?;
    let registers = cpu.fxsave_registers();
    let mut image = [0; LEGACY_SIZE];
    cpu.read_area(uop.segment(), la, &mut image)?;
    let Some(mxcsr) = get_mxcsr(&image) else {
        return Err(cpu.general_protection());
    };
    get_x87(cpu, &image, WIDE);
    cpu.state.fpu.mxcsr = mxcsr;
    get_xmm(&mut cpu.state.fpu, &image, registers);
    Ok(())
}
