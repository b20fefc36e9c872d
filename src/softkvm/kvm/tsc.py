"""The guest's time stamp counter: offset and rate of each vCPU, and how the vCPUs of a VM are kept in step.

Answers to Linux 6.1 `arch/x86/kvm/x86.c` (`kvm_synchronize_tsc()`, `kvm_calc_nested_tsc_{offset,multiplier}()` and their neighbours) and
`Documentation/virt/kvm/devices/vcpu.rst` (KVM_VCPU_TSC_OFFSET). guest TSC = (host TSC * ratio) + offset, modulo 2^64; the host's TSC counts
as stable.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from softkvm.host import trace
from softkvm.host.clock import KHZ_NSEC
from softkvm.kvm import request

if TYPE_CHECKING:
    from softkvm.host.clock import Clock
    from softkvm.kvm.params import Parameters
    from softkvm.kvm.types import Vcpu
    from softkvm.kvm.vcpu_core import VcpuCore
    from softkvm.silicon import Model

_U64 = (1 << 64) - 1
FRACTION_BITS = 48
"""Fixed point of `Control.tsc_multiplier`."""
UNITY = 1 << FRACTION_BITS
"""The ratio of the host's rate."""
SVM_FRACTION_BITS = 32
"""Precision of AMD's TSC ratio MSR."""
_LARGEST_RATIO = {"intel": (1 << 64) - 1, "amd": (1 << 40) - 1 << FRACTION_BITS - SVM_FRACTION_BITS}
"""What the VMCS field and the MSR C0000104h can hold."""
TOLERANCE_PPM = 250
"""How far a wanted rate may be from the host's before scaling is used (KVM's `tsc_tolerance_ppm`)."""
MAX_KHZ = 0x7FFF_FFFF
"""The rates that scaling reaches are below this; without scaling there is no limit but that of a u32, as which KVM reads a rate."""
_U32 = (1 << 32) - 1


@dataclass(slots=True)
class Generation:
    """One epoch of TSC writes: vCPUs of the same generation have the same offset."""

    number: int = 0
    nsec: int = 0
    write: int = 0
    offset: int = 0


class VmTsc:
    """What the vCPUs of a VM share: the last write, and the current generation."""

    def __init__(self, clock: Clock, vendor: str, scaling: bool = True) -> None:
        """A VM without vCPUs on the silicon of a vendor, with or without TSC scaling, whose vCPUs will run at the host's rate."""
        self.lock = threading.Lock()
        self.default_khz = clock.tsc_khz
        """Rate of new vCPUs in kHz: KVM_SET_TSC_KHZ of the VM."""
        self.last_nsec = self.last_write = self.last_khz = self.last_offset = 0
        self.current = Generation()
        self.vcpus_matched = 0
        """vCPUs of the current generation, not counting the one that began it."""
        self.precision = SVM_FRACTION_BITS if vendor == "amd" else FRACTION_BITS
        """Fraction bits of a ratio that the silicon has."""
        self.scaling = scaling
        """KVM_CAP_TSC_CONTROL: whether a vCPU can have any rate. Without it, a faster one catches up and a slower one is refused."""
        self._host_khz = clock.tsc_khz
        self._limit_khz = min(MAX_KHZ, clock.tsc_khz * _LARGEST_RATIO[vendor] >> FRACTION_BITS) if scaling else 1 << 32

    def set_default_khz(self, khz: int) -> None:
        """KVM_SET_TSC_KHZ of the VM: the rate of vCPUs to come, 0 for the host's; OSError(EINVAL) for one that is too high."""
        self.default_khz = self.checked_khz(khz)

    def checked_khz(self, khz: int) -> int:
        """`khz` as a u32, the host's rate for 0; OSError(EINVAL) if the silicon cannot scale to it."""
        khz = khz & _U32 or self._host_khz
        if khz >= self._limit_khz:
            raise OSError(errno.EINVAL, "TSC frequency out of range")
        return khz


def has_control(model: Model, parameters: Parameters) -> bool:
    """Whether vCPUs on this silicon, under KVM with these parameters, have TSC scaling."""
    return parameters.tsc_scaling and (model.vendor != "amd" or "tsc-scale" in model.features)


def _deviating(khz: int, ppm: int) -> int:
    """`adjust_tsc_khz()`."""
    return khz * (1_000_000 + ppm) // 1_000_000


