//! The interpreter lock between the threads of vCPUs.
//!
//! A thread that comes back from a guest while another one has the lock would sleep in the host's kernel, and waking it takes much longer
//! than what the other one does with most exits. So it looks for a while whether the lock is about to be free, as the kernel's mutexes do
//! (`kernel/locking/mutex.c`, optimistic spinning: only while the owner runs). A thread that took the lock longer ago than that does
//! something else with it, or sleeps in HLT; nobody waits for it like this.

use std::hint;
use std::sync::atomic::{AtomicU64, Ordering};

use softkvm_engine::cpu::clock::{host_tsc, host_tsc_khz};

/// Longest time that an exit is expected to keep the lock, in microseconds.
const EXIT_US: u64 = 30;

/// When the thread that came out of a guest last got the lock, in ticks of the host's TSC; zero if it is in a guest again.
static OWNED_SINCE: AtomicU64 = AtomicU64::new(0);

/// The calling thread, which has the lock, is about to release it for a guest.
pub fn release() {
    OWNED_SINCE.store(0, Ordering::Relaxed);
}

/// The calling thread wants the lock: waits while another one is in the middle of an exit.
pub fn wait() {
    let limit = host_tsc_khz() / 1000 * EXIT_US;
    loop {
        let since = OWNED_SINCE.load(Ordering::Relaxed);
        if since == 0 || host_tsc().wrapping_sub(since) > limit {
            return;
        }
        hint::spin_loop();
    }
}

/// The calling thread has got the lock.
pub fn acquired() {
    OWNED_SINCE.store(host_tsc(), Ordering::Relaxed);
}
