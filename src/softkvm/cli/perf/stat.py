"""`softkvm perf stat`: exact counts of what a guest has executed, from outside."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from softkvm.cli import output, run
from softkvm.cli.errors import CliError
from softkvm.cli.options import RunOptions
from softkvm.cli.perf.record import event_attr
from softkvm.cli.perf.sampler import open_events, switch
from softkvm.host.perf.event import Event
from softkvm.vmm import Machine


class Counter:
    """Counts events over a run; `counts` are there after `end()`."""

    def __init__(self, names: Sequence[str]) -> None:
        """The events' names; CliError for one that does not exist."""
        self._attrs = {name: event_attr(name, 0) for name in names}
        self._events: dict[str, list[Event]] = {}
        self._machine: Machine | None = None
        self.counts: dict[str, int] = {}

    def attach(self, machine: Machine) -> None:
        """Open the events."""
        self._machine = machine
        try:
            self._events = {name: open_events(machine.vcpus, attr) for name, attr in self._attrs.items()}
        except OSError as error:
            raise CliError(f"this CPU model cannot count so: {error.strerror}") from error

    def begin(self) -> None:
        """Count from now on."""
        if self._machine is not None:
            for events in self._events.values():
                switch(self._machine.vcpus, events, on=True)

    def end(self, machine: Machine) -> None:
        """Count no more; an event that had to share its counter with others is told as if it had had it all the time."""
        for name, events in self._events.items():
            switch(machine.vcpus, events, on=False)
            perf = machine.vcpus[0].vm.scheduler.perf
            self.counts[name] = sum(perf.read_scaled(event) for event in events)


def stat(options: RunOptions, names: Sequence[str], json: bool) -> int:
    """Run the guest and print the counts on standard error, or with `json` one object on standard output; the run's exit status."""
    counter = Counter(names)
    status = run.run(options, counter)
    if json:
        output.print_json(msgspec.json.encode({"counts": counter.counts, "status": status}))
    else:
        output.table("Counts", ("event", "count"), [(name, f"{count:,}") for name, count in counter.counts.items()])
    return status
