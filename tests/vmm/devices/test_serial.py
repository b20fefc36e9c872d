"""16550A: what Linux' 8250 driver sees when it probes, sends and receives."""

from __future__ import annotations

import pytest

from softkvm.vmm.devices import serial
from softkvm.vmm.devices.serial import (
    FCR_CLEAR_RX,
    FCR_ENABLE,
    IER,
    IER_MSI,
    IER_RDI,
    IER_RLSI,
    IER_THRI,
    IIR_FCR,
    IIR_FIFO_ENABLED,
    IIR_LINE_STATUS,
    IIR_MODEM_STATUS,
    IIR_NONE,
    IIR_RECEIVED,
    IIR_THRE,
    IIR_TIMEOUT,
    LCR,
    LCR_DLAB,
    LSR,
    MCR,
    MCR_LOOP,
    MCR_OUT2,
    MSR,
    RBR_THR,
    SCR,
    Serial,
)
from tests.vmm.doubles import Wire


class Bench:
    """A UART, its line, and what it sent."""

    def __init__(self) -> None:
        self.wire = Wire()
        self.sent = bytearray()
        self.uart = Serial(self.wire, self.sent.extend)

    def get(self, register: int) -> int:
        return self.uart.read(register, 1)

    def put(self, register: int, value: int) -> None:
        self.uart.write(register, 1, value)

    def open(self, ier: int = 0, fcr: int = FCR_ENABLE) -> None:
        """As a driver does: FIFO on, interrupts through OUT2."""
        self.put(IIR_FCR, fcr)
        self.put(MCR, MCR_OUT2)
        self.put(IER, ier)


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_sent_bytes_arrive_and_the_transmitter_is_empty_at_once(bench: Bench) -> None:
    for byte in b"hello":
        assert bench.get(LSR) & 0x60 == 0x60
        bench.put(RBR_THR, byte)
    assert bench.sent == b"hello"


def test_scratch_register_holds_any_value(bench: Bench) -> None:
    for value in (0x00, 0x55, 0xAA, 0xFF):
        bench.put(SCR, value)
        assert bench.get(SCR) == value


def test_divisor_latch_hides_data_and_interrupt_enable(bench: Bench) -> None:
    bench.put(IER, 0x05)
    bench.put(LCR, LCR_DLAB | 3)
    bench.put(RBR_THR, 0x01)
    bench.put(IER, 0x02)
    assert (bench.get(RBR_THR), bench.get(IER)) == (0x01, 0x02)
    bench.put(LCR, 3)
    assert bench.get(IER) == 0x05
    assert bench.sent == b""


def test_interrupt_enable_keeps_four_bits_as_a_16550a_does(bench: Bench) -> None:
    bench.put(IER, 0xFF)
    assert bench.get(IER) == 0x0F


def test_fifo_bits_tell_a_16550a_and_not_a_16750(bench: Bench) -> None:
    assert bench.get(IIR_FCR) & IIR_FIFO_ENABLED == 0
    bench.put(IIR_FCR, FCR_ENABLE)
    assert bench.get(IIR_FCR) == IIR_FIFO_ENABLED | IIR_NONE
    bench.put(LCR, LCR_DLAB)
    bench.put(IIR_FCR, FCR_ENABLE | 0x20)
    assert bench.get(IIR_FCR) & 0x20 == 0


def test_loopback_wires_modem_control_into_modem_status(bench: Bench) -> None:
    bench.put(MCR, MCR_LOOP | 0x0A)  # RTS and OUT2, the pattern of Linux' autoconfig
    assert bench.get(MSR) & 0xF0 == 0x90  # CTS and DCD
    bench.put(MCR, MCR_LOOP | 0x05)
    assert bench.get(MSR) & 0xF0 == 0x60
    bench.put(MCR, 0)
    assert bench.get(MSR) & 0xF0 == 0xB0


def test_loopback_returns_data_and_sends_nothing(bench: Bench) -> None:
    bench.open()
    bench.put(MCR, MCR_LOOP)
    bench.uart.receive(b"x")
    bench.put(RBR_THR, 0x42)
    assert bench.get(RBR_THR) == 0x42
    assert bench.sent == b""
    bench.put(MCR, 0)
    assert bench.get(RBR_THR) == ord("x")


