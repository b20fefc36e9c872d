"""A virtual CPU: its ioctls, its state in the control block, and how other threads reach it.

Answers to Linux 6.1 `kvm_vcpu_ioctl()`, `kvm_arch_vcpu_ioctl()`, `kvm_arch_vcpu_create()` and `Documentation/virt/kvm/api.rst` (vCPU ioctls).
Architectural state is always in `block`; what KVM keeps beside it (events, local APIC, MSRs, clocks) has a class of its own each.
"""

from __future__ import annotations

import errno
import mmap
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING

from softkvm import silicon
from softkvm.host.sched import TICK_NS, Cpu
from softkvm.host.task import TIF_SIGPENDING, Task, current
from softkvm.kvm import cpuid, events, exits, fpu, msr, regs, reset, run
from softkvm.kvm.ioctl import (
    KvmFile,
    field,
    ioctl,
    returns,
    returns_array,
    returns_msr_values,
    takes,
    takes_array,
    takes_msr_indices,
    takes_msr_values,
    takes_signal_set,
    value,
    zero,
)
from softkvm.kvm.irqchip.lapic import Lapic
from softkvm.kvm.kvmclock import PvClock
from softkvm.kvm.request import REQ_NMI, REQ_TRIPLE_FAULT
from softkvm.kvm.tsc import VcpuTsc
from softkvm.kvm.vendor import INTERCEPTS, setup_controls
from softkvm.uapi import kvm as uapi

if TYPE_CHECKING:
    from softkvm.kvm.vm import Vm

MMAP_SIZE = 3 * 4096
"""kvm_run, PIO data, coalesced ring: one page each."""
MAX_CPUID_ENTRIES = 256
NO_INTERRUPT = -1
_NOT_ARMED = -1
_CR4_INTERCEPTED = regs.CR4_VMXE | regs.CR4_SMXE | regs.CR4_OSXSAVE | regs.CR4_PKE | regs.CR4_PCIDE | regs.CR4_LA57
"""CR4 bits whose change KVM must see: those without which it refuses, and those that CPUID shows."""


