//! Identification, model-specific registers, time stamps and random numbers: CPUID, RDMSR, WRMSR, RDTSC, RDTSCP, RDPID, RDPMC, RDRAND,
//! RDSEED (SDM vol. 2; MSR bitmaps: SDM vol. 3, 25.6.9; APM vol. 2, 15.11).
//!
//! The registers that this core executes without its hypervisor are those that live in [`crate::state::State`] and those of its
//! [`crate::pmu`]; every other index raises #GP when it is not intercepted.

use iced_x86::{Instruction, Mnemonic};

use crate::cpu::{CodeSize, Cpu};
use crate::flags::Flags;
use crate::model::msrs::index;
use crate::model::Feature;
use crate::pmu::lvt;
use crate::pmu::registers::{self as pmu, debugctl_bits};
use crate::state::{cr0, cr4, efer, gpr, rflags, seg};
use crate::uop::{Exec, Handler, Stop, Uop};
use crate::virt::apic;
use crate::virt::control::intercept;
use crate::virt::exits::{code, Code};
use crate::word::Word;

/// The handler of an instruction of this family.
pub fn handler(insn: &Instruction, _size: CodeSize) -> Option<Handler> {
    let handler: Handler = match (insn.mnemonic(), insn.op0_register().size()) {
        (Mnemonic::Cpuid, _) => cpuid,
        (Mnemonic::Rdmsr, _) => rdmsr,
        (Mnemonic::Wrmsr, _) => wrmsr,
        (Mnemonic::Rdtsc, _) => rdtsc,
        (Mnemonic::Rdtscp, _) => rdtscp,
        (Mnemonic::Rdpid, _) => rdpid,
        (Mnemonic::Rdpmc, _) => rdpmc,
        (Mnemonic::Rdrand, 2) => rdrand::<u16>,
        (Mnemonic::Rdrand, 4) => rdrand::<u32>,
        (Mnemonic::Rdrand, 8) => rdrand::<u64>,
        (Mnemonic::Rdseed, 2) => rdseed::<u16>,
        (Mnemonic::Rdseed, 4) => rdseed::<u32>,
        (Mnemonic::Rdseed, 8) => rdseed::<u64>,
        _ => return None,
    };
    Some(handler)
}

/// Instructions of this family after which the dispatcher must look at the CPU, or before which all others of the block must have retired:
/// a virtual TSC and performance counters count them.
pub fn ends_block(insn: &Instruction) -> bool {
    matches!(insn.mnemonic(), Mnemonic::Wrmsr | Mnemonic::Rdmsr | Mnemonic::Rdpmc | Mnemonic::Rdtsc | Mnemonic::Rdtscp)
}

// ---- identification -----------------------------------------------------------------------------------------------------------------

/// CPUID always exits on Intel silicon (SDM vol. 3, 26.1.2).
fn cpuid(cpu: &mut Cpu, _uop: &Uop) -> Exec {
    if !cpu.model.is_amd() || cpu.control.intercepts(intercept::CPUID) {
        return Err(cpu.exit(code::CPUID, 0));
    }
    let (leaf, subleaf) = (cpu.gpr(gpr::RAX) as u32, cpu.gpr(gpr::RCX) as u32);
    let [eax, ebx, ecx, edx] = current_cpuid(cpu, leaf, subleaf);
    for (register, value) in [(gpr::RAX, eax), (gpr::RBX, ebx), (gpr::RCX, ecx), (gpr::RDX, edx)] {
        cpu.set_gpr(register, value.into());
    }
    Ok(())
}

/// The model's answer with the bits that follow the registers of this CPU.
fn current_cpuid(cpu: &Cpu, leaf: u32, subleaf: u32) -> [u32; 4] {
    const OSXSAVE: u32 = 1 << 27;
    let model = &cpu.model;
    let mut answer = model.cpuid(leaf, subleaf);
    match (leaf, subleaf) {
        (1, _) if cpu.state.cr4 & cr4::OSXSAVE != 0 => answer[2] |= OSXSAVE,
        (0xd, 0) if model.has(Feature::Xsave) => answer[1] = model.xsave_size(cpu.state.xcr0),
        (0xd, 1) if model.has(Feature::Xsavec) => answer[1] = model.xsave_size_compacted(cpu.state.xcr0 | cpu.state.xss),
        _ => {}
    }
    answer
}

