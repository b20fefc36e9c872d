"""A peer that wants to hurt: random messages with a sense for the structure, cut anywhere, while the guest runs and makes events.

Nothing that it sends may raise an exception in KVM, keep the guest from its end, get an answer that is no answer to what it asked, or leave
anything behind. There are few messages here; `make fuzz` sends a million to each vendor's KVM (SOFTKVM_KVMI_MESSAGES). A seed that did harm
becomes a line of `tests/hostile/kvmi.txt`. The other direction is `tests/vmi/test_hostile_server.py`.
"""

from __future__ import annotations

import ctypes
import gc
import os
import random
import socket
import struct
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from softkvm import kvm
from softkvm.kvm.introspection.session import Session
from softkvm.uapi import kvmi
from softkvm.uapi.kvmi import Command, Dialect, Error, Message
from tests.helpers.long_guest import CODE, DATA, END, RAM_SIZE, Guest
from tests.kvm_guests.introspection.conftest import Hooked
from tests.kvm_guests.introspection.tool import TIMEOUT, Tool

INTERESTING = (0, 1, 2, 3, 4, 7, 8, 0xFF, 0x1000, 0xFFFF, CODE, DATA, RAM_SIZE, 1 << 31, (1 << 32) - 1, 1 << 63, (1 << 64) - 1)
CORPUS = Path(__file__).parents[2] / "hostile/kvmi.txt"
ERRORS = {-int(error) for error in Error} | {0}
MOST = kvmi.MAX_MESSAGE
AMOUNTS, FEW = ("size", "count", "nmsrs"), (0, 1, 2, 8, 64, 255, 480, 4096)
"""Who announces more than comes is closed, and can do no more."""
LOOP = b"\xcc\x88\x03\x0f\xa2\x0f\x20\xe0\x0f\x22\xe0\xeb\xf3"  # 1: int3; mov [rbx], al; cpuid; mov rax, cr4; mov cr4, rax; jmp 1b


class Mutator:
    """Makes messages: mostly well formed, each wrong in one way at most."""

    def __init__(self, seed: int, dialect: Dialect) -> None:
        self.random = random.Random(seed)
        self.dialect = dialect
        self.events: list[tuple[int, int]] = []
        """Sequence number and vCPU of events that wait."""
        self.asked: Counter[tuple[int, int]] = Counter()
        """Id and sequence number of what was not answered yet."""

    def number(self, size: int) -> bytes:
        chosen = self.random.choice(INTERESTING) if self.random.random() < 0.7 else self.random.getrandbits(8 * size)
        return (chosen & (1 << 8 * size) - 1).to_bytes(size, "little")

    def structure(self, layout: type[ctypes.Structure] | None) -> bytes:
        if layout is None:
            return b""
        data = bytearray(layout())
        for name in layout.__annotations__:
            if name.startswith("padding") and self.random.random() < 0.95:
                continue
            place = getattr(layout, name)
            if name in AMOUNTS and self.random.random() < 0.995:
                data[place.offset : place.offset + 2] = self.random.choice(FEW[:-1] if name == "nmsrs" else FEW).to_bytes(2, "little")
            elif place.size <= 8:
                data[place.offset : place.offset + place.size] = self.number(place.size)
        return bytes(data)

    def command(self) -> bytes:
        command = self.random.choice(list(self.dialect.commands))
        if command is Command.CONTROL_CMD_RESPONSE and self.random.random() < 0.9:
            command = Command.GET_VERSION
        message = self.dialect.messages[command]
        body = struct.pack("<HHI", self.random.choice((0, 0, 0, 1, 99)), 0, 0) if command in self.dialect.vcpu_commands else b""
        body += self.structure(message.request) + self.random.randbytes(self.random.choice((0, 8, 16, 64, 4096)))
        if message.trailing is not None and self.random.random() < 0.995:
            body = body.ljust(MOST, b"\0")
        return self.frame(self.dialect.commands[command], body)

    def reply(self) -> bytes:
        seq, vcpu = self.events.pop() if self.events else (self.random.getrandbits(8), 0)
        body = struct.pack("<HHI", vcpu, 0, 0) + struct.pack("<BBHI", self.random.choice((0, 0, 0, 1)), 0, 0, 0)
        return self.frame(self.dialect.event_reply, body + self.random.choice((b"", b"", self.number(8))), seq)

    def frame(self, number: int, body: bytes, seq: int | None = None) -> bytes:
        body = body[: kvmi.MAX_MESSAGE]
        if seq is None:
            seq = self.random.getrandbits(32)
            self.asked[number, seq] += 1
        return struct.pack("<HHI", number, len(body), seq) + body

    def is_answer(self, number: int, seq: int, body: bytes) -> bool:
        """Whether a message answers something that was asked and not answered, and has the size that its error and its command demand."""
        self.asked[number, seq] -= 1
        error, padding = struct.unpack_from("<iI", body)
        command = self.dialect.by_id.get(number)
        if self.asked[number, seq] < 0 or error not in ERRORS or padding or (error and len(body) != 8):
            return False
        message = self.dialect.messages[command] if command is not None and not error else Message()
        return message.trailing_reply is not None or len(body) == 8 + (ctypes.sizeof(message.reply) if message.reply is not None else 0)

    def message(self) -> bytes:
        kind = self.random.random()
        if self.events and kind < 0.4:
            return self.reply()
        if kind < 0.989:
            return self.command()
        if kind < 0.99:
            return self.reply()
        return self.frame(self.random.getrandbits(16), self.random.randbytes(self.random.randrange(64)))


