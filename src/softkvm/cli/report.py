"""The report that a bug in softkvm leaves behind: what a maintainer needs, and nothing of the guest's memory.

One JSON file for each bug, in the `reports` folder of the cache directory: versions, the command line, the traceback and, if a machine
ran, where its vCPU stood and its counters.
"""

from __future__ import annotations

import platform
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import msgspec

from softkvm.cli.guest.cache import default_directory, write_atomically


class Report(msgspec.Struct, frozen=True):
    """The content of a report file."""

    message: str
    versions: dict[str, str]
    command: list[str]
    traceback: list[str]
    state: dict[str, object]


def softkvm_version() -> str:
    """The version of the installed distribution."""
    from importlib import metadata  # here, because it brings a mail parser with it

    try:
        return metadata.version("softkvm")
    except metadata.PackageNotFoundError:
        return "from a source tree, not installed"


def versions() -> dict[str, str]:
    """Versions of everything that takes part in a run; the engine's entry says why if it cannot be loaded."""
    found = {"softkvm": softkvm_version(), "python": platform.python_version(), "platform": platform.platform()}
    try:
        from softkvm import silicon
    except ImportError as error:
        return found | {"engine": f"not loadable: {error}"}
    return found | {f"engine.{key}": value for key, value in silicon.build_info().items()}


def write(message: str, error: BaseException | None, state: dict[str, object], command: Sequence[str] = sys.argv) -> Path:
    """Write a report and return its path. Raises OSError if the cache directory cannot be written."""
    lines = traceback.format_exception(error) if error is not None else []
    report = Report(message, versions(), list(command), lines, state)
    folder = default_directory() / "reports"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"softkvm-{time.strftime('%Y%m%d-%H%M%S')}-{time.monotonic_ns() % 1_000_000:06d}.json"
    write_atomically(path, msgspec.json.format(msgspec.json.encode(report, enc_hook=repr), indent=2) + b"\n")
    return path
