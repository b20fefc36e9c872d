"""A machine without a processor: the guest is a Python function, so the command line is tested alone and in milliseconds."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import msgspec

from softkvm.vmm import RunState, SerialBackend, Status, Stop, StopReason


class FakeStats(msgspec.Struct, frozen=True):
    """Counters with one nested level, like the real ones."""

    seconds: float
    exits: dict[str, int]


class FakeMachine:
    """Has the interface of `vmm.Machine` that the command line uses; `guest` plays the guest and returns how it ended."""

    introspection: Any = None
    max_gpa = (512 << 20) - 1
    guest: ClassVar[Callable[[Any], Stop]]
    made: ClassVar[list[FakeMachine]]

    def __init__(self, **configuration: Any) -> None:
        self.configuration = configuration
        self.serial: Mapping[int, SerialBackend] = configuration.get("serial") or {}
        self.inputs: list[queue.Queue[bytes]] = [queue.Queue() for _ in range(4)]
        self.stopped = threading.Event()
        self.closed = False
        self.state = RunState.RUNNING
        self.output = b""
        self.timeout: float | None = None
        type(self).made.append(self)

    @classmethod
    def restore(cls, path: str, serial: Mapping[int, SerialBackend], **configuration: Any) -> FakeMachine:
        return cls(restored=path, serial=serial, **configuration)

    def __enter__(self) -> FakeMachine:
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True

    def run(self, *, timeout: float | None) -> Stop:
        self.timeout = timeout
        return type(self).guest(self)

    def send(self, data: bytes, port: int = 0) -> None:
        self.inputs[port].put(data)

    def stop(self) -> None:
        self.stopped.set()

    def status(self) -> Status:
        return Status(self.state, "cascadelake", 1, 512 << 20)

    def pause(self) -> None:
        self.state = RunState.PAUSED

    def resume(self) -> None:
        self.state = RunState.RUNNING

    def stats(self) -> FakeStats:
        return FakeStats(1.5, {"io": 12345})

    # What guests of the tests are made of

    def print(self, text: str, port: int = 0) -> None:
        """The guest writes to a serial port."""
        self.output += text.encode() if port == 0 else b""
        if port in self.serial:
            self.serial[port](text.encode())

    def read(self, port: int) -> bytes:
        """The guest waits for input."""
        return self.inputs[port].get(timeout=60)

    def wait_stopped(self) -> Stop:
        """The guest runs until someone stops it."""
        assert self.stopped.wait(timeout=60)
        return stop(StopReason.INTERRUPTED)


def stop(reason: StopReason, detail: str = "detail", status: int | None = None) -> Stop:
    """A Stop somewhere in the kernel."""
    return Stop(reason, 0, 0xFFFFFFFF81000000, detail, status)
