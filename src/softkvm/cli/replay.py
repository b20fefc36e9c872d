"""`softkvm audit replay`: from a log to the calls that came out differently."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click
import msgspec

from softkvm import kvm, silicon
from softkvm.cli import output, status
from softkvm.cli.errors import CliError
from softkvm.vmm import config
from softkvm.vmm.errors import ConfigError
from softkvm.vmm.replay import Replay, ReplayError, load


def run(file: Path, cpu: str, parameters: Sequence[str], json: bool) -> int:
    """Replay `file`; exit status 1 if a result differs. CliError, one sentence, for what cannot be replayed."""
    try:
        name, features = config.parse_cpu(cpu)
        system = kvm.System(silicon.Model(name, features), config.parse_parameters(parameters))
        with Replay(system) as replay:
            report = replay.run(load(file))
    except (ConfigError, ReplayError, ValueError) as error:
        raise CliError(str(error)) from error
    if json:
        click.echo(msgspec.json.encode(report))
    else:
        rows = [(str(one.seq), one.call, str(one.recorded), str(one.replayed)) for one in report.differences]
        if rows:
            output.table("Calls with another result", ("line", "call", "recorded", "now"), rows, on_stdout=True)
        click.echo(f"{report.calls} calls made again, {len(rows)} with another result; {report.skipped} left out")
    return 1 if report.differences else status.SUCCESS