def nested_offset(l1_offset: int, l2_offset: int, l2_ratio: int = UNITY) -> int:
    """The offset from the host's TSC to L2's, of L1's own and those that L1 gives L2: L1's is a signed number that L2's ratio scales."""
    signed = l1_offset - (l1_offset >> 63 << 64)
    scaled = abs(signed) * l2_ratio >> FRACTION_BITS
    return (l2_offset + (scaled if signed >= 0 else -scaled)) & _U64


def nested_ratio(l1_ratio: int, l2_ratio: int) -> int:
    """The ratio of L2's TSC to the host's."""
    return l1_ratio * l2_ratio >> FRACTION_BITS


def enter_catching_up(vcpu: VcpuCore, enter: Callable[[], int]) -> int:
    """A VM entry by `enter` of a vCPU whose TSC catches up: it does so before the next one. The exit reason."""
    reason = enter()
    vcpu.note_request(request.REQ_CLOCK_UPDATE)
    return reason


class VcpuTsc:
    """Offset and rate of one vCPU's TSC; what the silicon needs of it is kept in the control block."""

    def __init__(self, vcpu: Vcpu) -> None:
        """A TSC at the VM's default rate; `synchronize(0)` starts it once the vCPU is online."""
        self._vcpu = vcpu
        self._clock = vcpu.vm.clock
        self._vm = vcpu.vm.tsc
        self.khz = 0
        """Rate that the guest is told, in kHz."""
        self.offset = 0
        """L1's offset: what the host reads and sets, whichever guest runs."""
        self.ratio = UNITY
        self._nested: tuple[int, int] | None = None
        """Offset and ratio that L1 has given the L2 that runs."""
        self.adjust = 0
        """IA32_TSC_ADJUST."""
        self.generation = Generation()
        self.catchup = False
        """The TSC runs at the host's rate, which is too slow, and jumps to where it should be after each VM exit."""
        self._base = 0
        """Its value at `generation.nsec`, had it never been slow."""
        try:
            self.set_khz(self._vm.default_khz)
        except OSError:  # too slow a rate for silicon without scaling: told to the guest, as in Linux, and not kept
            self._run_at(self._vm.default_khz, UNITY, False)

    def read(self, host_tsc: int | None = None) -> int:
        """The guest's TSC now, or when the host's TSC was `host_tsc`."""
        return (self.scale(self._clock.tsc() if host_tsc is None else host_tsc) + self.offset) & _U64

    def scale(self, host_cycles: int) -> int:
        """Host cycles to guest cycles."""
        return host_cycles * self.ratio >> FRACTION_BITS

    def expiry_of(self, guest_tsc: int) -> int | None:
        """When the guest's TSC reaches `guest_tsc`, in `Clock.monotonic_ns()` time; None if it already has."""
        now = self._clock.tsc()
        left = guest_tsc - self.read(now)
        if left <= 0:
            return None
        if self.catchup:
            return self._clock.tsc_to_ns(now) - (-left * KHZ_NSEC // self.khz)
        return self._clock.ns_reaching(-(-(self.scale(now) + left << FRACTION_BITS) // self.ratio))

    @property
    def hardware_ratio(self) -> int:
        """The ratio in the silicon's own units, of `VmTsc.precision` fraction bits."""
        return self.ratio >> FRACTION_BITS - self._vm.precision

    def set_khz(self, khz: int) -> None:
        """KVM_SET_TSC_KHZ; 0 means the host's rate. OSError(EINVAL) for a rate that cannot be scaled to."""
        host_khz = self._clock.tsc_khz
        khz = self._vm.checked_khz(khz)
        if _deviating(host_khz, -TOLERANCE_PPM) <= khz <= _deviating(host_khz, TOLERANCE_PPM):
            self._run_at(khz, UNITY, False)
        elif self._vm.scaling:
            precision = self._vm.precision
            self._run_at(khz, (khz << precision) // host_khz << FRACTION_BITS - precision, False)
        elif khz > host_khz:
            self._run_at(khz, UNITY, True)
        else:
            raise OSError(errno.EINVAL, "this silicon cannot slow a TSC down")

    def _run_at(self, khz: int, ratio: int, catchup: bool) -> None:
        self.khz, self.ratio = khz, ratio
        if catchup != self.catchup:
            self.catchup = catchup
            self._vcpu.set_tsc_catchup(catchup)
        self._program()

    def catch_up(self) -> None:
        """Go forward to where a TSC of the wanted rate would be; never back."""
        now = self._clock.tsc()
        wanted = self._base + (self._clock.boottime_at(now) - self.generation.nsec) * self.khz // KHZ_NSEC
        behind = (wanted - self.read(now)) & _U64
        if behind >> 63 == 0:
            self._set_offset(self.offset + behind)

    def enter_nested(self, offset: int, ratio: int = UNITY) -> None:
        """L2 runs from now on, with what L1 asks for: 0 where its controls leave TSC offsetting out, unity without scaling."""
        self._nested = (offset, ratio)
        self._program()

    def leave_nested(self) -> None:
        """L1 runs again."""
        self._nested = None
        self._program()

    def synchronize(self, data: int) -> None:
        """A host write of IA32_TSC, and with 0 the start of a new vCPU's TSC.

        Writes that are within a second of what the last write would have become are taken as an attempt to make all vCPUs equal: they
        get the VM's current offset, and the value itself is ignored.
        """
        with self._vm.lock:
            now_tsc = self._clock.tsc()
            offset = (data - self.scale(now_tsc)) & _U64
            nsec = self._clock.boottime_at(now_tsc)
            matched = self._is_synchronizing(data, nsec) and self.khz == self._vm.last_khz
            if matched:
                offset = self._vm.current.offset
            self._write(offset, data, nsec, matched)
        self._track_matching()

    def set_offset(self, offset: int) -> None:
        """KVM_VCPU_TSC_OFFSET: an offset from the host's TSC, as two's complement of 64 bits."""
        with self._vm.lock:
            matched = self._vm.last_offset == offset and self._vm.last_khz == self.khz
            now_tsc = self._clock.tsc()
            self._write(offset, (self.scale(now_tsc) + offset) & _U64, self._clock.boottime_at(now_tsc), matched)
        self._track_matching()

    def guest_write(self, data: int) -> None:
        """WRMSR of IA32_TSC: moves TSC and TSC_ADJUST by the same amount, on this vCPU alone."""
        delta = (data - self.read()) & _U64
        self._move(delta)
        self.adjust = (self.adjust + delta) & _U64

    def guest_write_adjust(self, value: int) -> None:
        """WRMSR of IA32_TSC_ADJUST: moves the TSC by the change."""
        self._move(value - self.adjust)
        self.adjust = value
        self._vcpu.make_request(request.REQ_CLOCK_UPDATE)

    def _move(self, delta: int) -> None:
        """The guest moves its own TSC; what it catches up to moves along, else it would undo a step back."""
        self._base = self._base + delta & _U64
        self._set_offset(self.offset + delta)

    def _set_offset(self, offset: int) -> None:
        offset &= _U64
        if trace.kvm_write_tsc_offset.enabled:
            trace.kvm_write_tsc_offset(self._vcpu.vcpu_id, self.offset, offset)
        self.offset = offset
        self._program()

    def _program(self) -> None:
        """Give the silicon what the guest that runs needs."""
        control = self._vcpu.control
        if self._nested is None:
            control.tsc_offset, control.tsc_multiplier = self.offset, self.ratio
        else:
            offset, ratio = self._nested
            control.tsc_offset, control.tsc_multiplier = nested_offset(self.offset, offset, ratio), nested_ratio(self.ratio, ratio)

    def _is_synchronizing(self, data: int, nsec: int) -> bool:
        if data == 0:
            return True
        cycles = (nsec - self._vm.last_nsec) * self.khz // KHZ_NSEC
        expected, second = self._vm.last_write + cycles & _U64, self.khz * 1000
        return data < (expected + second & _U64) and (data + second & _U64) > expected

    def _write(self, offset: int, data: int, nsec: int, matched: bool) -> None:
        vm = self._vm
        vm.last_nsec, vm.last_write, vm.last_khz, vm.last_offset = nsec, data, self.khz, offset
        self._set_offset(offset)
        if not matched:
            vm.current = Generation(vm.current.number + 1, nsec, data, offset)
            vm.vcpus_matched = 0
        elif self.generation.number != vm.current.number:
            vm.vcpus_matched += 1
        self.generation = vm.current
        self._base = vm.current.write

    def _track_matching(self) -> None:
        kvmclock, vcpus = self._vcpu.vm.kvmclock, len(self._vcpu.vm.vcpus)
        if kvmclock.use_master_clock or kvmclock.all_tscs_match():
            self._vcpu.make_request(request.REQ_MASTERCLOCK_UPDATE)
        if trace.kvm_track_tsc.enabled:
            matched, host_clock = self._vm.vcpus_matched, trace.HOST_CLOCK_TSC
            trace.kvm_track_tsc(self._vcpu.vcpu_id, matched, vcpus, kvmclock.use_master_clock, host_clock)
