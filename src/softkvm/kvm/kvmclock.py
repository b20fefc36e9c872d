"""kvmclock and steal time: the pages in guest memory that tell a guest about time.

Answers to Linux 6.1 `arch/x86/kvm/x86.c`, `Documentation/virt/kvm/x86/{msr,timekeeping}.rst` and `asm/pvclock-abi.h`.
"""

from __future__ import annotations

import errno
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, NamedTuple

from softkvm.host import trace
from softkvm.host.clock import NSEC_PER_MSEC, NSEC_PER_SEC, HrTimer
from softkvm.kvm import request
from softkvm.uapi.kvm import KVM_CLOCK_HOST_TSC, KVM_CLOCK_REALTIME, KVM_CLOCK_TSC_STABLE, ClockData

if TYPE_CHECKING:
    from softkvm.kvm.types import Vcpu, Vm

_U32, _U64 = 0xFFFF_FFFF, (1 << 64) - 1
UPDATE_DELAY_NS = 100 * NSEC_PER_MSEC
"""How long after one vCPU's time has changed all are refreshed (KVMCLOCK_UPDATE_DELAY)."""
SYNC_PERIOD_NS = 300 * NSEC_PER_SEC
"""How often all are refreshed in any case (KVMCLOCK_SYNC_PERIOD)."""
MSR_ENABLED = 1
FLAG_TSC_STABLE, FLAG_GUEST_STOPPED = 1, 2
STEAL_RESERVED = 0x3E
"""The record is aligned to 64 bytes; bit 0 enables it."""

_VERSION = struct.Struct("<I")
_TIME_INFO = struct.Struct("<I4xQQIbB2x")  # version, tsc_timestamp, system_time, tsc_to_system_mul, tsc_shift, flags
_TIME_INFO_FLAGS = 29
_WALL_CLOCK = struct.Struct("<III")  # version, sec, nsec
_STEAL_TIME = struct.Struct("<QIIB47x")  # steal, version, flags, preempted
_STEAL_VERSION = 8


@dataclass(frozen=True, slots=True)
class TimeInfo:
    """`struct pvclock_vcpu_time_info`."""

    version: int
    tsc_timestamp: int
    system_time: int
    tsc_to_system_mul: int
    tsc_shift: int
    flags: int


class MasterPair(NamedTuple):
    """The master clock's instant, and whether it is in use."""

    use_master_clock: bool
    cycle_now: int
    kernel_ns: int
    offset: int
    """From kernel_ns to kvmclock, in ns."""


def time_scale(hz: int) -> tuple[int, int]:
    """Shift and multiplier that turn cycles of `hz` into ns: `((cycles << shift) * multiplier) >> 32`, with all bits of precision."""
    shift = 0
    while (NSEC_PER_SEC << 32) // (hz << shift) > _U32:
        shift += 1
    while shift <= 0 and (NSEC_PER_SEC << 33 - shift) // hz <= _U32:
        shift -= 1
    multiplier = (NSEC_PER_SEC << 32) // (hz << shift) if shift >= 0 else (NSEC_PER_SEC << 32 - shift) // hz
    return shift, multiplier


def scale_delta(cycles: int, shift: int, multiplier: int) -> int:
    """Nanoseconds as a guest computes them from the page."""
    return ((cycles << shift if shift >= 0 else cycles >> -shift) * multiplier) >> 32


def _next_odd(version: int) -> int:
    """The version that says "being written"."""
    return (version + 1 | 1) & _U32


