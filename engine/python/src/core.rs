//! One physical CPU.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pyo3::exceptions::{PyLookupError, PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use softkvm_engine::cpu::signal::Signal;
use softkvm_engine::paging::walk::WalkError;
use softkvm_engine::pmu::log::Filter;
use softkvm_engine::pmu::registers::Refused;
use softkvm_engine::virt::entry::Core as Silicon;

use crate::block::ControlBlock;
use crate::bug;
use crate::handover;
use crate::model::Model;
use crate::nested::NestedPageTable;
use crate::posted::{IpiTable, PostedInterrupts};
use crate::processors::{self, Stay};

/// Value of `Core::timer` when no change waits for the next entry.
const UNCHANGED: u64 = u64::MAX;

/// One physical CPU: translation caches, code cache, TSC and its own timer.
#[pyclass(frozen, module = "softkvm._engine")]
pub struct Core {
    silicon: Mutex<Silicon>,
    signal: Arc<Signal>,
    /// The timer setting that the next entry takes over.
    timer: AtomicU64,
    running: AtomicBool,
    /// The engine panicked while the core ran; its caches cannot be trusted any more.
    broken: AtomicBool,
}

#[pymethods]
impl Core {
    #[new]
    fn new(model: &Model, index: u32) -> Self {
        let mut silicon = Silicon::new(model.model.clone(), index);
        silicon.set_crowded(processors::wanted);
        let signal = silicon.signal();
        let (running, broken) = (AtomicBool::new(false), AtomicBool::new(false));
        Core { silicon: Mutex::new(silicon), signal, timer: AtomicU64::new(UNCHANGED), running, broken }
    }

    /// Runs the guest of `block` on `npt` until a VM exit, without the GIL, and returns the exit reason.
    ///
    /// Raises RuntimeError while the core or the block runs already, EngineBug when the engine itself failed.
    fn enter(&self, py: Python<'_>, block: &ControlBlock, npt: &NestedPageTable) -> PyResult<u32> {
        if self.broken.load(Ordering::Relaxed) {
            return Err(bug::EngineBug::new_err("the core stopped for good at an earlier bug of the engine"));
        }
        let _running = Running::start(&self.running).ok_or_else(|| PyRuntimeError::new_err("the core is running already"))?;
        let claim = block.claim().ok_or_else(|| PyRuntimeError::new_err("another core runs on the control block"))?;
        handover::release();
        let outcome = py.detach(|| {
            let stay = Stay::begin();
            let mut silicon = self.lock();
            let timer = self.timer.swap(UNCHANGED, Ordering::SeqCst);
            if timer != UNCHANGED {
                silicon.set_timer(timer);
            }
            // SAFETY: the claim keeps the block alive and other cores away from it. Python code may still write it through a view, which
            // the contract of the class forbids during the run; the engine copies what it checks.
            let reason = bug::guard(|| unsafe { silicon.enter(claim.as_ptr(), &npt.table) });
            drop(silicon);
            drop(stay);
            handover::wait();
            reason
        });
        handover::acquired();
        outcome.map_err(|message| {
            self.broken.store(true, Ordering::Relaxed);
            self.signal.set_running(false); // nobody needs to wait for it
            bug::EngineBug::new_err(message)
        })
    }

    /// A host interrupt: a running guest leaves, and the next entry of one that does not run returns at once.
    fn kick(&self) {
        self.signal.kick();
    }

    /// Sets the core's timer, which interrupts a running guest, to a host TSC value; 0 stops it. Never waits: a core that runs leaves
    /// the guest and takes the new setting with its next entry.
    fn set_timer(&self, tsc: u64) {
        self.timer.store(tsc.min(UNCHANGED - 1), Ordering::SeqCst);
        if self.running.load(Ordering::SeqCst) {
            self.signal.kick();
        }
    }

