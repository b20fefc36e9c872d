"""What introspection costs: event round trips, reads of guest memory, and a guest whose pages are write-protected.

A guest without an operating system makes KVMI's hypercall in a loop. The tool answers in this process without a socket, or in another
process over a UNIX socket. The slow-down is that of a loop of stores while other pages of the same 2 MB may not be written.
"""

from __future__ import annotations

import multiprocessing
import socket
import statistics
import struct
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from benchmarks.report import machine_facts, publish
from softkvm.cli.selftest import image
from softkvm.cli.selftest.assembler import Assembler
from softkvm.uapi import kvmi
from softkvm.uapi.kvmi import Access, Action, Command, Event, Reply
from softkvm.vmm import Machine, StopReason

DEBUG_EXIT = 0xF4
VMCALL = b"\x0f\x01\xc1"
TARGET = 0x40_0000
PAGE = 4096
CONTINUE = Reply(Action.CONTINUE)


def hypercalls(repetitions: int) -> bytes:
    """A bzImage that makes the tool's hypercall that often."""
    asm = Assembler(0x100000, 64)
    asm.org(image.ENTRY64)
    asm.mov("ebp", repetitions)
    asm.label("loop")
    asm.mov("eax", kvmi.HYPERCALL_NUMBER)
    asm.mov("edi", kvmi.HYPERCALL_FUNCTION)
    asm.mov("esi", 0)
    asm.data(VMCALL)
    return _end(asm)


def stores(repetitions: int) -> bytes:
    """A bzImage that stores to one page that often."""
    asm = Assembler(0x100000, 64)
    asm.org(image.ENTRY64)
    asm.mov("ebp", repetitions)
    asm.mov("ebx", TARGET)
    asm.label("loop")
    for _ in range(8):
        asm.data(b"\x89\x03")  # mov [rbx], eax
    return _end(asm)


def _end(asm: Assembler) -> bytes:
    asm.do("dec ebp")
    asm.jump("loop", "nz")
    asm.mov("eax", 0)
    asm.mov("edx", DEBUG_EXIT)
    asm.do("out dx, al", "hlt")
    return image.bzimage(asm.finish())


@contextmanager
def machine(kernel: bytes) -> Iterator[Machine]:
    """A machine with that kernel, not started."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(kernel)
        file.flush()
        with Machine(kernel=file.name, memory="64M") as made:
            yield made


def run(made: Machine) -> float:
    """Seconds inside the machine's run."""
    stop = made.run(timeout=120)
    if stop.reason is not StopReason.EXIT:
        raise click.ClickException(f"the guest ended by {stop.reason.value}: {stop.detail}")
    return made.stats().seconds


def enable(event: Event) -> bytes:
    """VCPU_CONTROL_EVENTS, without its header."""
    return struct.pack("<HBBI", event, 1, 0, 0)


def in_process(events: int) -> float:
    """Round trips per second without a socket."""
    with machine(hypercalls(events)) as made:
        channel = made.introspect_direct(lambda event: CONTINUE)
        channel.request(Command.VCPU_CONTROL_EVENTS, enable(Event.HYPERCALL), 0)
        return events / run(made)


def _answer(own: socket.socket) -> None:
    """The tool's process: every message is an event, and is continued."""
    buffer = bytearray(kvmi.MAX_MESSAGE + 8)
    reply = struct.pack("<HHI", 0, 0, 0) + bytes(kvmi.EventReply(action=Action.CONTINUE))
    while own.recv_into(buffer):
        seq = struct.unpack_from("<I", buffer, 4)[0]
        own.send(struct.pack("<HHI", 0, len(reply), seq) + reply)


def over_a_socket(events: int) -> float:
    """Round trips per second with the tool in another process."""
    with machine(hypercalls(events)) as made, made.introspect() as own:
        body = bytes(8) + enable(Event.HYPERCALL)
        own.send(struct.pack("<HHI", Command.VCPU_CONTROL_EVENTS, len(body), 1) + body)
        own.recv(64)
        tool = multiprocessing.get_context("fork").Process(target=_answer, args=(own,), daemon=True)
        tool.start()
        try:
            return events / run(made)
        finally:
            tool.kill()


def reads_in_process(pages: int) -> float:
    """GB/s of VM_READ_PAGES without a socket."""
    with machine(hypercalls(1)) as made:
        channel = made.introspect_direct(lambda event: CONTINUE)
        request = struct.pack("<HHI15Q", 15, 0, 0, *range(512, 527))
        started = time.perf_counter()
        for _ in range(pages // 15):
            channel.request(Command.VM_READ_PAGES, request)
        return pages // 15 * 15 * PAGE / (time.perf_counter() - started) / 1e9


def reads_over_a_socket(pages: int) -> float:
    """GB/s of VM_READ_PAGES over a UNIX socket."""
    with machine(hypercalls(1)) as made, made.introspect() as own:
        body = struct.pack("<HHI15Q", 15, 0, 0, *range(512, 527))
        request = struct.pack("<HHI", Command.VM_READ_PAGES, len(body), 1) + body
        buffer = bytearray(1 << 17)
        size = 8 + 8 + 8 + 15 * PAGE
        started = time.perf_counter()
        for _ in range(pages // 15):
            own.send(request)
            got = 0
            while got < size:
                got += own.recv_into(memoryview(buffer)[got:])
        return pages // 15 * 15 * PAGE / (time.perf_counter() - started) / 1e9


def slow_down(repetitions: int) -> float:
    """Time of the stores beside protected pages, as a multiple of the time without a tool."""
    with machine(stores(repetitions)) as made:
        free = run(made)
    with machine(stores(repetitions)) as made:
        channel = made.introspect_direct(lambda event: CONTINUE)
        channel.request(Command.VCPU_CONTROL_EVENTS, enable(Event.PF), 0)
        entries = [kvmi.PageAccessEntry(gpa=TARGET + n * PAGE, access=Access.R | Access.X, visible=1) for n in range(1, 500)]
        channel.request(Command.VM_SET_PAGE_ACCESS, bytes(kvmi.SetPageAccess(count=len(entries))) + b"".join(map(bytes, entries)))
        return run(made) / free


KINDS = {
    "events in the process": (in_process, 50_000, "100,000/s"),
    "events over a UNIX socket": (over_a_socket, 20_000, "20,000/s"),
    "reads in the process": (reads_in_process, 150_000, "1 GB/s"),
    "reads over a UNIX socket": (reads_over_a_socket, 60_000, "0.2 GB/s"),
    "stores beside 499 protected pages": (slow_down, 40_000_000, "1.02x"),
}


@click.command()
@click.option("-n", "--rounds", default=3, show_default=True, help="Runs of each kind.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write the samples to this file.")
def main(rounds: int, path: Path | None) -> None:
    """Measure introspection."""
    results = {name: [measure(amount) for _ in range(rounds)] for name, (measure, amount, _) in KINDS.items()}
    rows = [(name, f"{statistics.median(taken):,.2f}", f"{max(taken):,.2f}", KINDS[name][2]) for name, taken in results.items()]
    publish(f"Introspection, median of {rounds}", ("what", "median", "most", "goal"), rows, machine_facts(), results, path)


if __name__ == "__main__":
    main()