class VmClock:
    """The VM's kvmclock: its zero, and the master clock, one pair of TSC and time that all vCPUs extrapolate from."""

    def __init__(self, vm: Vm) -> None:
        """A clock that begins at 0 now."""
        self._vm = vm
        self._clock = vm.clock
        self._lock = threading.Lock()
        self._updating = threading.Lock()
        """Held while the master clock changes, by whoever changes it."""
        self.offset = -self._clock.boottime_ns()
        self.use_master_clock = False
        self.boot_vcpu_runs_old_kvmclock = False
        """Whether vCPU 0 uses the MSR 12h, whose guests do not look at the stable flag."""
        self._master_tsc = 0
        self._master_ns = 0
        self._update_work = HrTimer(self._clock, self._update_all)
        self._sync_work = HrTimer(self._clock, self._sync_periodically)

    def all_tscs_match(self) -> bool:
        """Whether every online vCPU is of the current TSC generation."""
        return self._vm.tsc.vcpus_matched + 1 == len(self._vm.vcpus)

    def update_masterclock(self, by: Vcpu | None = None) -> None:
        """Take a new pair, and have every vCPU but `by` refresh its page before it is in the guest again."""
        with self._update(by):
            self._update_gtod_copy()

    @contextmanager
    def _update(self, by: Vcpu | None) -> Iterator[None]:
        """`kvm_{start,end}_pvclock_update()`: in the block, with the lock held, no vCPU is in the guest; before one comes back its page is
        refreshed (`by` sees to that itself). So no guest has pages of two pairs, between which its time might go back.
        """
        others = [vcpu for vcpu in self._vm.vcpus if vcpu is not by]
        with self._updating:
            for vcpu in others:
                vcpu.keep_out(request.REQ_MCLOCK_INPROGRESS)
            for vcpu in others:
                vcpu.await_exit()
            with self._lock:
                yield
            for vcpu in others:
                vcpu.note_request(request.REQ_CLOCK_UPDATE)
                vcpu.clear_request(request.REQ_MCLOCK_INPROGRESS)

    def await_update(self) -> None:
        """Return when nobody changes the master clock."""
        with self._updating:
            pass

    def _update_gtod_copy(self) -> None:
        self._master_tsc = self._clock.tsc()
        self._master_ns = self._clock.boottime_at(self._master_tsc)
        matched = self.all_tscs_match()
        # A TSC that catches up is no clock to extrapolate from.
        steady = not any(vcpu.tsc.catchup for vcpu in self._vm.vcpus)
        self.use_master_clock = matched and steady and not self.boot_vcpu_runs_old_kvmclock
        if trace.kvm_update_master_clock.enabled:
            trace.kvm_update_master_clock(self.use_master_clock, trace.HOST_CLOCK_TSC, matched)

    def _refresh_pages(self) -> None:
        for vcpu in self._vm.vcpus:
            vcpu.make_request(request.REQ_CLOCK_UPDATE)

    # kvmclock_update_work and kvmclock_sync_work

    def update_soon(self) -> None:
        """Have every page refreshed in a moment: clocks of the vCPUs that differ by little must not do so for long."""
        if self._update_work.expires_ns is None:
            self._update_work.start(self._clock.monotonic_ns() + UPDATE_DELAY_NS)

    def start_periodic_sync(self) -> None:
        """Refresh every page now and then from now on."""
        self._sync_work.start(self._clock.monotonic_ns() + SYNC_PERIOD_NS)

    def close(self) -> None:
        """Refresh no more."""
        self._update_work.cancel()
        self._sync_work.cancel()

    def _update_all(self, _now: int) -> None:
        self._refresh_pages()

    def _sync_periodically(self, now: int) -> int:
        self._refresh_pages()
        return now + SYNC_PERIOD_NS

    def reference(self) -> tuple[int, int, bool]:
        """Host TSC, kvmclock ns at that TSC, and whether they are the master clock's: what a vCPU puts into its page."""
        with self._lock:
            if self.use_master_clock:
                return self._master_tsc, self._master_ns + self.offset & _U64, True
            tsc = self._clock.tsc()
            return tsc, self._clock.boottime_at(tsc) + self.offset & _U64, False

    def get(self) -> ClockData:
        """KVM_GET_CLOCK; with a master clock, exactly as a guest at the host's rate reads it, together with the host's clocks."""
        with self._lock:
            if not self.use_master_clock:
                return ClockData(clock=self._at(self._clock.tsc()))
            realtime, tsc = self._clock.realtime_and_tsc()
            return ClockData(
                clock=self._at(tsc),
                flags=KVM_CLOCK_TSC_STABLE | KVM_CLOCK_REALTIME | KVM_CLOCK_HOST_TSC,
                realtime=realtime,
                host_tsc=tsc,
            )

    def pair(self) -> MasterPair:
        """The master clock as it is."""
        with self._lock:
            return MasterPair(self.use_master_clock, self._master_tsc, self._master_ns, self.offset)

    def at(self, tsc: int) -> int:
        """kvmclock in ns when the host's TSC was `tsc`."""
        with self._lock:
            return self._at(tsc)

    def _at(self, tsc: int) -> int:
        """kvmclock in ns when the host's TSC was `tsc`, with the lock held."""
        if not self.use_master_clock:
            return self._clock.boottime_at(tsc) + self.offset & _U64
        passed = scale_delta(tsc - self._master_tsc, *time_scale(self._clock.tsc_khz * 1000))
        return self._master_ns + self.offset + passed & _U64

    def set(self, data: ClockData) -> None:
        """KVM_SET_CLOCK; with KVM_CLOCK_REALTIME the time since `realtime` is added. OSError(EINVAL) for unknown flags."""
        if data.flags & ~(KVM_CLOCK_TSC_STABLE | KVM_CLOCK_REALTIME | KVM_CLOCK_HOST_TSC):
            raise OSError(errno.EINVAL, "unknown clock flags")
        with self._update(None):
            self._update_gtod_copy()
            # Against the master pair, not now: a page written from that pair must not hold a negative time.
            tsc = self._master_tsc if self.use_master_clock else self._clock.tsc()
            clock = data.clock
            if data.flags & KVM_CLOCK_REALTIME:
                clock += max(self._clock.realtime_at(tsc) - data.realtime, 0)
            self.offset = clock - self._clock.boottime_at(tsc)

    def write_wall_clock(self, gpa: int) -> None:
        """WRMSR of a wall clock MSR: store the wall time at which kvmclock was 0; nothing happens where there is no memory."""
        if not gpa:
            return
        memory = self._vm.memory
        try:
            version = _next_odd(_VERSION.unpack(memory.read(gpa, _VERSION.size))[0])
            realtime, tsc = self._clock.realtime_and_tsc()
            with self._lock:
                seconds, nsec = divmod(realtime - self._at(tsc), NSEC_PER_SEC)
            memory.write(gpa, _VERSION.pack(version))
            memory.write(gpa, _WALL_CLOCK.pack(version, seconds & _U32, nsec))
            memory.write(gpa, _VERSION.pack(version + 1 & _U32))
        except OSError as error:
            _require_fault(error)


