//! FLD, FST, FILD, FIST, FISTTP, FBLD, FBSTP, FXCH and the constants (SDM vol. 1, 8.3.3 and 8.3.4).

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::stack::status::{EXCEPTIONS, INVALID, OVERFLOW, STACK_FAULT, UNDERFLOW};
use crate::cpu::Cpu;
use crate::exec::float::frame::{float80, Float80, Operation, INDEFINITE};
use crate::exec::float::unit::x87_operations;
use crate::paging::AccessKind;
use crate::uop::{Exec, Handler, Uop};
use crate::word::Plain;

// The loads replace ST(0) so that the frame has the value in `st0`.
x87_operations! {
    LoadSingle => "fld dword ptr [{frame} + 32]";
    LoadDouble => "fld qword ptr [{frame} + 32]";
    LoadShort => "fild word ptr [{frame} + 32]";
    LoadLong => "fild dword ptr [{frame} + 32]";
    LoadQuad => "fild qword ptr [{frame} + 32]";
    LoadDecimal => "fbld tbyte ptr [{frame} + 32]";
    StoreSingle => "fst dword ptr [{frame} + 32]";
    StoreDouble => "fst qword ptr [{frame} + 32]";
    StoreShort => "fistp word ptr [{frame} + 32]";
    StoreLong => "fistp dword ptr [{frame} + 32]";
    StoreQuad => "fistp qword ptr [{frame} + 32]";
    StoreDecimal => "fbstp tbyte ptr [{frame} + 32]";
    TruncateShort => "fisttp word ptr [{frame} + 32]";
    TruncateLong => "fisttp dword ptr [{frame} + 32]";
    TruncateQuad => "fisttp qword ptr [{frame} + 32]";
    One => "fld1";
    Log2Of10 => "fldl2t";
    Log2OfE => "fldl2e";
    Pi => "fldpi";
    Log10Of2 => "fldlg2";
    LogEOf2 => "fldln2";
}

/// The handler of an instruction of this file.
pub fn handler(insn: &Instruction) -> Option<Handler> {
    let register = insn.op0_kind() == OpKind::Register;
    let size = insn.memory_size().size();
    Some(match (insn.mnemonic(), size) {
        (Mnemonic::Fld, 4) => load::<LoadSingle, [u8; 4]>,
        (Mnemonic::Fld, 8) => load::<LoadDouble, [u8; 8]>,
        (Mnemonic::Fld, 10) => load_extended,
        (Mnemonic::Fld, _) => load_register,
        (Mnemonic::Fild, 2) => load::<LoadShort, [u8; 2]>,
        (Mnemonic::Fild, 4) => load::<LoadLong, [u8; 4]>,
        (Mnemonic::Fild, _) => load::<LoadQuad, [u8; 8]>,
        (Mnemonic::Fbld, _) => load::<LoadDecimal, [u8; 10]>,
        (Mnemonic::Fst, _) if register => store_register::<0>,
        (Mnemonic::Fst, 4) => store::<StoreSingle, [u8; 4], 0>,
        (Mnemonic::Fst, _) => store::<StoreDouble, [u8; 8], 0>,
        (Mnemonic::Fstp, _) if register => store_register::<1>,
        (Mnemonic::Fstp, 4) => store::<StoreSingle, [u8; 4], 1>,
        (Mnemonic::Fstp, 8) => store::<StoreDouble, [u8; 8], 1>,
        (Mnemonic::Fstp, _) => store_extended,
        (Mnemonic::Fist, 2) => store::<StoreShort, [u8; 2], 0>,
        (Mnemonic::Fist, _) => store::<StoreLong, [u8; 4], 0>,
        (Mnemonic::Fistp, 2) => store::<StoreShort, [u8; 2], 1>,
        (Mnemonic::Fistp, 4) => store::<StoreLong, [u8; 4], 1>,
        (Mnemonic::Fistp, _) => store::<StoreQuad, [u8; 8], 1>,
        (Mnemonic::Fisttp, 2) => store::<TruncateShort, [u8; 2], 1>,
        (Mnemonic::Fisttp, 4) => store::<TruncateLong, [u8; 4], 1>,
        (Mnemonic::Fisttp, _) => store::<TruncateQuad, [u8; 8], 1>,
        (Mnemonic::Fbstp, _) => store::<StoreDecimal, [u8; 10], 1>,
        (Mnemonic::Fstpnce, _) => store_unless_empty,
        (Mnemonic::Fxch, _) => exchange,
        (Mnemonic::Fldz, _) => load_zero,
        (Mnemonic::Fld1, _) => load_constant::<One>,
        (Mnemonic::Fldl2t, _) => load_constant::<Log2Of10>,
        (Mnemonic::Fldl2e, _) => load_constant::<Log2OfE>,
        (Mnemonic::Fldpi, _) => load_constant::<Pi>,
        (Mnemonic::Fldlg2, _) => load_constant::<Log10Of2>,
        (Mnemonic::Fldln2, _) => load_constant::<LogEOf2>,
        _ => return None,
    })
}

