"""A VM and vCPUs that are nothing but what the devices of `softkvm.kvm` look at (`kvm/types.py`), on virtual time."""

from __future__ import annotations

import errno
import threading
from typing import Any, cast

from softkvm.host.clock import VirtualClock
from softkvm.host.perf.core import Perf
from softkvm.kvm import cpuid
from softkvm.kvm.iobus import IoBus
from softkvm.kvm.irqchip import Irqchip
from softkvm.kvm.irqchip.apic_map import ApicMap
from softkvm.kvm.irqchip.lapic import Lapic
from softkvm.kvm.irqchip.pit import Pit
from softkvm.kvm.irqchip.routing import Routing
from softkvm.kvm.kvmclock import PvClock, VmClock
from softkvm.kvm.lbr import GuestLbr
from softkvm.kvm.msr import MsrState
from softkvm.kvm.pmu.vpmu import VirtualPmu
from softkvm.kvm.request import REQ_NMI
from softkvm.kvm.smm import SmmState
from softkvm.kvm.tsc import VcpuTsc, VmTsc
from softkvm.silicon.control import ControlBlock
from softkvm.uapi.kvm import CpuidEntry2

ALL = 0xFFFF_FFFF
INTEL = (0x756E_6547, 0x6C65_746E, 0x4965_6E69)
AMD = (0x6874_7541, 0x444D_4163, 0x6974_6E65)

XSTATE = {
    0: (0x2E7, 0xA88, 0xA88, 0),
    1: (0xF, 0x988, 0, 0),
    2: (256, 576, 0, 0),
    5: (64, 1088, 0, 0),
    6: (512, 1152, 0, 0),
    7: (1024, 1664, 0, 0),
    9: (8, 2688, 0, 0),
}
"""Leaf Dh of a server CPU with AVX-512 and protection keys."""


class FakeModel:
    """Silicon with every feature bit set."""

    def __init__(self, vendor: str = "intel") -> None:
        self.name = f"fake {vendor}"
        self.vendor = vendor

    def cpuid(self, leaf: int, subleaf: int) -> tuple[int, int, int, int]:
        if leaf == 0xD:
            return XSTATE.get(subleaf, (0, 0, 0, 0))
        return {
            0x0: (0x20, *(INTEL if self.vendor == "intel" else AMD)),
            0x1: (0x50657, 0x800, ALL, ALL),
            0x5: (64, 64, 3, 0),
            0x7: (1, ALL, ALL, ALL),
            0xB: (1, 2, 0x100, 7) if subleaf == 0 else (4, 4, 0x201, 7),
            0x8000_0000: (0x8000_0028, 0, 0, 0),
            0x8000_0001: (0, 0, ALL, ALL),
            0x8000_0007: (ALL, ALL, ALL, ALL),
            0x8000_0008: (0x302E, ALL, ALL, ALL),
        }.get(leaf, (0, 0, 0, 0))

    def leaves(self) -> list[tuple[int, int, bool, int, int, int, int]]:
        plain = (0x0, 0x1, 0x5, 0x8000_0000, 0x8000_0001, 0x8000_0007, 0x8000_0008)
        rows = [(leaf, 0, False, *self.cpuid(leaf, 0)) for leaf in plain]
        rows += [(0x7, 0, True, *self.cpuid(0x7, 0)), (0xB, 0, True, *self.cpuid(0xB, 0)), (0xB, 1, True, *self.cpuid(0xB, 1))]
        return rows + [(0xD, subleaf, True, *values) for subleaf, values in XSTATE.items()]

    def msrs(self) -> dict[int, int]:
        return {0x10A: 0xEB, 0x1A0: 1, 0xCE: 1 << 31}


