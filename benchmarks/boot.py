"""Boot to power-off: softkvm beside `qemu-system-x86_64 -accel tcg`, with the same kernel, initramfs, memory and one vCPU.

The guest is Debian's cloud kernel with an /init that powers off at once. The two take turns, so that a busy host slows both. Wall time
and peak resident memory are the whole process's, as wait4(2) reports them.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from benchmarks.report import machine_facts, program_version, publish
from softkvm.cli import guest
from softkvm.cli.guest import cpio

QEMU = "qemu-system-x86_64"
INIT = b"#!/bin/busybox sh\n/bin/busybox poweroff -f\n"
GOAL = 4.0  # times QEMU's wall time


@dataclass(frozen=True)
class Sample:
    """One boot: wall time in seconds, peak resident memory in MiB."""

    seconds: float
    memory: float


def measure(command: Sequence[str | Path]) -> Sample:
    """Run `command` to its end; raises click.ClickException if it fails."""
    started = time.perf_counter()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            log.seek(0)
            raise click.ClickException(f"{command[0]} ended with {process.returncode}: {log.read().decode(errors='replace')[-2000:]}")
    return Sample(seconds, usage.ru_maxrss / 1024)


def require_qemu() -> None:
    """Have QEMU on the PATH: as root, Debian's package is installed; otherwise one sentence says what is missing."""
    if shutil.which(QEMU):
        return
    remedy = "apt-get install --no-install-recommends -y qemu-system-x86"
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise click.ClickException(f"the comparison needs {QEMU}; install it with: sudo {remedy}")
    for command in ("apt-get update -q", remedy):
        subprocess.run(command.split(), check=True, stdout=subprocess.DEVNULL)


def median(samples: Sequence[Sample]) -> Sample:
    """The median of each quantity."""
    return Sample(statistics.median(s.seconds for s in samples), statistics.median(s.memory for s in samples))


@click.command()
@click.option("-n", "--rounds", default=3, show_default=True, help="Boots of each.")
@click.option("--memory", default=512, show_default=True, metavar="MIB", help="Guest memory.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write the samples to this file.")
def main(rounds: int, memory: int, path: Path | None) -> None:
    """Compare boot times."""
    require_qemu()
    image = guest.prepare("cloud")
    assert isinstance(image.initrd, bytes)
    with tempfile.NamedTemporaryFile(suffix=".cpio") as initrd:
        initrd.write(image.initrd + cpio.archive([cpio.file("/init", INIT, 0o755)]))
        initrd.flush()
        softkvm: list[str | Path] = [
            sys.executable,
            "-m",
            "softkvm.cli",
            "run",
            "-m",
            f"{memory}M",
            "-k",
            image.kernel,
            "-i",
            initrd.name,
            "-p",
            "quiet",
        ]
        qemu: list[str | Path] = [QEMU, "-accel", "tcg", "-m", f"{memory}M", "-kernel", image.kernel, "-initrd", initrd.name, "-no-reboot"]
        qemu += ["-append", "console=ttyS0 panic=-1 quiet", "-nodefaults", "-display", "none", "-serial", "stdio", "-monitor", "none"]
        samples: dict[str, list[Sample]] = {"QEMU TCG": [], "softkvm": []}
        for _ in range(rounds):
            samples["QEMU TCG"].append(measure(qemu))
            samples["softkvm"].append(measure(softkvm))
    base = median(samples["QEMU TCG"])
    rows = [
        (
            name,
            f"{(m := median(taken)).seconds:.2f}",
            f"{m.seconds / base.seconds:.2f}",
            f"{min(s.seconds for s in taken):.2f}",
            f"{m.memory:.0f}",
        )
        for name, taken in samples.items()
    ]
    facts = machine_facts() | {"qemu": program_version(QEMU), "guest": image.title}
    columns = ("", "median s", f"ratio (goal {GOAL:g})", "best s", "peak MiB")
    title = f"Boot to power-off, {memory} MiB, median of {rounds}"
    publish(title, columns, rows, facts, {name: [asdict(sample) for sample in taken] for name, taken in samples.items()}, path)


if __name__ == "__main__":
    main()
