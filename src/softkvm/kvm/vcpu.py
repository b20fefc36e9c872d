"""A virtual CPU: its parts and its ioctls.

Answers to Linux 6.1 `kvm_vcpu_ioctl()`, `kvm_arch_vcpu_ioctl()`, `kvm_arch_vcpu_create()` and `Documentation/virt/kvm/api.rst` (vCPU
ioctls). Architectural state is always in `block`; what KVM keeps beside it (events, local APIC, MSRs, clocks) has a class of its own each.
"""

from __future__ import annotations

import errno
import signal
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from softkvm import silicon
from softkvm.host import trace
from softkvm.host.sched import Cpu
from softkvm.host.task import Task, current
from softkvm.kvm import cpuid, cr, events, exits, fpu, guest_debug, msr, msr_filter, regs, reset, run, smm, virtual_time
from softkvm.kvm.introspection import exits as introspected_exits
from softkvm.kvm.ioctl import (
    fields,
    ioctl,
    returns,
    returns_array,
    returns_msr_values,
    takes,
    takes_array,
    takes_msr_indices,
    takes_msr_values,
    takes_signal_set,
    zero,
)
from softkvm.kvm.irqchip.apicv import ApicV
from softkvm.kvm.irqchip.lapic import Lapic
from softkvm.kvm.kvmclock import PvClock
from softkvm.kvm.lbr import GuestLbr
from softkvm.kvm.pmu.vpmu import VirtualPmu
from softkvm.kvm.request import REQ_APICV_UPDATE, REQ_EVENT, REQ_GLOBAL_CLOCK_UPDATE, REQ_SMI, REQ_STEAL_UPDATE
from softkvm.kvm.tsc import VcpuTsc
from softkvm.kvm.vcpu_core import NO_INTERRUPT
from softkvm.kvm.vcpu_options import VcpuOptions
from softkvm.kvm.vendor import Handler, setup_controls
from softkvm.uapi import kvm as uapi

if TYPE_CHECKING:
    from softkvm.kvm.introspection.vcpu import VcpuIntrospection
    from softkvm.kvm.vm import Vm

MAX_CPUID_ENTRIES = 256
_CR4_INTERCEPTED = regs.CR4_VMXE | regs.CR4_SMXE | regs.CR4_OSXSAVE | regs.CR4_PKE | regs.CR4_PCIDE | regs.CR4_LA57
"""CR4 bits whose change KVM must see: those without which it refuses, and those that CPUID shows."""


def _traced_run(vcpu: Vcpu, task: Task) -> int:
    """KVM_RUN while somebody listens for its returns."""
    result = run.ioctl_run(vcpu, task)
    trace.kvm_userspace_exit(vcpu.kvm_run.exit_reason, result)
    return result