// ---- model-specific registers -------------------------------------------------------------------------------------------------------

fn rdmsr(cpu: &mut Cpu, _uop: &Uop) -> Exec {
    cpu.require_cpl0()?;
    let index = cpu.gpr(gpr::RCX) as u32;
    check_msr_intercept(cpu, index, false)?;
    let value = read_msr(cpu, index)?;
    set_edx_eax(cpu, value);
    Ok(())
}

fn wrmsr(cpu: &mut Cpu, _uop: &Uop) -> Exec {
    cpu.require_cpl0()?;
    let index = cpu.gpr(gpr::RCX) as u32;
    check_msr_intercept(cpu, index, true)?;
    let value = cpu.gpr(gpr::RDX) << 32 | cpu.gpr(gpr::RAX) & 0xffff_ffff;
    if value & !writable_bits(cpu, index) != 0 {
        return Err(exit_for_msr(cpu, index, true));
    }
    match index {
        apic::EOI | apic::ICR | apic::SELF_IPI if cpu.apic.is_enabled() => cpu.write_apic(index, value)?,
        _ => write_msr(cpu, index, value)?,
    }
    Err(Stop::Leave)
}

fn set_edx_eax(cpu: &mut Cpu, value: u64) {
    cpu.set_gpr(gpr::RAX, value & 0xffff_ffff);
    cpu.set_gpr(gpr::RDX, value >> 32);
}

fn check_msr_intercept(cpu: &mut Cpu, index: u32, write: bool) -> Exec {
    let of_apic = (apic::FIRST..=apic::LAST).contains(&index);
    if cpu.control.intercepts(intercept::MSR_BITMAP) && !cpu.msr_intercepted(index, write) && !(of_apic && cpu.emulates()) {
        return Ok(());
    }
    Err(exit_for_msr(cpu, index, write))
}

fn exit_for_msr(cpu: &mut Cpu, index: u32, write: bool) -> Stop {
    let (number, detail) = if write { (code::WRMSR, 1) } else { (code::RDMSR, 0) };
    let detail = if cpu.model.is_amd() { detail } else { 0 };
    let stop = cpu.exit(number, detail);
    cpu.exit.msr_index = index;
    stop
}

/// The bits of an MSR that its bitmap lets the guest write which the hypervisor leaves to the guest.
fn writable_bits(cpu: &Cpu, index: u32) -> u64 {
    if cpu.pmu.virtual_lvtpc.is_none() {
        return u64::MAX;
    }
    match index {
        index::DEBUGCTL => cpu.control.guest_debugctl_mask,
        pmu::index::GLOBAL_STATUS_RESET => cpu.control.guest_status_mask,
        pmu::index::X2APIC_LVTPC => lvt::BITS,
        _ => u64::MAX,
    }
}

fn read_msr(cpu: &mut Cpu, index: u32) -> Exec<u64> {
    let state = &cpu.state;
    let value = match index {
        index::TSC => cpu.guest_tsc(),
        index::SYSENTER_CS => state.sysenter_cs,
        index::SYSENTER_ESP => state.sysenter_esp,
        index::SYSENTER_EIP => state.sysenter_eip,
        index::DEBUGCTL => state.debugctl,
        index::PAT => state.pat,
        index::EFER => state.efer,
        index::STAR => state.star,
        index::LSTAR => state.lstar,
        index::CSTAR => state.cstar,
        index::FMASK => state.fmask,
        index::FS_BASE => state.segments[seg::FS].base,
        index::GS_BASE => state.segments[seg::GS].base,
        index::KERNEL_GS_BASE => state.kernel_gs_base,
        index::TSC_AUX if has_tsc_aux(cpu) => state.tsc_aux,
        index::SPEC_CTRL if spec_ctrl_bits(cpu) != 0 => state.spec_ctrl,
        index::XSS if cpu.model.has(Feature::Xsaves) => state.xss,
        index::PKRS if cpu.model.has(Feature::Pks) => state.pkrs,
        _ => return cpu.read_pmu(index),
    };
    Ok(value)
}

