//! MOV, PUSH and POP of segment registers, and loads of far pointers (SDM vol. 2, "MOV", "POP", "LDS/LES/LFS/LGS/LSS"; vol. 3, 5.4.1).

use iced_x86::{Code, Instruction, OpKind, Register};

use crate::cpu::descriptor::{is_null, rpl};
use crate::cpu::Cpu;
use crate::fault::vector;
use crate::paging::AccessKind;
use crate::state::{interruptibility, rights, seg, Segment};
use crate::uop::{Exec, Handler, Stop, Uop};
use crate::word::Word;

pub(super) fn handler(insn: &Instruction) -> Option<Handler> {
    Some(match insn.code() {
        Code::Mov_r32m16_Sreg | Code::Mov_r64m16_Sreg | Code::Mov_rm16_Sreg if insn.op0_kind() == OpKind::Memory => store_segment,
        Code::Mov_rm16_Sreg => read_segment::<u16>,
        Code::Mov_r32m16_Sreg => read_segment::<u32>,
        Code::Mov_r64m16_Sreg => read_segment::<u64>,
        Code::Mov_Sreg_rm16 | Code::Mov_Sreg_r32m16 | Code::Mov_Sreg_r64m16 => match (insn.op1_kind(), insn.op0_register()) {
            (_, Register::CS) => return None,
            (OpKind::Memory, _) => move_from_memory,
            _ => move_from_register,
        },
        Code::Pushw_ES | Code::Pushw_CS | Code::Pushw_SS | Code::Pushw_DS | Code::Pushw_FS | Code::Pushw_GS => push_segment::<u16>,
        Code::Pushd_ES | Code::Pushd_CS | Code::Pushd_SS | Code::Pushd_DS | Code::Pushd_FS | Code::Pushd_GS => push_segment::<u32>,
        Code::Pushq_FS | Code::Pushq_GS => push_segment::<u64>,
        Code::Popw_ES | Code::Popw_SS | Code::Popw_DS | Code::Popw_FS | Code::Popw_GS => pop_segment::<u16>,
        Code::Popd_ES | Code::Popd_SS | Code::Popd_DS | Code::Popd_FS | Code::Popd_GS => pop_segment::<u32>,
        Code::Popq_FS | Code::Popq_GS => pop_segment::<u64>,
        Code::Les_r16_m1616 => load_pointer::<u16, { seg::ES }>,
        Code::Les_r32_m1632 => load_pointer::<u32, { seg::ES }>,
        Code::Lds_r16_m1616 => load_pointer::<u16, { seg::DS }>,
        Code::Lds_r32_m1632 => load_pointer::<u32, { seg::DS }>,
        Code::Lss_r16_m1616 => load_pointer::<u16, { seg::SS }>,
        Code::Lss_r32_m1632 => load_pointer::<u32, { seg::SS }>,
        Code::Lss_r64_m1664 => load_pointer::<u64, { seg::SS }>,
        Code::Lfs_r16_m1616 => load_pointer::<u16, { seg::FS }>,
        Code::Lfs_r32_m1632 => load_pointer::<u32, { seg::FS }>,
        Code::Lfs_r64_m1664 => load_pointer::<u64, { seg::FS }>,
        Code::Lgs_r16_m1616 => load_pointer::<u16, { seg::GS }>,
        Code::Lgs_r32_m1632 => load_pointer::<u32, { seg::GS }>,
        Code::Lgs_r64_m1664 => load_pointer::<u64, { seg::GS }>,
        _ => return None,
    })
}

fn read_segment<W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let selector = cpu.state.segments[usize::from(uop.reg[1])].selector;
    cpu.set_reg(uop.reg[0], W::truncate(selector.into()));
    Ok(())
}

fn store_segment(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let selector = cpu.state.segments[usize::from(uop.reg[1])].selector;
    cpu.store(uop, selector)
}

fn move_from_register(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let selector = cpu.reg::<u16>(uop.reg[1]);
    cpu.load_segment(uop.reg[0].into(), selector)?;
    shadow_stack_load(cpu, uop.reg[0].into())
}

fn move_from_memory(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let selector = cpu.load::<u16>(uop)?;
    cpu.load_segment(uop.reg[0].into(), selector)?;
    shadow_stack_load(cpu, uop.reg[0].into())
}

/// MOV SS and POP SS keep interrupts away until the next instruction has set RSP (SDM vol. 3, 6.8.3).
fn shadow_stack_load(cpu: &mut Cpu, number: usize) -> Exec {
    if number != seg::SS {
        return Ok(());
    }
    cpu.shadow(interruptibility::MOV_SS);
    Err(Stop::Leave)
}

fn push_segment<W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let selector = cpu.state.segments[usize::from(uop.reg[0])].selector;
    cpu.push(W::truncate(selector.into()))
}

fn pop_segment<W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let number = usize::from(uop.reg[0]);
    let selector = cpu.peek::<W>(0)?.zero_extend() as u16;
    let mask = cpu.stack_mask();
    cpu.load_segment(number, selector)?;
    let rsp = cpu.gpr(crate::state::gpr::RSP);
    // The width of the stack that was popped counts, also when SS itself was loaded.
    cpu.set_gpr(crate::state::gpr::RSP, rsp & !mask | rsp.wrapping_add(W::BYTES) & mask);
    shadow_stack_load(cpu, number)
}

fn load_pointer<W: Word, const NUMBER: usize>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let la = cpu.linear(uop, W::BYTES + 2, AccessKind::Read)?;
    let offset: W = cpu.read(uop.segment(), la)?;
    let selector: u16 = cpu.read(uop.segment(), la.wrapping_add(W::BYTES))?;
    cpu.load_segment(NUMBER, selector)?;
    cpu.set_reg(uop.reg[0], offset);
    if NUMBER == seg::SS {
        return Err(Stop::Leave);
    }
    Ok(())
}

impl Cpu {
    /// Loads ES, SS, DS, FS or GS.
    pub fn load_segment(&mut self, number: usize, selector: u16) -> Exec {
        let segment = if !self.protected() {
            self.real_segment(number, selector)
        } else if number == seg::SS {
            self.stack_segment(selector)?
        } else {
            self.data_segment(selector)?
        };
        self.set_segment(number, segment);
        Ok(())
    }

    fn data_segment(&mut self, selector: u16) -> Exec<Segment> {
        if is_null(selector) {
            return Ok(Segment::new(selector, rights::UNUSABLE, 0, 0));
        }
        let descriptor = self.descriptor(selector, vector::GP)?;
        let level = self.cpl().max(rpl(selector));
        if !descriptor.is_readable() || !descriptor.is_conforming_code() && level > descriptor.dpl() {
            return Err(self.selector_fault(vector::GP, selector));
        }
        if !descriptor.present() {
            return Err(self.selector_fault(vector::NP, selector));
        }
        Ok(self.accessed(selector, descriptor)?.segment(selector))
    }

    fn stack_segment(&mut self, selector: u16) -> Exec<Segment> {
        let level = self.cpl();
        if is_null(selector) {
            if self.long_mode() && level < 3 && rpl(selector) == level {
                return Ok(Cpu::null_stack(level));
            }
            return Err(self.general_protection());
        }
        let descriptor = self.descriptor(selector, vector::GP)?;
        if rpl(selector) != level || descriptor.dpl() != level || !descriptor.is_writable_data() {
            return Err(self.selector_fault(vector::GP, selector));
        }
        if !descriptor.present() {
            return Err(self.selector_fault(vector::SS, selector));
        }
        Ok(self.accessed(selector, descriptor)?.segment(selector))
    }
}
