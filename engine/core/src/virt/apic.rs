//! APIC virtualization in x2APIC mode: interrupts that reach a running guest, end, and are sent to other guests without an exit.
//!
//! Sources: SDM vol. 3, ch. 30 (virtual-interrupt delivery, posted interrupts, IPI virtualization); APM vol. 2, 15.29 (x2AVIC). What both
//! vendors' silicon does is the same here, exits have each vendor's numbers. RVI and SVI are the highest bits of VIRR and VISR, as on AMD
//! silicon. Registers other than EOI, ICR and SELF_IPI, and whatever the MSR bitmap intercepts, are the hypervisor's.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use crate::cpu::signal::Signal;
use crate::cpu::{pending, Cpu};
use crate::state::{activity, interruptibility, rflags};
use crate::uop::{Exec, Stop};
use crate::virt::control::{intercept, VirtualApic};
use crate::virt::exits::{code, Code};

/// MSRs of the x2APIC.
pub const FIRST: u32 = 0x800;
pub const LAST: u32 = 0x8ff;
pub const EOI: u32 = 0x80b;
pub const ICR: u32 = 0x830;
pub const SELF_IPI: u32 = 0x83f;

/// Bits of the ICR besides vector, destination, and the level that an edge-triggered interrupt does not have: delivery and destination mode,
/// trigger, shorthand, reserved.
const ICR_UNUSUAL: u64 = 0xffff_bf00;
/// Vectors below are the processor's own.
const FIRST_VECTOR: u8 = 16;
/// Offsets of registers in an APIC page.
const EOI_OFFSET: u64 = 0xb0;
const ICR_OFFSET: u64 = 0x300;
/// EXITINFO1 of SVM: the access was a write.
const SVM_WRITE: u64 = 1 << 32;

const EVENT_VALID: u32 = 1 << 31;

type Vectors = [u64; 4];

/// Highest vector of a set.
fn highest(vectors: &Vectors) -> Option<u8> {
    let word = vectors.iter().rposition(|word| *word != 0)?;
    Some((word as u32 * 64 + 63 - vectors[word].leading_zeros()) as u8)
}

fn contains(vectors: &Vectors, vector: u8) -> bool {
    vectors[usize::from(vector / 64)] >> (vector % 64) & 1 != 0
}

fn add(vectors: &mut Vectors, vector: u8) {
    vectors[usize::from(vector / 64)] |= 1 << (vector % 64);
}

fn remove(vectors: &mut Vectors, vector: u8) {
    vectors[usize::from(vector / 64)] &= !(1 << (vector % 64));
}

/// A posted-interrupt descriptor: how any thread brings an interrupt to a guest, wherever that is.
pub struct PostedInterrupts {
    requests: [AtomicU64; 4],
    /// Something was posted since the last look, and the destination was told.
    outstanding: AtomicBool,
    /// The core that the guest is on.
    destination: Mutex<Option<Arc<Signal>>>,
    /// Ends the wait of a guest that is on no core.
    wake: Box<dyn Fn() + Send + Sync>,
}

impl PostedInterrupts {
    /// Of a guest whose thread `wake` wakes.
    pub fn new(wake: impl Fn() + Send + Sync + 'static) -> Self {
        PostedInterrupts {
            requests: Default::default(),
            outstanding: AtomicBool::new(false),
            destination: Mutex::default(),
            wake: Box::new(wake),
        }
    }

    /// Brings an interrupt to the guest.
    pub fn post(&self, vector: u8) {
        self.requests[usize::from(vector / 64)].fetch_or(1 << (vector % 64), Ordering::SeqCst);
        if !self.outstanding.swap(true, Ordering::SeqCst) {
            if let Some(core) = &*self.destination.lock().unwrap_or_else(PoisonError::into_inner) {
                core.notify();
            }
            (self.wake)();
        }
    }

    /// Takes what was posted.
    pub fn take(&self) -> Option<Vectors> {
        let posted = self.outstanding.load(Ordering::SeqCst) && self.outstanding.swap(false, Ordering::SeqCst);
        posted.then(|| self.requests.each_ref().map(|word| word.swap(0, Ordering::SeqCst)))
    }

    fn set_destination(&self, core: Option<Arc<Signal>>) {
        *self.destination.lock().unwrap_or_else(PoisonError::into_inner) = core;
    }
}

/// The PID-pointer table: descriptors by APIC id, for IPIs.
#[derive(Default)]
pub struct IpiTable(RwLock<Vec<Option<Arc<PostedInterrupts>>>>);

