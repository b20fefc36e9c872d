//! VM entry: from a control block to a running guest, and back (SDM vol. 3, ch. 27 and 28; APM vol. 2, 15.5 and 15.6).

use std::sync::Arc;

use crate::cpu::clock::{host_tsc_khz, Clock, TICK_MS};
use crate::cpu::signal::Signal;
use crate::cpu::{pending, Cpu};
use crate::memory::nested::NestedPageTable;
use crate::model::Model;
use crate::paging::walk::{probe, Context, WalkError};
use crate::paging::{canonical, unused_bits, AccessKind, Privilege};
use crate::state::{activity, cr0, cr4, efer, rflags, rights, seg, State};
use crate::virt::apic::{IpiTable, PostedInterrupts};
use crate::virt::control::{intercept, perf, Block, ACCESS_MAX, WAIVER_MAX};
use crate::virt::exits::code;
use crate::virt::halt::Crowded;

/// Kinds of access for [`Core::translate`].
pub mod access {
    pub const WRITE: u32 = 2;
    pub const FETCH: u32 = 4;
    pub const USER: u32 = 8;
}

const EVENT_VALID: u32 = 1 << 31;
const EVENT_HAS_ERROR: u32 = 1 << 11;

/// One physical CPU.
pub struct Core {
    pub(crate) cpu: Box<Cpu>,
    index: u32,
}

impl Core {
    /// Core number `index` of a machine with CPUs of `model`.
    pub fn new(model: Arc<Model>, index: u32) -> Self {
        host_tsc_khz(); // measured once, and not at the first entry
        let threshold = model.tier().threshold();
        let mut cpu = Cpu::new(model, Clock::default());
        cpu.set_translator(threshold);
        Core { cpu, index }
    }

    /// What other threads use to reach the core.
    pub fn signal(&self) -> Arc<Signal> {
        self.cpu.signal.clone()
    }

    /// The guests that it runs from now on have their interrupts posted to `posted`, and post to those of `table`.
    pub fn set_apic(&mut self, posted: Option<Arc<PostedInterrupts>>, table: Option<Arc<IpiTable>>) {
        self.cpu.set_apic(posted, table);
    }

    /// While a guest waits in HLT, the core asks `crowded` whether others want the processor of the host that it is on.
    pub fn set_crowded(&mut self, crowded: Crowded) {
        self.cpu.crowded = crowded;
    }

    /// Number of the core in its machine.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// Sets the core's own timer to a host TSC value; zero stops it.
    pub fn set_timer(&mut self, tsc: u64) {
        self.cpu.clock.timer = tsc;
    }

    /// Runs the guest of `block` until a VM exit and returns the exit reason, which `block` holds too.
    ///
    /// # Safety
    /// `block` must be valid for reads and writes, and nobody else may write its state, control or access list during the call.
    pub unsafe fn enter(&mut self, block: *mut Block, npt: &Arc<NestedPageTable>) -> u32 {
        let cpu = &mut *self.cpu;
        // SAFETY: valid by the caller's promise; the copies keep later changes by others from reaching the CPU.
        unsafe {
            cpu.control = (*block).control;
            cpu.state = (*block).state;
            cpu.accesses.clear();
            let count = (cpu.control.access_count as usize).min(ACCESS_MAX);
            cpu.accesses.extend_from_slice(&(&(*block).access)[..count]);
            let count = (cpu.control.waiver_count as usize).min(WAIVER_MAX);
            cpu.waivers.set(&(&(*block).waivers)[..count]);
        }
        if cpu.control.emulate == 0 && cpu.control.event & EVENT_VALID == 0 {
            cpu.end_waivers();
        }
        cpu.bitmaps = block;
        // SAFETY: as above.
        unsafe { cpu.apic.load(&raw const (*block).apic) };
        cpu.access_next = 0;
        let start = cpu.instructions();
        if state_is_valid(&cpu.state, &cpu.model) && global_control_is_valid(cpu) {
            self.attach(npt);
            self.load();
            self.run();
            self.unload();
        } else {
            self.cpu.exit(code::INVALID_STATE, 0);
        }
        let cpu = &mut *self.cpu;
        cpu.bitmaps = std::ptr::null();
        cpu.exit.instructions = cpu.instructions().wrapping_sub(start);
        cpu.exit.tsc = cpu.host_tsc();
        // SAFETY: as above.
        unsafe {
            cpu.apic.store(&raw mut (*block).apic);
            (*block).exit = cpu.exit;
            (*block).state = cpu.state;
            (*block).control.event = cpu.control.event;
            (*block).control.tlb_control = cpu.control.tlb_control;
            (*block).control.emulate = cpu.control.emulate;
            (*block).control.waiver_count = cpu.control.waiver_count;
            (*block).control.random = cpu.control.random;
            (*block).control.guest_perf_global_ctrl = cpu.control.guest_perf_global_ctrl;
            (*block).control.virtual_lvtpc = cpu.control.virtual_lvtpc;
        }
        cpu.exit.reason
    }

