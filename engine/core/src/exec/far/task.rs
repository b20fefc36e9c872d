//! Hardware task switches: always a VM exit, as VMX has it (SDM vol. 3, 26.2 and table 28-6; APM vol. 2, 15.14.1). The hypervisor does
//! the switch.

use crate::cpu::Cpu;
use crate::state::rflags;
use crate::uop::Stop;
use crate::virt::exits::code;

/// What started a task switch; the numbers are those of the exit qualification.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum TaskSwitch {
    Call = 0,
    Iret = 1,
    Jump = 2,
    Gate = 3,
}

impl Cpu {
    /// Leaves the guest for a switch to the task of `selector`. `error`: what a task gate pushes on the new task's stack.
    #[cold]
    pub fn exit_task_switch(&mut self, selector: u16, source: TaskSwitch, error: Option<u32>) -> Stop {
        if !self.model.is_amd() {
            return self.exit(code::TASK_SWITCH, u64::from(selector) | (source as u64) << 30);
        }
        let stop = self.exit(code::TASK_SWITCH, selector.into());
        let bits = [
            (36, source == TaskSwitch::Iret),
            (38, source == TaskSwitch::Jump),
            (44, error.is_some()),
            (48, self.rflags & rflags::RF != 0),
        ];
        let flags = bits.iter().fold(0, |all, (bit, on)| all | u64::from(*on) << bit);
        self.exit.info2 = flags | u64::from(error.unwrap_or(0));
        stop
    }
}