class Vcpu(KvmFile):
    """One vCPU. Its ioctls exclude each other (the vCPU mutex); `kick()`, `kick_guest()`, `wake()`, `make_request()` are for any thread."""

    unknown_ioctl = errno.EINVAL

    def __init__(self, vm: Vm, vcpu_id: int) -> None:
        """A vCPU after RESET; only `Vm.create_vcpu` makes one."""
        self.ioctl_lock = threading.RLock()
        self.vm = vm
        self.vcpu_id = vcpu_id
        self.model = vm.model
        self.clock = vm.clock
        self.vendor = vm.vendor
        self.handlers = vm.vendor.handlers
        self.next_expiry = vm.clock.next_expiry
        self._init_shared_state()
        self._init_concurrency()
        self.cpuid = cpuid.CpuidTable([])
        self.msrs = msr.MsrState(self)
        self.tsc = VcpuTsc(self)
        self.pvclock = PvClock(self)
        self.apic_base = 0xFEE0_0000 | 0x800 | (0x100 if vcpu_id == vm.boot_cpu_id else 0)
        self.lapic: Lapic | None = None
        self.mp_state = uapi.KVM_MP_STATE_RUNNABLE
        if vm.irqchip_in_kernel:
            self.lapic = Lapic(self)
            if vcpu_id != vm.boot_cpu_id:
                self.mp_state = uapi.KVM_MP_STATE_UNINITIALIZED
        setup_controls(self, 0)
        reset.reset(self, init=False)
        self._update_cr4_mask()

    def _init_shared_state(self) -> None:
        """The control block, the mapping, and views of both for the paths that are taken at every exit."""
        vmcb = silicon.Vmcb()
        self._hardware = vmcb.hardware
        self.block = vmcb.view
        self.control, self.exit, self.state, self.gpr = vmcb.control, vmcb.exit, vmcb.state, vmcb.gpr
        self.accesses = self.block.access
        self._mapping = mmap.mmap(-1, MMAP_SIZE)
        self.mmap_area = memoryview(self._mapping)
        """What mmap(2) of the vCPU maps: page 0 `kvm_run`, page 1 PIO data, page 2 the coalesced ring."""
        self.kvm_run = uapi.Run.from_buffer(self._mapping)
        self.kvm_run_io = self.kvm_run.io
        self.pio_data = self.mmap_area[4096:8192]
        self.windows = 0

    def _init_concurrency(self) -> None:
        """What other threads touch, and what belongs to the run loop."""
        self.mode = run.OUTSIDE_GUEST_MODE
        self.requests = 0
        self._request_lock = threading.Lock()
        self.wakeup = threading.Event()
        self.blocked = False
        self.task: Task | None = None
        self._task_lock = threading.Lock()
        self._signalled = False
        self.signal_mask: frozenset[int] | None = None
        self._cpu: Cpu | None = None
        self._last_cpu: Cpu | None = None
        self.enter: Callable[[], int] = self._not_loaded
        self.armed: int | None = _NOT_ARMED
        self._ticks = False
        self.flush_requested = False
        self.events = events.EventQueue()
        self.userspace_irq = NO_INTERRUPT
        self.complete_userspace_io: Callable[[], int] | None = None
        self.stats: Counter[str] = Counter()
        """Counters by the names of the kernel's binary statistics (`halt_exits`, `signal_exits`, ...)."""
        self.exit_counts: Counter[int] = Counter()
        """VM exits by the vendor's exit reason."""

    # --- Other threads --------------------------------------------------------------------------------------------------------------

    def make_request(self, request: int) -> None:
        """Ask for the work of REQ_* before the next VM entry, and make the vCPU notice."""
        with self._request_lock:
            self.requests |= request
        if self.blocked:
            self.wakeup.set()
        elif self.mode:
            self.kick_guest()

    def take_requests(self) -> int:
        """All requests, which are cleared."""
        with self._request_lock:
            requests, self.requests = self.requests, 0
        return requests

    def set_triple_fault(self, pending: bool) -> None:
        """Raise or withdraw a triple fault."""
        with self._request_lock:
            self.requests = self.requests | REQ_TRIPLE_FAULT if pending else self.requests & ~REQ_TRIPLE_FAULT

    def wake(self) -> None:
        """End a wait in HLT, so that the vCPU looks whether it can run."""
        self.wakeup.set()

    def kick_guest(self) -> None:
        """Leave guest mode, if in it (`kvm_vcpu_kick()`); KVM_RUN goes on."""
        cpu = self._cpu
        if self.mode and cpu is not None:
            cpu.core.kick()

    def kick(self) -> None:
        """Send the vCPU's thread a signal: the KVM_RUN in progress, or the next one, fails with EINTR and KVM_EXIT_INTR."""
        with self._task_lock:
            if self.task is None:
                self._signalled = True
            else:
                self.task.set_flag(TIF_SIGPENDING)

    def _notice_flags(self) -> None:
        """The thread's flags have changed: look at them soon."""
        self.wakeup.set()
        self.kick_guest()

    # --- The run loop's view --------------------------------------------------------------------------------------------------------

    def load(self, task: Task) -> None:
        """`vcpu_load()`: bind the thread and a core to this vCPU."""
        with self._task_lock:
            self.task = task
            task.kick = self._notice_flags
            if self._signalled:
                self._signalled = False
                task.set_flag(TIF_SIGPENDING)
        self._ticks = threading.current_thread() is threading.main_thread()
        self._cpu = self.vm.scheduler.load(self, self._last_cpu)

    def put(self) -> None:
        """`vcpu_put()`."""
        cpu, self._cpu = self._cpu, None
        if cpu is not None:
            self.vm.scheduler.put(self, cpu)
        with self._task_lock:
            if self.task is not None:
                self.task.kick = None
            self.task = None

    def sched_in(self, cpu: Cpu) -> None:
        """On a core now; whatever a stranger left in its TLB goes."""
        if cpu is not self._last_cpu or cpu.last is not self:
            self.control.tlb_control = 1
            self.flush_requested = True
            cpu.last = self
            self._last_cpu = cpu
            self.enter = partial(cpu.core.enter, self._hardware, self.vm.mmu.npt)
        self.armed = _NOT_ARMED

    def sched_out(self) -> None:
        """Off the core."""
        self.disarm_timer()

    def _not_loaded(self) -> int:
        raise RuntimeError("the vCPU is not on a core")

    @property
    def cpu_index(self) -> int:
        """Number of the core that the vCPU last ran on."""
        return self._last_cpu.index if self._last_cpu is not None else 0

    def arm_timer(self, expiry: int | None) -> None:
        """Let the core's timer end guest mode at `expiry` (ns, None for never); on the main thread also at each scheduler tick."""
        self.armed = deadline = expiry
        if self._ticks:
            tick = self.clock.monotonic_ns() + TICK_NS
            deadline = tick if expiry is None else min(tick, expiry)
        if self._cpu is not None:
            self._cpu.core.set_timer(0 if deadline is None else max(1, self.clock.ns_to_tsc(deadline)))

    def disarm_timer(self) -> None:
        """Stop the core's timer until the next entry arms it again."""
        if self._cpu is not None:
            self._cpu.core.set_timer(0)
        self.armed = _NOT_ARMED

    def set_windows(self, windows: int) -> None:
        """Which interrupt and NMI windows (bits of `Control.intercepts`) to exit at."""
        if windows != self.windows:
            self.windows = windows
            self.control.intercepts = INTERCEPTS | windows

    def exit_to_user(self, reason: int, finish: Callable[[], int] | None = None) -> int:
        """Leave KVM_RUN with an exit reason; `finish` runs at the start of the next KVM_RUN, its result is that of an exit handler."""
        self.kvm_run.exit_reason = reason
        self.complete_userspace_io = finish
        return 0

    def handle_signal_exit(self) -> None:
        """A signal ends KVM_RUN."""
        self.kvm_run.exit_reason = uapi.KVM_EXIT_INTR
        self.stats["signal_exits"] += 1

    def translate_gva(self, gva: int, access: int) -> int | None:
        """Guest-virtual to guest-physical as the guest's paging has it now; `access` as for `Core.translate`."""
        cpu = self._cpu or self._last_cpu
        core = cpu.core if cpu is not None else self.vm.scheduler.any_core()
        return core.translate(self._hardware, self.vm.mmu.npt, gva, access)

    def set_apic_base(self, apic_base: int) -> None:
        """IA32_APIC_BASE from user space; OSError(EINVAL) for an impossible value."""
        if apic_base == self.apic_base:
            return
        try:
            msr.set(self, msr.IA32_APIC_BASE, apic_base, True)
        except msr.MsrError:
            raise OSError(errno.EINVAL, "bad APIC base") from None

    def _update_cr4_mask(self) -> None:
        """The host owns the CR4 bits that CPUID does not allow, and those whose change CPUID shows."""
        self.control.cr4_mask = regs.cr4_reserved(self) | _CR4_INTERCEPTED

    # --- Running --------------------------------------------------------------------------------------------------------------------

    @ioctl(uapi.KVM_RUN, zero)
    def run(self) -> None:
        """KVM_RUN; OSError EINTR (signal, immediate_exit), EAGAIN (before SIPI), EFAULT (no memory behind a slot), EIO (closed VM)."""
        result = run.ioctl_run(self, current())
        if result < 0:
            raise OSError(-result, "KVM_RUN")

    @ioctl(uapi.KVM_INTERRUPT, field(uapi.Interrupt, "irq"))
    def interrupt(self, irq: int) -> None:
        """KVM_INTERRUPT: queue a vector; OSError EINVAL above 255, ENXIO with the PIC in the kernel, EEXIST if one waits already."""
        if not 0 <= irq < uapi.KVM_NR_INTERRUPTS:
            raise OSError(errno.EINVAL, "no such vector")
        if self.vm.irqchip is not None:
            raise OSError(errno.ENXIO, "the PIC is in the kernel")
        if self.userspace_irq != NO_INTERRUPT:
            raise OSError(errno.EEXIST, "an interrupt waits already")
        self.userspace_irq = irq
        self.make_request(run.REQ_EVENT)

    @ioctl(uapi.KVM_NMI)
    def nmi(self) -> None:
        """KVM_NMI: queue a non-maskable interrupt."""
        self.make_request(REQ_NMI)

    @ioctl(uapi.KVM_SET_SIGNAL_MASK, takes_signal_set)
    def set_signal_mask(self, signals: Iterable[int] | None) -> None:
        """KVM_SET_SIGNAL_MASK: signals that the thread blocks during KVM_RUN, None for its own mask."""
        self.signal_mask = None if signals is None else frozenset(signals) & signal.valid_signals()

    # --- Registers ------------------------------------------------------------------------------------------------------------------

    @ioctl(uapi.KVM_GET_REGS, encode=returns)
    def get_regs(self) -> uapi.Regs:
        """KVM_GET_REGS."""
        return regs.get_regs(self)

    @ioctl(uapi.KVM_SET_REGS, takes(uapi.Regs))
    def set_regs(self, value: uapi.Regs) -> None:
        """KVM_SET_REGS."""
        regs.set_regs(self, value)

    @ioctl(uapi.KVM_GET_SREGS, encode=returns)
    def get_sregs(self) -> uapi.Sregs:
        """KVM_GET_SREGS."""
        return regs.get_sregs(self)

    @ioctl(uapi.KVM_SET_SREGS, takes(uapi.Sregs))
    def set_sregs(self, value: uapi.Sregs) -> None:
        """KVM_SET_SREGS; OSError(EINVAL)."""
        regs.set_sregs(self, value)

    @ioctl(uapi.KVM_GET_SREGS2, encode=returns)
    def get_sregs2(self) -> uapi.Sregs2:
        """KVM_GET_SREGS2."""
        return regs.get_sregs2(self)

    @ioctl(uapi.KVM_SET_SREGS2, takes(uapi.Sregs2))
    def set_sregs2(self, value: uapi.Sregs2) -> None:
        """KVM_SET_SREGS2; OSError(EINVAL)."""
        regs.set_sregs2(self, value)

    @ioctl(uapi.KVM_GET_DEBUGREGS, encode=returns)
    def get_debugregs(self) -> uapi.Debugregs:
        """KVM_GET_DEBUGREGS."""
        return regs.get_debugregs(self)

    @ioctl(uapi.KVM_SET_DEBUGREGS, takes(uapi.Debugregs))
    def set_debugregs(self, value: uapi.Debugregs) -> None:
        """KVM_SET_DEBUGREGS; OSError(EINVAL)."""
        regs.set_debugregs(self, value)

    @ioctl(uapi.KVM_GET_VCPU_EVENTS, encode=returns)
    def get_vcpu_events(self) -> uapi.VcpuEvents:
        """KVM_GET_VCPU_EVENTS."""
        return regs.get_vcpu_events(self)

    @ioctl(uapi.KVM_SET_VCPU_EVENTS, takes(uapi.VcpuEvents))
    def set_vcpu_events(self, value: uapi.VcpuEvents) -> None:
        """KVM_SET_VCPU_EVENTS; OSError(EINVAL)."""
        regs.set_vcpu_events(self, value)

    @ioctl(uapi.KVM_GET_FPU, encode=returns)
    def get_fpu(self) -> uapi.Fpu:
        """KVM_GET_FPU."""
        return fpu.get_fpu(self)

    @ioctl(uapi.KVM_SET_FPU, takes(uapi.Fpu))
    def set_fpu(self, value: uapi.Fpu) -> None:
        """KVM_SET_FPU."""
        fpu.set_fpu(self, value)

    @ioctl(uapi.KVM_GET_XSAVE, encode=returns)
    def get_xsave(self) -> uapi.Xsave:
        """KVM_GET_XSAVE."""
        return fpu.get_xsave(self)

    @ioctl(uapi.KVM_GET_XSAVE2, encode=returns)
    def get_xsave2(self) -> uapi.Xsave:
        """KVM_GET_XSAVE2: no dynamic feature makes the area larger than KVM_GET_XSAVE's."""
        return fpu.get_xsave(self)

    @ioctl(uapi.KVM_SET_XSAVE, takes(uapi.Xsave))
    def set_xsave(self, value: uapi.Xsave) -> None:
        """KVM_SET_XSAVE; OSError(EINVAL) for a header that XRSTOR would refuse."""
        fpu.set_xsave(self, value)

    @ioctl(uapi.KVM_GET_XCRS, encode=returns)
    def get_xcrs(self) -> uapi.Xcrs:
        """KVM_GET_XCRS."""
        xcrs = uapi.Xcrs(nr_xcrs=1)
        xcrs.xcrs[0].value = self.state.xcr0
        return xcrs

    @ioctl(uapi.KVM_SET_XCRS, takes(uapi.Xcrs))
    def set_xcrs(self, value: uapi.Xcrs) -> None:
        """KVM_SET_XCRS; OSError(EINVAL) for flags, too many, or an XCR0 that XSETBV would refuse."""
        if value.nr_xcrs > uapi.KVM_MAX_XCRS or value.flags:
            raise OSError(errno.EINVAL, "bad XCRs")
        for xcr in value.xcrs[: value.nr_xcrs]:
            if xcr.xcr == 0 and not exits.set_xcr(self, 0, xcr.value):
                raise OSError(errno.EINVAL, "bad XCR0")

    @ioctl(uapi.KVM_TRANSLATE, field(uapi.Translation, "linear_address"), returns)
    def translate(self, linear: int) -> uapi.Translation:
        """KVM_TRANSLATE: the guest-physical address behind a linear one; `writeable` and `usermode` are not looked at, as in Linux."""
        gpa = self.translate_gva(linear, 0)
        result = uapi.Translation(linear_address=linear, valid=gpa is not None, writeable=1)
        result.physical_address = (1 << 64) - 1 if gpa is None else gpa
        return result

    # --- CPUID and MSRs -------------------------------------------------------------------------------------------------------------

    @ioctl(uapi.KVM_SET_CPUID2, takes_array(uapi.Cpuid2, uapi.CpuidEntry2, MAX_CPUID_ENTRIES))
    def set_cpuid2(self, entries: list[uapi.CpuidEntry2]) -> None:
        """KVM_SET_CPUID2; OSError E2BIG above 256 entries, EINVAL for an impossible set or a change after KVM_RUN."""
        if len(entries) > MAX_CPUID_ENTRIES:
            raise OSError(errno.E2BIG, "too many CPUID entries")
        if self._last_cpu is not None and list(map(bytes, entries)) != list(map(bytes, self.cpuid.entries())):
            raise OSError(errno.EINVAL, "CPUID cannot change once the vCPU has run")
        self.cpuid = cpuid.CpuidTable(entries)
        cpuid.update_runtime(self)
        self._update_cr4_mask()

    @ioctl(uapi.KVM_GET_CPUID2, encode=returns_array(uapi.Cpuid2, 40))
    def get_cpuid2(self) -> list[uapi.CpuidEntry2]:
        """KVM_GET_CPUID2."""
        return self.cpuid.entries()

    @ioctl(uapi.KVM_GET_MSRS, takes_msr_indices, returns_msr_values)
    def get_msrs(self, indices: Iterable[int]) -> list[int]:
        """KVM_GET_MSRS: the values up to the first MSR that cannot be read."""
        values: list[int] = []
        for index in indices:
            try:
                values.append(msr.get(self, index, True))
            except msr.MsrError:
                break
        return values

    @ioctl(uapi.KVM_SET_MSRS, takes_msr_values)
    def set_msrs(self, values: Mapping[int, int] | Iterable[tuple[int, int]]) -> int:
        """KVM_SET_MSRS: the number written, up to the first MSR that refuses its value."""
        done = 0
        for index, data in values.items() if isinstance(values, Mapping) else values:
            try:
                msr.set(self, index, data, True)
            except msr.MsrError:
                break
            done += 1
        return done

    @ioctl(uapi.KVM_SET_TSC_KHZ, value)
    def set_tsc_khz(self, khz: int) -> None:
        """KVM_SET_TSC_KHZ: 0 is the host's rate; OSError(EINVAL) if the silicon cannot scale to it."""
        self.tsc.set_khz(khz)

    @ioctl(uapi.KVM_GET_TSC_KHZ)
    def get_tsc_khz(self) -> int:
        """KVM_GET_TSC_KHZ."""
        return self.tsc.khz

    @ioctl(uapi.KVM_KVMCLOCK_CTRL)
    def kvmclock_ctrl(self) -> None:
        """KVM_KVMCLOCK_CTRL: tell the guest that it was paused; OSError(EINVAL) if it has no kvmclock."""
        self.pvclock.set_guest_paused()

    # --- Local APIC and state of execution ------------------------------------------------------------------------------------------

    def _need_lapic(self) -> Lapic:
        if self.lapic is None:
            raise OSError(errno.EINVAL, "no local APIC in the kernel")
        return self.lapic

    @ioctl(uapi.KVM_GET_LAPIC, encode=returns)
    def get_lapic(self) -> uapi.LapicState:
        """KVM_GET_LAPIC; OSError(EINVAL) without one in the kernel."""
        return uapi.LapicState.from_buffer_copy(self._need_lapic().get_state())

    @ioctl(uapi.KVM_SET_LAPIC, takes(uapi.LapicState))
    def set_lapic(self, value: uapi.LapicState) -> None:
        """KVM_SET_LAPIC; OSError(EINVAL) without one in the kernel."""
        self._need_lapic().set_state(bytes(value))

    @ioctl(uapi.KVM_GET_MP_STATE, encode=returns)
    def get_mp_state(self) -> uapi.MpState:
        """KVM_GET_MP_STATE, after acting on INIT and SIPI that wait; a halted vCPU that was kicked counts as running."""
        reset.accept_events(self)
        halted = self.mp_state == uapi.KVM_MP_STATE_HALTED
        unhalted = halted and self.lapic is not None and self.lapic.pv_unhalted
        return uapi.MpState(mp_state=uapi.KVM_MP_STATE_RUNNABLE if unhalted else self.mp_state)

    @ioctl(uapi.KVM_SET_MP_STATE, takes(uapi.MpState))
    def set_mp_state(self, value: uapi.MpState) -> None:
        """KVM_SET_MP_STATE; OSError(EINVAL) for a state that x86 lacks, or any but RUNNABLE without a local APIC in the kernel."""
        state = value.mp_state
        if state > uapi.KVM_MP_STATE_SIPI_RECEIVED or (self.lapic is None and state != uapi.KVM_MP_STATE_RUNNABLE):
            raise OSError(errno.EINVAL, "bad multiprocessing state")
        if state == uapi.KVM_MP_STATE_SIPI_RECEIVED and self.lapic is not None:
            self.mp_state, self.lapic.sipi_vector = uapi.KVM_MP_STATE_INIT_RECEIVED, self.lapic.sipi_vector or 0
        else:
            self.mp_state = state
        self.make_request(run.REQ_EVENT)

    @ioctl(uapi.KVM_ENABLE_CAP, takes(uapi.EnableCap))
    def enable_cap(self, cap: uapi.EnableCap) -> None:
        """KVM_ENABLE_CAP on a vCPU; OSError(EINVAL) for what is not known."""
        if cap.flags or cap.cap != uapi.KVM_CAP_ENFORCE_PV_FEATURE_CPUID:
            raise OSError(errno.EINVAL, "no such capability")
        self.msrs.enforce_pv_features = bool(cap.args[0])

    def close(self) -> None:
        """close(2): later ioctls fail with EBADF."""
        self.closed = True