    /// Makes the core translate through `npt`, and forget what it cached from another one.
    fn attach(&mut self, npt: &Arc<NestedPageTable>) {
        let cpu = &mut *self.cpu;
        if !Arc::ptr_eq(&cpu.npt, npt) {
            cpu.code.clear(&cpu.npt.code);
            cpu.npt = npt.clone();
            npt.attach(&cpu.signal);
            cpu.nested_generation = 0;
        }
        cpu.signal.set_running(true);
        let generation = npt.generation();
        if cpu.nested_generation != generation {
            cpu.flush_nested();
        }
        cpu.shoot_down();
    }

    fn load(&mut self) {
        let cpu = &mut *self.cpu;
        let paging = &cpu.paging;
        let before = (paging.cr0, paging.cr3, paging.cr4, paging.efer, paging.pkru, paging.pkrs);
        let state = &cpu.state;
        if cpu.control.tlb_control != 0 || before != (state.cr0, state.cr3, state.cr4, state.efer, state.fpu.pkru, state.pkrs as u32) {
            cpu.tlb.flush();
            cpu.tlb.switch(cpu.pcid(), false);
            cpu.control.tlb_control = 0;
        }
        cpu.regs[..16].copy_from_slice(&cpu.state.gpr);
        let instructions = cpu.instructions();
        cpu.clock.set_virtual(cpu.control.tsc_rate.into(), cpu.control.virtual_tsc, instructions);
        cpu.clock.tick = if cpu.clock.is_virtual() { u64::MAX } else { cpu.host_tsc() + host_tsc_khz() * TICK_MS };
        cpu.clock.offset = cpu.control.tsc_offset;
        cpu.clock.multiplier = cpu.control.tsc_multiplier;
        cpu.clock.pauses = (0, 0);
        cpu.clock.preemption =
            if cpu.control.intercepts(intercept::PREEMPTION_TIMER) { cpu.clock.host_deadline(cpu.control.preemption_deadline) } else { 0 };
        cpu.pending = entry_work(cpu);
        (cpu.vectoring, cpu.vectoring_error) = (0, 0);
        let image = cpu.state.rflags;
        cpu.set_rflags(image);
        cpu.refresh();
        cpu.refresh_breakpoints();
        let rip = cpu.state.rip;
        cpu.set_rip(rip);
        if cpu.control.instruction_budget != 0 {
            cpu.control.instruction_budget = cpu.control.instruction_budget.saturating_add(instructions);
        }
        cpu.shorten_budget();
        cpu.receive_posted();
        if cpu.control.perf_controls & perf::LOAD_GUEST != 0 {
            cpu.pmu.load_global_control(cpu.control.guest_perf_global_ctrl);
        }
        if cpu.control.perf_controls & perf::VIRTUAL_PMI != 0 {
            cpu.pmu.load_virtual_interrupt(cpu.control.virtual_lvtpc.into());
        }
        cpu.begin_watch();
    }

    /// Delivers the injected event, then runs.
    fn run(&mut self) {
        let cpu = &mut *self.cpu;
        let event = cpu.control.event;
        if event & EVENT_VALID != 0 {
            cpu.control.event = 0;
            cpu.state.activity = activity::ACTIVE;
            cpu.pending &= !pending::HALTED;
            let error = if event & EVENT_HAS_ERROR != 0 { cpu.control.event_error } else { 0 };
            if cpu.deliver_event(event, error, cpu.control.event_instruction_length).is_err() {
                return;
            }
            if cpu.control.emulate == 0 {
                cpu.end_waivers();
            }
        }
        cpu.run();
    }

    fn unload(&mut self) {
        let cpu = &mut *self.cpu;
        cpu.signal.set_running(false);
        cpu.end_watch();
        cpu.pmu.leave_guest();
        if let Some(entry) = cpu.pmu.save_virtual_interrupt() {
            cpu.control.virtual_lvtpc = entry as u32;
        }
        if cpu.control.perf_controls & perf::SAVE_GUEST != 0 {
            cpu.control.guest_perf_global_ctrl = cpu.pmu.global_control();
        }
        if cpu.control.perf_controls & perf::LOAD_HOST != 0 {
            cpu.pmu.load_global_control(cpu.control.host_perf_global_ctrl);
        }
        cpu.state.gpr.copy_from_slice(&cpu.regs[..16]);
        cpu.state.rip = cpu.rip();
        cpu.state.rflags = cpu.rflags();
        cpu.state.activity = if cpu.pending & pending::HALTED != 0 { activity::HLT } else { activity::ACTIVE };
    }

    /// Guest-physical address of `la` for an observer: nothing changes in the guest.
    pub fn translate(&self, state: &State, npt: &NestedPageTable, la: u64, access: u32) -> Result<u64, WalkError> {
        let context = Context::new(state, self.cpu.model.physical_bits());
        if context.efer & efer::LMA != 0 && !canonical(la, unused_bits(context.cr4)) {
            return Err(WalkError::Guest(0));
        }
        let kind = match access {
            bits if bits & access::WRITE != 0 => AccessKind::Write,
            bits if bits & access::FETCH != 0 => AccessKind::Fetch,
            _ => AccessKind::Read,
        };
        let privilege = if access & access::USER != 0 { Privilege::User } else { Privilege::SupervisorAc };
        probe(&context, &npt.tree(), la, privilege, kind).map(|mapping| mapping.gpa)
    }