const ZERO: Float80 = float80(0, 0);

/// An operand in memory as bytes.
trait Bytes: Plain + AsRef<[u8]> {
    fn from_slice(bytes: &[u8]) -> Self;
}
macro_rules! bytes {
    ($($n:literal)*) => {$(
        impl Bytes for [u8; $n] {
            fn from_slice(bytes: &[u8]) -> Self {
                let mut value = [0; $n];
                value.copy_from_slice(&bytes[..$n]);
                value
            }
        }
    )*};
}
bytes!(2 4 8 10);

fn load<O: Operation, B: Bytes>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.begin_x87()?;
    let operand: B = cpu.load(uop)?;
    let frame = cpu.operate::<O>(ZERO, ZERO, operand.as_ref());
    cpu.load_x87(uop, frame.status, frame.st0);
    Ok(())
}

fn load_constant<O: Operation>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.begin_x87()?;
    let frame = cpu.operate::<O>(ZERO, ZERO, &[]);
    cpu.load_x87(uop, 0, frame.st0);
    Ok(())
}

fn load_zero(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.begin_x87()?;
    cpu.load_x87(uop, 0, ZERO);
    Ok(())
}

/// An 80-bit load converts nothing, so it raises nothing.
fn load_extended(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.begin_x87()?;
    let operand: [u8; 10] = cpu.load(uop)?;
    let mut value = ZERO;
    value[..10].copy_from_slice(&operand);
    cpu.load_x87(uop, 0, value);
    Ok(())
}

fn load_register(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.begin_x87()?;
    match cpu.st(uop.reg[0]) {
        Some(value) => cpu.load_x87(uop, 0, value),
        None if cpu.underflow(uop, None) => cpu.push_x87(INDEFINITE),
        None => {}
    }
    Ok(())
}

/// Stores ST(0) in another format. Unmasked exceptions of the conversion, but for precision, leave memory and stack alone.
fn store<O: Operation, B: Bytes, const POPS: u8>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.begin_x87()?;
    let (value, empty) = match cpu.st(0) {
        Some(value) => (value, 0),
        None => (INDEFINITE, INVALID | STACK_FAULT),
    };
    let frame = cpu.operate::<O>(value, ZERO, &[]);
    let raised = frame.status | empty;
    let stops = EXCEPTIONS & !cpu.state.fpu.fcw & (INVALID | OVERFLOW | UNDERFLOW);
    if raised & stops == 0 {
        cpu.store(uop, B::from_slice(&frame.memory))?;
        cpu.conclude(uop, raised);
        cpu.pop_x87(POPS);
    } else {
        cpu.probe_store(uop, size_of::<B>() as u64)?;
        cpu.conclude(uop, raised);
    }
    Ok(())
}

fn store_extended(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.begin_x87()?;
    let (value, raised) = match cpu.st(0) {
        Some(value) => (value, 0),
        None => (INDEFINITE, INVALID | STACK_FAULT),
    };
    if raised & !cpu.state.fpu.fcw & INVALID == 0 {
        cpu.store(uop, <[u8; 10]>::from_slice(&value))?;
        cpu.conclude(uop, raised);
        cpu.pop_x87(1);
    } else {
        cpu.probe_store(uop, 10)?;
        cpu.conclude(uop, raised);
    }
    Ok(())
}

fn store_register<const POPS: u8>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.begin_x87()?;
    let done = match cpu.st(0) {
        Some(value) => {
            cpu.set_st(uop.reg[0], value);
            cpu.conclude(uop, 0)
        }
        None => cpu.underflow(uop, Some(uop.reg[0])),
    };
    if done {
        cpu.pop_x87(POPS);
    }
    Ok(())
}

/// D9 D8+i, which the manuals leave out: FSTP that pops an empty ST(0) without an exception and without storing.
fn store_unless_empty(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.begin_x87()?;
    if let Some(value) = cpu.st(0) {
        cpu.set_st(uop.reg[0], value);
    }
    cpu.conclude(uop, 0);
    cpu.pop_x87(1);
    Ok(())
}

/// FXCH fills an empty register with the default NaN first.
fn exchange(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.begin_x87()?;
    let other = uop.reg[1];
    let (a, b) = (cpu.st(0), cpu.st(other));
    let done = if a.is_some() && b.is_some() { cpu.conclude(uop, 0) } else { cpu.underflow(uop, None) };
    if done {
        cpu.set_st(0, b.unwrap_or(INDEFINITE));
        cpu.set_st(other, a.unwrap_or(INDEFINITE));
    }
    Ok(())
}

impl Cpu {
    /// Fails as a store of `bytes` would, without storing.
    fn probe_store(&mut self, uop: &Uop, bytes: u64) -> Exec {
        let la = self.linear(uop, bytes, AccessKind::Write)?;
        self.probe_write(uop.segment(), la, bytes)
    }
}
