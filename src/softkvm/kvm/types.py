"""What the devices and tables of `kvm` need to know of a VM and a vCPU: structural types, so that none of them imports the run loop."""

from __future__ import annotations

from collections.abc import Sequence
from threading import RLock
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from softkvm.host.clock import Clock
    from softkvm.kvm.cpuid import CpuidTable
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
    from softkvm.kvm.smm import SmmState
    from softkvm.kvm.tsc import VcpuTsc, VmTsc
    from softkvm.silicon.control import Control, ControlBlock, State


class Model(Protocol):
    """A CPU model of the engine (`softkvm._engine.Model`)."""

    @property
    def name(self) -> str:
        """Name of the table, such as "cascadelake"."""

    @property
    def vendor(self) -> str:
        """ "intel" or "amd"."""

    def cpuid(self, leaf: int, subleaf: int) -> tuple[int, int, int, int]:
        """EAX, EBX, ECX, EDX as the silicon answers."""

    def leaves(self) -> list[tuple[int, int, bool, int, int, int, int]]:
        """Leaf, subleaf, whether the subleaf counts, EAX, EBX, ECX, EDX."""

    def msrs(self) -> dict[int, int]:
        """The silicon's MSRs and their values."""


class GuestMemory(Protocol):
    """Guest-physical memory through the memslots; OSError(EFAULT) where there is none."""

    def read(self, gpa: int, size: int) -> bytes:
        """`size` bytes from `gpa`."""

    def write(self, gpa: int, data: bytes) -> None:
        """Store `data` at `gpa`."""


class Scheduler(Protocol):
    """Who gives the vCPUs' threads a processor."""

    def run_delay(self) -> int:
        """How long the calling thread has been runnable and not run, in ns."""


class Vm(Protocol):
    """The virtual machine around a device."""

    @property
    def vcpus(self) -> Sequence[Vcpu]:
        """Online vCPUs in the order of their creation."""

    @property
    def clock(self) -> Clock:
        """Time of this VM."""

    @property
    def scheduler(self) -> Scheduler:
        """Who gives its vCPUs' threads a processor."""

    @property
    def lock(self) -> RLock:
        """The VM's slots and interrupt lock."""

    @property
    def memory(self) -> GuestMemory:
        """Guest-physical memory."""

    @property
    def irqchip(self) -> Irqchip | None:
        """PIC and IOAPIC, if they are in KVM."""

    @property
    def irqchip_in_kernel(self) -> bool:
        """Whether vCPUs have their local APIC in KVM."""

    @property
    def reserved_ioapic_pins(self) -> int:
        """GSIs below are pins of an IOAPIC in user space."""

    @property
    def apic_map(self) -> ApicMap:
        """Local APICs by their physical destinations."""

    @property
    def pit(self) -> Pit | None:
        """The PIT, if it is in KVM."""

    @property
    def routing(self) -> Routing:
        """GSI routes."""

    @property
    def pio_bus(self) -> IoBus:
        """Ports of in-kernel devices."""

    @property
    def mmio_bus(self) -> IoBus:
        """Guest-physical ranges of in-kernel devices."""

    @property
    def tsc(self) -> VmTsc:
        """What vCPUs share about their TSCs."""

    @property
    def kvmclock(self) -> VmClock:
        """The VM's paravirtual clock."""

    @property
    def model(self) -> Model:
        """The silicon."""

    @property
    def perf_capabilities(self) -> int:
        """PERF_CAPABILITIES of new vCPUs."""

    @property
    def guest_reads_platform_info(self) -> bool:
        """Whether guests may read PLATFORM_INFO."""

    @property
    def boot_cpu_id(self) -> int:
        """The vCPU id of the bootstrap processor."""


class Vcpu(Protocol):
    """The virtual CPU around its local APIC, MSRs and clocks."""

    apic_base: int
    mp_state: int
    userspace_irq: int
    pending_ioapic_eoi: int

    @property
    def vcpu_id(self) -> int:
        """APIC id."""

    @property
    def vm(self) -> Vm:
        """The VM that it belongs to."""

    @property
    def control(self) -> Control:
        """What KVM asks of the silicon."""

    @property
    def state(self) -> State:
        """Architectural state."""

    @property
    def mmap_area(self) -> memoryview:
        """`kvm_run`, PIO data and coalesced ring, one page each."""

    @property
    def has_run(self) -> bool:
        """Whether the vCPU has ever entered the guest."""

    @property
    def lapic(self) -> Lapic | None:
        """Local APIC, if it is in KVM."""

    @property
    def cpuid(self) -> CpuidTable:
        """What the guest sees with CPUID."""

    @property
    def msrs(self) -> MsrState:
        """MSRs that KVM keeps."""

    @property
    def tsc(self) -> VcpuTsc:
        """Offset and rate of the TSC."""

    @property
    def pmu(self) -> VirtualPmu:
        """Performance counters."""

    @property
    def lbr(self) -> GuestLbr:
        """Last branch records."""

    @property
    def block(self) -> ControlBlock:
        """What KVM and the silicon share."""

    @property
    def pvclock(self) -> PvClock:
        """Shared clock pages and steal time."""

    @property
    def smm(self) -> SmmState:
        """System management mode."""

    @property
    def model(self) -> Model:
        """The silicon."""

    def make_request(self, request: int) -> None:
        """Ask the vCPU for the work `REQ_*` before it next enters the guest; wakes it and takes it out of guest mode."""

    def note_request(self, request: int) -> None:
        """The same for a vCPU that will look by itself."""

    def keep_out(self, request: int) -> None:
        """The same, but whoever sleeps is not woken."""

    def clear_request(self, request: int) -> None:
        """Ask no more."""

    def await_exit(self) -> None:
        """Return when the vCPU is out of guest mode."""

    def queue_nmi(self) -> None:
        """Let an NMI arrive at the vCPU."""

    def wake(self) -> None:
        """End a HLT block."""

    def set_tsc_catchup(self, on: bool) -> None:
        """Whether the TSC must be looked after at every exit."""

    def kick_guest(self) -> None:
        """Leave guest mode soon, to look at requests."""