    /// Everything that the core counts, by name. What begins with `interpreted_` is there once it is not zero.
    pub fn counters(&self) -> Vec<(String, u64)> {
        let cpu = &*self.cpu;
        let translator = cpu.translator.as_ref();
        let counts = &cpu.native.counts;
        let interpreted = counts.interpreted();
        let mut counters: Vec<(String, u64)> = [
            ("instructions", cpu.instructions()),
            ("blocks_run_by_dispatcher", cpu.blocks_run),
            ("blocks_decoded", cpu.code.decoded),
            ("blocks_invalidated", cpu.code.invalidated),
            ("blocks_cached", cpu.code.len() as u64),
            ("blocks_translated", translator.map_or(0, |own| own.translated())),
            ("host_code_bytes", translator.map_or(0, |own| own.bytes() as u64)),
            ("translations_evicted", translator.map_or(0, |own| own.evicted())),
            ("host_code_links", counts.links),
            ("host_code_tlb_misses", counts.misses),
            ("host_code_interpreted", interpreted.iter().map(|(_, count)| count).sum()),
            ("tlb_fills", cpu.tlb.fills),
            ("tlb_flushes", cpu.tlb.flushes),
            ("page_walks", cpu.walks),
            ("branches_lost", self.branches_lost()),
        ]
        .map(|(name, count)| (name.into(), count))
        .into();
        counters.extend(interpreted.iter().map(|(mnemonic, count)| (format!("interpreted_{mnemonic:?}").to_lowercase(), *count)));
        counters
    }
}

impl Drop for Core {
    fn drop(&mut self) {
        let cpu = &mut *self.cpu;
        cpu.code.clear(&cpu.npt.code);
        cpu.set_apic(None, None);
    }
}

/// Whether the silicon's GLOBAL_CTRL takes the values that entry and exit load (SDM vol. 3, 27.2.2 and 27.3.1.1).
fn global_control_is_valid(cpu: &Cpu) -> bool {
    let control = &cpu.control;
    let loads = [(perf::LOAD_GUEST, control.guest_perf_global_ctrl), (perf::LOAD_HOST, control.host_perf_global_ctrl)];
    loads.iter().all(|(bit, value)| control.perf_controls & bit == 0 || cpu.pmu.global_control_allowed(*value))
}

fn entry_work(cpu: &Cpu) -> u32 {
    let mut work = cpu.pending & pending::BREAKPOINTS;
    if cpu.control.emulate != 0 {
        work |= pending::EMULATE;
    }
    if cpu.state.pending_debug != 0 {
        work |= pending::DEBUG;
    }
    if cpu.state.activity == activity::HLT {
        work |= pending::HALTED;
    }
    work
}

/// The checks of a VM entry on guest state that the engine relies on (SDM vol. 3, 27.3.1; APM vol. 2, 15.5.1).
fn state_is_valid(state: &State, model: &Model) -> bool {
    let paging = state.cr0 & cr0::PG != 0;
    let long = state.efer & efer::LMA != 0;
    let cs = &state.segments[seg::CS];
    let code_64 = long && cs.has(rights::LONG);
    let unused = model.unused_address_bits();
    let checks = [
        !paging || state.cr0 & cr0::PE != 0,
        state.cr0 >> 32 == 0,
        long == (paging && state.efer & efer::LME != 0),
        !long || state.cr4 & cr4::PAE != 0,
        state.cr4 & cr4::PCIDE == 0 || long,
        state.cr3 >> model.physical_bits() == 0,
        state.rflags & rflags::FIXED != 0,
        state.rflags & rflags::VM == 0 || !long,
        !(cs.has(rights::LONG) && cs.has(rights::DB) && long),
        if code_64 { rip_may_be_loaded(state.rip, unused) } else { state.rip >> 32 == 0 },
        [seg::FS, seg::GS].iter().all(|number| canonical(state.segments[*number].base, unused)),
        state.activity <= activity::HLT,
        state.gdtr.limit <= 0xffff && state.idtr.limit <= 0xffff,
    ];
    checks.iter().all(|good| *good)
}

/// Bits 63:N of RIP must be identical, where N is the width of linear addresses; bit N-1 may differ (SDM vol. 3, 27.3.1.4). An instruction
/// at the end of the lower half leaves such a RIP behind, and the next fetch is #GP.
fn rip_may_be_loaded(rip: u64, unused: u8) -> bool {
    matches!((rip as i64) >> (64 - unused), 0 | -1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rip_behind_the_lower_half_may_be_loaded() {
        for rip in [0x7fff_ffff_ffff, 0x8000_0000_0000, !0] {
            assert!(rip_may_be_loaded(rip, 16) && rip_may_be_loaded(rip, 7), "{rip:#x}");
        }
        assert!(!rip_may_be_loaded(1 << 48, 16) && !rip_may_be_loaded(1 << 63, 16));
        assert!(rip_may_be_loaded(1 << 48, 7) && !rip_may_be_loaded(1 << 57, 7));
    }
}