fn write_msr(cpu: &mut Cpu, index: u32, value: u64) -> Exec {
    check_msr_value(cpu, index, value)?;
    let amd = cpu.model.is_amd();
    let state = &mut cpu.state;
    match index {
        index::SYSENTER_CS => state.sysenter_cs = value,
        // AMD silicon has SYSENTER in legacy mode only, and keeps 32 bits of its addresses.
        index::SYSENTER_ESP => state.sysenter_esp = if amd { value & 0xffff_ffff } else { value },
        index::SYSENTER_EIP => state.sysenter_eip = if amd { value & 0xffff_ffff } else { value },
        index::DEBUGCTL => write_debugctl(cpu, value),
        index::PAT => state.pat = value,
        index::EFER => write_efer(cpu, value),
        index::STAR => state.star = value,
        index::LSTAR => state.lstar = value,
        index::CSTAR => state.cstar = value,
        index::FMASK => state.fmask = value,
        index::FS_BASE => write_base(cpu, seg::FS, value),
        index::GS_BASE => write_base(cpu, seg::GS, value),
        index::KERNEL_GS_BASE => state.kernel_gs_base = value,
        index::TSC_AUX => state.tsc_aux = value & 0xffff_ffff,
        index::SPEC_CTRL => state.spec_ctrl = value,
        index::XSS => state.xss = value,
        index::PKRS => write_supervisor_keys(cpu, value),
        index::PRED_CMD => cpu.pmu.barrier(value),
        _ => return cpu.write_pmu(index, value),
    }
    Ok(())
}

/// #GP for a value that the register does not take, or a register that the model does not have.
fn check_msr_value(cpu: &mut Cpu, index: u32, value: u64) -> Exec {
    let amd = cpu.model.is_amd();
    let good = match index {
        index::SYSENTER_ESP | index::SYSENTER_EIP => amd || cpu.canonical_base(value),
        index::LSTAR | index::CSTAR | index::FS_BASE | index::GS_BASE | index::KERNEL_GS_BASE => cpu.canonical_base(value),
        index::FMASK => value >> 32 == 0,
        index::TSC_AUX => has_tsc_aux(cpu) && (amd || value >> 32 == 0),
        index::PAT => value.to_le_bytes().iter().all(|kind| matches!(kind, 0 | 1 | 4..=7)),
        index::EFER => efer_allowed(cpu, value),
        index::DEBUGCTL => value & !debugctl_bits(&cpu.pmu) == 0,
        index::SPEC_CTRL => spec_ctrl_bits(cpu) != 0 && value & !spec_ctrl_bits(cpu) == 0,
        index::PRED_CMD => (cpu.model.has(Feature::SpecCtrl) || cpu.model.has(Feature::AmdIbpb)) && value & !1 == 0,
        index::XSS => cpu.model.has(Feature::Xsaves) && value == 0,
        index::PKRS => cpu.model.has(Feature::Pks) && value >> 32 == 0,
        _ => true,
    };
    if good {
        Ok(())
    } else {
        Err(cpu.general_protection())
    }
}

fn has_tsc_aux(cpu: &Cpu) -> bool {
    cpu.model.has(Feature::Rdtscp) || cpu.model.has(Feature::Rdpid)
}

/// Bits of SPEC_CTRL that the model has: IBRS, STIBP, SSBD, BHI_DIS_S.
fn spec_ctrl_bits(cpu: &Cpu) -> u64 {
    let any = |features: [Feature; 2]| u64::from(features.into_iter().any(|feature| cpu.model.has(feature)));
    any([Feature::SpecCtrl, Feature::AmdIbrs])
        | any([Feature::Stibp, Feature::AmdStibp]) << 1
        | any([Feature::Ssbd, Feature::AmdSsbd]) << 2
        | u64::from(cpu.model.has(Feature::BhiCtrl)) << 10
}

fn write_debugctl(cpu: &mut Cpu, value: u64) {
    cpu.sync_counters();
    cpu.state.debugctl = value;
    cpu.choose_watch();
}

/// Reserved bits of EFER must be clear, and LME cannot change while paging is on. LMA is read-only and ignored.
fn efer_allowed(cpu: &Cpu, value: u64) -> bool {
    let optional = [
        (Feature::Syscall, efer::SCE),
        (Feature::Lm, efer::LME | efer::LMA),
        (Feature::Nx, efer::NXE),
        (Feature::Svm, efer::SVME),
        (Feature::FxsrOpt, efer::FFXSR),
    ];
    let allowed = optional.into_iter().filter(|(feature, _)| cpu.model.has(*feature)).fold(0, |bits, (_, bit)| bits | bit);
    let paging = cpu.state.cr0 & cr0::PG != 0;
    value & !allowed == 0 && !(paging && (value ^ cpu.state.efer) & efer::LME != 0)
}

