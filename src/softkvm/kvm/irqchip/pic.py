"""The pair of 8259A interrupt controllers of a PC, with the edge/level control registers.

Answers to the 8259A data sheet and Linux 6.1 `arch/x86/kvm/i8259.c`. The registers of a chip are the ioctl's own record, `PicState`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from softkvm.kvm import request
from softkvm.kvm.irqchip.routing import PIC_PINS, line_level
from softkvm.uapi.kvm import KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, PicState

if TYPE_CHECKING:
    from softkvm.kvm.types import Vm

MASTER_PORT, SLAVE_PORT, ELCR_PORT = 0x20, 0xA0, 0x4D0
"""Two ports each: command and data of a chip; the ELCR of the master and of the slave."""

CASCADE = 2
"""The master's line from the slave."""
SPURIOUS = 7
LOWEST = 8
"""Priority of no interrupt at all."""

_ELCR_MASKS = (0xF8, 0xDE)  # lines that can be level-triggered: not the timer, keyboard, cascade, RTC and FPU
_ICW1, _ICW1_ICW4, _OCW3 = 0x10, 0x01, 0x08
_READY, _ICW2, _ICW3, _ICW4 = range(4)  # `PicState.init_state`: the initialisation word that comes next


def _bit(line: int) -> int:
    return 1 << line


class PicChip:
    """One 8259A; `ended(line)` is called when a line leaves the in-service register."""

    def __init__(self, pair: Pic, chip_id: int) -> None:
        """A chip after power-up: uninitialised, nothing masked."""
        self._pair = pair
        self._chip_id = chip_id
        self.state = PicState(elcr_mask=_ELCR_MASKS[chip_id])

    def set_line(self, line: int, level: bool) -> int:
        """Change a line. Returns 1, 0 if the request was already there, -1 if the line is masked."""
        state, bit, result = self.state, _bit(line), 1
        if not level:
            state.last_irr &= ~bit
            if state.elcr & bit:
                state.irr &= ~bit
        elif state.elcr & bit or not state.last_irr & bit:
            result = int(not state.irr & bit)
            state.irr |= bit
            state.last_irr |= bit
        return -1 if state.imr & bit else result

    def pending(self) -> int:
        """The line to be served next, -1 if none has priority over what is in service."""
        state = self.state
        priority = self._priority(state.irr & ~state.imr)
        if priority == LOWEST:
            return -1
        in_service = state.isr
        if state.special_mask:
            in_service &= ~state.imr
        if state.special_fully_nested_mode and self._chip_id == KVM_IRQCHIP_PIC_MASTER:
            in_service &= ~_bit(CASCADE)
        return (priority + state.priority_add) & 7 if priority < self._priority(in_service) else -1

    def _priority(self, lines: int) -> int:
        """How far the most important of `lines` is from the top priority: 0..7, or 8 if there is none."""
        if not lines:
            return LOWEST
        turn = self.state.priority_add
        rotated = (lines >> turn | lines << 8 - turn) & 0xFF
        return (rotated & -rotated).bit_length() - 1

    def acknowledge(self, line: int) -> None:
        """The CPU takes the interrupt of `line`."""
        state, bit = self.state, _bit(line)
        state.isr |= bit
        if not state.elcr & bit:
            state.irr &= ~bit
        if state.auto_eoi:
            if state.rotate_on_auto_eoi:
                state.priority_add = (line + 1) & 7
            self._end(line)

    def _end(self, line: int) -> None:
        self.state.isr &= ~_bit(line)
        self._pair.notify_acked(self._chip_id, line)

    def write(self, data_port: bool, value: int) -> None:
        """OUT to the command or the data port."""
        if data_port:
            self._write_data(value)
        elif value & _ICW1:
            self._initialise(bool(value & _ICW1_ICW4))
        elif value & _OCW3:
            self._write_ocw3(value)
        else:
            self._write_ocw2(value >> 5, value & 7)

    def _initialise(self, icw4_follows: bool) -> None:
        state = self.state
        edges = state.irr & ~state.elcr
        state.init4 = icw4_follows
        state.last_irr = state.imr = state.priority_add = state.special_mask = state.read_reg_select = 0
        state.irr &= state.elcr
        state.isr = 0
        if not icw4_follows:
            state.special_fully_nested_mode = state.auto_eoi = 0
        state.init_state = _ICW2
        for line in range(PIC_PINS):  # requests that are dropped here count as ended for whoever waits to raise the next
            if edges & _bit(line):
                self._pair.notify_acked(self._chip_id, line)

    def _write_ocw3(self, value: int) -> None:
        if value & 4:
            self.state.poll = 1
        if value & 2:
            self.state.read_reg_select = value & 1
        if value & 0x40:
            self.state.special_mask = value >> 5 & 1

    def _write_ocw2(self, command: int, line: int) -> None:
        state = self.state
        rotate, specific, end = command & 4, command & 2, command & 1
        if not specific and not end:
            state.rotate_on_auto_eoi = command >> 2
            return
        if not specific:
            priority = self._priority(state.isr)
            if priority == LOWEST:
                return
            line = (priority + state.priority_add) & 7
        if command == 2:  # no operation
            return
        if rotate:
            state.priority_add = (line + 1) & 7
        if end:
            self._end(line)

    def _write_data(self, value: int) -> None:
        state = self.state
        if state.init_state == _READY:
            changed, state.imr = state.imr ^ value, value
            for line in range(PIC_PINS):
                if changed & _bit(line):
                    self._pair.notify_masked(self._chip_id, line, bool(value & _bit(line)))
        elif state.init_state == _ICW2:
            state.irq_base = value & 0xF8
            state.init_state = _ICW3
        elif state.init_state == _ICW3:
            state.init_state = _ICW4 if state.init4 else _READY
        else:
            state.special_fully_nested_mode = value >> 4 & 1
            state.auto_eoi = value >> 1 & 1
            state.init_state = _READY

    def read(self, data_port: bool) -> int:
        """IN from the command or the data port."""
        state = self.state
        if state.poll:
            state.poll = 0
            return self._poll()
        if data_port:
            return state.imr
        return state.isr if state.read_reg_select else state.irr

    def _poll(self) -> int:
        """The poll command acknowledges and, as KVM has it, also ends the interrupt; bit 7 says that there was one."""
        line = self.pending()
        if line < 0:
            return SPURIOUS
        if self._chip_id == KVM_IRQCHIP_PIC_SLAVE:
            self._pair.drop_cascade()
        self.state.irr &= ~_bit(line)
        self._end(line)
        return 0x80 | line


