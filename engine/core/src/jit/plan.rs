//! Which instructions become host code, and what they do to the flags there. All others are run by the interpreter in their place.
//!
//! An instruction may be in here only if the host does exactly what the reference handler does; where hosts differ in flags that somebody
//! sees ([`crate::model::silicon`]), it is left out or has a [`Rule`].

use iced_x86::{Code, ConditionCode, FlowControl, Instruction, Mnemonic, OpKind, Register};

use super::flags::{Overflow, Rule};
use super::registers;
use super::string;
use super::system::control_register;
use super::vector::{self, Extensions, Units};
use super::x87;
use crate::decode::feature;
use crate::exec::float::host::{comparison_keeps_c1, move_keeps_c1};
use crate::memory::PAGE_SIZE;
use crate::model::{Model, Silicon};
use crate::state::rflags::ARITHMETIC;

/// How an instruction is translated.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Plan {
    /// The same instruction with other operands; flags as the rule tells, if it changes any.
    Same(Rule),
    /// The same on vector registers, or on the x87 unit.
    Media(Units),
    /// FLDCW.
    LoadControl,
    Divide,
    ShiftByCl,
    /// ROL or ROR by so many bits.
    Rotate(u32),
    Scan,
    PushFlags,
    DisableInterrupts,
    /// CLD, or with `true` STD.
    Direction(bool),
    /// REP MOVS and REP STOS.
    Repeat,
    SwapGs,
    /// CLAC, or with `true` STAC.
    UserPages(bool),
    /// PUSH from memory.
    PushMemory,
    EnableInterrupts,
    /// MOV from the control register of this number.
    ReadControl(usize),
    ReadSegment,
    /// RDPKRU.
    ReadKeys,
    /// RDTSC, or with `true` RDTSCP.
    ReadTime(bool),
    SystemCall,
    SystemReturn,
    Lea,
    Nothing,
    Push,
    Pop,
    Leave,
    Conditional,
    JumpRelative,
    JumpIndirect,
    CallRelative,
    CallIndirect,
    Return,
    Interpret,
}

impl Plan {
    /// What host code of the instruction works on besides the general registers.
    pub fn units(self) -> Units {
        match self {
            Plan::Media(units) => units,
            Plan::LoadControl => Units { vectors: None, x87: true },
            _ => Units::default(),
        }
    }
}

/// What the host's processor has beyond the base of x86-64.
#[derive(Clone, Copy)]
pub struct Host {
    popcnt: bool,
    lzcnt: bool,
    pub bmi1: bool,
    bmi2: bool,
    adx: bool,
    movbe: bool,
    sse42: bool,
    /// Whether C1 stays behind FCOMI and FCMOVcc, if it is the same for both.
    keeps_c1: Option<bool>,
    pub vectors: Extensions,
}

impl Host {
    pub fn new() -> Self {
        Host {
            popcnt: std::arch::is_x86_feature_detected!("popcnt"),
            lzcnt: std::arch::is_x86_feature_detected!("lzcnt"),
            bmi1: std::arch::is_x86_feature_detected!("bmi1"),
            bmi2: std::arch::is_x86_feature_detected!("bmi2"),
            adx: std::arch::is_x86_feature_detected!("adx"),
            sse42: std::arch::is_x86_feature_detected!("sse4.2"),
            movbe: std::arch::is_x86_feature_detected!("movbe"),
            keeps_c1: Some(comparison_keeps_c1()).filter(|keeps| *keeps == move_keeps_c1()),
            vectors: Extensions::of_host(),
        }
    }
}