fn write_efer(cpu: &mut Cpu, value: u64) {
    let old = cpu.state.efer;
    cpu.state.efer = value & !efer::LMA | old & efer::LMA;
    if (old ^ cpu.state.efer) & efer::NXE != 0 {
        cpu.tlb.flush();
    }
    cpu.refresh();
}

fn write_supervisor_keys(cpu: &mut Cpu, value: u64) {
    let changed = cpu.state.pkrs != value;
    cpu.state.pkrs = value;
    if changed && cpu.state.cr4 & cr4::PKS != 0 {
        cpu.tlb.flush();
        cpu.refresh();
    }
}

fn write_base(cpu: &mut Cpu, segment: usize, base: u64) {
    cpu.state.segments[segment].base = base;
    cpu.refresh();
}

// ---- time ---------------------------------------------------------------------------------------------------------------------------

/// #GP where CR4.TSD keeps the time stamp from user mode, then the exit of a hypervisor that wants to see every reading.
fn check_tsc(cpu: &mut Cpu, number: Code) -> Exec {
    if cpu.state.cr4 & cr4::TSD != 0 {
        cpu.require_cpl0()?;
    }
    if cpu.control.intercepts(intercept::RDTSC) {
        return Err(cpu.exit(number, 0));
    }
    Ok(())
}

fn rdtsc(cpu: &mut Cpu, _uop: &Uop) -> Exec {
    check_tsc(cpu, code::RDTSC)?;
    let now = cpu.guest_tsc();
    set_edx_eax(cpu, now);
    Ok(())
}

fn rdtscp(cpu: &mut Cpu, _uop: &Uop) -> Exec {
    check_tsc(cpu, code::RDTSCP)?;
    let now = cpu.guest_tsc();
    set_edx_eax(cpu, now);
    cpu.set_gpr(gpr::RCX, cpu.state.tsc_aux & 0xffff_ffff);
    Ok(())
}

fn rdpid(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let aux = cpu.state.tsc_aux as u32;
    cpu.set_reg(uop.reg[0], aux);
    Ok(())
}

fn rdpmc(cpu: &mut Cpu, _uop: &Uop) -> Exec {
    if cpu.state.cr4 & cr4::PCE == 0 {
        cpu.require_cpl0()?;
    }
    if cpu.control.intercepts(intercept::RDPMC) {
        return Err(cpu.exit(code::RDPMC, 0));
    }
    let value = cpu.read_counter(cpu.gpr(gpr::RCX) as u32)?;
    set_edx_eax(cpu, value);
    Ok(())
}

// ---- random numbers -----------------------------------------------------------------------------------------------------------------

fn rdrand<W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    if cpu.control.intercepts(intercept::RDRAND) {
        return Err(cpu.exit(code::RDRAND, 0));
    }
    random::<W>(cpu, uop)
}

fn rdseed<W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    if cpu.control.intercepts(intercept::RDSEED) {
        return Err(cpu.exit(code::RDSEED, 0));
    }
    random::<W>(cpu, uop)
}

/// Carry tells that the number is good; the other arithmetic flags are cleared. Without entropy the number is zero and carry is clear.
fn random<W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let entropy = if cpu.clock.is_virtual() { Some(repeatable(&mut cpu.control.random)) } else { host_entropy() };
    cpu.set_reg(uop.reg[0], entropy.map_or(W::ZERO, W::truncate));
    cpu.flags = Flags::from_bits(if entropy.is_some() { rflags::CF } else { 0 });
    Ok(())
}

