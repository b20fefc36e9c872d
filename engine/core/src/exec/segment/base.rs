//! SWAPGS, RDFSBASE, RDGSBASE, WRFSBASE and WRGSBASE (SDM vol. 2).

use iced_x86::{Code, Instruction};

use crate::cpu::Cpu;
use crate::state::{cr4, seg};
use crate::uop::{Exec, Handler, Uop};
use crate::word::Word;

pub(super) fn handler(insn: &Instruction) -> Option<Handler> {
    Some(match insn.code() {
        Code::Swapgs => swapgs,
        Code::Rdfsbase_r32 => read_base::<u32, { seg::FS }>,
        Code::Rdfsbase_r64 => read_base::<u64, { seg::FS }>,
        Code::Rdgsbase_r32 => read_base::<u32, { seg::GS }>,
        Code::Rdgsbase_r64 => read_base::<u64, { seg::GS }>,
        Code::Wrfsbase_r32 => write_base::<u32, { seg::FS }>,
        Code::Wrfsbase_r64 => write_base::<u64, { seg::FS }>,
        Code::Wrgsbase_r32 => write_base::<u32, { seg::GS }>,
        Code::Wrgsbase_r64 => write_base::<u64, { seg::GS }>,
        _ => return None,
    })
}

fn swapgs(cpu: &mut Cpu, _uop: &Uop) -> Exec {
    cpu.require_cpl0()?;
    let user = cpu.state.segments[seg::GS].base;
    let kernel = std::mem::replace(&mut cpu.state.kernel_gs_base, user);
    cpu.set_segment_base(seg::GS, kernel);
    Ok(())
}

fn require_fsgsbase(cpu: &mut Cpu) -> Exec {
    if cpu.state.cr4 & cr4::FSGSBASE == 0 {
        return Err(cpu.undefined());
    }
    Ok(())
}

fn read_base<W: Word, const NUMBER: usize>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    require_fsgsbase(cpu)?;
    cpu.set_reg(uop.reg[0], W::truncate(cpu.state.segments[NUMBER].base));
    Ok(())
}

fn write_base<W: Word, const NUMBER: usize>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    require_fsgsbase(cpu)?;
    let base = cpu.reg::<W>(uop.reg[0]).zero_extend();
    if !cpu.canonical_base(base) {
        return Err(cpu.general_protection());
    }
    cpu.set_segment_base(NUMBER, base);
    Ok(())
}