/// The plan for `insn`; `live` are the flags behind it that somebody sees.
pub fn plan(insn: &Instruction, live: u64, host: Host, model: &Model) -> Plan {
    if string::is_host_code(insn) {
        return Plan::Repeat;
    }
    if !feature::offers(model, insn) || insn.has_rep_prefix() && insn.mnemonic() != Mnemonic::Ret || insn.has_repne_prefix() {
        return Plan::Interpret;
    }
    match structural(insn) {
        Plan::Interpret if operands_fit(insn) && lock_fits(insn) => {
            let media = units(insn, host, model.silicon()).map(Plan::Media).or_else(|| special(insn, live));
            media.or_else(|| same(insn, live, host, model.silicon()).map(Plan::Same)).unwrap_or(Plan::Interpret)
        }
        other => other,
    }
}

/// The plan for instructions that are more than an operation on operands.
fn structural(insn: &Instruction) -> Plan {
    match insn.code() {
        Code::Pushq_imm8 | Code::Pushq_imm32 | Code::Push_r64 => return Plan::Push,
        Code::Push_rm64 if in_memory(insn) && operands_fit(insn) => return Plan::PushMemory,
        Code::Pop_r64 => return Plan::Pop,
        Code::Leaveq => return Plan::Leave,
        Code::Retnq | Code::Retnq_imm16 => return Plan::Return,
        Code::Call_rel32_64 => return Plan::CallRelative,
        Code::Jmp_rel8_64 | Code::Jmp_rel32_64 => return Plan::JumpRelative,
        Code::Jmp_rm64 if operands_fit(insn) => return Plan::JumpIndirect,
        Code::Call_rm64 if operands_fit(insn) => return Plan::CallIndirect,
        Code::Mov_r64_cr => return control_register(insn).map_or(Plan::Interpret, Plan::ReadControl),
        Code::Mov_r32m16_Sreg | Code::Mov_r64m16_Sreg if !in_memory(insn) => return Plan::ReadSegment,
        Code::Syscall => return Plan::SystemCall,
        Code::Sysretq => return Plan::SystemReturn,
        _ => {}
    }
    match insn.mnemonic() {
        Mnemonic::Lea if address_fits(insn) && insn.op0_register().size() >= 4 => Plan::Lea,
        Mnemonic::Nop | Mnemonic::Endbr64 => Plan::Nothing,
        Mnemonic::Prefetchw | Mnemonic::Prefetchnta | Mnemonic::Prefetcht0 | Mnemonic::Prefetcht1 | Mnemonic::Prefetcht2 => Plan::Nothing,
        Mnemonic::Lfence | Mnemonic::Sfence => Plan::Nothing, // the host's accesses are in order
        Mnemonic::Swapgs => Plan::SwapGs,
        Mnemonic::Stac => Plan::UserPages(true),
        Mnemonic::Clac => Plan::UserPages(false),
        Mnemonic::Pushfq => Plan::PushFlags,
        Mnemonic::Sti => Plan::EnableInterrupts,
        Mnemonic::Rdpkru => Plan::ReadKeys,
        Mnemonic::Rdtsc => Plan::ReadTime(false),
        Mnemonic::Rdtscp => Plan::ReadTime(true),
        Mnemonic::Cli => Plan::DisableInterrupts,
        Mnemonic::Cld => Plan::Direction(false),
        Mnemonic::Std => Plan::Direction(true),
        _ if insn.is_jcc_short_or_near() && insn.op0_kind() == OpKind::NearBranch64 => Plan::Conditional,
        _ => Plan::Interpret,
    }
}

/// What an instruction works on that is the host's own on the units of the guest.
fn units(insn: &Instruction, host: Host, silicon: Silicon) -> Option<Units> {
    if x87::is_host_code(insn) && (!x87::may_keep_c1(insn.mnemonic()) || !silicon.keeps_c1() || host.keeps_c1 == Some(true)) {
        return Some(Units { vectors: None, x87: true });
    }
    vector::width(insn, host.vectors).map(|width| Units { vectors: Some(width), x87: false })
}