impl IpiTable {
    /// Lets IPIs to `id` go to `posted`, or exit.
    pub fn set(&self, id: u16, posted: Option<Arc<PostedInterrupts>>) {
        let mut table = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let id = usize::from(id);
        if id >= table.len() {
            table.resize(id + 1, None);
        }
        table[id] = posted;
    }

    /// Sends `vector` to `id`; whether it is known.
    fn send(&self, id: u32, vector: u8) -> bool {
        let table = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let Some(Some(posted)) = table.get(id as usize) else { return false };
        posted.post(vector);
        true
    }
}

/// The virtual APIC of the guest on a core.
#[derive(Default)]
pub struct Apic {
    pub(super) state: VirtualApic,
    posted: Option<Arc<PostedInterrupts>>,
    table: Option<Arc<IpiTable>>,
    /// What [`pending::APIC_EXIT`] is about: number, qualification or EXITINFO1, EXITINFO2.
    exit: Option<(Code, u64, u64)>,
}

impl Apic {
    /// Whether the guest has it.
    #[inline(always)]
    pub fn is_enabled(&self) -> bool {
        self.state.enable != 0
    }

    /// Takes the state from a control block.
    ///
    /// # Safety
    /// `from` must be valid for reads.
    pub unsafe fn load(&mut self, from: *const VirtualApic) {
        self.exit = None;
        // SAFETY: by the caller's promise.
        unsafe {
            if (*from).enable != 0 {
                self.state = *from;
            } else {
                self.state.enable = 0;
            }
        }
    }

    /// Gives it back.
    ///
    /// # Safety
    /// `to` must be valid for writes.
    pub unsafe fn store(&self, to: *mut VirtualApic) {
        if self.is_enabled() {
            // SAFETY: by the caller's promise.
            unsafe { *to = self.state };
        }
    }

    /// The vector to deliver, if the processor's priority lets it through (SDM vol. 3, 30.1.3 and 30.2.1).
    fn recognized(&self) -> Option<u8> {
        let in_service = highest(&self.state.isr).unwrap_or(0);
        let priority = u32::from(in_service).max(self.state.tpr) >> 4;
        highest(&self.state.irr).filter(|vector| u32::from(vector >> 4) > priority)
    }
}

impl Cpu {
    /// See [`crate::virt::entry::Core::set_apic`].
    pub(super) fn set_apic(&mut self, posted: Option<Arc<PostedInterrupts>>, table: Option<Arc<IpiTable>>) {
        if let Some(before) = &self.apic.posted {
            before.set_destination(None);
        }
        if let Some(now) = &posted {
            now.set_destination(Some(self.signal.clone()));
        }
        (self.apic.posted, self.apic.table) = (posted, table);
    }

    /// Whether the hypervisor has an instruction emulated, whose exits it wants to see.
    pub fn emulates(&self) -> bool {
        self.pending & pending::EMULATE != 0
    }

    /// Posted-interrupt processing (SDM vol. 3, 30.6).
    pub fn receive_posted(&mut self) {
        if !self.apic.is_enabled() {
            return;
        }
        if let Some(requests) = self.apic.posted.as_ref().and_then(|posted| posted.take()) {
            self.apic.state.irr.iter_mut().zip(requests).for_each(|(irr, requests)| *irr |= requests);
        }
        self.evaluate_virtual();
    }

    /// Evaluation of pending virtual interrupts (SDM vol. 3, 30.2.1).
    fn evaluate_virtual(&mut self) {
        self.pending &= !pending::VIRTUAL;
        if self.apic.recognized().is_some() {
            self.pending |= pending::VIRTUAL;
        }
    }

    /// Virtual-interrupt delivery, if the guest takes interrupts now (SDM vol. 3, 30.2.2 and 30.2.3).
    #[cold]
    pub fn take_virtual_interrupt(&mut self) -> Exec {
        let shadow = self.state.interruptibility & (interruptibility::STI | interruptibility::MOV_SS) != 0;
        if shadow || self.rflags & rflags::IF == 0 || self.control.intercepts(intercept::INTERRUPT_WINDOW) {
            return Ok(());
        }
        let Some(vector) = self.apic.recognized() else { return Ok(()) };
        add(&mut self.apic.state.isr, vector);
        remove(&mut self.apic.state.irr, vector);
        self.evaluate_virtual();
        self.pending &= !pending::HALTED;
        self.state.activity = activity::ACTIVE;
        self.deliver_event(EVENT_VALID | u32::from(vector), 0, 0)
    }