def read_answers(peer: socket.socket, mutator: Mutator, failures: list[str]) -> None:
    """Every message that comes is an event or an answer in form."""
    dialect, buffer = mutator.dialect, b""
    while True:
        try:
            data = peer.recv(1 << 16)
        except OSError:
            return
        if not data:
            return
        buffer += data
        while len(buffer) >= 8:
            number, size, seq = struct.unpack_from("<HHI", buffer)
            if len(buffer) < 8 + size:
                break
            body, buffer = buffer[8 : 8 + size], buffer[8 + size :]
            if number in (dialect.vm_event, dialect.vcpu_event):
                mutator.events.append((seq, int.from_bytes(body[10:12] if dialect.split_ids else body[2:4], "little")))
            elif not mutator.is_answer(number, seq, body):
                failures.append(f"answer to {number}: {body[:16].hex()}")


def assault(model: kvm.Model, seed: int, messages: int, dialect: Dialect) -> int:
    """One connection of a hostile peer; how many messages it could send."""
    guest = Guest(kvm.System(model), LOOP, rbx=DATA)
    tool, mutator, failures, sent = Tool(guest, dialect), Mutator(seed, dialect), list[str](), 0
    tool.start()
    reader = threading.Thread(target=read_answers, args=(tool.socket, mutator, failures), daemon=True)
    reader.start()
    for _ in range(messages):
        try:
            tool.socket.sendall(mutator.message())
        except OSError:
            break
        sent += 1
    tool.socket.close()
    guest.vm._unhook()
    guest.ram[CODE : CODE + len(END)] = END
    guest.vcpu.kvm_run.immediate_exit = 1
    guest.vcpu.kick()
    assert tool._thread is not None
    tool._thread.join(TIMEOUT)
    alive = tool._thread.is_alive()
    guest.close()
    tool.theirs.close()
    reader.join(TIMEOUT)
    line = f"keep it by this line in {CORPUS.name}: tool {dialect.name} {seed}"
    assert not alive, f"the guest hangs; {line}"
    assert tool.error is None or isinstance(tool.error, OSError), f"{tool.error!r}; {line}"
    assert not failures, f"{failures[:3]}; {line}"
    return sent


def left_behind(expected: tuple[int, int, int]) -> tuple[int, int, int]:
    """Threads, descriptors and sessions, once there are no more than expected or the last receiver, which ends by itself, had its time."""
    deadline = time.monotonic() + TIMEOUT
    while True:
        gc.collect()
        sessions = sum(isinstance(found, Session) for found in gc.get_objects())
        found = threading.active_count(), len(os.listdir("/proc/self/fd")), sessions
        if all(now <= then for now, then in zip(found, expected, strict=True)) or time.monotonic() > deadline:
            return found


@pytest.mark.parametrize("dialect", kvmi.DIALECTS.values(), ids=lambda dialect: dialect.name)
def test_random_messages_do_no_harm(model: kvm.Model, dialect: Dialect) -> None:
    for seed in range(12):
        assault(model, seed, 150, dialect)


def test_what_once_did_harm(model: kvm.Model) -> None:
    for line in CORPUS.read_text().splitlines():
        if line.startswith("tool "):
            _, dialect, seed = line.split()
            assault(model, int(seed), 400, kvmi.DIALECTS[dialect])


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_a_million_random_messages_do_no_harm(model: kvm.Model) -> None:
    before = threading.active_count(), len(os.listdir("/proc/self/fd")), 0
    assault(model, 0, 400, kvmi.V9)
    before, left, seed = left_behind(before), int(os.environ.get("SOFTKVM_KVMI_MESSAGES", "20000")), 1000
    while left > 0:
        left -= max(1, assault(model, seed, 400, list(kvmi.DIALECTS.values())[seed % 3]))
        seed += 1
    after = left_behind(before)
    assert all(now <= then for now, then in zip(after, before, strict=True)), (before, after)


def test_messages_cut_anywhere(hooked: Hooked) -> None:
    tool = hooked()
    body = struct.pack("<HHI", 4, 0, 0)
    message = struct.pack("<HHI", kvmi.V9.commands[Command.VM_CHECK_COMMAND], len(body), 5) + body
    for cut in range(1, len(message)):
        tool.socket.sendall(message[:cut])
        tool.socket.sendall(message[cut:])
        assert tool.answer(5) == (0, b"")
    tool.socket.sendall(message[:3])
    tool.socket.shutdown(socket.SHUT_WR)
    assert tool.closed


def test_a_message_that_is_too_large_ends_the_connection(hooked: Hooked) -> None:
    tool = hooked()
    tool.send(1, b"", 1)
    tool.socket.sendall(struct.pack("<HHI", 1, kvmi.MAX_MESSAGE + 1, 2))
    assert tool.closed


def test_commands_beyond_all_measure_end_the_connection(hooked: Hooked) -> None:
    """The vCPU waits for an answer; its tool sends commands and reads nothing."""
    tool = hooked(b"\x90" + END)
    processor = tool.vm.create_vcpu(1)
    processor.kvm_run.immediate_exit = 1
    processor.ioctl_lock.acquire()  # as if it were in KVM_RUN, and did not come out
    try:
        processor.task = kvm_task = object()  # type: ignore[assignment]
        assert kvm_task is not None
        for _ in range(1100):
            try:
                tool.socket.sendall(struct.pack("<HHIHHI", kvmi.V9.commands[Command.VCPU_GET_INFO], 8, 1, 1, 0, 0))
            except OSError:
                break
        assert tool.closed
    finally:
        processor.task = None
        processor.ioctl_lock.release()