class PvClock:
    """One vCPU's pages: its time info and its steal time."""

    def __init__(self, vcpu: Vcpu) -> None:
        """No page set."""
        self._vcpu = vcpu
        self.system_time_msr = 0
        self.steal_msr = 0
        self.hv_clock: TimeInfo | None = None
        """What `update_time()` last wrote."""
        self._stopped = False
        self._run_delay_ns: int | None = None
        self._recorded_ns = 0

    @property
    def active(self) -> bool:
        """Whether the guest has given a page for its time info."""
        return bool(self.system_time_msr & MSR_ENABLED)

    def set_system_time(self, value: int, old_msr: bool, host_initiated: bool) -> None:
        """Write of a SYSTEM_TIME MSR, `old_msr` for 12h."""
        vm_clock = self._vcpu.vm.kvmclock
        if self._vcpu.vcpu_id == 0 and not host_initiated:
            if vm_clock.boot_vcpu_runs_old_kvmclock != old_msr:
                self._vcpu.make_request(request.REQ_MASTERCLOCK_UPDATE)
            vm_clock.boot_vcpu_runs_old_kvmclock = old_msr
        self.system_time_msr = value
        self._vcpu.make_request(request.REQ_GLOBAL_CLOCK_UPDATE)

    def set_steal_time(self, value: int) -> None:
        """Write of the STEAL_TIME MSR; the caller has checked the reserved bits."""
        self.steal_msr = value
        self._run_delay_ns = None
        if value & MSR_ENABLED:
            self._vcpu.make_request(request.REQ_STEAL_UPDATE)

    def set_guest_paused(self) -> None:
        """KVM_KVMCLOCK_CTRL: tell the guest that it was stopped, so that its watchdogs stay quiet; OSError(EINVAL) without a page."""
        if not self.active:
            raise OSError(errno.EINVAL, "kvmclock is not in use")
        self._stopped = True
        self._vcpu.make_request(request.REQ_CLOCK_UPDATE)

    def update_time(self) -> None:
        """Refresh the time info page; nothing happens where there is no memory."""
        if not self.active:
            return
        vcpu = self._vcpu
        host_tsc, system_time, stable = vcpu.vm.kvmclock.reference()
        shift, multiplier = time_scale(vcpu.tsc.scale(vcpu.vm.clock.tsc_khz * 1000))
        memory, gpa = vcpu.vm.memory, self.system_time_msr & ~MSR_ENABLED
        try:
            before = memory.read(gpa, _TIME_INFO.size)
            version = _next_odd(_VERSION.unpack_from(before)[0])
            flags = (FLAG_TSC_STABLE if stable else 0) | before[_TIME_INFO_FLAGS] & FLAG_GUEST_STOPPED
            if self._stopped:
                flags |= FLAG_GUEST_STOPPED
                self._stopped = False
            info = TimeInfo(version + 1 & _U32, vcpu.tsc.read(host_tsc), system_time, multiplier, shift, flags)
            memory.write(gpa, _VERSION.pack(version))
            memory.write(gpa, _TIME_INFO.pack(version, info.tsc_timestamp, system_time, multiplier, shift, flags))
            memory.write(gpa, _VERSION.pack(info.version))
            self.hv_clock = info
            if trace.kvm_pvclock_update.enabled:
                trace.kvm_pvclock_update(vcpu.vcpu_id, *astuple(info))
        except OSError as error:
            _require_fault(error)

    @property
    def steal_is_old(self) -> bool:
        """Whether the guest wants to know the stolen time, and what it knows is not of this millisecond: it looks at its own ticks."""
        return bool(self.steal_msr & MSR_ENABLED) and self._vcpu.vm.clock.monotonic_ns() - self._recorded_ns >= NSEC_PER_MSEC

    def record_steal_time(self) -> None:
        """Add the time that this thread waited for a CPU to the steal time record; called in the vCPU's thread."""
        if not self.steal_msr & MSR_ENABLED:
            return
        delay = self._vcpu.vm.scheduler.run_delay()
        stolen = 0 if self._run_delay_ns is None else max(delay - self._run_delay_ns, 0)
        memory, gpa = self._vcpu.vm.memory, self.steal_msr & ~(MSR_ENABLED | STEAL_RESERVED)
        try:
            steal, version, flags, _preempted = _STEAL_TIME.unpack(memory.read(gpa, _STEAL_TIME.size))
            version = _next_odd(version)
            memory.write(gpa + _STEAL_VERSION, _VERSION.pack(version))
            memory.write(gpa, _STEAL_TIME.pack(steal + stolen & _U64, version, flags, 0))
            memory.write(gpa + _STEAL_VERSION, _VERSION.pack(version + 1 & _U32))
        except OSError as error:
            _require_fault(error)
            return
        self._run_delay_ns, self._recorded_ns = delay, self._vcpu.vm.clock.monotonic_ns()


def service(vcpu: Vcpu, requests: int) -> None:
    """Do what `requests` (`request.REQ_CLOCK` bits) ask, in the vCPU's thread before it enters the guest."""
    if requests & request.REQ_MCLOCK_INPROGRESS:
        vcpu.vm.kvmclock.await_update()
    if requests & request.REQ_MASTERCLOCK_UPDATE:
        vcpu.vm.kvmclock.update_masterclock(by=vcpu)
        requests |= request.REQ_CLOCK_UPDATE
    if requests & request.REQ_GLOBAL_CLOCK_UPDATE:
        vcpu.vm.kvmclock.update_soon()
        requests |= request.REQ_CLOCK_UPDATE
    if requests & request.REQ_CLOCK_UPDATE:
        if vcpu.tsc.catchup:
            vcpu.tsc.catch_up()
        vcpu.pvclock.update_time()
    if requests & request.REQ_STEAL_UPDATE:
        vcpu.pvclock.record_steal_time()


def _require_fault(error: OSError) -> None:
    """A page without memory behind it is the guest's mistake and goes unanswered, as in KVM; anything else is ours."""
    if error.errno != errno.EFAULT:
        raise error
