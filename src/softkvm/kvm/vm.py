"""A virtual machine: its memory, interrupt chips, clocks and vCPUs, and the ioctls on its file.

Answers to Linux 6.1 `kvm_vm_ioctl()`, `kvm_arch_vm_ioctl()`, `kvm_vm_ioctl_create_vcpu()` and `Documentation/virt/kvm/api.rst`.
"""

from __future__ import annotations

import errno
import threading
from contextlib import nullcontext
from types import TracebackType
from typing import TYPE_CHECKING

from softkvm import silicon
from softkvm.host import task
from softkvm.host.clock import Clock
from softkvm.kvm import capabilities, stats, svm, tsc, tsc_status, vmx
from softkvm.kvm.coalesced import Coalesced
from softkvm.kvm.eventfd import EventFds
from softkvm.kvm.introspection.ioctls import IntrospectionIoctls
from softkvm.kvm.iobus import IoBus
from softkvm.kvm.ioctl import fields, ioctl, pointed_u64, returns, returns_first_u32, takes, takes_array, value
from softkvm.kvm.irqchip import Irqchip
from softkvm.kvm.irqchip.apic_map import ApicMap
from softkvm.kvm.irqchip.pit import Pit
from softkvm.kvm.irqchip.routing import MAX_ROUTES, USERSPACE_SOURCE, Routing
from softkvm.kvm.kvmclock import VmClock
from softkvm.kvm.mmu import Mmu
from softkvm.kvm.timekeeper import Timekeeper
from softkvm.kvm.tsc import VmTsc
from softkvm.kvm.tsc_status import TscStatus
from softkvm.kvm.vcpu import Vcpu
from softkvm.kvm.vendor import Vendor
from softkvm.kvm.virtual_time import ExitTrace
from softkvm.kvm.vm_memory import VmMemory
from softkvm.kvm.vm_options import VmOptions
from softkvm.uapi import kvm as uapi

if TYPE_CHECKING:
    from softkvm.kvm.system import System

_VENDORS: dict[str, Vendor] = {"intel": vmx, "amd": svm}
_PAGE = 4096
_MAXPHYADDR_LEAF = 0x8000_0008


