//! x87 and MMX instructions as host code: the host's unit holds the guest's registers and control words meanwhile (SDM vol. 1, ch. 8 and 9).
//!
//! The unit is loaded when a block with such instructions begins, and stays so until the interpreter is asked or host code ends;
//! `Native::x87` tells. It never has an exception unmasked: a guest that has one is interpreted, and what can unmask one is the last
//! instruction of its block. The pointer to the last instruction is the guest's affair: host code writes it behind the last x87 instruction
//! of a block, and whoever leaves a block earlier finds it out from the block.

use iced_x86::Register::{R13D, R15D, RBP};
use iced_x86::{Code, CpuidFeature, Instruction, MemoryOperand, Mnemonic, OpKind};

use super::asm::{byte_ptr, dword_ptr, Asm};
use super::block::{Place, Translation};
use super::flags::Rule;
use super::native::{IMAGE, X87};
use super::vector::is_vector;
use crate::cpu::mode::media;
use crate::cpu::Cpu;
use crate::decode::block::Block;
use crate::paging::AccessKind;
use crate::uop::Uop;

/// Bits of the control word that are as an FLDCW makes them, and those that mask all exceptions.
const FCW_KEPT: u16 = 0x1f3f;
const FCW_FIXED: u16 = 0x40;
const FCW_MASKS: u16 = 0x3f;
/// A pending exception in the status word.
const FSW_PENDING: u16 = 0x8080;
const TOP_SHIFT: u16 = 11;

/// What FNSAVE writes in 32-bit protected mode, which is the format in 64-bit mode too: seven words and ST(0) to ST(7).
#[repr(C, align(16))]
#[derive(Default)]
pub struct Image {
    control: u32,
    status: u32,
    tags: u32,
    pointers: [u32; 4],
    registers: [[u16; 5]; 8],
}

const _: () = assert!(std::mem::offset_of!(Image, registers) == 28);

/// Bits of `control` that FLDCW takes, and those that it always sets.
const fn control_word(control: u16) -> u16 {
    control & FCW_KEPT | FCW_FIXED
}

/// Whether the host's unit can run `insn` in the guest's place.
pub fn is_host_code(insn: &Instruction) -> bool {
    let registers = || (0..insn.op_count()).filter(|n| insn.op_kind(*n) == OpKind::Register).map(|n| insn.op_register(n));
    let mmx = registers().any(|register| register.is_mm()) && !registers().any(is_vector) && !is_other(insn.mnemonic());
    let baseline = |feature: &CpuidFeature| {
        use CpuidFeature::*;
        matches!(feature, FPU | FPU287 | FPU387 | CMOV | MMX | SSE | SSE2 | SSE3 | SSSE3)
    };
    let x87 = (sets_pointer(insn.mnemonic()) || is_control(insn.mnemonic())) && !is_open(insn.mnemonic());
    (mmx || x87) && insn.cpuid_features().iter().all(baseline)
}

fn is_control(mnemonic: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(mnemonic, Fnop | Fnstsw | Fnstcw | Fnclex | Wait | Emms)
}

/// Instructions that leave to silicon what becomes of condition bits, or that the manual does not know.
fn is_open(mnemonic: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(mnemonic, Fprem | Fprem1 | Fstpnce)
}

/// Instructions behind which vendors differ in C1.
pub fn may_keep_c1(mnemonic: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(mnemonic, Fcomi | Fcomip | Fucomi | Fucomip)
        || matches!(mnemonic, Fcmovb | Fcmovnb | Fcmove | Fcmovne | Fcmovbe | Fcmovnbe | Fcmovu | Fcmovnu)
}

/// MMX instructions that store selected bytes, or need MXCSR.
fn is_other(mnemonic: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(mnemonic, Maskmovq | Cvtps2pi | Cvttps2pi | Cvtpd2pi | Cvttpd2pi)
}

/// Whether an instruction of the interpreter's in the middle of a block clears the pointer to the last x87 instruction.
fn clears_pointer(mnemonic: Mnemonic) -> bool {
    matches!(mnemonic, Mnemonic::Fninit | Mnemonic::Fnsave)
}

/// Whether an instruction becomes the last x87 instruction that the instruction pointer tells of.
pub fn sets_pointer(mnemonic: Mnemonic) -> bool {
    use Mnemonic::*;
    let moves = matches!(mnemonic, Fld | Fst | Fstp | Fild | Fist | Fistp | Fisttp | Fbld | Fbstp | Fxch | Fstpnce);
    let constants = matches!(mnemonic, Fldz | Fld1 | Fldl2t | Fldl2e | Fldpi | Fldlg2 | Fldln2);
    let sums = matches!(mnemonic, Fadd | Faddp | Fiadd | Fsub | Fsubp | Fisub | Fsubr | Fsubrp | Fisubr);
    let products = matches!(mnemonic, Fmul | Fmulp | Fimul | Fdiv | Fdivp | Fidiv | Fdivr | Fdivrp | Fidivr);
    let comparisons = matches!(
        mnemonic,
        Fcom | Fcomp | Fcompp | Fucom | Fucomp | Fucompp | Ficom | Ficomp | Ftst | Fxam | Fcomi | Fcomip | Fucomi | Fucomip
    );
    let conditional = matches!(mnemonic, Fcmovb | Fcmovnb | Fcmove | Fcmovne | Fcmovbe | Fcmovnbe | Fcmovu | Fcmovnu);
    let functions = matches!(mnemonic, Fabs | Fchs | Fsqrt | Fscale | Fprem | Fprem1 | Frndint | Fxtract);
    let transcendental = matches!(mnemonic, F2xm1 | Fyl2x | Fyl2xp1 | Fptan | Fpatan | Fsin | Fcos | Fsincos | Fincstp | Fdecstp);
    moves || constants || sums || products || comparisons || conditional || functions || transcendental
}