class Pic:
    """Both chips, cascaded; all methods may be called from any thread and take the VM's lock."""

    def __init__(self, vm: Vm) -> None:
        """Two chips after power-up, not yet on a bus."""
        self._vm = vm
        self._levels = [0] * (2 * PIC_PINS)
        self.chips = (PicChip(self, KVM_IRQCHIP_PIC_MASTER), PicChip(self, KVM_IRQCHIP_PIC_SLAVE))
        self.output = False
        """The INTR line towards the CPUs."""

    def read(self, port: int, size: int) -> int:
        """IN from a port of either chip; only byte accesses reach the chips."""
        if size != 1:
            return 0
        with self._vm.lock:
            if port & ~1 == ELCR_PORT:
                return self.chips[port & 1].state.elcr
            value = self._chip_at(port).read(bool(port & 1))
            self._update()
        return value

    def write(self, port: int, size: int, value: int) -> bool:
        """OUT to a port of either chip; only byte accesses reach the chips."""
        if size == 1:
            with self._vm.lock:
                if port & ~1 == ELCR_PORT:
                    state = self.chips[port & 1].state
                    state.elcr = value & state.elcr_mask
                else:
                    self._chip_at(port).write(bool(port & 1), value)
                    self._update()
        return True

    def set_irq(self, line: int, source: int, level: bool) -> int:
        """`source` drives line 0..15. Returns 1, 0 if coalesced, -1 if masked."""
        with self._vm.lock:
            high = line_level(self._levels, line, source, level)
            result = self.chips[line // PIC_PINS].set_line(line % PIC_PINS, high)
            self._update()
        return result

    def read_irq(self) -> int:
        """The CPU's acknowledge cycle: returns the vector of the most important line, or of a spurious interrupt."""
        master, slave = self.chips
        with self._vm.lock:
            self.output = False
            line = master.pending()
            if line < 0:
                vector = master.state.irq_base + SPURIOUS
            else:
                master.acknowledge(line)
                vector = master.state.irq_base + line
                if line == CASCADE:
                    vector = self._acknowledge_slave(slave)
            self._update()
        return vector

    def _acknowledge_slave(self, slave: PicChip) -> int:
        line = slave.pending()
        if line < 0:
            return slave.state.irq_base + SPURIOUS
        slave.acknowledge(line)
        return slave.state.irq_base + line

    def notify_acked(self, chip_id: int, line: int) -> None:
        """A chip's line was ended."""
        self._vm.routing.notify_acked(chip_id, line)

    def notify_masked(self, chip_id: int, line: int, masked: bool) -> None:
        """A chip's line was masked or unmasked."""
        self._vm.routing.notify_masked(chip_id, line, masked)

    def drop_cascade(self) -> None:
        """A poll of the slave also ends the master's part."""
        master = self.chips[0].state
        master.isr &= ~_bit(CASCADE)
        master.irr &= ~_bit(CASCADE)

    def get_state(self, chip_id: int) -> PicState:
        """KVM_GET_IRQCHIP: a copy of one chip's registers."""
        with self._vm.lock:
            return PicState.from_buffer_copy(self.chips[chip_id].state)

    def set_state(self, chip_id: int, state: PicState) -> None:
        """KVM_SET_IRQCHIP of one chip; values that the chip cannot hold are cut to its bits."""
        with self._vm.lock:
            chip = self.chips[chip_id]
            chip.state = PicState.from_buffer_copy(state)
            chip.state.priority_add &= 7
            chip.state.init_state &= 3
            chip.state.elcr_mask = _ELCR_MASKS[chip_id]
            self._update()

    def _chip_at(self, port: int) -> PicChip:
        return self.chips[port >> 7 & 1]

    def _update(self) -> None:
        master, slave = self.chips
        if slave.pending() >= 0:
            master.set_line(CASCADE, True)  # as a pulse: the slave's request is looked at anew each time
            master.set_line(CASCADE, False)
        output = master.pending() >= 0
        rising, self.output = output and not self.output, output
        if rising:
            for vcpu in self._vm.vcpus:
                if vcpu.lapic is not None and vcpu.lapic.accepts_pic:
                    vcpu.make_request(request.REQ_EVENT)
