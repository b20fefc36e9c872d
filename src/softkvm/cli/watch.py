"""What a person wants to see of a VMM's calls: `--trace`, `--audit`, `--ioctl-filter`, `--contexts`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from softkvm.cli import output
from softkvm.cli.errors import CliError
from softkvm.cli.options import RunOptions
from softkvm.host import context_tracking, ftrace, seccomp_file
from softkvm.host.audit import AuditLog
from softkvm.host.process import Process
from softkvm.host.seccomp import FilterError


@contextmanager
def watched(options: RunOptions) -> Iterator[Process]:
    """The process to run the machine in, watched as `options` say until the block ends. CliError, one sentence, for what cannot be."""
    with ExitStack() as resources:
        try:
            filters = seccomp_file.load(options.ioctl_filter) if options.ioctl_filter is not None else ()
            audit = resources.enter_context(AuditLog(options.audit)) if options.audit is not None else None
            if options.contexts:
                context_tracking.enable()
                resources.callback(context_tracking.disable)
            if options.trace:
                events = Path(options.trace_file) if options.trace_file is not None else sys.stderr
                resources.enter_context(ftrace.Trace(options.trace, events))
        except (FilterError, ftrace.PatternError) as error:
            raise CliError(str(error)) from error
        except OSError as error:
            raise CliError(f"{error.filename} cannot be written: {error.strerror}") from error
        yield Process(filters, audit)


_NANOSECONDS = 1e9
_PLACES = {"guest": "guest", "kernel": "KVM", "user": "VMM", "idle": "idle"}


def print_contexts() -> None:
    """Where the threads spent their time, in seconds; a thread that waits to be let run is in the VMM."""
    rows = [(name, *(f"{times[place] / _NANOSECONDS:.3f}" for place in _PLACES)) for name, times in context_tracking.threads()]
    output.table("Seconds of each thread", ("thread", *_PLACES.values()), rows)
