"""The price of a VM exit to a Python handler and back, for CPUID, port I/O and MMIO.

A guest without an operating system repeats one instruction; the time of a run with no repetition is subtracted.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import click

from benchmarks.report import machine_facts, publish
from softkvm.cli.selftest import image
from softkvm.cli.selftest.assembler import Assembler
from softkvm.vmm import Machine, StopReason

GOAL = 2.0  # µs
COM1_SCRATCH = 0x3FF
LAPIC_ID = 0xFEE00020
NOBODY = 0xFE000000  # an address without a device: KVM hands the access to the VMM
DEBUG_EXIT = 0xF4


def cpuid(asm: Assembler) -> None:
    asm.mov("eax", 1)
    asm.do("cpuid")


def port(asm: Assembler) -> None:
    asm.mov("edx", COM1_SCRATCH)
    asm.do("in al, dx")


def mmio_kernel(asm: Assembler) -> None:
    asm.mov("ebx", LAPIC_ID)
    asm.do("mov eax, [rbx]")


def mmio_user(asm: Assembler) -> None:
    asm.mov("ebx", NOBODY)
    asm.do("mov eax, [rbx]")


KINDS: dict[str, Callable[[Assembler], None]] = {
    "CPUID (KVM)": cpuid,
    "port read (VMM)": port,
    "MMIO read (KVM: local APIC)": mmio_kernel,
    "MMIO read (VMM)": mmio_user,
}


def guest(body: Callable[[Assembler], None], repetitions: int) -> bytes:
    """A bzImage that runs `body` that often and ends by the debug-exit port."""
    asm = Assembler(0x100000, 64)
    asm.org(image.ENTRY64)
    asm.mov("ebp", repetitions)
    asm.label("loop")
    body(asm)
    asm.do("dec ebp")
    asm.jump("loop", "nz")
    asm.mov("eax", 0)
    asm.mov("edx", DEBUG_EXIT)
    asm.do("out dx, al", "hlt")
    return image.bzimage(asm.finish())


def seconds(kernel: bytes, cpu: str) -> float:
    """Wall time inside the machine's run."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(kernel)
        file.flush()
        with Machine(kernel=file.name, memory="16M", cpu=cpu) as machine:
            stop = machine.run(timeout=120)
            if stop.reason is not StopReason.EXIT:
                raise click.ClickException(f"the guest ended by {stop.reason.value}: {stop.detail}")
            return machine.stats().seconds


@click.command()
@click.option("-n", "--rounds", default=5, show_default=True, help="Runs of each kind.")
@click.option("--exits", default=20_000, show_default=True, help="Exits in each run.")
@click.option("--cpu", default="cascadelake", show_default=True, help="CPU model.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write the samples to this file.")
def main(rounds: int, exits: int, cpu: str, path: Path | None) -> None:
    """Measure exits."""
    results: dict[str, list[float]] = {}
    for name, body in KINDS.items():
        base, kernel = guest(body, 1), guest(body, exits + 1)
        results[name] = [(seconds(kernel, cpu) - seconds(base, cpu)) / exits * 1e6 for _ in range(rounds)]
    rows = [(name, f"{statistics.median(taken):.2f}", f"{min(taken):.2f}") for name, taken in results.items()]
    title = f"Exit and back on {cpu}, median of {rounds} x {exits}"
    publish(title, ("exit", f"median µs (goal {GOAL:g})", "best µs"), rows, machine_facts(), results, path)


if __name__ == "__main__":
    main()
