//! HLT that waits awake on the core, for as long as the hypervisor lets it, before it exits: an interrupt that is posted meanwhile goes on
//! to the guest without one.
//!
//! What PAUSE-loop exiting is to a loop (SDM vol. 3, 25.1.3), this window is to a wait: silicon has it for TPAUSE and UMWAIT (SDM vol. 3,
//! 26.3, and IA32_UMWAIT_CONTROL). A guest in it is ready for everything that reaches one that runs.

use std::hint;

use crate::cpu::clock::{host_tsc, host_tsc_khz};
use crate::cpu::signal::attention;
use crate::cpu::{pending, Cpu};
use crate::state::rflags;

/// A core that has a processor of the host to itself looks more often than this, in microseconds.
const PREEMPTED_US: u64 = 20;
/// A shorter wait does not ask whether others want the processor.
const BRIEF_US: u64 = 3;

/// What a core asks while it waits: whether others want the processor of the host that it is on.
pub type Crowded = fn() -> bool;

/// For a core that has the processor to itself.
pub fn never_crowded() -> bool {
    false
}

impl Cpu {
    /// HLT waits for an interrupt in the hypervisor's window, if it has given one; whether there is an interrupt to deliver now.
    #[cold]
    pub fn wait_awake(&mut self) -> bool {
        self.apic.state.halt_waited = 0;
        let undisturbed = self.pending & !(pending::SHADOW | pending::VIRTUAL) == 0 && self.rflags & rflags::IF != 0;
        if self.control.halt_window == 0 || !self.apic.is_enabled() || self.clock.is_virtual() || !undisturbed {
            return false;
        }
        let start = host_tsc();
        let interrupted = self.poll_posted(start);
        let waited = host_tsc().saturating_sub(start).max(1);
        let state = &mut self.apic.state;
        if interrupted {
            state.halts += 1;
            state.halt_cycles += waited;
        } else {
            state.halt_waited = waited;
        }
        interrupted
    }

    /// Until an interrupt is there (true), the window or a timer ends, or somebody wants the guest out, or the processor.
    fn poll_posted(&mut self, start: u64) -> bool {
        let ticks = host_tsc_khz() / 1000;
        let timers = [self.clock.tick, self.clock.timer, self.clock.preemption].into_iter().filter(|end| *end != 0);
        let end = timers.fold(start.saturating_add(self.control.halt_window), u64::min);
        let (mut last, mut unasked) = (start, true);
        loop {
            let signals = self.signal.pending();
            if signals & attention::POSTED != 0 {
                self.signal.take(attention::POSTED);
                self.receive_posted();
            }
            if self.pending & pending::VIRTUAL != 0 {
                return true;
            }
            if signals & (attention::PROTECT | attention::STOP) != 0 {
                self.serve();
            }
            let now = host_tsc();
            let preempted = now.saturating_sub(last) > ticks * PREEMPTED_US;
            if now >= end || preempted || signals & (attention::KICK | attention::NESTED) != 0 {
                return false;
            }
            if unasked && now - start > ticks * BRIEF_US {
                unasked = false;
                if (self.crowded)() {
                    return false;
                }
            }
            last = now;
            hint::spin_loop();
        }
    }
}
