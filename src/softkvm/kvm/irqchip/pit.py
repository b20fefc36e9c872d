"""The 8254 programmable interval timer and port 61h.

Answers to the 8254 data sheet and Linux 6.1 `arch/x86/kvm/i8254.c`. Counters do not count: their values are computed from the time of the
last load. Counter 0 drives GSI 0 by a host timer; with reinjection on, ticks that the guest was too slow to take are delivered late
rather than lost, one after each acknowledgement.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from softkvm.host.clock import NSEC_PER_SEC, HrTimer
from softkvm.kvm.irqchip import irq
from softkvm.kvm.irqchip.routing import PIT_SOURCE
from softkvm.uapi.kvm import KVM_PIT_FLAGS_HPET_LEGACY, KVM_PIT_FLAGS_SPEAKER_DATA_ON, PitChannelState, PitState2

if TYPE_CHECKING:
    from softkvm.kvm.types import Vm

FREQUENCY = 1_193_182
"""Input clock in Hz."""
PIT_PORT, SPEAKER_PORT = 0x40, 0x61
PIT_PORTS = 4
CONTROL = 3
"""Offset of the control port."""
IRQ0 = 0
MIN_PERIOD_NS = 200_000
"""Shortest period of counter 0 as a periodic timer (KVM's `min_timer_period_us`)."""
MAX_COUNT = 0x10000

_LSB, _MSB, _WORD0, _WORD1 = 1, 2, 3, 4  # access states: one byte of the count, or its low and high byte in turn
_MODE_AFTER_RESET = 0xFF
_ONE_SHOT_MODES = (0, 1, 4)
_PERIODIC_MODES = (2, 3)
_READ_BACK, _KEEP_COUNT, _KEEP_STATUS = 3, 0x20, 0x10
_GATE, _SPEAKER = 1, 2


def _ns_of(ticks: int) -> int:
    return ticks * NSEC_PER_SEC // FREQUENCY


class PitChannel:
    """One counter; its registers are the ioctl's own record, `PitChannelState`."""

    def __init__(self, number: int) -> None:
        """A counter after reset; the gates of counters 0 and 1 are tied high."""
        self.state = PitChannelState(count=MAX_COUNT, mode=_MODE_AFTER_RESET, gate=number != 2)

    def _ticks(self, now: int) -> int:
        return max(now - self.state.count_load_time, 0) * FREQUENCY // NSEC_PER_SEC

    def count(self, now: int) -> int:
        """The counting element at `now` ns."""
        state, ticks = self.state, self._ticks(now)
        if state.mode in (0, 1, 4, 5):
            return (state.count - ticks) & 0xFFFF  # goes on below zero
        if state.mode == 3:
            return state.count - 2 * ticks % state.count
        return state.count - ticks % state.count

    def out(self, now: int) -> bool:
        """The OUT pin at `now` ns."""
        state, ticks = self.state, self._ticks(now)
        if state.mode == 1:
            return ticks < state.count
        if state.mode == 2:
            return ticks % state.count == 0 and ticks != 0
        if state.mode == 3:
            return ticks % state.count < (state.count + 1) >> 1
        if state.mode in (4, 5):
            return ticks == state.count
        return ticks >= state.count

    def set_gate(self, level: bool, now: int) -> None:
        """Drive the GATE pin; a rising edge restarts the modes that it triggers."""
        if level and not self.state.gate and self.state.mode in (1, 2, 3, 5):
            self.state.count_load_time = now
        self.state.gate = level

    def latch_count(self, now: int) -> None:
        """The counter latch command; does nothing while an earlier latch is unread."""
        if not self.state.count_latched:
            self.state.latched_count = self.count(now) & 0xFFFF
            self.state.count_latched = self.state.rw_mode

    def latch_status(self, now: int) -> None:
        """The status half of the read-back command."""
        state = self.state
        if not state.status_latched:
            state.status = self.out(now) << 7 | (state.rw_mode << 4 | state.mode << 1 | state.bcd) & 0x7F
            state.status_latched = 1

    def control(self, access: int, mode: int, bcd: int) -> None:
        """A control word that programs this counter."""
        state = self.state
        state.rw_mode = state.read_state = state.write_state = access
        state.mode, state.bcd = mode, bcd

    def read(self, now: int) -> int:
        """IN from the counter's port: latched status, then latched count, then the running count."""
        state = self.state
        if state.status_latched:
            state.status_latched = 0
            return state.status
        if state.count_latched:
            return self._read_latched()
        count = self.count(now) & 0xFFFF
        if state.read_state == _WORD0:
            state.read_state = _WORD1
            return count & 0xFF
        if state.read_state == _WORD1:
            state.read_state = _WORD0
        elif state.read_state != _MSB:
            return count & 0xFF
        return count >> 8

    def _read_latched(self) -> int:
        state = self.state
        if state.count_latched == _WORD0:
            state.count_latched = _MSB
            return state.latched_count & 0xFF
        low = state.count_latched == _LSB
        state.count_latched = 0
        return state.latched_count & 0xFF if low else state.latched_count >> 8

    def write(self, value: int) -> int | None:
        """OUT to the counter's port; returns the count once it is complete."""
        state = self.state
        if state.write_state == _WORD0:
            state.write_latch = value
            state.write_state = _WORD1
            return None
        if state.write_state == _WORD1:
            state.write_state = _WORD0
            return state.write_latch | value << 8
        return value << 8 if state.write_state == _MSB else value

    def load(self, count: int, now: int) -> None:
        """Start from `count`; 0 means 65536."""
        self.state.count = count or MAX_COUNT
        self.state.count_load_time = now


class Pit:
    """The three counters and port 61h; all methods may be called from any thread and take the VM's lock."""

    def __init__(self, vm: Vm, speaker: bool) -> None:
        """A PIT after reset on ports 40h..43h, and with `speaker` (KVM_PIT_SPEAKER_DUMMY) on 61h."""
        self._vm = vm
        self._clock = vm.clock
        self._timer = HrTimer(vm.clock, self._tick)
        self._period_ns = 0
        self._legacy_replaced = False
        self._speaker_on = False
        self._reinject = True
        self._pending_ticks = 0
        self._acked = True
        self.channels = tuple(PitChannel(number) for number in range(3))
        for channel in self.channels:
            channel.load(0, self._clock.monotonic_ns())
        vm.routing.add_ack_listener(IRQ0, self._irq0_acked)
        vm.routing.add_mask_listener(IRQ0, self._irq0_masked)
        vm.pio_bus.register(PIT_PORT, PIT_PORTS, self)
        if speaker:
            vm.pio_bus.register(SPEAKER_PORT, 1, self)

    # --- Ports ------------------------------------------------------------------------------------------------------------------

    def read(self, port: int, _size: int) -> int:
        """IN from 40h..43h or 61h; all registers are bytes."""
        now = self._clock.monotonic_ns()
        with self._vm.lock:
            if port == SPEAKER_PORT:
                return self._read_speaker(now)
            number = port - PIT_PORT
            return 0 if number == CONTROL else self.channels[number].read(now)

    def write(self, port: int, _size: int, value: int) -> bool:
        """OUT to 40h..43h or 61h; all registers are bytes."""
        now, value = self._clock.monotonic_ns(), value & 0xFF
        with self._vm.lock:
            if port == SPEAKER_PORT:
                self._speaker_on = bool(value & _SPEAKER)
                self.channels[2].set_gate(bool(value & _GATE), now)
            elif port == PIT_PORT + CONTROL:
                self._write_control(value, now)
            else:
                count = self.channels[port - PIT_PORT].write(value)
                if count is not None:
                    self._load(port - PIT_PORT, count, now)
        return True

    def _read_speaker(self, now: int) -> int:
        channel = self.channels[2]
        refresh = now >> 14 & 1  # toggles about every 15 us, as the DRAM refresh of a PC
        return self._speaker_on << 1 | channel.state.gate | channel.out(now) << 5 | refresh << 4

    def _write_control(self, value: int, now: int) -> None:
        if value >> 6 == _READ_BACK:
            for number, channel in enumerate(self.channels):
                if value & 2 << number:
                    if not value & _KEEP_COUNT:
                        channel.latch_count(now)
                    if not value & _KEEP_STATUS:
                        channel.latch_status(now)
            return
        channel, access, mode = self.channels[value >> 6], value >> 4 & 3, value >> 1 & 7
        if access == 0:
            channel.latch_count(now)
        else:
            channel.control(access, mode - 4 if mode > 5 else mode, value & 1)

    def _load(self, number: int, count: int, now: int) -> None:
        self.channels[number].load(count, now)
        if number == 0:
            self._start_timer(now)

    # --- Counter 0 and its interrupt ------------------------------------------------------------------------------------------------

    def _start_timer(self, loaded_ns: int) -> None:
        """Arm the timer of counter 0 as if it had been loaded at `loaded_ns`."""
        channel = self.channels[0].state
        self._timer.cancel()
        if self._legacy_replaced or channel.mode not in _ONE_SHOT_MODES + _PERIODIC_MODES:
            return
        self._reset_reinject()
        now, interval = self._clock.monotonic_ns(), _ns_of(channel.count)
        if channel.mode in _ONE_SHOT_MODES:
            self._period_ns = 0
            if loaded_ns + interval >= now:
                self._timer.start(loaded_ns + interval)
            return
        self._period_ns = max(interval, MIN_PERIOD_NS)
        passed = max(now - loaded_ns, 0) // self._period_ns
        self._timer.start(loaded_ns + (passed + 1) * self._period_ns)

    def _tick(self, now: int) -> int | None:
        with self._vm.lock:
            if self._reinject:
                self._pending_ticks += 1
            self._inject()
            if not self._period_ns:
                return None
            missed = max(now - self._timer.expiry, 0) // self._period_ns
            if self._reinject:
                self._pending_ticks += missed
            return self._timer.expiry + (missed + 1) * self._period_ns

    def _inject(self) -> None:
        """Pulse GSI 0, unless the guest still has to acknowledge the last pulse; and the NMI watchdog where LINT0 asks for it."""
        if self._reinject:
            if not self._acked:
                return
            self._acked = False
        self._vm.routing.set_irq(PIT_SOURCE, IRQ0, True)
        self._vm.routing.set_irq(PIT_SOURCE, IRQ0, False)
        for vcpu in self._vm.vcpus:
            if vcpu.lapic is not None and vcpu.lapic.accepts_pit_nmi:
                vcpu.lapic.accept(irq.DM_NMI, 0, True, False)

    def _irq0_acked(self) -> None:
        if not self._reinject:
            return
        self._acked = True
        self._pending_ticks = max(self._pending_ticks - 1, 0)
        if self._pending_ticks:
            self._inject()

    def _irq0_masked(self, masked: bool) -> None:
        if not masked:
            self._reset_reinject()

    def _reset_reinject(self) -> None:
        self._pending_ticks = 0
        self._acked = True

    def set_reinject(self, reinject: bool) -> None:
        """KVM_REINJECT_CONTROL."""
        with self._vm.lock:
            self._reinject = reinject
            self._reset_reinject()

    def close(self) -> None:
        """Tick no more."""
        self._timer.cancel()

    # --- State ------------------------------------------------------------------------------------------------------------------

    def get_state(self) -> PitState2:
        """KVM_GET_PIT2."""
        state = PitState2()
        with self._vm.lock:
            for number, channel in enumerate(self.channels):
                state.channels[number] = channel.state
            if self._legacy_replaced:
                state.flags |= KVM_PIT_FLAGS_HPET_LEGACY
            if self._speaker_on:
                state.flags |= KVM_PIT_FLAGS_SPEAKER_DATA_ON
        return state

    def set_state(self, state: PitState2) -> None:
        """KVM_SET_PIT2; counter 0 goes on from its load time."""
        with self._vm.lock:
            self._legacy_replaced = bool(state.flags & KVM_PIT_FLAGS_HPET_LEGACY)
            self._speaker_on = bool(state.flags & KVM_PIT_FLAGS_SPEAKER_DATA_ON)
            for channel, saved in zip(self.channels, state.channels, strict=True):
                channel.state = PitChannelState.from_buffer_copy(saved)
                channel.state.count = min(channel.state.count, MAX_COUNT) or MAX_COUNT
            self._start_timer(self.channels[0].state.count_load_time)