/// The plan for operations that take more than one instruction of the host.
fn special(insn: &Instruction, live: u64) -> Option<Plan> {
    use Mnemonic::*;
    let unseen = live & ARITHMETIC == 0;
    Some(match insn.mnemonic() {
        Fldcw => Plan::LoadControl,
        Div | Idiv if wide(insn) => Plan::Divide,
        Shl | Sal | Shr | Sar if !unseen && wide(insn) && insn.op1_kind() == OpKind::Register => Plan::ShiftByCl,
        Rol | Ror if !unseen && !in_memory(insn) => Plan::Rotate(count(insn).filter(|count| *count > 1)?),
        Bsf | Bsr => Plan::Scan,
        _ => return None,
    })
}

fn same(insn: &Instruction, live: u64, host: Host, silicon: Silicon) -> Option<Rule> {
    use Mnemonic::*;
    let unseen = live & ARITHMETIC == 0;
    let of_vendor = |intel, amd| if silicon == Silicon::Amd { amd } else { intel };
    match insn.mnemonic() {
        Mov | Movzx | Movsx | Movsxd | Cbw | Cwde | Cdqe | Cwd | Cdq | Cqo | Not | Bswap if insn.mnemonic() != Bswap || wide(insn) => {
            Some(Rule::Exact)
        }
        // Of two equal operands the sum is what stays.
        Xadd if insn.op0_register().full_register() == insn.op1_register().full_register() => None,
        Xchg | Xadd | Add | Or | Adc | Sbb | And | Sub | Xor | Cmp | Test | Inc | Dec | Neg => Some(Rule::Exact),
        Cmpxchg if in_memory(insn) => Some(Rule::Exact),
        Shl | Sal | Shr | Sar => shift(insn, unseen),
        Rol | Ror => (unseen || count(insn) == Some(1)).then_some(Rule::Exact),
        Rcl | Rcr => (count(insn) == Some(1)).then_some(Rule::Exact),
        Shld | Shrd => (unseen && wide(insn)).then_some(Rule::Exact),
        Imul | Mul => Some(of_vendor(Rule::Product, Rule::ProductAlone)),
        Popcnt => host.popcnt.then_some(Rule::Exact),
        Movbe => host.movbe.then_some(Rule::Exact),
        Shlx | Shrx | Sarx | Rorx | Mulx | Pdep | Pext => host.bmi2.then_some(Rule::Exact),
        Bzhi => host.bmi2.then_some(Rule::CarryAndResult),
        Blsi | Blsr | Blsmsk => host.bmi1.then_some(Rule::CarryAndResult),
        Andn => host.bmi1.then_some(Rule::Result),
        Bextr => (host.bmi1 && insn.op2_kind() != OpKind::Immediate32).then_some(of_vendor(Rule::Result, Rule::Field)),
        Tzcnt => host.bmi1.then_some(of_vendor(Rule::CarryAndResult, Rule::CarryAndZero)),
        Lzcnt => host.lzcnt.then_some(of_vendor(Rule::CarryAndResult, Rule::CarryAndZero)),
        Adcx | Adox => host.adx.then_some(Rule::Exact),
        Crc32 => host.sse42.then_some(Rule::Exact),
        Clc | Stc | Cmc | Lahf | Sahf => Some(Rule::Exact),
        Cmpxchg8b | Cmpxchg16b => Some(Rule::Exact),
        Bt | Bts | Btr | Btc => (insn.op1_kind() == OpKind::Immediate8 || !in_memory(insn)).then_some(Rule::Exact),
        Movnti => Some(Rule::Exact),
        _ if insn.condition_code() != ConditionCode::None && insn.flow_control() == FlowControl::Next => Some(Rule::Exact),
        _ => None,
    }
}

fn shift(insn: &Instruction, unseen: bool) -> Option<Rule> {
    if unseen {
        return Some(Rule::Exact);
    }
    let bits = 8 * size(insn) as u32;
    let overflow = match (count(insn)?, insn.mnemonic()) {
        (0, _) => return None,
        (1, _) => Overflow::Host,
        (count, _) if count >= bits => return None,
        (_, Mnemonic::Shr | Mnemonic::Sar) => Overflow::Clear,
        _ => Overflow::CarryFromSign,
    };
    Some(Rule::Shift(overflow))
}

