//! Which processors of the host the guests are on, where the host does not know who waits for whom.
//!
//! Two vCPUs that hand work to each other are two busy threads to the host, which may leave them on one processor for seconds, or wake one
//! on the processor of the other: then each hand-over takes a time slice, and a lock of the guest's is held as long. Answers to Linux 6.1
//! `active_load_balance_cpu_stop()` (`kernel/sched/fair.c`) and `kvm_vcpu_on_spin()` (`virt/kvm/kvm_main.c`).

use std::cell::Cell;
use std::marker::PhantomData;
use std::mem::{size_of, MaybeUninit};
use std::sync::atomic::{AtomicU32, Ordering};

use softkvm_engine::cpu::clock::{host_tsc, host_tsc_khz};

/// Processors that are told apart; those of a larger host share a place.
const MAX: usize = 1024;
/// Milliseconds between two attempts of a thread to find another processor.
const PATIENCE_MS: u64 = 2;

/// How many threads were on the processor when they entered their guests, and have not come back.
static GUESTS: [AtomicU32; MAX] = [const { AtomicU32::new(0) }; MAX];

thread_local! {
    /// Host TSC of the thread's last attempt.
    static ATTEMPT: Cell<u64> = const { Cell::new(0) };
    /// Where the thread is counted, if it is in a guest.
    static PLACE: Cell<Option<usize>> = const { Cell::new(None) };
    /// How often the thread had lost its processor to another one when it last looked.
    static PREEMPTIONS: Cell<i64> = const { Cell::new(0) };
}

/// The calling thread is in a guest, until dropped.
pub struct Stay(PhantomData<*const ()>);

impl Stay {
    /// The thread enters its guest: where another guest was and cannot run now, the thread goes to a processor without one.
    pub fn begin() -> Self {
        let mut here = current();
        if GUESTS[here].load(Ordering::Relaxed) != 0 && step_aside() {
            here = current();
        }
        arrive(here);
        Stay(PhantomData)
    }
}

impl Drop for Stay {
    fn drop(&mut self) {
        depart();
    }
}

fn arrive(here: usize) {
    GUESTS[here].fetch_add(1, Ordering::Relaxed);
    PLACE.set(Some(here));
}

/// Whether the thread was in a guest.
fn depart() -> bool {
    let place = PLACE.take();
    if let Some(place) = place {
        GUESTS[place].fetch_sub(1, Ordering::Relaxed);
    }
    place.is_some()
}

/// Whether others want the processor of the calling thread, which has nothing to do: another guest was on it, or another thread has taken it
/// since the last call. Where others want to run, the kernel does not poll either (`single_task_running()`).
pub fn wanted() -> bool {
    was_preempted() || crowded()
}

/// Whether another guest cannot run now because the calling thread has its processor. If the thread is in a guest itself, the host may have
/// moved it meanwhile: it is counted where it is now.
fn crowded() -> bool {
    let here = current();
    let inside = depart();
    let others = GUESTS[here].load(Ordering::Relaxed);
    if inside {
        arrive(here);
    }
    others != 0
}

fn was_preempted() -> bool {
    let mut usage = MaybeUninit::<libc::rusage>::uninit();
    // SAFETY: the buffer is ours; the call fills it, and cannot fail for a valid `who`.
    let count = unsafe {
        libc::getrusage(libc::RUSAGE_THREAD, usage.as_mut_ptr());
        usage.assume_init().ru_nivcsw
    };
    PREEMPTIONS.replace(count) != count
}

fn current() -> usize {
    // SAFETY: takes nothing and changes nothing.
    let processor = unsafe { libc::sched_getcpu() };
    usize::try_from(processor).unwrap_or(0) % MAX
}

/// Leaves the processor for one without a guest; false where that would not help, or was tried a moment ago.
#[cold]
fn step_aside() -> bool {
    let now = host_tsc();
    if ATTEMPT.get() != 0 && now.wrapping_sub(ATTEMPT.get()) < host_tsc_khz() * PATIENCE_MS {
        return false;
    }
    ATTEMPT.set(now);
    // SAFETY: zeroes are an empty set, and the kernel writes no more than the size that it is told; the macros look into the sets.
    unsafe {
        let mut allowed: libc::cpu_set_t = std::mem::zeroed();
        if libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &mut allowed) != 0 {
            return false; // more processors than the set has
        }
        let mut free: libc::cpu_set_t = std::mem::zeroed();
        for processor in (0..MAX).filter(|processor| libc::CPU_ISSET(*processor, &allowed)) {
            if GUESTS[processor].load(Ordering::Relaxed) == 0 {
                libc::CPU_SET(processor, &mut free);
            }
        }
        if libc::CPU_COUNT(&free) == 0 || runnable() > libc::CPU_COUNT(&allowed) {
            return false; // on a busy host whoever moves waits for its turn again
        }
        // The thread may run everywhere again at once; the host has moved it by then.
        if libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &free) == 0 {
            libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &allowed);
        }
    }
    true
}

/// How many threads of the host run or want to (proc(5), `/proc/loadavg`); more than there can be if it does not tell.
fn runnable() -> i32 {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let running = text.split(' ').nth(3).and_then(|field| field.split('/').next());
    running.and_then(|number| number.parse().ok()).unwrap_or(i32::MAX)
}
