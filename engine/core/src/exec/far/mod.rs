//! Far transfers of control: JMP, CALL and RET far, IRET, and the instructions that raise interrupts (SDM vol. 3, 5.8, 6.12 and 7.3).

mod iret;
mod jump;
mod ret;
pub mod task;

use iced_x86::{Code, Instruction};

use crate::cpu::descriptor::Descriptor;
use crate::cpu::{CodeSize, Cpu};
use crate::fault::vector;
use crate::interrupts::Kind;
use crate::state::{rights, seg};
use crate::uop::{Exec, Handler, Stop, Uop};

/// The handler of an instruction of this family.
pub fn handler(insn: &Instruction, size: CodeSize) -> Option<Handler> {
    let long = size == CodeSize::Bits64;
    Some(match insn.code() {
        Code::Jmp_ptr1616 => jump::jump_immediate::<u16>,
        Code::Jmp_ptr1632 => jump::jump_immediate::<u32>,
        Code::Jmp_m1616 => jump::jump_memory::<u16>,
        Code::Jmp_m1632 => jump::jump_memory::<u32>,
        Code::Jmp_m1664 => jump::jump_memory::<u64>,
        Code::Call_ptr1616 => jump::call_immediate::<u16>,
        Code::Call_ptr1632 => jump::call_immediate::<u32>,
        Code::Call_m1616 => jump::call_memory::<u16>,
        Code::Call_m1632 => jump::call_memory::<u32>,
        Code::Call_m1664 => jump::call_memory::<u64>,
        Code::Retfw | Code::Retfw_imm16 => ret::return_far::<u16>,
        Code::Retfd | Code::Retfd_imm16 => ret::return_far::<u32>,
        Code::Retfq | Code::Retfq_imm16 => ret::return_far::<u64>,
        Code::Iretw if long => iret::iret_long::<u16>,
        Code::Iretd if long => iret::iret_long::<u32>,
        Code::Iretq => iret::iret_long::<u64>,
        Code::Iretw => iret::iret_legacy::<u16>,
        Code::Iretd => iret::iret_legacy::<u32>,
        Code::Int_imm8 => interrupt,
        Code::Int3 => breakpoint,
        Code::Into => overflow,
        Code::Int1 => debug_trap,
        Code::Rsm => outside_smm,
        _ => return None,
    })
}

/// Far transfers end their blocks as the branches that they are; RSM raises #UD.
pub fn ends_block(_insn: &Instruction) -> bool {
    false
}

fn interrupt(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.deliver_software(uop.imm as u8, Kind::Software, uop)
}

fn breakpoint(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.deliver_software(vector::BP, Kind::SoftwareException, uop)
}

fn overflow(cpu: &mut Cpu, uop: &Uop) -> Exec {
    if cpu.flags.of() {
        return cpu.deliver_software(vector::OF, Kind::SoftwareException, uop);
    }
    cpu.set_rip(cpu.rip_at(uop.next_offset()));
    Err(Stop::Next)
}

fn debug_trap(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.deliver_software(vector::DB, Kind::PrivilegedException, uop)
}

/// RSM outside system-management mode.
fn outside_smm(cpu: &mut Cpu, _uop: &Uop) -> Exec {
    Err(cpu.undefined())
}

impl Cpu {
    /// Raises #GP unless `offset` may be RIP in the code segment of `descriptor`.
    fn check_target(&mut self, descriptor: Descriptor, offset: u64) -> Exec {
        let inside = if self.is_long_code(descriptor) { self.canonical(offset) } else { offset <= u64::from(descriptor.limit()) };
        if !inside {
            return Err(self.general_protection());
        }
        Ok(())
    }

    /// Whether a code segment is 64-bit.
    fn is_long_code(&self, descriptor: Descriptor) -> bool {
        self.ia32e() && descriptor.has(rights::LONG)
    }

    /// Whether a code segment sets both L and D, which IA-32e mode reserves.
    fn is_reserved_code(&self, descriptor: Descriptor) -> bool {
        self.ia32e() && descriptor.rights() & (rights::LONG | rights::DB) == rights::LONG | rights::DB
    }

    /// Continues at `offset` of a code segment, at privilege `level`. SS is in place already.
    fn enter_code(&mut self, selector: u16, descriptor: Descriptor, level: u8, offset: u64) {
        let stays_long = self.long_mode() && self.is_long_code(descriptor);
        self.state.segments[seg::CS] = descriptor.segment(selector & !3 | u16::from(level));
        if stays_long {
            self.refresh_privilege();
        } else {
            self.refresh();
        }
        self.set_rip(offset);
    }

    /// Continues at `selector:offset` in real-address or virtual-8086 mode.
    fn enter_real_code(&mut self, selector: u16, offset: u64) -> Exec {
        if offset > u64::from(self.state.segments[seg::CS].limit) {
            return Err(self.general_protection());
        }
        self.state.segments[seg::CS] = self.real_segment(seg::CS, selector);
        self.refresh();
        self.set_rip(offset);
        Ok(())
    }
}
