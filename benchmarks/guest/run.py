"""Rounds: each case of each setup, once under TCG and once under softkvm, again and again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from benchmarks.guest import machines
from benchmarks.guest.cases import Case, Setup
from benchmarks.guest.results import NATIVE, SOFTKVM, TCG, Result, Sample, summarise


def measure(cases: Sequence[Case], rounds: int, tier: str | None, folder: Path) -> Iterator[Result]:
    """The results of `cases`, setup by setup; files of the machines go to `folder`. click.ClickException for what cannot run."""
    for case in cases:
        if not case.request:
            yield _boots(case, rounds, tier, folder)
    requests = [case for case in cases if case.request]
    if requests:
        program = machines.compile_program(folder)
        machines.host_files(folder)
        for setup in dict.fromkeys(case.setup for case in requests):
            yield from _requests([case for case in requests if case.setup == setup], setup, rounds, tier, folder, program)


def _boots(case: Case, rounds: int, tier: str | None, folder: Path) -> Result:
    image = machines.initrd(case.setup, None, folder / "boot.cpio")
    commands = {TCG: machines.qemu_command(image, case.setup), SOFTKVM: machines.softkvm_command(image, case.setup, tier, folder)}
    for command in commands.values():  # files come into memory, and Python's bytecode into its place
        machines.whole_run(command)
    return _rounds(case, rounds, {who: partial(machines.whole_run, command) for who, command in commands.items()})


def _requests(cases: Sequence[Case], setup: Setup, rounds: int, tier: str | None, folder: Path, program: Path) -> Iterator[Result]:
    image = machines.initrd(setup, program, folder / "guest.cpio")
    with (
        machines.serving(NATIVE, [program], folder) as native,
        machines.serving(TCG, machines.qemu_command(image, setup)) as tcg,
        machines.serving(SOFTKVM, machines.softkvm_command(image, setup, tier, folder), count=machines.counters) as softkvm,
    ):
        for case in cases:
            servers = {NATIVE: native} if case.is_native else {}
            servers |= {TCG: tcg, SOFTKVM: softkvm}
            yield _rounds(case, rounds, {who: partial(server.ask, case.request) for who, server in servers.items()})


def _rounds(case: Case, rounds: int, ask: Mapping[str, Callable[[], Sample]]) -> Result:
    samples: dict[str, list[Sample]] = {who: [] for who in ask}
    for _ in range(rounds):
        for who, one in ask.items():
            samples[who].append(one())
    return summarise(case, samples)