    /// Guests that the core runs from now on have their interrupts posted to `posted`, and send IPIs by `table`. Waits while the core runs.
    #[pyo3(signature = (posted, table))]
    fn set_apic(&self, py: Python<'_>, posted: Option<&PostedInterrupts>, table: Option<&IpiTable>) {
        let (posted, table) = (posted.map(|posted| posted.descriptor.clone()), table.map(|table| table.table.clone()));
        self.with_silicon(py, |silicon| silicon.set_apic(posted, table));
    }

    /// Guest-physical address of `gva` in the address space of `block`, or None where the guest would fault; nothing changes.
    /// `access` is the sum of 1 read, 2 write, 4 execute, 8 user mode. Waits while the core runs. Raises LookupError, with the
    /// guest-physical address, for a table of the guest's that `npt` does not map.
    fn translate(&self, py: Python<'_>, block: &ControlBlock, npt: &NestedPageTable, gva: u64, access: u32) -> PyResult<Option<u64>> {
        let found = py.detach(|| {
            // SAFETY: the block is valid as long as `block`, and its state is plain data.
            let state = unsafe { (&raw const (*block.as_ptr()).state).read_volatile() };
            self.lock().translate(&state, &npt.table, gva, access)
        });
        match found {
            Ok(gpa) => Ok(Some(gpa)),
            Err(WalkError::Guest(_)) => Ok(None),
            Err(WalkError::Nested { gpa, .. }) => Err(PyLookupError::new_err(gpa)),
        }
    }

    /// Reads an MSR of the core's PMU, LBR stack or LVTPC as the host does; ValueError if there is none of this number. Waits while the
    /// core runs.
    fn pmu_read(&self, py: Python<'_>, index: u32) -> PyResult<u64> {
        self.with_silicon(py, |silicon| silicon.pmu_read(index)).map_err(|Refused| PyValueError::new_err(format!("no MSR {index:#x}")))
    }

    /// Writes one as the host does; ValueError if there is none or it does not take `value`. Waits while the core runs.
    fn pmu_write(&self, py: Python<'_>, index: u32, value: u64) -> PyResult<()> {
        let outcome = self.with_silicon(py, |silicon| silicon.pmu_write(index, value));
        outcome.map_err(|Refused| PyValueError::new_err(format!("MSR {index:#x} does not take {value:#x}")))
    }

    /// Starts a log of at most `capacity` taken branches from `rings` (1 kernel, 2 user, 3 both) and addresses `low` to `high`, both
    /// included; one that was on is dropped. Waits while the core runs.
    fn branch_log_start(&self, py: Python<'_>, capacity: usize, rings: u8, low: u64, high: u64) {
        self.with_silicon(py, |silicon| silicon.branch_log_start(capacity, Filter { rings, low, high }));
    }

    /// Takes the records out of the branch log. Waits while the core runs.
    fn branch_log_read<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        let records = self.with_silicon(py, Silicon::branch_log_read);
        PyBytes::new(py, &records)
    }

    /// Ends the branch log and drops what nobody read. Waits while the core runs.
    fn branch_log_stop(&self, py: Python<'_>) {
        self.with_silicon(py, Silicon::branch_log_stop);
    }

    /// Everything that the core counts, by name. Waits while the core runs.
    fn counters(&self, py: Python<'_>) -> BTreeMap<String, u64> {
        py.detach(|| self.lock().counters().into_iter().collect())
    }
}

impl Core {
    /// Calls `act` with the core that does not run, at once if it does not.
    fn with_silicon<T: Send>(&self, py: Python<'_>, act: impl FnOnce(&mut Silicon) -> T + Send) -> T {
        match self.silicon.try_lock() {
            Ok(mut silicon) => act(&mut silicon),
            Err(_) => py.detach(|| act(&mut self.lock())),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Silicon> {
        self.silicon.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Says that a thread is in `enter`, until dropped.
struct Running<'a>(&'a AtomicBool);

impl<'a> Running<'a> {
    fn start(flag: &'a AtomicBool) -> Option<Self> {
        flag.compare_exchange(false, true, Ordering::SeqCst, Ordering::Relaxed).is_ok().then_some(Running(flag))
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::SeqCst);
    }
}
