//! The time stamp counter of a core and its local timer (SDM vol. 3, 18.17).
//!
//! The host's TSC is the processor's own, or virtual: then it counts a fixed number of cycles per retired instruction, and stands still
//! while no guest runs unless the hypervisor moves it.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// Host TSC now. On x86-64 hosts it is the processor's own; elsewhere nanoseconds of the monotonic clock.
#[inline(always)]
pub fn host_tsc() -> u64 {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every x86-64 processor has RDTSC, and user space may execute it (CR4.TSD is clear under Linux).
    unsafe {
        core::arch::x86_64::_rdtsc()
    }
    #[cfg(not(target_arch = "x86_64"))]
    monotonic_ns()
}

/// CLOCK_MONOTONIC_RAW in nanoseconds.
pub fn monotonic_ns() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: a valid clock and a valid buffer.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC_RAW, &mut now) };
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// Frequency of [`host_tsc`] in kHz, measured once against the monotonic clock.
pub fn host_tsc_khz() -> u64 {
    static KHZ: OnceLock<u64> = OnceLock::new();
    *KHZ.get_or_init(|| if cfg!(target_arch = "x86_64") { measure_khz() } else { 1_000_000 })
}

fn measure_khz() -> u64 {
    const WINDOW: Duration = Duration::from_millis(20);
    let start = Instant::now();
    let (tsc, ns) = reading();
    std::thread::sleep(WINDOW.saturating_sub(start.elapsed()));
    let (tsc_end, ns_end) = reading();
    (u128::from(tsc_end - tsc) * 1_000_000 / u128::from(ns_end - ns)) as u64
}

/// TSC and monotonic time of the same moment: the pair with the shortest gap of several.
fn reading() -> (u64, u64) {
    let pair = || {
        let before = host_tsc();
        let ns = monotonic_ns();
        let after = host_tsc();
        (after - before, before + (after - before) / 2, ns)
    };
    let (_, tsc, ns) = (0..16).map(|_| pair()).min_by_key(|(gap, ..)| *gap).unwrap_or_else(pair);
    (tsc, ns)
}

/// What a core knows about time.
#[derive(Clone, Copy, Debug, Default)]
pub struct Clock {
    /// Host TSC at which the core's own timer interrupts; zero is off.
    pub timer: u64,
    /// Host TSC of the next periodic interrupt, which gives the host a look at its own work.
    pub tick: u64,
    /// Host TSC at which the preemption timer of the running guest ends; zero is off.
    pub preemption: u64,
    pub offset: u64,
    /// 48 fractional bits; zero stands for unity before the first entry.
    pub multiplier: u64,
    /// Host TSC of the first and of the last PAUSE of the current loop; zero after a VM entry.
    pub pauses: (u64, u64),
    /// Virtual time: cycles per retired instruction; zero while the host's TSC is the processor's.
    pub rate: u64,
    /// Virtual time: what the host's TSC was before the core retired its first instruction.
    pub base: u64,
}

/// Milliseconds between two periodic interrupts.
pub const TICK_MS: u64 = 10;

/// Multiplier of a guest TSC that runs at the host's rate.
pub const UNITY: u64 = 1 << 48;

impl Clock {
    /// Whether the host's TSC is virtual.
    #[inline(always)]
    pub fn is_virtual(&self) -> bool {
        self.rate != 0
    }

    /// Host TSC of a core that has retired `instructions`.
    #[inline(always)]
    pub fn host_tsc(&self, instructions: u64) -> u64 {
        if self.is_virtual() {
            self.base.wrapping_add(instructions.wrapping_mul(self.rate))
        } else {
            host_tsc()
        }
    }

    /// Makes the host's TSC a virtual one that reads `now` on a core that has retired `instructions`, or the processor's if `rate` is zero.
    pub fn set_virtual(&mut self, rate: u64, now: u64, instructions: u64) {
        self.rate = rate;
        self.base = now.wrapping_sub(instructions.wrapping_mul(rate));
    }

    /// Guest TSC when the host's is `host`.
    pub fn guest_tsc(&self, host: u64) -> u64 {
        self.scale(host).wrapping_add(self.offset)
    }

    /// Host TSC at which the first of the core's timers ends.
    pub fn next_timer(&self) -> Option<u64> {
        [self.timer, self.preemption].into_iter().filter(|end| *end != 0).min()
    }

    fn scale(&self, tsc: u64) -> u64 {
        if self.multiplier == UNITY || self.multiplier == 0 {
            return tsc;
        }
        ((u128::from(tsc) * u128::from(self.multiplier)) >> 48) as u64
    }

    /// Notes a PAUSE, which belongs to the loop of the last one if that was up to `gap` cycles ago; returns the age of the loop in cycles
    /// (SDM vol. 3, 25.1.3).
    pub fn pause(&mut self, now: u64, gap: u32) -> u64 {
        let (first, last) = self.pauses;
        let same = now.saturating_sub(last) <= u64::from(gap);
        self.pauses = (if same { first } else { now }, now);
        now.saturating_sub(self.pauses.0)
    }

    /// Host TSC at which the guest's TSC reaches `deadline`.
    pub fn host_deadline(&self, deadline: u64) -> u64 {
        let scaled = deadline.wrapping_sub(self.offset);
        if self.multiplier == UNITY || self.multiplier == 0 {
            return scaled.max(1);
        }
        let host = (u128::from(scaled) << 48) / u128::from(self.multiplier);
        u64::try_from(host).unwrap_or(u64::MAX).max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_loop_is_as_old_as_its_first_pause() {
        let mut clock = Clock::default();
        let ages = [1000, 1050, 1150, 1251, 1300].map(|now| clock.pause(now, 100));
        assert_eq!(ages, [0, 50, 150, 0, 49]);
    }
}