class Vm(VmMemory, VmOptions, IntrospectionIoctls):
    """One virtual machine; a context manager that closes it."""

    unknown_ioctl = errno.ENOTTY
    fd_class = "vm"
    ioctl_lock = nullcontext()

    def __init__(self, system: System, clock: Clock) -> None:
        """A VM without memory, chips and vCPUs; only `System.create_vm` makes one."""
        super().__init__(system.process)
        self.vm_id = self.fd
        self.model = system.model
        self.parameters = system.parameters
        self.scheduler, self.turns = system.scheduler, system.turns
        self.vendor = _VENDORS[self.model.vendor]
        self.clock = clock
        self.lock = threading.RLock()
        self._hook_lock = threading.Lock()
        max_gpa = 1 << (self.model.cpuid(_MAXPHYADDR_LEAF, 0)[0] & 0xFF)
        self.mmu, self.smm_mmu = Mmu(self.lock, max_gpa), Mmu(self.lock, max_gpa, address_space=1)
        """Memory of the guest, and of a vCPU in system management mode."""
        self.memory = self.mmu
        self.vcpus: list[Vcpu] = []
        self.init_options()
        self.mmu.push_dirty = self.smm_mmu.push_dirty = self._push_dirty
        self.boot_cpu_id = 0
        self.pio_bus, self.mmio_bus = IoBus(self.lock), IoBus(self.lock)
        self.routing = Routing(self)
        self.apic_map = ApicMap(self)
        self.has_apicv: bool = self.parameters.enable_apicv and self.turns is None
        """Whether the silicon virtualizes local APICs; who is interrupted when must not depend on the host where runs are to repeat."""
        self.ipi_table = silicon.IpiTable()
        self.irqchip: Irqchip | None = None
        self.pit: Pit | None = None
        self.tsc = VmTsc(clock, self.model.vendor, tsc.has_control(self.model, self.parameters))
        self.kvmclock = VmClock(self)
        self.eventfds = EventFds(self)
        self.coalesced = Coalesced(self)
        self.timekeeper = Timekeeper(lambda: self.vcpus)
        self.exit_trace = ExitTrace()
        self.tss_addr = 0
        self.identity_map_addr = 0
        clock.on_earlier = self._timer_came_nearer

    def __enter__(self) -> Vm:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Stop all vCPUs and timers, and free what the VM holds; harmless when repeated. Later ioctls fail with EBADF."""
        if self.closed:
            return
        self.closed = True
        self._unhook()
        for vcpu in self.vcpus:
            vcpu.kick()
            vcpu.close()
        if self.pit is not None:
            self.pit.close()
        self.kvmclock.close()
        self.eventfds.close()

    def _as_vm(self) -> Vm:
        return self

    def _push_dirty(self, slot: int, page: int) -> None:
        """Into the ring of the vCPU that this thread runs (`mark_page_dirty_in_slot()`)."""
        mine = task.current()
        for vcpu in self.vcpus:
            if vcpu.task is mine and vcpu.dirty_ring is not None:
                vcpu.dirty_ring.push(slot, page)

    def _timer_came_nearer(self) -> None:
        """A timer was armed that is first now: a vCPU's own thread sees it at its next entry, the others are told."""
        if task.current().guest not in self.vcpus:
            for vcpu in self.vcpus:
                vcpu.wake()
                vcpu.kick_guest()

    # --- Capabilities ---------------------------------------------------------------------------------------------------------------

    @ioctl(uapi.KVM_CHECK_EXTENSION, value)
    def check_extension(self, cap: int) -> int:
        """KVM_CHECK_EXTENSION: 0 if the capability is absent."""
        return capabilities.check(cap, self.tsc.scaling)

    @ioctl(uapi.KVM_GET_STATS_FD)
    def get_stats_fd(self) -> stats.StatsFile:
        """KVM_GET_STATS_FD: a file with the VM's statistics."""
        return stats.open_vm(self)

    # --- Memory ---------------------------------------------------------------------------------------------------------------------

    @ioctl(uapi.KVM_SET_TSS_ADDR, value)
    def set_tss_addr(self, address: int) -> None:
        """KVM_SET_TSS_ADDR: three pages for real mode on old Intel CPUs, which this silicon does not need; OSError(EINVAL) above 4 GB."""
        if address > (1 << 32) - 3 * _PAGE:
            raise OSError(errno.EINVAL, "the TSS must lie below 4 GB")
        self.tss_addr = address

    @ioctl(uapi.KVM_SET_IDENTITY_MAP_ADDR, pointed_u64)
    def set_identity_map_addr(self, address: int) -> None:
        """KVM_SET_IDENTITY_MAP_ADDR, as `set_tss_addr`; OSError(EINVAL) after the first vCPU."""
        with self.lock:
            if self.vcpus:
                raise OSError(errno.EINVAL, "there are vCPUs")
            self.identity_map_addr = address

    # --- Interrupts -----------------------------------------------------------------------------------------------------------------

    def _need_irqchip(self, error: int) -> Irqchip:
        if self.irqchip is None:
            raise OSError(error, "no interrupt chips in the kernel")
        return self.irqchip

    def _need_irqchip_in_kernel(self, error: int) -> None:
        if not self.irqchip_in_kernel:
            raise OSError(error, "no interrupt chips in the kernel")

    @ioctl(uapi.KVM_CREATE_IRQCHIP)
    def create_irqchip(self) -> None:
        """KVM_CREATE_IRQCHIP; OSError EEXIST if there are chips, EINVAL if there are vCPUs."""
        with self.lock:
            if self.irqchip_in_kernel:
                raise OSError(errno.EEXIST, "there are interrupt chips")
            if self.vcpus:
                raise OSError(errno.EINVAL, "there are vCPUs")
            self.irqchip = Irqchip(self)

    @ioctl(uapi.KVM_CREATE_PIT2, takes(uapi.PitConfig))
    def create_pit2(self, config: uapi.PitConfig) -> None:
        """KVM_CREATE_PIT2; OSError EEXIST if there is one, ENOENT without interrupt chips."""
        with self.lock:
            if self.pit is not None:
                raise OSError(errno.EEXIST, "there is a PIT")
            self._need_irqchip(errno.ENOENT)
            self.pit = Pit(self, bool(config.flags & uapi.KVM_PIT_SPEAKER_DUMMY))

    @ioctl(uapi.KVM_GET_PIT2, encode=returns)
    def get_pit2(self) -> uapi.PitState2:
        """KVM_GET_PIT2; OSError(ENXIO) without a PIT."""
        return self._need_pit().get_state()

    @ioctl(uapi.KVM_SET_PIT2, takes(uapi.PitState2))
    def set_pit2(self, state: uapi.PitState2) -> None:
        """KVM_SET_PIT2; OSError(ENXIO) without a PIT."""
        self._need_pit().set_state(state)

    @ioctl(uapi.KVM_REINJECT_CONTROL, takes(uapi.ReinjectControl))
    def reinject_control(self, request: uapi.ReinjectControl) -> None:
        """KVM_REINJECT_CONTROL: whether PIT ticks that the guest missed are delivered late, or lost; OSError(ENXIO) without a PIT."""
        self._need_pit().set_reinject(bool(request.pit_reinject))

    def _need_pit(self) -> Pit:
        if self.pit is None:
            raise OSError(errno.ENXIO, "no PIT in the kernel")
        return self.pit

    @ioctl(uapi.KVM_GET_IRQCHIP, takes(uapi.Irqchip), returns)
    def get_irqchip(self, chip: uapi.Irqchip) -> uapi.Irqchip:
        """KVM_GET_IRQCHIP of the chip `chip_id`; OSError ENXIO without chips, EINVAL for another id."""
        return self._need_irqchip(errno.ENXIO).get_state(chip.chip_id)

    @ioctl(uapi.KVM_SET_IRQCHIP, takes(uapi.Irqchip))
    def set_irqchip(self, chip: uapi.Irqchip) -> None:
        """KVM_SET_IRQCHIP; OSError ENXIO without chips, EINVAL for another id."""
        self._need_irqchip(errno.ENXIO).set_state(chip)

    @ioctl(uapi.KVM_SET_GSI_ROUTING, takes_array(uapi.IrqRouting, uapi.IrqRoutingEntry, MAX_ROUTES))
    def set_gsi_routing(self, entries: list[uapi.IrqRoutingEntry]) -> None:
        """KVM_SET_GSI_ROUTING; OSError(EINVAL) without chips, and for a bad route."""
        self._need_irqchip_in_kernel(errno.EINVAL)
        self.routing.set(entries)

    @ioctl(uapi.KVM_IRQ_LINE, fields(uapi.IrqLevel, "irq", "level"))
    def irq_line(self, gsi: int, level: int) -> None:
        """KVM_IRQ_LINE: set a line's level; OSError(ENXIO) without chips."""
        self._need_irqchip_in_kernel(errno.ENXIO)
        self.routing.set_irq(USERSPACE_SOURCE, gsi, bool(level))

    @ioctl(uapi.KVM_IRQ_LINE_STATUS, fields(uapi.IrqLevel, "irq", "level"), returns_first_u32)
    def irq_line_status(self, gsi: int, level: int) -> int:
        """KVM_IRQ_LINE_STATUS: as `irq_line`, and the number of APICs reached, 0 if coalesced, -1 if it goes nowhere."""
        self._need_irqchip_in_kernel(errno.ENXIO)
        return self.routing.set_irq(USERSPACE_SOURCE, gsi, bool(level))

    @ioctl(uapi.KVM_SIGNAL_MSI, takes(uapi.Msi))
    def signal_msi(self, msi: uapi.Msi) -> int:
        """KVM_SIGNAL_MSI: above 0 if delivered, 0 if blocked; OSError EINVAL without chips or for flags, EPERM if it addresses nobody."""
        self._need_irqchip_in_kernel(errno.EINVAL)
        if msi.flags:
            raise OSError(errno.EINVAL, "bad flags")
        reached = self.routing.signal_msi(msi.address_lo, msi.address_hi, msi.data)
        if reached < 0:
            raise OSError(errno.EPERM, "no such destination")
        return reached

    @ioctl(uapi.KVM_IRQFD, takes(uapi.Irqfd))
    def irqfd(self, request: uapi.Irqfd) -> None:
        """KVM_IRQFD: an eventfd raises a GSI; OSError EINVAL, EBADF, EBUSY."""
        self.eventfds.irqfd(request)

    @ioctl(uapi.KVM_IOEVENTFD, takes(uapi.Ioeventfd))
    def ioeventfd(self, request: uapi.Ioeventfd) -> None:
        """KVM_IOEVENTFD: a guest write signals an eventfd; OSError EINVAL, EBADF, EEXIST, ENOENT."""
        self.eventfds.ioeventfd(request)

    @ioctl(uapi.KVM_REGISTER_COALESCED_MMIO, takes(uapi.CoalescedMmioZone))
    def register_coalesced_mmio(self, zone: uapi.CoalescedMmioZone) -> None:
        """KVM_REGISTER_COALESCED_MMIO: writes to a range go to the ring of the first vCPU; OSError(EINVAL)."""
        self.coalesced.register(zone)

    @ioctl(uapi.KVM_UNREGISTER_COALESCED_MMIO, takes(uapi.CoalescedMmioZone))
    def unregister_coalesced_mmio(self, zone: uapi.CoalescedMmioZone) -> None:
        """KVM_UNREGISTER_COALESCED_MMIO: every zone within the range; OSError(EINVAL)."""
        self.coalesced.unregister(zone)

    # --- Clocks ---------------------------------------------------------------------------------------------------------------------

    @ioctl(uapi.KVM_GET_CLOCK, encode=returns)
    def get_clock(self) -> uapi.ClockData:
        """KVM_GET_CLOCK."""
        return self.kvmclock.get()

    @ioctl(uapi.KVM_SET_CLOCK, takes(uapi.ClockData))
    def set_clock(self, data: uapi.ClockData) -> None:
        """KVM_SET_CLOCK; OSError(EINVAL) for unknown flags."""
        self.kvmclock.set(data)

    @ioctl(uapi.KVM_SET_TSC_KHZ, value)
    def set_tsc_khz(self, khz: int) -> None:
        """KVM_SET_TSC_KHZ: the rate of vCPUs to come, 0 for the host's; OSError(EINVAL) for one that is too high."""
        self.tsc.set_default_khz(khz)

    @ioctl(uapi.KVM_GET_TSC_KHZ)
    def get_tsc_khz(self) -> int:
        """KVM_GET_TSC_KHZ: the rate of vCPUs to come."""
        return self.tsc.default_khz

    def tsc_status(self) -> TscStatus:
        """What a kernel with KVM shows in debugfs, and more: the clocks now. No ioctl; for any thread."""
        return tsc_status.read(self)

    # --- vCPUs ----------------------------------------------------------------------------------------------------------------------

    @ioctl(uapi.KVM_SET_BOOT_CPU_ID, value)
    def set_boot_cpu_id(self, vcpu_id: int) -> None:
        """KVM_SET_BOOT_CPU_ID; OSError(EBUSY) after the first vCPU."""
        with self.lock:
            if self.vcpus:
                raise OSError(errno.EBUSY, "there are vCPUs")
            self.boot_cpu_id = vcpu_id

    @ioctl(uapi.KVM_CREATE_VCPU, value)
    def create_vcpu(self, vcpu_id: int) -> Vcpu:
        """KVM_CREATE_VCPU; OSError EINVAL for too large an id or too many vCPUs, EEXIST for an id that is taken."""
        with self.lock:
            if self.max_vcpu_ids is None:
                self.max_vcpu_ids = capabilities.MAX_VCPU_IDS
            if not 0 <= vcpu_id < self.max_vcpu_ids:
                raise OSError(errno.EINVAL, "vCPU id out of range")
            if len(self.vcpus) >= capabilities.MAX_VCPUS:
                raise OSError(errno.EINVAL, "too many vCPUs")
            if any(vcpu.vcpu_id == vcpu_id for vcpu in self.vcpus):
                raise OSError(errno.EEXIST, f"there is a vCPU {vcpu_id}")
            vcpu = Vcpu(self, vcpu_id)
            self.vcpus = [*self.vcpus, vcpu]
            self.apic_map.forget()
            if self.introspection is not None:
                self.introspection.add_vcpu(vcpu)
        vcpu.tsc.synchronize(0)
        if vcpu is self.vcpus[0] and self.parameters.kvmclock_periodic_sync:
            self.kvmclock.start_periodic_sync()
        return vcpu
