"""One counter of a guest, and the host's perf event behind it.

Answers to Linux 6.1 `arch/x86/kvm/pmu.c`: `struct kvm_pmc`, `reprogram_counter()`, `pmc_{pause,resume}_counter()`, `kvm_perf_overflow()`.
The event is on the silicon's counter of the same number, and has the guest's value in it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from softkvm.host.perf import intel
from softkvm.host.perf.event import Attr, Event, Registers, State
from softkvm.host.perf.intel import EVENTSEL_INT, EVENTSEL_OS, EVENTSEL_USR, FIXED, FIXED_EVENTS

if TYPE_CHECKING:
    from softkvm.kvm.pmu.vpmu import VirtualPmu

_FIXED_OS, _FIXED_USR, _FIXED_PMI = 1, 2, 8


class Counter:
    """A general counter, or a fixed one (`idx` from 32)."""

    __slots__ = ("_config", "_paused", "bit", "event", "eventsel", "idx", "intr", "pmu", "used", "value")

    def __init__(self, pmu: VirtualPmu, idx: int) -> None:
        """A counter after RESET."""
        self.pmu = pmu
        self.idx = idx
        self.bit = 1 << idx
        self.value = 0
        """What it reads while no event has it."""
        self.eventsel = 0
        """The event select register of a general counter, and what it would be of a fixed one."""
        self.event: Event | None = None
        self.intr = False
        """Overflows interrupt the guest."""
        self.used = False
        """The guest has touched the counter in this time slice."""
        self._paused = True
        self._config = 0

    def set_fixed_control(self, field: int) -> None:
        """Its four bits of FIXED_CTR_CTRL."""
        eventsel = FIXED_EVENTS[self.idx - FIXED]
        if field & (_FIXED_OS | _FIXED_USR):
            eventsel |= intel.EVENTSEL_ENABLE
        for bit, meaning in ((_FIXED_OS, EVENTSEL_OS), (_FIXED_USR, EVENTSEL_USR), (_FIXED_PMI, EVENTSEL_INT)):
            if field & bit:
                eventsel |= meaning
        self.eventsel = eventsel

    @property
    def wanted(self) -> bool:
        """Whether the counter is switched on by itself (`pmc_speculative_in_use()`)."""
        return bool(self.eventsel & intel.EVENTSEL_ENABLE)

    @property
    def enabled(self) -> bool:
        """Whether GLOBAL_CTRL, if there is one, has the counter on (`pmc_is_enabled()`)."""
        return bool(self.pmu.global_ctrl & self.bit) or not self.pmu.has_global_ctrl

    # --- The event ------------------------------------------------------------------------------------------------------------------

    def reprogram(self) -> None:
        """`reprogram_counter()`: an event as the registers want it, or none that counts. GLOBAL_CTRL lets it count."""
        self.pause()
        if not (self.wanted and self.pmu.allows(self)):
            return
        if self.eventsel != self._config or self.event is None:
            self.release()
            self._config = self.eventsel
            self._create()
        if self.event is not None:
            self.pmu.perf.write(self.event, self.value)
            self._paused = False
            self.pmu.perf.enable(self.event)

    def _create(self) -> None:
        eventsel, pmu = self.eventsel, self.pmu
        attr = Attr(
            config=eventsel & pmu.raw_event_mask,
            counter=self.idx,
            pinned=True,
            disabled=True,
            exclude_host=True,
            exclude_user=not eventsel & EVENTSEL_USR,
            exclude_kernel=not eventsel & EVENTSEL_OS,
        )
        try:
            self.event = pmu.perf.create_kernel_counter(attr, pmu.task_events, self._overflow)
        except OSError:
            return  # an event that the host's PMU does not have counts nothing, as in Linux
        self.intr = bool(eventsel & EVENTSEL_INT)
        pmu.event_count += 1

    def pause(self) -> None:
        """`pmc_pause_counter()`: stop the event, and take over its count."""
        if self.event is not None and not self._paused:
            self.value = self.pmu.perf.pause(self.event)
            self._paused = True

    def release(self) -> None:
        """`pmc_stop_counter()`: let the event go; the count stays."""
        if self.event is not None:
            self.value = self.read()
            self.pmu.perf.release(self.event)
            self.event = None
            self._config = 0
            self.pmu.event_count -= 1

    @property
    def owned(self) -> bool:
        """Whether the silicon's counter of this number is the guest's now."""
        return self.event is not None and self.event.state is State.ACTIVE

    def _overflow(self, _event: Event, _registers: Registers) -> None:
        """`kvm_perf_overflow()`, in the host's NMI handler."""
        self.pmu.overflowed(self)

    # --- The value ------------------------------------------------------------------------------------------------------------------

    def read(self) -> int:
        """`pmc_read_counter()`."""
        return self.value if self.event is None or self._paused else self.pmu.perf.read(self.event)

    def write(self, value: int) -> None:
        """Set the counter, also while it runs."""
        self.value = value & self.pmu.mask
        if self.event is not None and not self._paused:
            self.pmu.perf.write(self.event, self.value)
        self.pmu.written(self)

    def retire(self) -> None:
        """`kvm_pmu_incr_counter()`: one more, which KVM has counted in the silicon's place."""
        value = self.read() + 1 & self.pmu.mask
        self.write(value)
        if not value:
            self.pmu.overflowed(self)
