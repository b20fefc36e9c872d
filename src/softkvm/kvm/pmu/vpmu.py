"""The virtual PMU of a vCPU: its counters together, global control and status, interrupts, and what the guest may know of it.

Answers to Linux 6.1 `arch/x86/kvm/pmu.c`: `struct kvm_pmu` and `kvm_pmu_*()`.
Which registers there are is the vendor's: `intel.py`, `amd.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from softkvm.host.perf.context import EventContext
from softkvm.host.perf.core import Perf
from softkvm.host.perf.intel import EVENTSEL_CMASK, EVENTSEL_EDGE, EVENTSEL_INV, EVENTSEL_OS, EVENTSEL_USR, FIXED
from softkvm.kvm import regs
from softkvm.kvm.irqchip.lapic_registers import LVT_MASKED, Reg
from softkvm.kvm.pmu.counter import Counter
from softkvm.kvm.pmu.passthrough import PassThrough
from softkvm.kvm.request import REQ_PMI, REQ_PMU
from softkvm.silicon.pmu import LOAD_GUEST_GLOBAL_CTRL, LOAD_HOST_GLOBAL_CTRL, LVTPC_PENDING, SAVE_GUEST_GLOBAL_CTRL, VIRTUAL_PMI

if TYPE_CHECKING:
    from softkvm.host.sched import Cpu
    from softkvm.kvm.vcpu import Vcpu

_RDPMC_FAST, _RDPMC_FIXED = 1 << 31, 1 << 30
_U32 = 0xFFFF_FFFF


class VirtualPmu:
    """The PMU of one vCPU. It belongs to the thread that holds the vCPU; `overflowed()` is called in that thread as well."""

    def __init__(self, vcpu: Vcpu) -> None:
        """No PMU, until `refresh()` finds one in the guest's CPUID."""
        self.vcpu = vcpu
        self.perf: Perf = vcpu.vm.scheduler.perf
        self._task_events: EventContext | None = None
        self.counters: dict[int, Counter] = {}
        self.version = 0
        """Of architectural performance monitoring; 0 for a guest without a PMU."""
        self.mask = 0
        """Bits of a counter."""
        self.raw_event_mask = 0
        self.eventsel_reserved = 0
        self.has_global_ctrl = False
        self._global_ctrl = self._global_status = 0
        self.fixed_ctr_ctrl = 0
        self.global_ctrl_mask = 0
        """The counters that GLOBAL_CTRL can switch."""
        self.event_count = 0
        """Counters with an event behind them."""
        self.access = PassThrough(self)
        self._need_cleanup = False
        self._counting = False

    @property
    def task_events(self) -> EventContext:
        """The vCPU's own events on the host."""
        if self._task_events is None:
            self._task_events = self.vcpu.vm.scheduler.events(self.vcpu)
        return self._task_events

    # --- What there is --------------------------------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """`kvm_pmu_refresh()`: CPUID or PERF_CAPABILITIES have changed. Counters start anew."""
        self.reset()
        self.counters = {}
        self.version = self.mask = self.raw_event_mask = self.global_ctrl_mask = 0
        self.has_global_ctrl = False
        if self.vcpu.vm.enable_pmu:
            self.vcpu.vendor.refresh_pmu(self.vcpu, self)

    def set_counters(self, generic: int, fixed: int) -> None:
        """So many counters of each kind."""
        indices = (*range(generic), *range(FIXED, FIXED + fixed))
        self.counters = {idx: Counter(self, idx) for idx in indices}

    def reset(self) -> None:
        """`kvm_pmu_reset()`."""
        for counter in self.counters.values():
            counter.release()
            counter.value = counter.eventsel = 0
        self._global_ctrl = self._global_status = self.fixed_ctr_ctrl = 0
        self._update_retire()

    # --- Programming ----------------------------------------------------------------------------------------------------------------

    def set_eventsel(self, counter: Counter, value: int) -> None:
        """Write a general counter's event select register."""
        if value != counter.eventsel:
            counter.eventsel = value
            self.reprogram(counter)

    def set_fixed_ctr_ctrl(self, value: int) -> None:
        """Write FIXED_CTR_CTRL: four bits for each fixed counter."""
        changed = value ^ self.fixed_ctr_ctrl
        self.fixed_ctr_ctrl = value
        for idx, counter in self.counters.items():
            shift = (idx - FIXED) * 4
            if idx >= FIXED and changed >> shift & 0xF:
                counter.set_fixed_control(value >> shift & 0xF)
                self.reprogram(counter)

    @property
    def global_ctrl(self) -> int:
        """GLOBAL_CTRL; while the guest has it by itself, the silicon has saved it at the last exit."""
        return self.vcpu.control.guest_perf_global_ctrl if self.access.on else self._global_ctrl

    def set_global_ctrl(self, value: int) -> None:
        """Write GLOBAL_CTRL: counters go on and off together."""
        for counter in self._of(value ^ self.global_ctrl):
            counter.used = True
        self._global_ctrl = self.vcpu.control.guest_perf_global_ctrl = value
        self.switch_host_registers()
        self._update_retire()

    @property
    def global_status(self) -> int:
        """GLOBAL_STATUS: what has overflowed; while the guest has it by itself, the silicon keeps it."""
        return self.access.status if self.access.on else self._global_status

    @global_status.setter
    def global_status(self, value: int) -> None:
        if self.access.on:
            self.access.status = value
        else:
            self._global_status = value

    def reprogram(self, counter: Counter) -> None:
        """A counter's registers have changed."""
        counter.used = True
        counter.reprogram()
        self._update_retire()

    def allows(self, counter: Counter) -> bool:
        """Whether the VM's event filter lets the counter count (`check_pmu_event_filter()`)."""
        chosen = self.vcpu.vm.pmu_event_filter
        return chosen is None or chosen.allows(counter.idx, counter.eventsel)

    def _of(self, bits: int) -> Iterator[Counter]:
        return (counter for idx, counter in self.counters.items() if bits >> idx & 1)

    # --- Instructions that KVM does -------------------------------------------------------------------------------------------------

    def _update_retire(self) -> None:
        """Let `exits.step_over()` report instructions while a counter wants to know."""
        instructions = self.vcpu.vendor.pmu_instructions
        counting = any(self._counts(counter, instructions, self.access.on) for counter in self.counters.values())
        if counting != self._counting:
            self._counting = counting
            self.vcpu.retired = self.instruction_retired if counting else None

    def _counts(self, counter: Counter, code: int, whether_enabled_or_not: bool = False) -> bool:
        wanted = counter.wanted and (whether_enabled_or_not or counter.enabled)
        return wanted and counter.eventsel & self.raw_event_mask & ~_MODIFIERS == code and self.allows(counter)

    def instruction_retired(self) -> None:
        """`kvm_pmu_trigger_event(PERF_COUNT_HW_INSTRUCTIONS)`: KVM has executed an instruction for the guest."""
        ring = EVENTSEL_USR if regs.cpl(self.vcpu) else EVENTSEL_OS
        code = self.vcpu.vendor.pmu_instructions
        for counter in self.counters.values():
            if counter.eventsel & ring and self._counts(counter, code):
                counter.retire()

    # --- Overflow -------------------------------------------------------------------------------------------------------------------

    def overflowed(self, counter: Counter) -> None:
        """`__kvm_perf_overflow()`: set the status, ask for the interrupt."""
        self.global_status |= counter.bit
        if counter.intr:
            self.vcpu.make_request(REQ_PMI)

    @property
    def takes_interrupts(self) -> bool:
        """Whether the guest's local APIC is there to take the counters' interrupts, so that the silicon may do it."""
        lapic = self.vcpu.lapic
        return lapic is not None and lapic.hw_enabled and lapic.sw_enabled

    def choose_interrupts(self) -> None:
        """The mode of the guest's local APIC has changed."""
        if self.access.on:
            self.access.choose_msrs()
            self.switch_host_registers()

    def handle_event(self) -> None:
        """`kvm_pmu_handle_event()`, for REQ_PMU."""
        if self._need_cleanup:
            self._cleanup()

    def deliver_pmi(self) -> None:
        """`kvm_pmu_deliver_pmi()`, for REQ_PMI: the guest's LVTPC says what the interrupt is; the silicon's first act is to freeze LBRs."""
        lapic = self.vcpu.lapic
        if lapic is None:
            return
        self.vcpu.lbr.freeze_on_pmi()
        if lapic.deliver_local(Reg.LVT_PMC):
            lapic.lvtpc |= LVT_MASKED

    # --- Time slices ----------------------------------------------------------------------------------------------------------------

    def sched_in(self, cpu: Cpu) -> None:
        """The vCPU begins a slice on `cpu`: soon look for events that it has not used in the last one."""
        cpu.perf.counters.on_change = self.switch_host_registers
        self.switch_host_registers()
        if self.event_count or self.vcpu.lbr.event is not None:
            self._need_cleanup = True
            self.vcpu.make_request(REQ_PMU)

    def sched_out(self, cpu: Cpu) -> None:
        """The vCPU leaves `cpu`, whose registers are then somebody else's."""
        cpu.perf.counters.on_change = None
        self._let_pass(frozenset())

    def switch_host_registers(self) -> None:
        """`atomic_switch_perf_msrs()`, which Linux does at each entry and this one when something has changed: the core's registers in the
        guest."""
        vcpu = self.vcpu
        if vcpu.cpu is None or self.perf.pmu.version < 2:  # AMD's counters say themselves whether they count in guests
            return
        counters = vcpu.cpu.perf.counters
        owned = frozenset(idx for idx, counter in self.counters.items() if counter.owned)
        self._let_pass(owned if counters.belong_to(self._task_events) else frozenset())
        if self.access.on:
            virtual = VIRTUAL_PMI if self.takes_interrupts else 0
            vcpu.control.perf_controls = LOAD_GUEST_GLOBAL_CTRL | SAVE_GUEST_GLOBAL_CTRL | LOAD_HOST_GLOBAL_CTRL | virtual
        else:
            lent = sum(1 << idx for idx in owned)
            vcpu.control.guest_perf_global_ctrl = on = counters.guest_global_ctrl | self._global_ctrl & lent
            vcpu.control.perf_controls = LOAD_GUEST_GLOBAL_CTRL | LOAD_HOST_GLOBAL_CTRL if on else 0
        vcpu.lbr.set_host_debugctl(counters.guest_debugctl)
        vcpu.lbr.choose_debugctl()

    def _let_pass(self, owned: frozenset[int]) -> None:
        """Let the guest use the counters in `owned`, and with them the global registers, without exits."""
        if self.access.on and not owned:
            self._global_ctrl, self._global_status = self.global_ctrl, self.global_status
            self._take_pending_interrupt()
        passing = self.access.on
        self.access.set(owned)
        if self.access.on and not passing:
            self.vcpu.control.guest_perf_global_ctrl = self._global_ctrl
            self.access.status = self._global_status
        if self.access.on != passing:
            self._update_retire()

    def _take_pending_interrupt(self) -> None:
        """The silicon does not bring the guest its interrupts any more: one that it has not yet brought is KVM's."""
        lapic = self.vcpu.lapic
        if lapic is not None and lapic.lvtpc & LVTPC_PENDING:
            lapic.lvtpc &= ~LVTPC_PENDING
            self.vcpu.make_request(REQ_PMI)

    def written(self, counter: Counter) -> None:
        """A counter has another value, which RDPMC reads without an exit while the guest has some of them."""
        self.access.mirror(counter)

    def _cleanup(self) -> None:
        """`kvm_pmu_cleanup()`: release what the guest has left alone for a whole slice and has switched off."""
        self._need_cleanup = False
        for counter in self.counters.values():
            if not counter.used and counter.event is not None and not counter.wanted:
                counter.release()
            counter.used = False
        self.vcpu.lbr.cleanup()

    # --- RDPMC ----------------------------------------------------------------------------------------------------------------------

    def rdpmc(self, index: int) -> int | None:
        """`kvm_pmu_rdpmc()`: the counter; None where RDPMC is #GP."""
        fast = index & _RDPMC_FAST and not self.vcpu.cpuid.is_amd
        number = index & ~_RDPMC_FAST if fast else index
        counter = self.counters.get(number & ~_RDPMC_FIXED | FIXED if number & _RDPMC_FIXED else number)
        if counter is None or (number & _RDPMC_FIXED and number & ~_RDPMC_FIXED >= FIXED) or number == FIXED:
            return None
        value = counter.read()
        return value & _U32 if fast else value


_MODIFIERS = EVENTSEL_EDGE | EVENTSEL_INV | EVENTSEL_CMASK
"""Bits that do not change what KVM adds for its own work."""
