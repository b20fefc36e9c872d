"""One run of a machine at the command line: the machine on a thread of its own, terminal, pipes and signals on the main thread.

Python delivers signals to the main thread only, and a vCPU may stay in guest mode for long; the main thread therefore never enters a
guest. It sleeps until a signal, a piece of input, or a ring of the doorbell by the other thread.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Protocol

from softkvm.cli.inputs import Input
from softkvm.vmm import Stop

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_RING = b"\0"


class Runnable(Protocol):
    """The part of `vmm.Machine` that a session drives."""

    def run(self, *, timeout: float | None) -> Stop:
        """Run until the guest stops."""

    def stop(self) -> None:
        """Make `run` return; callable from any thread."""


class Doorbell:
    """Wakes the main thread's select; a signal rings it with its number."""

    def __init__(self) -> None:
        self._inside, self._outside = socket.socketpair()
        self._inside.setblocking(False)
        self._outside.setblocking(False)

    def fileno(self) -> int:
        """The descriptor that becomes readable."""
        return self._inside.fileno()

    def ring(self) -> None:
        """Wake the main thread; callable from any thread."""
        with suppress(BlockingIOError):  # it is full of rings already
            self._outside.send(_RING)

    def answer(self) -> int | None:
        """Clear the bell; the number of the first signal among the rings."""
        return next(filter(None, self._inside.recv(4096)), None)

    @contextmanager
    def catching_signals(self) -> Iterator[None]:
        """Turn SIGINT, SIGTERM and SIGHUP into rings for the time of the block."""
        handlers = {number: signal.signal(number, _leave_to_doorbell) for number in _SIGNALS}
        previous = signal.set_wakeup_fd(self._outside.fileno(), warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(previous)
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def close(self) -> None:
        """Give the descriptors back."""
        self._inside.close()
        self._outside.close()


def _leave_to_doorbell(number: int, frame: FrameType | None) -> None:
    """A handler must exist for the wake-up descriptor to be written."""


def run(
    machine: Runnable, source: Input | None, doorbell: Doorbell, timeout: float | None, surrender: Callable[[], None] = lambda: None
) -> tuple[Stop, int | None]:
    """Run `machine` to its end, feeding it from `source`; `timeout` is in seconds.

    A signal stops it, after `surrender` has freed a vCPU that waits for a reader of its output. Returns why it stopped and the number of
    the signal that made us stop it, if one did. Raises what `machine.run` raises.
    """
    result: list[Stop | BaseException] = []
    worker = threading.Thread(target=_run_machine, args=(machine, timeout, result.append, doorbell.ring), name="machine")
    received: int | None = None
    with doorbell.catching_signals():
        worker.start()
        try:
            while not result:
                received = _serve(source, doorbell) or received
                if received is not None:
                    surrender()
                    machine.stop()
        finally:
            surrender()
            machine.stop()
            worker.join()
    if isinstance(result[0], BaseException):
        raise result[0]
    return result[0], received


def _run_machine(
    machine: Runnable, timeout: float | None, report: Callable[[Stop | BaseException], None], ring: Callable[[], None]
) -> None:
    try:
        report(machine.run(timeout=timeout))
    except BaseException as error:  # carried to the main thread, where it is raised again
        report(error)
    finally:
        ring()


def _serve(source: Input | None, doorbell: Doorbell) -> int | None:
    """Wait for one event and act on it; the number of a signal that arrived."""
    readers: list[int] = [doorbell.fileno()]
    if source is not None and source.wanted():
        readers.append(source.descriptor)
    ready, _, _ = select.select(readers, [], [])
    if source is not None and source.descriptor in ready:
        source.feed(os.read(source.descriptor, source.piece_size))
    return doorbell.answer() if doorbell.fileno() in ready else None
