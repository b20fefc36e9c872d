"""`softkvm perf record` and `softkvm perf flame`: samples of a run, as a file for Debian's perf or as a picture."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from softkvm.cli import guest, output, run
from softkvm.cli.errors import CliError
from softkvm.cli.options import RunOptions
from softkvm.cli.perf import data, flame
from softkvm.cli.perf.guest import GuestView, VmMemory
from softkvm.cli.perf.sampler import EVENTS, Sampler, parse_event
from softkvm.host.perf.event import NO_BRANCHES, Attr
from softkvm.uapi.perf import BranchSample
from softkvm.vmm import Machine

KERNELS = "kernels"
"""Where decoded symbols are kept, below the guest cache."""


def event_attr(text: str, period: int) -> Attr:
    """The event `text`, sampled every `period`; CliError for one that does not exist."""
    attr = parse_event(text)
    if attr is None:
        raise CliError(f"there is no event {text!r}; there are {', '.join(EVENTS)}, each with :u or :k behind it or nothing")
    return replace(attr, sample_period=period)


class Recorder:
    """Samples a run; `sampler` and `view` are there from `attach()` on."""

    sampler: Sampler
    view: GuestView

    def __init__(self, attr: Attr, kinds: BranchSample, chains: bool = False) -> None:
        """What to sample: which branches with it, and whether with the kernel's call chain."""
        self._attr = attr
        self._kinds = kinds
        self._chains = chains

    def attach(self, machine: Machine) -> None:
        """Open the events; CliError if the CPU model cannot count them."""
        self.view = GuestView(VmMemory(machine.vcpus[0].vm), guest.default_directory() / KERNELS)
        try:
            self.sampler = Sampler(machine.vcpus, self._attr, self._kinds, self.view, self._chains)
        except OSError as error:
            raise CliError(f"this CPU model cannot be sampled so: {error.strerror}") from error

    def begin(self) -> None:
        """Sample from now on."""
        self.sampler.start()

    def end(self, machine: Machine) -> None:
        """Sample no more."""
        self.sampler.stop()

    @property
    def summary(self) -> str:
        """How many samples there are."""
        lost = f", {self.sampler.lost} more did not fit" if self.sampler.lost else ""
        return f"{len(self.sampler.samples)} samples{lost}"


def _check_place(*paths: Path | None) -> None:
    """CliError before the run for a file that could not be written behind it."""
    for path in paths:
        if path is not None and not os.access(path.parent, os.W_OK):
            raise CliError(f"{path} cannot be written: {path.parent} is no directory of yours; name another file")


def record(options: RunOptions, event: str, period: int, branches: bool, path: Path) -> int:
    """Run the guest and write a perf.data file; the run's exit status."""
    attr = event_attr(event, period)
    _check_place(path)
    rings = BranchSample.USER if attr.exclude_kernel else BranchSample.USER | BranchSample.KERNEL
    recorder = Recorder(attr, BranchSample.ANY | rings if branches else NO_BRANCHES)
    status = run.run(options, recorder)
    sampler, view = recorder.sampler, recorder.view
    try:
        data.write(path, sampler.attr, sampler.samples, view, options.kernel)
    except OSError as error:
        raise CliError(f"{path} cannot be written: {error.strerror}") from error
    output.say(f"{recorder.summary}; to read them: perf report -i {path} --kallsyms {path}.kallsyms --symfs {path}.symfs")
    return status


def draw(options: RunOptions, event: str, period: int, path: Path, folded: Path | None) -> int:
    """Run the guest and write a flame graph; the run's exit status."""
    _check_place(path, folded)
    recorder = Recorder(event_attr(event, period), BranchSample.CALL_STACK | BranchSample.USER, chains=True)
    status = run.run(options, recorder)
    stacks = flame.fold(recorder.sampler.samples, recorder.view)
    try:
        path.write_text(flame.svg(stacks, f"{event} of {' '.join(options.command) or options.kernel}"))
        if folded is not None:
            folded.write_text(flame.text(stacks))
    except OSError as error:
        raise CliError(f"{error.filename} cannot be written: {error.strerror}") from error
    output.say(f"{recorder.summary}; the graph is in {path}")
    return status
