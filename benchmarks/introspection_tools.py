"""What the introspection tools cost: the time from attaching to the first list of processes, and a guest under `lock-kernel`.

A Debian guest at its shell. "Attach" is a session over a UNIX socket, the kernel found and its processes listed, in a process that has
nothing of it in memory, with and without decoded symbols on the disk. The slow-down is that of a pipeline and a series of programs in the
guest: CPU time of this process, which is both the machine and the tool. Each round is one run without the lock and one with it, and every
other round has them the other way round. Before each there is a run that does not count: engaging the lock changes the rights of all the
kernel's pages, and what the silicon cached of them comes back meanwhile. Programs lie at the same addresses each time (`norandmaps`),
because how they fall into the silicon's caches makes a greater difference than the lock.
"""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import click

from benchmarks.report import machine_facts, publish
from softkvm.cli import guest
from softkvm.vmi.client import Client
from softkvm.vmi.linux import tasks
from softkvm.vmi.target import Target
from softkvm.vmi.tools.lock import KernelLock
from softkvm.vmm import Machine, StopReason

LOADS = {
    "pipeline": "dd if=/dev/zero bs=4096 count=8000 2>/dev/null | sha256sum >/dev/null",
    "programs": "i=0; while [ $i -lt 100 ]; do /bin/busybox true; i=$((i+1)); done",
}
DONE = "work done"


@contextmanager
def running(machine: Machine) -> Iterator[None]:
    """The machine runs in the block."""
    thread = threading.Thread(target=machine.run)
    thread.start()
    try:
        yield
    finally:
        machine.stop()
        thread.join()


def attach(machine: Machine, cache: Path) -> float:
    """Seconds from nothing to the list of processes."""
    with running(machine):
        started = time.perf_counter()
        with Client(machine.introspect()) as client:
            target = Target(client, cache)
            kernel = target.kernel
            with target.still():
                tasks.processes(kernel, target.cr3s())
            return time.perf_counter() - started


def work(machine: Machine, load: str) -> float:
    """CPU seconds of a load, the second time it runs."""
    _once(machine, load)
    return _once(machine, load)


def _once(machine: Machine, load: str) -> float:
    machine.send(f'{load}; echo work"" done\n')
    started = time.process_time()
    stop = machine.run(until=DONE, timeout=300)
    if stop.reason is not StopReason.UNTIL:
        raise click.ClickException(f"the guest ended by {stop.reason.value}: {stop.detail}")
    return time.process_time() - started


def locked(machine: Machine, load: str, cache: Path) -> float:
    """The same with the kernel locked."""
    with Client(machine.introspect()) as client:
        lock = KernelLock(Target(client, cache))
        with running(machine):
            lock.engage_when_booted()
        tool = threading.Thread(target=lambda: list(lock.records()))
        tool.start()
        try:
            return work(machine, load)
        finally:
            lock.stop()
            tool.join()


def slow_down(machine: Machine, load: str, cache: Path, rounds: int) -> tuple[list[float], list[float]]:
    """CPU seconds of the load without the lock and with it, by round."""
    both: tuple[Callable[[], float], Callable[[], float]] = partial(work, machine, load), partial(locked, machine, load, cache)
    taken: tuple[list[float], list[float]] = [], []
    for turn in range(rounds):
        for which in (0, 1) if turn % 2 == 0 else (1, 0):
            taken[which].append(both[which]())
    return taken


@click.command()
@click.option("-n", "--rounds", default=5, show_default=True, help="Runs of each kind.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write the samples to this file.")
def main(rounds: int, path: Path | None) -> None:
    """Measure the tools."""
    image = guest.prepare("cloud")
    results: dict[str, list[float]] = {}
    rows = []
    with (
        Machine(kernel=image.kernel, initrd=image.initrd, append="loglevel=3 norandmaps") as machine,
        tempfile.TemporaryDirectory() as folder,
    ):
        machine.run(until="# ", timeout=300)
        results["attach to first ps, first time"] = [attach(machine, Path(folder) / str(turn)) for turn in range(rounds)]
        results["attach to first ps, again"] = [attach(machine, Path(folder) / "0") for _ in range(rounds)]
        rows += [(name, f"{statistics.median(taken):.3f}", f"{min(taken):.3f}", "1 s") for name, taken in results.items()]
        for name, load in LOADS.items():
            free, under = slow_down(machine, load, Path(folder) / "0", rounds)
            results |= {f"{name}, free": free, f"{name}, locked": under}
            medians = statistics.median(under) / statistics.median(free)
            rows.append((f"lock-kernel, {name}", f"{medians:.3f}", f"{min(under) / min(free):.3f}", "1.02x"))
    publish(f"Introspection tools, median of {rounds}", ("what", "median", "least", "goal"), rows, machine_facts(), results, path)


if __name__ == "__main__":
    main()
