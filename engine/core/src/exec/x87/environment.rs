//! FNSTENV, FLDENV, FNSAVE, FRSTOR (SDM vol. 1, figures 8-9 to 8-12).

use iced_x86::{Code, Instruction};

use super::stack::status::TOP;
use crate::cpu::Cpu;
use crate::model::Silicon;
use crate::paging::AccessKind;
use crate::uop::{Exec, Handler, Uop};

/// The handler of an instruction of this file.
pub fn handler(insn: &Instruction) -> Option<Handler> {
    Some(match insn.code() {
        Code::Fnstenv_m14byte => store_environment::<SHORT>,
        Code::Fnstenv_m28byte => store_environment::<LONG>,
        Code::Fldenv_m14byte => load_environment::<SHORT>,
        Code::Fldenv_m28byte => load_environment::<LONG>,
        Code::Fnsave_m94byte => save::<SHORT>,
        Code::Fnsave_m108byte => save::<LONG>,
        Code::Frstor_m94byte => restore::<SHORT>,
        Code::Frstor_m108byte => restore::<LONG>,
        _ => return None,
    })
}

/// Bytes of each of the seven fields of an environment.
const SHORT: usize = 2;
const LONG: usize = 4;
const FIELDS: usize = 7;
const REGISTER: usize = 10;
const MAX: usize = FIELDS * LONG + 8 * REGISTER;

/// What a register holds, in the two bits of the full tag word.
fn tag(register: &[u8; 16]) -> u16 {
    let exponent = u16::from_le_bytes([register[8], register[9]]) & 0x7fff;
    let zero = register[..8].iter().all(|byte| *byte == 0);
    match exponent {
        0 if zero => 1,
        0 | 0x7fff => 2,
        _ if register[7] & 0x80 == 0 => 2,
        _ => 0,
    }
}

impl Cpu {
    /// The full tag word.
    fn full_tags(&self) -> u16 {
        let fpu = &self.state.fpu;
        (0..8).fold(0, |word, n| word | if fpu.ftw >> n & 1 != 0 { tag(&fpu.st[n]) } else { 3 } << (2 * n))
    }

    /// Bits of ST(0), empty or not.
    pub(super) fn raw_st0(&self) -> [u8; 16] {
        self.state.fpu.st[usize::from((self.state.fpu.fsw & TOP) >> 11)]
    }

    /// Linear address of an area of `bytes`, whose first field has `WIDTH`. AMD's silicon looks at that field, then at the limit of the
    /// segment, then at the last byte; Intel's at all of it in order.
    fn area_address<const WIDTH: usize>(&mut self, uop: &Uop, bytes: u64, kind: AccessKind) -> Exec<u64> {
        if self.silicon == Silicon::Intel {
            return self.linear(uop, bytes, kind);
        }
        let first = self.linear(uop, WIDTH as u64, kind)?;
        self.probe_area(uop, first, WIDTH, kind)?;
        let la = self.linear(uop, bytes, kind)?;
        self.probe_area(uop, la.wrapping_add(bytes - 1), 1, kind)?;
        Ok(la)
    }

    /// Fails as an access of up to four bytes would.
    fn probe_area(&mut self, uop: &Uop, la: u64, bytes: usize, kind: AccessKind) -> Exec {
        match kind {
            AccessKind::Write => self.probe_write(uop.segment(), la, bytes as u64),
            _ => self.read_area(uop.segment(), la, &mut [0; LONG][..bytes]),
        }
    }

    /// The seven fields. The code and data selectors read as zero, as on silicon with CPUID.7.0:EBX[13].
    fn environment<const WIDTH: usize>(&self) -> [u32; FIELDS] {
        let fpu = &self.state.fpu;
        let (ip, dp, fop) = (fpu.fip as u32, fpu.fdp as u32, u32::from(fpu.fop));
        let (code, data) = match (self.protected(), WIDTH) {
            (true, LONG) => ([ip, fop << 16], [dp, 0]),
            (true, _) => ([ip, 0], [dp, 0]),
            (false, _) => ([ip & 0xffff, ip >> 16 << 12 | fop], [dp & 0xffff, dp >> 16 << 12]),
        };
        [fpu.fcw.into(), fpu.fsw.into(), self.full_tags().into(), code[0], code[1], data[0], data[1]]
    }

