"""16550A UART.

Source of truth: National Semiconductor PC16550D data sheet, with the PC's wiring of OUT2 (it gates the interrupt). Linux'
`drivers/tty/serial/8250` probes exactly this chip: scratch register, FIFO bits in IIR, loopback of MCR into MSR, THRE interrupt.

Transmission takes no time, so the transmitter is always empty. Reception has back-pressure: bytes for the guest wait in a queue outside the
chip and enter its FIFO only as the guest makes room, so nothing is ever overrun by the host.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Annotated, Literal

from msgspec import Meta

from softkvm.vmm.irq import SetLevel
from softkvm.vmm.state import Record

# Register offsets. With LCR.DLAB set, offsets 0 and 1 are the divisor latch.
RBR_THR, IER, IIR_FCR, LCR, MCR, LSR, MSR, SCR = range(8)

IER_RDI = 1 << 0  # received data
IER_THRI = 1 << 1  # transmitter holding register empty
IER_RLSI = 1 << 2  # receiver line status
IER_MSI = 1 << 3  # modem status
IER_MASK = 0x0F

IIR_MODEM_STATUS = 0x00
IIR_NONE = 0x01
IIR_THRE = 0x02
IIR_RECEIVED = 0x04
IIR_LINE_STATUS = 0x06
IIR_TIMEOUT = 0x0C
IIR_FIFO_ENABLED = 0xC0

FCR_ENABLE = 1 << 0
FCR_CLEAR_RX = 1 << 1
FCR_TRIGGER_SHIFT = 6
FCR_KEPT = 0xC9  # what the chip remembers: enable, DMA mode, trigger level

LCR_BREAK = 1 << 6
LCR_DLAB = 1 << 7

MCR_DTR = 1 << 0
MCR_RTS = 1 << 1
MCR_OUT1 = 1 << 2
MCR_OUT2 = 1 << 3
MCR_LOOP = 1 << 4
MCR_MASK = 0x1F

LSR_DATA_READY = 1 << 0
LSR_OVERRUN = 1 << 1
LSR_BREAK = 1 << 4
LSR_THR_EMPTY = 1 << 5
LSR_TRANSMITTER_EMPTY = 1 << 6
LSR_ERRORS = 0x1E

MSR_DELTA = 0x0F
MSR_DELTA_CTS = 1 << 0
MSR_DELTA_DSR = 1 << 1
MSR_TRAILING_RI = 1 << 2
MSR_DELTA_DCD = 1 << 3
MSR_CTS = 1 << 4
MSR_DSR = 1 << 5
MSR_RI = 1 << 6
MSR_DCD = 1 << 7
MSR_CONNECTED = MSR_CTS | MSR_DSR | MSR_DCD  # the peer is always there and ready

FIFO_SIZE = 16
TRIGGER_LEVELS = (1, 4, 8, 14)
DIVISOR_9600 = 12

_Byte = Annotated[int, Meta(ge=0, le=0xFF)]


class SerialState(Record, frozen=True, kw_only=True):
    """Every register and both queues of a UART."""

    version: Literal[1] = 1
    divisor: Annotated[int, Meta(ge=0, le=0xFFFF)]
    ier: _Byte
    fcr: _Byte
    lcr: _Byte
    mcr: _Byte
    line_errors: _Byte
    msr: _Byte
    scr: _Byte
    thre_pending: bool
    fifo: Annotated[bytes, Meta(max_length=FIFO_SIZE)]
    waiting: bytes


class Serial:
    """One UART with 8 byte-wide registers."""

    def __init__(self, irq: SetLevel, transmit: Callable[[bytes], object]) -> None:
        """`irq` drives its interrupt line; `transmit` gets what the guest sends."""
        self._irq = irq
        self._transmit = transmit
        self._divisor = DIVISOR_9600
        self._ier = 0
        self._fcr = 0
        self._lcr = 0
        self._mcr = 0
        self._line_errors = 0
        self._msr = MSR_CONNECTED
        self._scr = 0
        self._thre_pending = False
        self._fifo: deque[int] = deque()
        self._waiting: deque[int] = deque()
        self._level = False
        self._readers = (
            self._read_rbr,
            self._read_ier,
            self._read_iir,
            self._read_lcr,
            self._read_mcr,
            self._read_lsr,
            self._read_msr,
            self._read_scr,
        )
        self._writers = (
            self._write_thr,
            self._write_ier,
            self._write_fcr,
            self._write_lcr,
            self._write_mcr,
            self._ignore,
            self._ignore,
            self._write_scr,
        )

    def read(self, offset: int, size: int) -> int:
        """Read a register."""
        return self._readers[offset]()

    def write(self, offset: int, size: int, value: int) -> None:
        """Write a register."""
        self._writers[offset](value)

    def receive(self, data: bytes) -> None:
        """Queue bytes for the guest."""
        self._waiting.extend(data)
        self._fill_fifo()

    @property
    def waiting(self) -> int:
        """Number of bytes that the guest has not read yet."""
        return len(self._waiting) + len(self._fifo)

    # Receiver and transmitter

    def _read_rbr(self) -> int:
        if self._lcr & LCR_DLAB:
            return self._divisor & 0xFF
        value = self._fifo.popleft() if self._fifo else 0
        self._fill_fifo()
        return value

    def _write_thr(self, value: int) -> None:
        if self._lcr & LCR_DLAB:
            self._divisor = (self._divisor & 0xFF00) | value
            return
        if self._thre_pending:
            self._thre_pending = False
            self._update_irq()  # an edge-triggered input must see the line fall between two THRE interrupts
        if self._mcr & MCR_LOOP:
            self._loop_back(value)
        else:
            self._transmit(value.to_bytes(1, "little"))
        self._thre_pending = True
        self._update_irq()

    def _loop_back(self, value: int) -> None:
        if len(self._fifo) >= self._capacity():
            self._line_errors |= LSR_OVERRUN
        else:
            self._fifo.append(value)

    def _capacity(self) -> int:
        return FIFO_SIZE if self._fcr & FCR_ENABLE else 1

    def _fill_fifo(self) -> None:
        if not self._mcr & MCR_LOOP:
            while self._waiting and len(self._fifo) < self._capacity():
                self._fifo.append(self._waiting.popleft())
        self._update_irq()

    # Interrupts

    def _pending(self) -> int:
        """The identification of the most urgent enabled interrupt."""
        if self._ier & IER_RLSI and self._line_errors:
            return IIR_LINE_STATUS
        if self._ier & IER_RDI and self._fifo:
            trigger = TRIGGER_LEVELS[self._fcr >> FCR_TRIGGER_SHIFT] if self._fcr & FCR_ENABLE else 1
            return IIR_RECEIVED if len(self._fifo) >= trigger else IIR_TIMEOUT
        if self._ier & IER_THRI and self._thre_pending:
            return IIR_THRE
        if self._ier & IER_MSI and self._msr & MSR_DELTA:
            return IIR_MODEM_STATUS
        return IIR_NONE

    def _update_irq(self) -> None:
        gate = self._mcr & (MCR_OUT2 | MCR_LOOP) == MCR_OUT2
        level = gate and self._ier != 0 and self._pending() != IIR_NONE
        if level != self._level:
            self._level = level
            self._irq(level)

    def _read_ier(self) -> int:
        return self._divisor >> 8 if self._lcr & LCR_DLAB else self._ier

    def _write_ier(self, value: int) -> None:
        if self._lcr & LCR_DLAB:
            self._divisor = (self._divisor & 0xFF) | value << 8
            return
        if value & ~self._ier & IER_THRI:
            self._thre_pending = True  # the transmitter is empty, so enabling its interrupt raises it
        self._ier = value & IER_MASK
        self._update_irq()

    def _read_iir(self) -> int:
        pending = self._pending()
        if pending == IIR_THRE:
            self._thre_pending = False
            self._update_irq()
        return pending | (IIR_FIFO_ENABLED if self._fcr & FCR_ENABLE else 0)

    def _write_fcr(self, value: int) -> None:
        if (value ^ self._fcr) & FCR_ENABLE or (value & FCR_ENABLE and value & FCR_CLEAR_RX):
            self._fifo.clear()
        self._fcr = value & FCR_KEPT if value & FCR_ENABLE else 0
        self._fill_fifo()

    # Line and modem control

    def _read_lcr(self) -> int:
        return self._lcr

    def _write_lcr(self, value: int) -> None:
        if self._mcr & MCR_LOOP and value & ~self._lcr & LCR_BREAK:
            self._loop_back(0)
            self._line_errors |= LSR_BREAK
        self._lcr = value
        self._update_irq()

    def _read_mcr(self) -> int:
        return self._mcr

    def _write_mcr(self, value: int) -> None:
        self._mcr = value & MCR_MASK
        self._update_modem_status()
        self._fill_fifo()

    def _update_modem_status(self) -> None:
        inputs = MSR_CONNECTED
        if self._mcr & MCR_LOOP:
            wires = ((MCR_DTR, MSR_DSR), (MCR_RTS, MSR_CTS), (MCR_OUT1, MSR_RI), (MCR_OUT2, MSR_DCD))
            inputs = sum(into for out, into in wires if self._mcr & out)
        changed = (self._msr ^ inputs) & ~MSR_DELTA
        delta = self._msr & MSR_DELTA | (changed & (MSR_CTS | MSR_DSR | MSR_DCD)) >> 4
        if changed & MSR_RI and not inputs & MSR_RI:
            delta |= MSR_TRAILING_RI
        self._msr = inputs | delta

    def _read_lsr(self) -> int:
        value = LSR_THR_EMPTY | LSR_TRANSMITTER_EMPTY | self._line_errors
        if self._fifo:
            value |= LSR_DATA_READY
        if self._line_errors:
            self._line_errors = 0
            self._update_irq()
        return value

    def _read_msr(self) -> int:
        value = self._msr
        if value & MSR_DELTA:
            self._msr &= ~MSR_DELTA
            self._update_irq()
        return value

    def _read_scr(self) -> int:
        return self._scr

    def _write_scr(self, value: int) -> None:
        self._scr = value

    def _ignore(self, value: int) -> None:
        """LSR and MSR are read-only in normal operation."""

    # State

    def save(self) -> SerialState:
        """The whole state, with the bytes that wait outside the chip."""
        return SerialState(
            divisor=self._divisor,
            ier=self._ier,
            fcr=self._fcr,
            lcr=self._lcr,
            mcr=self._mcr,
            line_errors=self._line_errors,
            msr=self._msr,
            scr=self._scr,
            thre_pending=self._thre_pending,
            fifo=bytes(self._fifo),
            waiting=bytes(self._waiting),
        )

    def restore(self, state: SerialState) -> None:
        """Take over a saved state."""
        self._divisor = state.divisor
        self._ier = state.ier & IER_MASK
        self._fcr = state.fcr & FCR_KEPT
        self._lcr = state.lcr
        self._mcr = state.mcr & MCR_MASK
        self._line_errors = state.line_errors & LSR_ERRORS
        self._msr = state.msr
        self._scr = state.scr
        self._thre_pending = state.thre_pending
        self._fifo = deque(state.fifo)
        self._waiting = deque(state.waiting)
        self._update_irq()