/// Shared code: stores the unit, if the guest's is there, where [`Cpu::take_x87`] finds it. Changes nothing but the flags.
pub fn write_spill(a: &mut Asm) {
    let done = a.create_label();
    a.cmp(byte_ptr(RBP, X87 as i32), 0);
    a.je(done);
    a.must_add(Instruction::with1(Code::Fnsave_m108byte, MemoryOperand::with_base_displ(RBP, IMAGE as i64)));
    a.set_label(done);
    a.ret();
}

/// Shared code: loads the unit from what [`Cpu::give_x87`] has written.
pub fn write_fill(a: &mut Asm) {
    a.must_add(Instruction::with1(Code::Frstor_m108byte, MemoryOperand::with_base_displ(RBP, IMAGE as i64)));
    a.mov(byte_ptr(RBP, X87 as i32), 1);
    a.ret();
}

/// Puts what the guest's unit holds into [`Native`](super::native::Native), from where the host's takes it; zero if the host's may not have
/// it.
///
/// # Safety
/// Host code calls this on the CPU that runs it, with all registers stored.
pub unsafe extern "sysv64" fn enter(cpu: *mut Cpu) -> u32 {
    // SAFETY: valid by the caller's promise, and host code holds no references.
    let cpu = unsafe { &mut *cpu };
    let (fcw, fsw) = (cpu.state.fpu.fcw, cpu.state.fpu.fsw);
    let masked = fcw & FCW_MASKS == FCW_MASKS && fcw == control_word(fcw) && fsw & FSW_PENDING == 0;
    if !masked || cpu.media & (media::TASK_SWITCHED | media::EMULATED) != 0 {
        return 0;
    }
    cpu.give_x87();
    1
}

impl Translation<'_> {
    /// A vector, MMX or x87 instruction. To rotate the stack there and back clears C1, and changes nothing else.
    pub(super) fn media(&mut self, insn: &Instruction, place: Place) {
        self.same(insn, Rule::Exact, place);
        if may_keep_c1(insn.mnemonic()) && !self.out.silicon.keeps_c1() {
            self.out.add(Instruction::with(Code::Fdecstp));
            self.out.add(Instruction::with(Code::Fincstp));
        }
    }

    /// FLDCW of a word that masks all exceptions, as the unit would load it. The interpreter gets the others.
    pub(super) fn load_control(&mut self, insn: &Instruction, place: Place) {
        self.out.clobber_flags(place.seen_before);
        let miss = self.out.detour(place.index);
        let address = self.operand_address(insn);
        let memory = self.out.access(address, 2, AccessKind::Read, miss).of(2);
        let a = &mut *self.out.asm;
        a.movzx(R15D, memory);
        a.mov(R13D, R15D);
        a.and(R13D, i32::from(FCW_MASKS));
        a.cmp(R13D, i32::from(FCW_MASKS));
        a.jne(miss);
        a.and(R15D, i32::from(FCW_KEPT));
        a.or(R15D, i32::from(FCW_FIXED));
        // From where no other core can change it meanwhile.
        a.mov(dword_ptr(RBP, IMAGE as i32), R15D);
        self.out.add_made(Instruction::with1(Code::Fldcw_m2byte, MemoryOperand::with_base_displ(RBP, IMAGE as i64)));
        self.out.rejoin();
    }
}

impl Cpu {
    /// Writes the image that the host's unit is loaded from.
    pub(super) fn give_x87(&mut self) {
        let (fpu, image) = (&self.state.fpu, &mut self.native.image);
        (image.control, image.status) = (fpu.fcw.into(), fpu.fsw.into());
        // FRSTOR finds out by itself what a register that is not empty holds.
        image.tags = (0..8).fold(0, |tags, n| tags | if fpu.ftw >> n & 1 != 0 { 0 } else { 3 << (2 * n) });
        let top = usize::from(fpu.fsw >> TOP_SHIFT);
        for (i, register) in image.registers.iter_mut().enumerate() {
            let bytes = &fpu.st[(top + i) & 7];
            *register = std::array::from_fn(|n| u16::from_le_bytes([bytes[2 * n], bytes[2 * n + 1]]));
        }
    }

    /// Takes over the image that the host's unit was stored to, before instruction `index` of `block` if that is where host code was left.
    pub(super) fn take_x87(&mut self, left: Option<(&Block, usize)>) {
        self.native.x87 = 0;
        let (fpu, image) = (&mut self.state.fpu, &self.native.image);
        (fpu.fcw, fpu.fsw) = (image.control as u16, image.status as u16);
        fpu.ftw = (0..8).fold(0, |tags, n| tags | u8::from(image.tags >> (2 * n) & 3 != 3) << n);
        let top = usize::from(fpu.fsw >> TOP_SHIFT);
        for (i, register) in image.registers.iter().enumerate() {
            let bytes = &mut fpu.st[(top + i) & 7];
            register.iter().enumerate().for_each(|(n, word)| bytes[2 * n..2 * n + 2].copy_from_slice(&word.to_le_bytes()));
        }
        if let Some((block, index)) = left {
            let mnemonic = |uop: &Uop| Code::try_from(usize::from(uop.code)).map_or(Mnemonic::INVALID, Code::mnemonic);
            let about = |uop: &&Uop| sets_pointer(mnemonic(uop)) || clears_pointer(mnemonic(uop));
            if let Some(last) = block.uops[..index].iter().rev().find(about).filter(|uop| sets_pointer(mnemonic(uop))) {
                self.state.fpu.fip = self.rip_at(last.offset.into());
            }
        }
    }
}
