//! What the thread of a processor that has nothing to do waits on, without the interpreter lock.
//!
//! A thread that sleeps in the host's kernel needs tens of microseconds to wake up, so it may look for a while whether it is about to be
//! woken, as KVM's halt polling does (Linux 6.1 `Documentation/virt/kvm/halt-polling.rst`).

use std::hint;
use std::ptr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use softkvm_engine::cpu::clock::{host_tsc, host_tsc_khz};

use crate::handover;
use crate::processors;

/// Values of `Wakeup::state`.
const QUIET: u32 = 0;
const WOKEN: u32 = 1;
const ASLEEP: u32 = 2;

/// A thread that has its processor to itself looks more often than this, in microseconds.
const PREEMPTED_US: u64 = 20;

/// Wakes one thread.
#[pyclass(frozen, module = "softkvm._engine")]
#[derive(Default)]
pub struct Wakeup {
    pub flag: Arc<Flag>,
}

/// What one thread waits for.
#[derive(Default)]
pub struct Flag {
    state: AtomicU32,
}

#[pymethods]
impl Wakeup {
    #[new]
    fn new() -> Self {
        Wakeup::default()
    }

    /// Whether it was set since `clear()`.
    fn is_set(&self) -> bool {
        self.flag.is_set()
    }

    /// Forgets what was set so far.
    fn clear(&self) {
        self.flag.state.store(QUIET, Ordering::SeqCst);
    }

    /// Wakes the thread that waits, or the next one that does.
    fn set(&self) {
        self.flag.set();
    }

    /// Waits awake until it is set, `ns` are over, or another thread has taken the processor; whether it is set. Not at all if another
    /// thread wants the processor (`processors::wanted()`).
    fn poll(&self, py: Python<'_>, ns: u64) -> bool {
        handover::release();
        py.detach(|| {
            if self.flag.looks_up(ns) {
                handover::wait();
            }
        });
        handover::acquired();
        self.flag.is_set()
    }

    /// Sleeps until it is set or `timeout` seconds are over, None for no limit; whether it is set. Python's signal handlers run meanwhile,
    /// and what they raise comes out. ValueError for a negative or boundless number.
    #[pyo3(signature = (timeout=None))]
    fn wait(&self, py: Python<'_>, timeout: Option<f64>) -> PyResult<bool> {
        let limit = timeout.map(Duration::try_from_secs_f64).transpose().map_err(|error| PyValueError::new_err(error.to_string()))?;
        let end = limit.and_then(|limit| Instant::now().checked_add(limit));
        loop {
            handover::release();
            let again = py.detach(|| {
                let again = self.flag.sleep(end);
                handover::wait();
                again
            });
            handover::acquired();
            py.check_signals()?;
            if !again {
                return Ok(self.flag.is_set());
            }
        }
    }
}

impl Flag {
    fn is_set(&self) -> bool {
        self.state.load(Ordering::SeqCst) == WOKEN
    }

    /// Wakes the thread.
    pub fn set(&self) {
        if self.state.swap(WOKEN, Ordering::SeqCst) == ASLEEP {
            // SAFETY: the word lives as long as `self`, and the call only looks up who sleeps on it.
            unsafe { libc::syscall(libc::SYS_futex, self.state.as_ptr(), libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG, i32::MAX) };
        }
    }

    /// The inside of `poll()`.
    fn looks_up(&self, ns: u64) -> bool {
        let khz = host_tsc_khz();
        let ticks = u128::from(ns) * u128::from(khz) / 1_000_000;
        let start = host_tsc();
        let end = start.saturating_add(u64::try_from(ticks).unwrap_or(u64::MAX));
        let gap = khz / 1000 * PREEMPTED_US;
        let mut last = start;
        if processors::wanted() {
            return self.is_set();
        }
        while !self.is_set() {
            let now = host_tsc();
            if now >= end || now.wrapping_sub(last) > gap {
                return self.is_set();
            }
            last = now;
            hint::spin_loop();
        }
        true
    }

    /// Sleeps once; whether it was for nothing, so that the caller must sleep again.
    fn sleep(&self, end: Option<Instant>) -> bool {
        let left = end.map(|end| end.saturating_duration_since(Instant::now()));
        if left == Some(Duration::ZERO) || self.state.compare_exchange(QUIET, ASLEEP, Ordering::SeqCst, Ordering::SeqCst) == Err(WOKEN) {
            return false;
        }
        let timeout = left.map(|left| libc::timespec { tv_sec: left.as_secs() as libc::time_t, tv_nsec: left.subsec_nanos().into() });
        let timeout = timeout.as_ref().map_or(ptr::null(), ptr::from_ref);
        // SAFETY: the word lives as long as `self`, `timeout` until the call returns; the kernel reads both.
        unsafe { libc::syscall(libc::SYS_futex, self.state.as_ptr(), libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG, ASLEEP, timeout) };
        self.state.compare_exchange(ASLEEP, QUIET, Ordering::SeqCst, Ordering::SeqCst).is_ok()
    }
}