def test_loopback_overrun_is_a_line_status_interrupt(bench: Bench) -> None:
    bench.put(MCR, MCR_LOOP)
    bench.put(IER, IER_RLSI | IER_RDI)
    bench.put(RBR_THR, 1)
    bench.put(RBR_THR, 2)
    assert bench.get(IIR_FCR) == IIR_LINE_STATUS
    assert bench.get(LSR) & serial.LSR_OVERRUN
    assert not bench.get(LSR) & serial.LSR_OVERRUN
    assert bench.get(IIR_FCR) == IIR_RECEIVED


def test_enabling_the_transmit_interrupt_raises_it_and_reading_iir_clears_it(bench: Bench) -> None:
    bench.open()
    bench.put(IER, IER_THRI)
    assert bench.wire.level
    assert bench.get(IIR_FCR) == IIR_FIFO_ENABLED | IIR_THRE
    assert not bench.wire.level
    assert bench.get(IIR_FCR) == IIR_FIFO_ENABLED | IIR_NONE
    bench.put(IER, 0)
    bench.put(IER, IER_THRI)
    assert bench.get(IIR_FCR) == IIR_FIFO_ENABLED | IIR_THRE


def test_every_sent_byte_gives_an_edge_while_the_transmit_interrupt_is_on(bench: Bench) -> None:
    bench.open(IER_THRI)
    bench.wire.changes.clear()
    bench.put(RBR_THR, 1)
    bench.put(RBR_THR, 2)
    assert bench.wire.changes == [False, True, False, True]


def test_out2_gates_the_interrupt(bench: Bench) -> None:
    bench.put(IER, IER_THRI)
    assert bench.wire.changes == []
    bench.put(MCR, MCR_OUT2)
    assert bench.wire.level
    bench.put(MCR, 0)
    assert not bench.wire.level


@pytest.mark.parametrize(("trigger", "level"), [(0x00, 1), (0x40, 4), (0x80, 8), (0xC0, 14)])
def test_receive_trigger_tells_full_from_timeout(bench: Bench, trigger: int, level: int) -> None:
    bench.open(IER_RDI, FCR_ENABLE | trigger)
    if level > 1:
        bench.uart.receive(bytes(level - 1))
        assert bench.get(IIR_FCR) & 0x0F == IIR_TIMEOUT
        bench.uart.receive(b"\0")
    else:
        bench.uart.receive(b"\0")
    assert bench.get(IIR_FCR) & 0x0F == IIR_RECEIVED
    assert bench.wire.level


def test_received_bytes_wait_outside_until_the_fifo_has_room(bench: Bench) -> None:
    bench.open(IER_RDI)
    data = bytes(range(100))
    bench.uart.receive(data)
    got = bytearray()
    while bench.get(LSR) & 1:
        got.append(bench.get(RBR_THR))
    assert got == data
    assert bench.uart.waiting == 0
    assert not bench.wire.level


def test_without_fifo_one_byte_is_visible_at_a_time(bench: Bench) -> None:
    bench.uart.receive(b"ab")
    bench.put(IIR_FCR, FCR_ENABLE)  # switching the FIFO on clears what is inside, not what waits
    assert bench.get(RBR_THR) == ord("b")


def test_clearing_the_fifo_drops_what_is_inside(bench: Bench) -> None:
    bench.open()
    bench.uart.receive(bytes(20))
    bench.put(IIR_FCR, FCR_ENABLE | FCR_CLEAR_RX)
    assert bench.uart.waiting == 4


def test_empty_receive_register_reads_zero(bench: Bench) -> None:
    assert bench.get(RBR_THR) == 0
    assert bench.get(LSR) & 1 == 0


def test_interrupts_are_reported_by_priority(bench: Bench) -> None:
    bench.open()
    bench.put(MCR, MCR_LOOP | MCR_OUT2)  # a modem status change...
    bench.put(MCR, MCR_OUT2)
    bench.put(IER, IER_RLSI | IER_RDI | IER_THRI | IER_MSI)
    bench.uart.receive(b"x")
    seen = []
    for acknowledge in (RBR_THR, None, MSR):
        seen.append(bench.get(IIR_FCR) & 0x0F)
        if acknowledge is not None:
            bench.get(acknowledge)
    assert seen == [IIR_RECEIVED, IIR_THRE, IIR_MODEM_STATUS]
    assert bench.get(IIR_FCR) & 0x0F == IIR_NONE


def test_read_only_registers_ignore_writes(bench: Bench) -> None:
    before = (bench.get(LSR), bench.get(MSR))
    bench.put(LSR, 0xFF)
    bench.put(MSR, 0xFF)
    assert (bench.get(LSR), bench.get(MSR)) == before
