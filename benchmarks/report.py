"""What the benchmarks share: rounds, a table, JSON, and the versions that a number is worthless without."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from softkvm.cli.report import versions


def machine_facts() -> dict[str, str]:
    """The host and the versions of softkvm and its engine."""
    model = next(
        (line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "?"
    )
    return {**versions(), "host cpu": model, "host cpus": str(os.cpu_count()), "kernel": platform.release()}


def program_version(program: str) -> str:
    """The first line that `program --version` prints."""
    return subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]


def publish(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], facts: dict[str, str], data: Any, path: Path | None) -> None:
    """Print the table and the facts below it; write `data` and the facts to `path` as JSON if there is one."""
    console = Console()
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print(", ".join(f"{name} {value}" for name, value in facts.items()), style="dim", highlight=False)
    if path is not None:
        path.write_text(json.dumps({"facts": facts, "results": data}, indent=2) + "\n")