    fn set_environment<const WIDTH: usize>(&mut self, fields: [u32; FIELDS]) {
        let protected = self.protected();
        let [fcw, fsw, tags, ip, code, dp, data] = fields;
        let fpu = &mut self.state.fpu;
        fpu.fsw = fsw as u16;
        fpu.ftw = (0..8).fold(0, |word, n| word | u8::from(tags >> (2 * n) & 3 != 3) << n);
        if protected {
            (fpu.fip, fpu.fdp) = (ip.into(), dp.into());
            if WIDTH == LONG {
                fpu.fop = (code >> 16 & 0x7ff) as u16;
            }
        } else {
            fpu.fip = (ip & 0xffff | code >> 12 << 16).into();
            fpu.fdp = (dp & 0xffff | data >> 12 << 16).into();
            fpu.fop = (code & 0x7ff) as u16;
        }
        self.set_fcw(fcw as u16);
    }
}

/// Writes the fields to the start of `image`; the upper halves of 32-bit fields of 16-bit registers are ones.
fn encode<const WIDTH: usize>(fields: [u32; FIELDS], image: &mut [u8]) {
    for (n, field) in fields.into_iter().enumerate() {
        let sixteen = n < 3 || n == 6;
        let field = if WIDTH == LONG && sixteen { field | 0xffff_0000 } else { field };
        image[n * WIDTH..][..WIDTH].copy_from_slice(&field.to_le_bytes()[..WIDTH]);
    }
}

fn decode<const WIDTH: usize>(image: &[u8]) -> [u32; FIELDS] {
    std::array::from_fn(|n| {
        let mut field = [0; 4];
        field[..WIDTH].copy_from_slice(&image[n * WIDTH..][..WIDTH]);
        u32::from_le_bytes(field)
    })
}

fn store_environment<const WIDTH: usize>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_x87()?;
    let mut image = [0; FIELDS * LONG];
    let image = &mut image[..FIELDS * WIDTH];
    encode::<WIDTH>(cpu.environment::<WIDTH>(), image);
    let la = cpu.area_address::<WIDTH>(uop, image.len() as u64, AccessKind::Write)?;
    cpu.write_area(uop.segment(), la, image)?;
    cpu.set_fcw(cpu.state.fpu.fcw | 0x3f);
    Ok(())
}

fn load_environment<const WIDTH: usize>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.begin_x87()?;
    let mut image = [0; FIELDS * LONG];
    let image = &mut image[..FIELDS * WIDTH];
    let la = cpu.area_address::<WIDTH>(uop, image.len() as u64, AccessKind::Read)?;
    cpu.read_area(uop.segment(), la, image)?;
    cpu.set_environment::<WIDTH>(decode::<WIDTH>(image));
    Ok(())
}

fn save<const WIDTH: usize>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_x87()?;
    let mut image = [0; MAX];
    let image = &mut image[..FIELDS * WIDTH + 8 * REGISTER];
    encode::<WIDTH>(cpu.environment::<WIDTH>(), image);
    let top = usize::from((cpu.state.fpu.fsw & TOP) >> 11);
    for (i, slot) in image[FIELDS * WIDTH..].chunks_exact_mut(REGISTER).enumerate() {
        slot.copy_from_slice(&cpu.state.fpu.st[(top + i) & 7][..REGISTER]);
    }
    let la = cpu.area_address::<WIDTH>(uop, image.len() as u64, AccessKind::Write)?;
    cpu.write_area(uop.segment(), la, image)?;
    cpu.initialize_x87();
    Ok(())
}

fn restore<const WIDTH: usize>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.begin_x87()?;
    let mut image = [0; MAX];
    let image = &mut image[..FIELDS * WIDTH + 8 * REGISTER];
    let la = cpu.area_address::<WIDTH>(uop, image.len() as u64, AccessKind::Read)?;
    cpu.read_area(uop.segment(), la, image)?;
    cpu.set_environment::<WIDTH>(decode::<WIDTH>(image));
    let top = usize::from((cpu.state.fpu.fsw & TOP) >> 11);
    for (i, slot) in image[FIELDS * WIDTH..].chunks_exact(REGISTER).enumerate() {
        cpu.state.fpu.st[(top + i) & 7][..REGISTER].copy_from_slice(slot);
    }
    Ok(())
}