/// Bytes of the first operand.
fn size(insn: &Instruction) -> usize {
    if insn.op0_kind() == OpKind::Register {
        insn.op0_register().size()
    } else {
        insn.memory_size().size()
    }
}

fn wide(insn: &Instruction) -> bool {
    size(insn) >= 4
}

/// Masked count of a shift or rotate by an immediate.
fn count(insn: &Instruction) -> Option<u32> {
    let mask = if size(insn) == 8 { 63 } else { 31 };
    (insn.op1_kind() == OpKind::Immediate8).then(|| u32::from(insn.immediate8()) & mask)
}

fn in_memory(insn: &Instruction) -> bool {
    (0..insn.op_count()).any(|n| insn.op_kind(n) == OpKind::Memory)
}

/// Whether all operands are immediates, general or vector registers and at most one address that host code can compute.
fn operands_fit(insn: &Instruction) -> bool {
    let memory = in_memory(insn);
    let high = (0..insn.op_count()).any(|n| insn.op_kind(n) == OpKind::Register && registers::is_high_byte(insn.op_register(n)));
    (0..insn.op_count()).all(|n| match insn.op_kind(n) {
        OpKind::Register => {
            let register = insn.op_register(n);
            registers::is_media(register) || register.is_gpr() && !(high && (memory || needs_rex(register)))
        }
        OpKind::Memory => address_fits(insn),
        OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64 | OpKind::FarBranch16 | OpKind::FarBranch32 => false,
        kind => is_immediate(kind),
    }) && resident(insn) <= if memory { 1 } else { 2 }
}

/// Whether the host register of `register` can only be named with a REX prefix.
fn needs_rex(register: Register) -> bool {
    registers::host(register.full_register()).is_none_or(|host| host.number() >= 8)
}

fn is_immediate(kind: OpKind) -> bool {
    use OpKind::*;
    matches!(
        kind,
        Immediate8 | Immediate16 | Immediate32 | Immediate64 | Immediate8to16 | Immediate8to32 | Immediate8to64 | Immediate32to64
    )
}

/// How many register operands stay in memory, and need a scratch register.
fn resident(insn: &Instruction) -> usize {
    let operands = (0..insn.op_count()).filter(|n| insn.op_kind(*n) == OpKind::Register).map(|n| insn.op_register(n));
    operands.filter(|register| register.is_gpr() && registers::host(register.full_register()).is_none()).count()
}

/// Whether host code can compute the address: 64 bits wide, with a displacement that fits.
fn address_fits(insn: &Instruction) -> bool {
    let wide = |register: Register| register == Register::None || register == Register::RIP || register.is_gpr64();
    // What is relative to RIP is computed from the start of the page.
    let in_page = if insn.memory_base() == Register::RIP { PAGE_SIZE as i64 } else { 0 };
    wide(insn.memory_base())
        && wide(insn.memory_index())
        && i32::try_from(insn.memory_displacement64() as i64 + in_page).is_ok()
        && !is_offset(insn.code())
}

/// MOV with an address in place of a ModRM byte.
fn is_offset(code: Code) -> bool {
    use Code::*;
    matches!(
        code,
        Mov_AL_moffs8
            | Mov_AX_moffs16
            | Mov_EAX_moffs32
            | Mov_RAX_moffs64
            | Mov_moffs8_AL
            | Mov_moffs16_AX
            | Mov_moffs32_EAX
            | Mov_moffs64_RAX
    )
}

/// LOCK is kept, where the host's means the same.
fn lock_fits(insn: &Instruction) -> bool {
    !insn.has_lock_prefix() || insn.op0_kind() == OpKind::Memory
}
