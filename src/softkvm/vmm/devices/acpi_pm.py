"""ACPI fixed hardware: the PM1a event and control blocks and the power management timer.

Source of truth: ACPI specification 6.5, 4.8 (fixed hardware registers). SMI_CMD is 0 in our FADT, so the machine is always in ACPI mode and
SCI_EN always set. Sleep states are S3, suspend to RAM, and S5, soft-off. Of the fixed events the timer, the power button and the alarm of
the RTC can happen; the others can be enabled, which a guest checks by reading the register back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

from msgspec import Meta

from softkvm.vmm.irq import SetLevel
from softkvm.vmm.state import Record
from softkvm.vmm.timers import NSEC_PER_SEC, Timers

PM_TIMER_HZ = 3_579_545
PM_TIMER_BITS = 32
_CARRY = 1 << (PM_TIMER_BITS - 1)  # TMR_STS is set whenever this bit changes

# Offsets in the event block
PM1_STATUS, PM1_ENABLE = 0, 2

PM1_TIMER = 1 << 0
PM1_GLOBAL_LOCK = 1 << 5
PM1_POWER_BUTTON = 1 << 8
PM1_SLEEP_BUTTON = 1 << 9
PM1_RTC = 1 << 10
PM1_EVENTS = PM1_TIMER | PM1_GLOBAL_LOCK | PM1_POWER_BUTTON | PM1_SLEEP_BUTTON | PM1_RTC
PM1_WAKE = 1 << 15
"""Status only: the machine has come from a sleep."""
_WAKING = PM1_POWER_BUTTON | PM1_RTC

CONTROL_SCI_EN = 1 << 0
CONTROL_SLP_TYP_SHIFT = 10
CONTROL_SLP_TYP = 7 << CONTROL_SLP_TYP_SHIFT
CONTROL_SLP_EN = 1 << 13
CONTROL_KEPT = CONTROL_SLP_TYP | 1 << 1  # SLP_TYP and BM_RLD

SLP_TYP_S3, SLP_TYP_S5 = 1, 5
"""What the packages \\_S3 and \\_S5 of the DSDT name for suspend to RAM and soft-off."""


class AcpiPmState(Record, frozen=True, kw_only=True):
    """The PM1a blocks, and the age of the power management timer in ns."""

    version: Literal[1] = 1
    status: Annotated[int, Meta(ge=0, le=0xFFFF)]
    enable: Annotated[int, Meta(ge=0, le=0xFFFF)]
    control: Annotated[int, Meta(ge=0, le=0xFFFF)]
    timer_ns: Annotated[int, Meta(ge=0)]
    carries: Annotated[int, Meta(ge=0)]


class AcpiPm:
    """The registers behind `event`, `control` and `timer`, which are claimed as three devices."""

    def __init__(
        self,
        sci: SetLevel,
        timers: Timers,
        on_power_off: Callable[[], None],
        on_suspend: Callable[[], None],
        on_wake: Callable[[], None],
    ) -> None:
        """`sci` drives the system control interrupt; `on_power_off()` follows a write of SLP_EN with the type of S5, `on_suspend()` of S3;
        `on_wake()` is called for what ends a sleep, whether or not there is one."""
        self._sci = sci
        self._now = timers.now
        self._alarm = timers.timer(self._update_sci)
        self._sleep = {SLP_TYP_S3: on_suspend, SLP_TYP_S5: on_power_off}
        self._on_wake = on_wake
        self._born = self._now()
        self._status = 0
        self._enable = 0
        self._control = 0
        self._carries = 0
        self._level = False
        self.event = Pm1Event(self)
        self.control = Pm1Control(self)
        self.timer = PmTimer(self)

    def press_power_button(self) -> None:
        """Tell the guest that a person wants it to shut down."""
        self._status |= PM1_POWER_BUTTON
        self._update_sci()

    @property
    def alarm_wakes(self) -> bool:
        """Whether the RTC's alarm would end a sleep."""
        return bool(self._enable & PM1_RTC)

    def rtc_alarm(self) -> None:
        """The RTC's alarm has rung."""
        self._status |= PM1_RTC
        self._update_sci()

    def wake(self) -> None:
        """The machine comes from a sleep: status says from which event, nothing is enabled."""
        self._note_carry()
        self._status = self._status & _WAKING | PM1_WAKE
        self._enable = self._control = 0
        self._update_sci()

    def ticks(self) -> int:
        """The power management timer, not cut to its width."""
        return (self._now() - self._born) * PM_TIMER_HZ // NSEC_PER_SEC

    def read_status(self) -> int:
        """PM1 status."""
        self._note_carry()
        return self._status

    def clear_status(self, bits: int) -> None:
        """PM1 status: ones clear."""
        self._note_carry()
        self._status &= ~bits
        self._update_sci()

    def read_enable(self) -> int:
        """PM1 enable."""
        return self._enable

    def write_enable(self, value: int) -> None:
        """PM1 enable."""
        self._enable = value & PM1_EVENTS
        self._update_sci()

    def read_control(self) -> int:
        """PM1 control; SLP_EN reads as 0."""
        return self._control | CONTROL_SCI_EN

    def write_control(self, value: int) -> None:
        """PM1 control: SLP_EN with the type of S3 or S5 begins that state; there are no others."""
        self._control = value & CONTROL_KEPT
        sleep = self._sleep.get((value & CONTROL_SLP_TYP) >> CONTROL_SLP_TYP_SHIFT)
        if value & CONTROL_SLP_EN and sleep is not None:
            sleep()
            self._update_sci()  # what ends the sleep may have happened already

    def _note_carry(self) -> None:
        carries = self.ticks() // _CARRY
        if carries != self._carries:
            self._carries = carries
            self._status |= PM1_TIMER

    def _update_sci(self) -> None:
        self._note_carry()
        level = bool(self._status & self._enable)
        if level != self._level:
            self._level = level
            self._sci(level)
        if self._status & self._enable & _WAKING:
            self._on_wake()
        if self._enable & PM1_TIMER:
            next_carry = (self._carries + 1) * _CARRY
            self._alarm.arm(self._born - (-next_carry * NSEC_PER_SEC // PM_TIMER_HZ))
        else:
            self._alarm.disarm()

    def save(self) -> AcpiPmState:
        """The whole state."""
        self._note_carry()
        return AcpiPmState(
            status=self._status,
            enable=self._enable,
            control=self._control,
            timer_ns=self._now() - self._born,
            carries=self._carries,
        )

    def restore(self, state: AcpiPmState) -> None:
        """Take over a saved state; the timer goes on from where it stood."""
        self._status = state.status & (PM1_EVENTS | PM1_WAKE)
        self._enable = state.enable & PM1_EVENTS
        self._control = state.control & CONTROL_KEPT
        self._born = self._now() - state.timer_ns
        self._carries = state.carries
        self._update_sci()


class Pm1Event:
    """PM1a event block: two 16-bit registers, byte accesses allowed."""

    def __init__(self, pm: AcpiPm) -> None:
        self._pm = pm

    def read(self, offset: int, size: int) -> int:
        """Status at 0, enable at 2."""
        word = self._pm.read_enable() if offset & PM1_ENABLE else self._pm.read_status()
        return word >> 8 * (offset & 1) & ((1 << 8 * size) - 1)

    def write(self, offset: int, size: int, value: int) -> None:
        """Clear status bits, or set the enable register."""
        shift = 8 * (offset & 1)
        if offset & PM1_ENABLE:
            kept = self._pm.read_enable() & ~(((1 << 8 * size) - 1) << shift)
            self._pm.write_enable(kept | value << shift)
        else:
            self._pm.clear_status(value << shift)


class Pm1Control:
    """PM1a control block: one 16-bit register, byte accesses allowed."""

    def __init__(self, pm: AcpiPm) -> None:
        self._pm = pm

    def read(self, offset: int, size: int) -> int:
        """The register."""
        return self._pm.read_control() >> 8 * offset & ((1 << 8 * size) - 1)

    def write(self, offset: int, size: int, value: int) -> None:
        """The register, or one byte of it."""
        shift = 8 * offset
        kept = self._pm.read_control() & ~(((1 << 8 * size) - 1) << shift)
        self._pm.write_control(kept | value << shift)


class PmTimer:
    """The timer: 32 bits, read-only."""

    def __init__(self, pm: AcpiPm) -> None:
        self._pm = pm

    def read(self, offset: int, size: int) -> int:
        """The count, or a part of it."""
        return self._pm.ticks() >> 8 * offset & ((1 << 8 * size) - 1)

    def write(self, offset: int, size: int, value: int) -> None:
        """Nothing: the timer cannot be set."""