class FakeMemory:
    """RAM from address 0."""

    def __init__(self, size: int = 0x10000) -> None:
        self.data = bytearray(size)

    def read(self, gpa: int, size: int) -> bytes:
        self._check(gpa, size)
        return bytes(self.data[gpa : gpa + size])

    def write(self, gpa: int, data: bytes) -> None:
        self._check(gpa, len(data))
        self.data[gpa : gpa + len(data)] = data

    def _check(self, gpa: int, size: int) -> None:
        if gpa + size > len(self.data):
            raise OSError(errno.EFAULT, "no memory there")


class FakeScheduler:
    """Whoever tells how long a thread has waited for a processor, and has the host's perf."""

    def __init__(self, model: FakeModel) -> None:
        self.perf = Perf(cast(Any, model))

    def run_delay(self) -> int:
        return 0


class FakeVm:
    """A VM; `vcpus` are added by `FakeVcpu`."""

    def __init__(self, vendor: str = "intel", irqchip: bool = True, pit: bool = False, scaling: bool = True) -> None:
        self.clock = VirtualClock()
        self.lock = threading.RLock()
        self.model = FakeModel(vendor)
        self.memory = FakeMemory()
        self.boot_cpu_id = 0
        self.guest_reads_platform_info = True
        self.reserved_ioapic_pins = 0
        self.vcpus: list[FakeVcpu] = []
        self.pio_bus, self.mmio_bus = IoBus(self.lock), IoBus(self.lock)
        self.routing = Routing(self)
        self.apic_map = ApicMap(self)
        self.irqchip: Irqchip | None = None
        self.tsc = VmTsc(self.clock, self.model.vendor, scaling)
        self.kvmclock = VmClock(self)
        self.scheduler = FakeScheduler(self.model)
        self.perf_capabilities = 0
        if irqchip:
            self.irqchip = Irqchip(self)
        self.pit = Pit(self, speaker=True) if pit else None

    @property
    def irqchip_in_kernel(self) -> bool:
        return self.irqchip is not None

    @property
    def chips(self) -> Irqchip:
        """The interrupt chips, which the test knows are there."""
        assert self.irqchip is not None
        return self.irqchip


class FakeVcpu:
    """A vCPU that remembers its requests instead of serving them."""

    def __init__(self, vm: FakeVm, vcpu_id: int = 0, lapic: bool = True) -> None:
        self.vm = vm
        self.vcpu_id = vcpu_id
        self.model = vm.model
        self.block = ControlBlock()
        self.control, self.state = self.block.control, self.block.state
        self.apic_base = 0xFEE0_0800
        self.mp_state = 0
        self.userspace_irq = -1
        self.pending_ioapic_eoi = 0
        self.smm = SmmState()
        self.has_run = False
        self.mmap_area = memoryview(bytearray(12288))
        self.requests = 0
        self.cpuid = cpuid.CpuidTable(self.supported_cpuid())
        self.msrs = MsrState(self)
        self.tsc = VcpuTsc(self)
        self.pvclock = PvClock(self)
        self.pmu = VirtualPmu(cast(Any, self))
        self.lbr = GuestLbr(cast(Any, self))
        self.lapic: Lapic | None = Lapic(self) if lapic else None
        vm.vcpus.append(self)
        vm.apic_map.forget()
        self.tsc.synchronize(0)
        cpuid.update_runtime(self)
        self.requests = 0

    def supported_cpuid(self) -> list[CpuidEntry2]:
        return cpuid.supported(self.model)

    @property
    def apic(self) -> Lapic:
        """The local APIC, which the test knows is there."""
        assert self.lapic is not None
        return self.lapic

    def make_request(self, request: int) -> None:
        self.requests |= request

    note_request = keep_out = make_request

    def clear_request(self, request: int) -> None:
        self.requests &= ~request

    def await_exit(self) -> None:
        """Nobody runs."""

    def queue_nmi(self) -> None:
        self.make_request(REQ_NMI)

    def take_requests(self) -> int:
        requests, self.requests = self.requests, 0
        return requests

    def wake(self) -> None:
        """Nobody sleeps."""

    def set_tsc_catchup(self, on: bool) -> None:
        """There are no exits."""

    def kick_guest(self) -> None:
        """Nobody runs."""