    /// WRMSR of a register that the virtual APIC has; #GP for reserved bits.
    pub fn write_apic(&mut self, index: u32, value: u64) -> Exec {
        match index {
            EOI if value == 0 => self.end_virtual_interrupt(),
            ICR => self.send_ipi(value),
            SELF_IPI if value >> 8 == 0 => {
                add(&mut self.apic.state.irr, value as u8);
                self.evaluate_virtual();
            }
            _ => return Err(self.general_protection()),
        }
        Ok(())
    }

    /// EOI virtualization (SDM vol. 3, 30.1.4).
    fn end_virtual_interrupt(&mut self) {
        let Some(vector) = highest(&self.apic.state.isr) else { return };
        remove(&mut self.apic.state.isr, vector);
        self.evaluate_virtual();
        if contains(&self.apic.state.eoi_exit, vector) {
            let detail = if self.model.is_amd() { SVM_WRITE | EOI_OFFSET } else { vector.into() };
            self.exit_behind(code::EOI, detail, vector.into());
        }
    }

    /// IPI virtualization (SDM vol. 3, 30.1.6): one fixed interrupt to one APIC id, without shorthand. All else is the hypervisor's.
    fn send_ipi(&mut self, value: u64) {
        self.apic.state.icr = value;
        let vector = value as u8;
        let usual = value & ICR_UNUSUAL == 0 && vector >= FIRST_VECTOR;
        if usual && self.apic.table.as_ref().is_some_and(|table| table.send((value >> 32) as u32, vector)) {
            return;
        }
        let detail = if self.model.is_amd() { value } else { ICR_OFFSET };
        self.exit_behind(code::APIC_WRITE, detail, 0);
    }

    /// Exits when the instruction is complete.
    fn exit_behind(&mut self, number: Code, detail: u64, info2: u64) {
        self.apic.exit = Some((number, detail, info2));
        self.pending |= pending::APIC_EXIT;
    }

    /// The exit of [`pending::APIC_EXIT`].
    #[cold]
    pub fn exit_apic(&mut self) -> Stop {
        self.pending &= !pending::APIC_EXIT;
        let Some((number, detail, info2)) = self.apic.exit.take() else { unreachable!("an exit of the APIC without a reason") };
        let stop = self.exit(number, detail);
        self.exit.info2 = info2;
        stop
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_of_vectors_know_their_highest() {
        let mut set = Vectors::default();
        assert_eq!(highest(&set), None);
        for vector in [0, 63, 64, 200, 255] {
            add(&mut set, vector);
            assert_eq!(highest(&set), Some(vector));
        }
        remove(&mut set, 255);
        assert!(highest(&set) == Some(200) && contains(&set, 200) && !contains(&set, 255));
    }

    #[test]
    fn priority_is_the_higher_one_of_the_task_and_of_what_is_in_service() {
        let mut apic = Apic::default();
        add(&mut apic.state.irr, 0x51);
        assert_eq!(apic.recognized(), Some(0x51));
        for (tpr, isr, passes) in [(0x4f, 0, true), (0x50, 0, false), (0, 0x4f, true), (0, 0x50, false), (0x50, 0x41, false)] {
            apic.state.tpr = tpr;
            apic.state.isr = Vectors::default();
            add(&mut apic.state.isr, isr);
            assert_eq!(apic.recognized().is_some(), passes, "{tpr:#x} {isr:#x}");
        }
    }

    #[test]
    fn each_post_is_taken_once_and_wakes_once() {
        let wakes = Arc::new(AtomicU64::new(0));
        let counted = wakes.clone();
        let posted = PostedInterrupts::new(move || {
            counted.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(posted.take(), None);
        posted.post(3);
        posted.post(255);
        assert_eq!(posted.take(), Some([8, 0, 0, 1 << 63]));
        assert_eq!((posted.take(), wakes.load(Ordering::Relaxed)), (None, 1));
        posted.post(64);
        assert_eq!((posted.take(), wakes.load(Ordering::Relaxed)), (Some([0, 1, 0, 0]), 2));
    }

    #[test]
    fn ipis_go_to_known_ids_only() {
        let table = IpiTable::default();
        let posted = Arc::new(PostedInterrupts::new(|| {}));
        table.set(3, Some(posted.clone()));
        assert!(!table.send(2, 0x30) && !table.send(4, 0x30) && !table.send(u32::MAX, 0x30));
        assert!(table.send(3, 0x30));
        assert_eq!(posted.take(), Some([1 << 0x30, 0, 0, 0]));
        table.set(3, None);
        assert!(!table.send(3, 0x30));
    }
}