/// 64 bits of SplitMix64 (Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators", 2014): the same for the same seed.
fn repeatable(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mixed = (*state ^ *state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ mixed >> 31
}

/// 64 bits from the host kernel's generator.
fn host_entropy() -> Option<u64> {
    let mut bytes = [0u8; 8];
    // SAFETY: the buffer is ours and as long as the call is told.
    let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), libc::GRND_NONBLOCK) };
    (got == bytes.len() as isize).then(|| u64::from_le_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::clock::Clock;
    use crate::model::Model;
    use crate::state::rights;
    use std::sync::Arc;

    fn cpu(model: &str) -> Box<Cpu> {
        Cpu::new(Arc::new(Model::new(model, &[]).unwrap()), Clock::default())
    }

    #[test]
    fn registers_keep_what_is_written() {
        for model in ["cascadelake", "epyc"] {
            let mut cpu = cpu(model);
            let plain = [index::LSTAR, index::CSTAR, index::KERNEL_GS_BASE, index::FS_BASE, index::GS_BASE, index::STAR];
            for (index, value) in plain.into_iter().map(|index| (index, 0xffff_8000_0000_0000)).chain([
                (index::FMASK, 0x47700),
                (index::PAT, 0x0407_0506_0007_0106),
                (index::SPEC_CTRL, 7),
                (index::TSC_AUX, 3),
                (index::SYSENTER_EIP, 0x8000_1000),
            ]) {
                assert_eq!(write_msr(&mut cpu, index, value), Ok(()), "{index:#x}");
                assert_eq!(read_msr(&mut cpu, index), Ok(value), "{index:#x}");
            }
        }
    }

    #[test]
    fn branch_history_is_a_choice_of_the_model() {
        assert_eq!(write_msr(&mut cpu("cascadelake"), index::SPEC_CTRL, 1 << 10), Ok(()));
        assert_eq!(write_msr(&mut cpu("epyc"), index::SPEC_CTRL, 1 << 10), Err(Stop::Fault));
    }

    #[test]
    fn values_that_a_register_cannot_hold_are_refused() {
        let mut cpu = cpu("cascadelake");
        for (index, value) in [
            (index::LSTAR, 1 << 47),
            (index::GS_BASE, 1 << 63),
            (index::SYSENTER_ESP, 1 << 47),
            (index::FMASK, 1 << 32),
            (index::PAT, 2),
            (index::PAT, 8 << 56),
            (index::EFER, 1 << 1),
            (index::EFER, efer::SVME),
            (index::SPEC_CTRL, 8),
            (index::PRED_CMD, 2),
            (index::TSC_AUX, 1 << 32),
            (index::DEBUGCTL, 1 << 6),
            (index::XSS, 1),
            (index::TSC, 0),
            (index::MTRRCAP, 0),
            (0x1234, 0),
        ] {
            assert_eq!(write_msr(&mut cpu, index, value), Err(Stop::Fault), "{index:#x}");
            assert_eq!(cpu.fault.vector, crate::fault::vector::GP);
        }
        for index in [index::PRED_CMD, index::MTRRCAP, 0x1234] {
            assert_eq!(read_msr(&mut cpu, index), Err(Stop::Fault), "{index:#x}");
        }
    }

    #[test]
    fn amd_keeps_32_bits_of_sysenter_addresses_and_of_tsc_aux() {
        let mut cpu = cpu("epyc");
        assert_eq!(write_msr(&mut cpu, index::SYSENTER_EIP, 0xffff_ffff_8000_0000), Ok(()));
        assert_eq!(read_msr(&mut cpu, index::SYSENTER_EIP), Ok(0x8000_0000));
        assert_eq!(write_msr(&mut cpu, index::TSC_AUX, 0x1_0000_0002), Ok(()));
        assert_eq!(read_msr(&mut cpu, index::TSC_AUX), Ok(2));
    }

    #[test]
    fn lma_follows_paging_alone_and_lme_stays_while_paging_is_on() {
        let mut cpu = cpu("cascadelake");
        assert_eq!(write_msr(&mut cpu, index::EFER, efer::LME | efer::LMA), Ok(()));
        assert_eq!(cpu.state.efer, efer::LME);
        cpu.state.cr0 |= cr0::PE | cr0::PG;
        cpu.state.efer |= efer::LMA;
        assert_eq!(write_msr(&mut cpu, index::EFER, 0), Err(Stop::Fault));
        assert_eq!(write_msr(&mut cpu, index::EFER, efer::LME | efer::NXE | efer::SCE), Ok(()));
        assert_eq!(cpu.state.efer, efer::LME | efer::LMA | efer::NXE | efer::SCE);
    }

    #[test]
    fn a_new_base_is_used_at_once() {
        let mut cpu = cpu("cascadelake");
        cpu.state.segments[seg::CS].access_rights = rights::PRESENT | rights::S | rights::CODE;
        assert_eq!(write_msr(&mut cpu, index::GS_BASE, 0xffff_8880_0000_0000), Ok(()));
        assert_eq!(cpu.segment_base(seg::GS), 0xffff_8880_0000_0000);
    }
}
