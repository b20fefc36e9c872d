"""What it costs a guest to be watched: the same work with the core's PMU off, with counters, and with last branch records on.

One boot of Debian's cloud kernel on one vCPU. The guest does the same work again and again, each time in the next mode, so that a busy host
slows all of them; CPU time of this process between two marks on the console, best of all rounds. The host's own tools turn the modes on,
behind the guest's back; the work is user code (sha256sum) and kernel code (directory walks, forks) in turn.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import click

from benchmarks.report import machine_facts, publish
from softkvm import kvm, silicon
from softkvm.cli import guest
from softkvm.cli.guest import cpio
from softkvm.silicon.pmu import Debugctl
from softkvm.vmm import Machine, StopReason

GOAL = 1.3  # times the CPU time of an unwatched guest
BEGIN, END = "work begins", "work ends"
INIT = f"""#!/bin/busybox sh
while true; do
    echo {BEGIN}
    /bin/busybox sha256sum /bin/busybox
    n=0
    while [ $n -lt 40 ]; do
        /bin/busybox find /bin /proc/1 -name none 2>/dev/null
        n=$((n + 1))
    done
    echo {END}
done
"""
_EVTSEL, _FIXED_CTR_CTRL, _GLOBAL_CTRL = 0x186, 0x38D, 0x38F
_BRANCHES = 0x43_00C4  # branches retired, at every privilege level


def _counters(core: silicon.Core, select: int, fixed: int) -> None:
    core.pmu_write(_EVTSEL, select)
    core.pmu_write(_FIXED_CTR_CTRL, fixed)
    core.pmu_write(_GLOBAL_CTRL, 1 | 7 << 32)


def _off(vcpu: kvm.Vcpu, core: silicon.Core) -> None:
    vcpu.state.debugctl = 0
    _counters(core, 0, 0)


def _lbr(vcpu: kvm.Vcpu, core: silicon.Core) -> None:
    _off(vcpu, core)
    vcpu.state.debugctl = Debugctl.LBR


MODES: dict[str, Callable[[kvm.Vcpu, silicon.Core], None]] = {
    "nothing": _off,
    "instructions": lambda vcpu, core: _counters(core, 0, 3),
    "branches and cycles": lambda vcpu, core: _counters(core, _BRANCHES, 0x33),
    "LBR": _lbr,
}


def _expect(machine: Machine, text: str) -> None:
    stop = machine.run(until=text, timeout=300)
    if stop.reason is not StopReason.UNTIL:
        raise click.ClickException(f"the guest ended by {stop.reason.value}: {stop.detail}")


def measure(image: guest.Guest, rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each round by mode."""
    assert isinstance(image.initrd, bytes)
    initrd = image.initrd + cpio.archive([cpio.file("/init", INIT.encode(), 0o755)])
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    with Machine(kernel=image.kernel, initrd=initrd, append="quiet panic=-1", cpus=1) as machine:
        (vcpu,) = machine._vcpus
        _expect(machine, END)
        for _ in range(rounds):
            for mode, begin in MODES.items():
                _expect(machine, BEGIN)
                assert vcpu.cpu is not None
                begin(vcpu, vcpu.cpu.core)
                started = time.process_time()
                _expect(machine, END)
                seconds[mode].append(time.process_time() - started)
    return seconds


@click.command()
@click.option("-n", "--rounds", default=5, show_default=True, help="Runs in each mode.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write the samples to this file.")
def main(rounds: int, path: Path | None) -> None:
    """Compare a guest that is watched with one that is not."""
    image = guest.prepare("cloud")
    seconds = measure(image, rounds)
    best = {mode: min(taken) for mode, taken in seconds.items()}
    rows = [(mode, f"{least:.3f}", f"{least / best['nothing']:.2f}") for mode, least in best.items()]
    columns = ("PMU", "CPU s", f"times (goal {GOAL:g})")
    publish(f"A watched guest, best of {rounds}", columns, rows, machine_facts() | {"guest": image.title}, seconds, path)


if __name__ == "__main__":
    main()
