"""A parallel guest workload on one vCPU and on two: two loops of busybox's sha256sum side by side, under Debian's cloud kernel.

Wall time between the guest's two marks on the console, so that the boot does not count. The two machines take turns, so that a busy host
slows both. Two vCPUs can only be faster where two host CPUs are idle; the CPU time tells what the second one costs anywhere.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from benchmarks.report import machine_facts, publish
from softkvm.cli import guest
from softkvm.cli.guest import cpio
from softkvm.vmm import Machine, StopReason

GOAL = 1.6  # times as fast with two vCPUs as with one
BEGIN, END = "work begins", "work ends"
INIT = f"""#!/bin/busybox sh
work() {{
    n=0
    while [ $n -lt $1 ]; do
        /bin/busybox sha256sum /bin/busybox
        n=$((n + 1))
    done
}}
work 1
echo {BEGIN}
work %d & work %d & wait
echo {END}
/bin/busybox poweroff -f
"""


@dataclass(frozen=True)
class Sample:
    """One run of the work: wall and CPU time of this process in seconds."""

    wall: float
    cpu: float


def measure(image: guest.Guest, cpus: int, loops: int) -> Sample:
    """Boot a machine with `cpus` vCPUs and let it work."""
    assert isinstance(image.initrd, bytes)
    init = (INIT % (loops, loops)).encode()
    initrd = image.initrd + cpio.archive([cpio.file("/init", init, 0o755)])
    with Machine(kernel=image.kernel, initrd=initrd, append="quiet panic=-1", cpus=cpus) as machine:
        _expect(machine, BEGIN)
        wall, cpu = time.perf_counter(), time.process_time()
        _expect(machine, END)
        return Sample(time.perf_counter() - wall, time.process_time() - cpu)


def _expect(machine: Machine, text: str) -> None:
    stop = machine.run(until=text, timeout=300)
    if stop.reason is not StopReason.UNTIL:
        raise click.ClickException(f"the guest ended by {stop.reason.value}: {stop.detail}")


@click.command()
@click.option("-n", "--rounds", default=3, show_default=True, help="Runs of each.")
@click.option("--loops", default=100, show_default=True, help="Checksums of busybox per loop.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write the samples to this file.")
def main(rounds: int, loops: int, path: Path | None) -> None:
    """Compare one vCPU with two."""
    image = guest.prepare("cloud")
    samples: dict[int, list[Sample]] = {1: [], 2: []}
    for _ in range(rounds):
        for cpus, taken in samples.items():
            taken.append(measure(image, cpus, loops))
    walls = {cpus: statistics.median(sample.wall for sample in taken) for cpus, taken in samples.items()}
    rows = [
        (str(cpus), f"{walls[cpus]:.2f}", f"{walls[1] / walls[cpus]:.2f}", f"{statistics.median(sample.cpu for sample in taken):.2f}")
        for cpus, taken in samples.items()
    ]
    columns = ("vCPUs", "median s", f"times as fast (goal {GOAL:g})", "CPU s")
    facts = machine_facts() | {"guest": image.title}
    data = {str(cpus): [asdict(sample) for sample in taken] for cpus, taken in samples.items()}
    publish(f"Two loops of sha256sum, median of {rounds}", columns, rows, facts, data, path)


if __name__ == "__main__":
    main()
