//! Instructions that order, hint or only exist to leave the guest: NOP, fences, cache-line hints, hypercalls, undefined opcodes
//! (SDM vol. 2; VM exits: SDM vol. 3, 26.1 and 26.3; APM vol. 2, 15.9).

use std::sync::atomic::{fence, Ordering};

use iced_x86::{Instruction, Mnemonic};

use crate::cpu::{CodeSize, Cpu};
use crate::paging::AccessKind;
use crate::state::efer;
use crate::uop::{Exec, Handler, Uop};
use crate::virt::control::intercept;
use crate::virt::exits::code;

/// The handler of an instruction of this family.
pub fn handler(insn: &Instruction, _size: CodeSize) -> Option<Handler> {
    use Mnemonic::*;
    let handler: Handler = match insn.mnemonic() {
        Nop | Reservednop | Endbr32 | Endbr64 | Rdsspd | Rdsspq | Cldemote => nop,
        Prefetch | Prefetchw | Prefetchwt1 | Prefetchnta | Prefetcht0 | Prefetcht1 | Prefetcht2 | Prefetchit0 | Prefetchit1 => nop,
        Pause => pause,
        Lfence => lfence,
        Sfence => sfence,
        Mfence => mfence,
        Serialize => serialize,
        Clflush | Clflushopt | Clwb => flush_line,
        Vmcall => hypercall::<false>,
        Vmmcall | Vmgexit => hypercall::<true>,
        Ud0 | Ud1 | Ud2 | Rsm | Getsec => super::undefined,
        mnemonic => return vm_instruction(mnemonic),
    };
    Some(handler)
}

fn nop(_cpu: &mut Cpu, _uop: &Uop) -> Exec {
    Ok(())
}

fn pause(cpu: &mut Cpu, _uop: &Uop) -> Exec {
    let watched = cpu.control.pause_window != 0 && cpu.cpl() == 0;
    let now = cpu.host_tsc();
    let long = watched && cpu.clock.pause(now, cpu.control.pause_gap) > u64::from(cpu.control.pause_window);
    if long || cpu.control.intercepts(intercept::PAUSE) {
        return Err(cpu.exit(code::PAUSE, 0));
    }
    Ok(())
}

fn lfence(_cpu: &mut Cpu, _uop: &Uop) -> Exec {
    fence(Ordering::Acquire);
    Ok(())
}

fn sfence(_cpu: &mut Cpu, _uop: &Uop) -> Exec {
    fence(Ordering::Release);
    Ok(())
}

fn mfence(_cpu: &mut Cpu, _uop: &Uop) -> Exec {
    fence(Ordering::SeqCst);
    Ok(())
}

/// Code that this core modified is already gone from its cache, so ordering memory is all that is left to do.
fn serialize(_cpu: &mut Cpu, _uop: &Uop) -> Exec {
    fence(Ordering::SeqCst);
    Ok(())
}

/// There is no cache to flush; the address is checked as a byte read is.
fn flush_line(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let la = cpu.linear(uop, 1, AccessKind::Read)?;
    cpu.chunk(uop.segment(), la, 1, AccessKind::Read).map(drop)
}

/// VMCALL is Intel's and VMMCALL is AMD's, which VMGEXIT is too for a guest whose memory is not encrypted (APM vol. 3).
fn hypercall<const AMD: bool>(cpu: &mut Cpu, _uop: &Uop) -> Exec {
    if cpu.model.is_amd() == AMD && cpu.control.intercepts(intercept::HYPERCALL) {
        return Err(cpu.exit(code::HYPERCALL, 0));
    }
    Err(cpu.undefined())
}

/// The handler of an instruction of either vendor's virtual machine extensions.
fn vm_instruction(mnemonic: Mnemonic) -> Option<Handler> {
    use Mnemonic::*;
    let handler: Handler = match mnemonic {
        Vmclear => vmx::<19>,
        Vmlaunch => vmx::<20>,
        Vmptrld => vmx::<21>,
        Vmptrst => vmx::<22>,
        Vmread => vmx::<23>,
        Vmresume => vmx::<24>,
        Vmwrite => vmx::<25>,
        Vmxoff => vmx::<26>,
        Vmxon => vmx::<27>,
        Invept => vmx::<50>,
        Invvpid => vmx::<53>,
        Invlpga => svm::<0x7a>,
        Vmrun => svm::<0x80>,
        Vmload => svm::<0x82>,
        Vmsave => svm::<0x83>,
        Stgi => svm::<0x84>,
        Clgi => svm::<0x85>,
        Skinit => svm::<0x86>,
        // Without the VM-function control, VMFUNC is undefined in a guest (SDM vol. 3, 26.5.6).
        Vmfunc => super::undefined,
        _ => return None,
    };
    Some(handler)
}

/// VMX instructions exit whatever the privilege, but need protected mode and, in IA-32e mode, 64-bit code.
fn vmx<const REASON: u32>(cpu: &mut Cpu, _uop: &Uop) -> Exec {
    let compatibility = cpu.state.efer & efer::LMA != 0 && !cpu.long_mode();
    let usable = !cpu.model.is_amd() && cpu.protected() && !compatibility;
    if usable && cpu.control.intercepts(intercept::VM_INSTRUCTION) {
        return Err(cpu.exit_number(REASON, 0));
    }
    Err(cpu.undefined())
}

/// SVM instructions need EFER.SVME and CPL 0 before they can be intercepted (APM vol. 2, 15.8).
fn svm<const REASON: u32>(cpu: &mut Cpu, _uop: &Uop) -> Exec {
    if !cpu.model.is_amd() || !cpu.protected() || cpu.state.efer & efer::SVME == 0 {
        return Err(cpu.undefined());
    }
    cpu.require_cpl0()?;
    if cpu.control.intercepts(intercept::VM_INSTRUCTION) {
        return Err(cpu.exit_number(REASON, 0));
    }
    Err(cpu.undefined())
}