class Vcpu(VcpuOptions):
    """One vCPU. Its ioctls exclude each other (the vCPU mutex); `kick()`, `kick_guest()`, `wake()`, `make_request()` are for any thread."""

    introspection: VcpuIntrospection | None = None
    """The tool's side of the vCPU, between hook and un-hook."""

    def __init__(self, vm: Vm, vcpu_id: int) -> None:
        """A vCPU after RESET; only `Vm.create_vcpu` makes one."""
        super().__init__(vm, vcpu_id)
        self.model = vm.model
        self.cpuid = cpuid.CpuidTable([])
        self.msrs = msr.MsrState(self)
        self.pmu = VirtualPmu(self)
        self.lbr = GuestLbr(self)
        self.tsc = VcpuTsc(self)
        self.pvclock = PvClock(self)
        self.apic_base = 0xFEE0_0000 | 0x800 | (0x100 if vcpu_id == vm.boot_cpu_id else 0)
        self.lapic: Lapic | None = None
        self.mp_state = uapi.KVM_MP_STATE_RUNNABLE
        if vm.irqchip_in_kernel:
            self.lapic = Lapic(self)
            if vm.has_apicv and isinstance(self.wakeup, silicon.Wakeup):
                self.lapic.apicv = ApicV(self, self.wakeup)
            if vcpu_id != vm.boot_cpu_id:
                self.mp_state = uapi.KVM_MP_STATE_UNINITIALIZED
        setup_controls(self)
        if vm.turns is not None:
            virtual_time.prepare(self, vm.turns)
        reset.reset(self, init=False)
        self.update_cr4_mask()

    def _as_vcpu(self) -> Vcpu:
        return self

    def set_apic_base(self, apic_base: int) -> None:
        """IA32_APIC_BASE from user space; OSError(EINVAL) for an impossible value."""
        if apic_base == self.apic_base:
            return
        try:
            msr.set(self, msr.IA32_APIC_BASE, apic_base, True)
        except msr.MsrError:
            raise OSError(errno.EINVAL, "bad APIC base") from None

    def sched_in(self, cpu: Cpu) -> None:
        """On a core now, after a time off it."""
        if not self.vm.kvmclock.use_master_clock and (cpu.index != self.cpu_index or not self.has_run):
            self.make_request(REQ_GLOBAL_CLOCK_UPDATE)
        super().sched_in(cpu)
        self.account_steal_time()
        if self.lapic is not None and self.lapic.apicv is not None:
            cpu.core.set_apic(self.lapic.apicv.posted, self.vm.ipi_table)
        self.lbr.sched_in()
        self.pmu.sched_in(cpu)

    def sched_out(self) -> None:
        """On no core any more."""
        if self.cpu is not None:
            self.pmu.sched_out(self.cpu)
            if self.lapic is not None and self.lapic.apicv is not None:
                self.cpu.core.set_apic(None, None)
        super().sched_out()

    def update_static_calls(self) -> None:
        """A hook was turned on or off."""
        super().update_static_calls()
        self.ioctl_run = _traced_run if trace.kvm_userspace_exit.enabled else run.ioctl_run
        open_filter = self.vm.msr_filter.is_open
        self.msr_get = msr.get if open_filter else msr_filter.filtered_get
        self.msr_set = msr.set if open_filter else msr_filter.filtered_set
        handlers = self.vendor.handlers
        if trace.kvm_cpuid.enabled:
            traced: dict[Handler, Handler] = {exits.handle_cpuid: exits.trace_cpuid}
            handlers = {reason: traced.get(handler, handler) for reason, handler in handlers.items()}
        if self.introspection is not None:
            handlers = introspected_exits.overlay(self, handlers)
            for reason in handlers:
                self.exit_counts.setdefault(reason, 0)
        self.handlers = handlers

    def set_introspection(self, introspection: VcpuIntrospection | None) -> None:
        """A tool begins or ends to look at the vCPU; for any thread."""
        self.introspection = introspection
        self.make_request(REQ_APICV_UPDATE)
        self.update_static_calls()

    def account_steal_time(self) -> None:
        """The thread was off its processor: let the guest know how long it had to wait for it, if the guest wants to."""
        if self.pvclock.steal_is_old:
            self.make_request(REQ_STEAL_UPDATE)

    def update_exception_bitmap(self) -> None:
        """`vmx_update_exception_bitmap()`: what KVM emulates, a debugger in user space, or a tool must see."""
        bitmap = guest_debug.exceptions(self.guest_debug) | 1 << events.UD
        if self.introspection is not None and self.introspection.intercepts_breakpoints:
            bitmap |= 1 << events.BP
        self.control.exception_bitmap = bitmap

    def update_cr4_mask(self) -> None:
        """The host owns the CR4 bits that CPUID does not allow, and those whose change CPUID shows."""
        mask = regs.cr4_reserved(self) | _CR4_INTERCEPTED
        if self.introspection is not None and 4 in self.introspection.control_registers:
            mask |= ~cr.CR4_GUEST_OWNED & (1 << 64) - 1
        self.control.cr4_mask = mask

    # --- Running --------------------------------------------------------------------------------------------------------------------

    @ioctl(uapi.KVM_RUN, zero)
    def run(self) -> None:
        """KVM_RUN; OSError EINTR (signal, immediate_exit), EAGAIN (before SIPI), EFAULT (no memory behind a slot)."""
        result = self.ioctl_run(self, current())
        if result < 0:
            raise OSError(-result, "KVM_RUN")

    @ioctl(uapi.KVM_INTERRUPT, fields(uapi.Interrupt, "irq"))
    def interrupt(self, irq: int) -> None:
        """KVM_INTERRUPT: queue a vector; OSError EINVAL above 255, ENXIO with the PIC in the kernel, EEXIST if one waits already."""
        if not 0 <= irq < uapi.KVM_NR_INTERRUPTS:
            raise OSError(errno.EINVAL, "no such vector")
        if self.vm.irqchip is not None:
            raise OSError(errno.ENXIO, "the PIC is in the kernel")
        if self.userspace_irq != NO_INTERRUPT:
            raise OSError(errno.EEXIST, "an interrupt waits already")
        self.userspace_irq = irq
        self.make_request(REQ_EVENT)

    @ioctl(uapi.KVM_NMI)
    def nmi(self) -> None:
        """KVM_NMI: queue a non-maskable interrupt."""
        self.queue_nmi()

    @ioctl(uapi.KVM_SMI)
    def smi(self) -> None:
        """KVM_SMI: queue a system management interrupt."""
        self.make_request(REQ_SMI)

    def enter_smm(self) -> bool:
        """Enter system management mode for an SMI that waits; False in it."""
        return smm.inject(self)

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

    @ioctl(uapi.KVM_SET_GUEST_DEBUG, takes(uapi.GuestDebug))
    def set_guest_debug(self, request: uapi.GuestDebug) -> None:
        """KVM_SET_GUEST_DEBUG; OSError(EBUSY) for an exception to inject while one waits, or breakpoints that a tool has."""
        guest_debug.set_guest_debug(self, request)

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

    @ioctl(uapi.KVM_TRANSLATE, fields(uapi.Translation, "linear_address"), returns)
    def translate(self, linear: int) -> uapi.Translation:
        """KVM_TRANSLATE: the guest-physical address behind a linear one; `writeable` and `usermode` are not looked at, as in Linux."""
        self.load()
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
        cpuid.check(self, entries)
        self.cpuid = cpuid.CpuidTable(entries)
        cpuid.update_runtime(self)
        self.update_cr4_mask()
        self.pmu.refresh()
        self.lbr.refresh()

    @ioctl(uapi.KVM_GET_CPUID2, encode=returns_array(uapi.Cpuid2, 40))
    def get_cpuid2(self) -> list[uapi.CpuidEntry2]:
        """KVM_GET_CPUID2."""
        return self.cpuid.entries

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

    # --- Local APIC and state of execution ------------------------------------------------------------------------------------------

    def _need_lapic(self) -> Lapic:
        if self.lapic is None:
            raise OSError(errno.EINVAL, "no local APIC in the kernel")
        return self.lapic

    @ioctl(uapi.KVM_GET_LAPIC, encode=returns)
    def get_lapic(self) -> uapi.LapicState:
        """KVM_GET_LAPIC; OSError(EINVAL) without one in the kernel."""
        return uapi.LapicState.from_buffer_copy(self._need_lapic().get_state())

    @ioctl(uapi.KVM_SET_LAPIC, takes(uapi.LapicState), before=_need_lapic)
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
        waits = state in (uapi.KVM_MP_STATE_INIT_RECEIVED, uapi.KVM_MP_STATE_SIPI_RECEIVED)
        if waits and (self.smm.active or self.smm.pending):
            raise OSError(errno.EINVAL, "a vCPU with an SMI does not wait for a SIPI")
        if state == uapi.KVM_MP_STATE_SIPI_RECEIVED and self.lapic is not None:
            self.mp_state, self.lapic.sipi_vector = uapi.KVM_MP_STATE_INIT_RECEIVED, self.lapic.sipi_vector or 0
        else:
            self.mp_state = state
        self.make_request(REQ_EVENT)

    def close(self) -> None:
        """close(2): later ioctls fail with EBADF, the core is free, and the local APIC's timer never fires again."""
        self.closed = True
        if self.lapic is not None:
            self.lapic.timer.cancel()
        self.vm.scheduler.put(self)
