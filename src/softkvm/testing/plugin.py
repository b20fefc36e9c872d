"""pytest fixtures that boot guests.

`vm_factory(...)` gives a `Machine` with softkvm's default guest, closed after the test; when the test fails, the last of each console is
part of the failure. `guest_run("uname", "-a")` runs one command in a fresh guest, as `softkvm run -- uname -a` does.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Generator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import msgspec
import pytest

if TYPE_CHECKING:
    from softkvm.vmm import Machine

_CONSOLE_SHOWN = 8192
_machines = pytest.StashKey[list["Machine"]]()


class GuestResult(msgspec.Struct, frozen=True):
    """How a command in a guest ended; `status` as `softkvm run` documents it, `seconds` is wall time with the boot."""

    status: int
    reason: str
    stdout: str
    stderr: str
    console: str
    seconds: float


class VmFactory(Protocol):
    """Makes machines for one test."""

    def __call__(self, kernel: str | Path = "cloud", initrd: Path | None = None, **options: Any) -> Machine:
        """A machine with a kernel file or a flavour of Debian's, and otherwise the options of `softkvm.vmm.Machine`."""


class GuestRun(Protocol):
    """Runs one command in a fresh guest."""

    def __call__(self, *command: str, options: tuple[str, ...] = (), stdin: bytes = b"", timeout: float = 600) -> GuestResult:
        """Run `command` with the `softkvm run` options given; `timeout` is in seconds."""


@pytest.fixture
def vm_factory(request: pytest.FixtureRequest) -> Iterator[VmFactory]:
    """A function that makes machines; they are closed after the test."""
    from softkvm.cli import guest
    from softkvm.vmm import Machine

    made = request.node.stash.setdefault(_machines, [])
    with ExitStack() as open_machines:

        def make(kernel: str | Path = "cloud", initrd: Path | None = None, **options: Any) -> Machine:
            image = guest.prepare(kernel, initrd)
            machine = Machine(kernel=image.kernel, initrd=image.initrd, **options)
            made.append(open_machines.enter_context(machine))
            return machine

        yield make
        made.clear()


@pytest.fixture(scope="session")
def guest_run() -> GuestRun:
    """A function that runs one command in a fresh guest and returns what it printed and its exit status."""

    def run(*command: str, options: tuple[str, ...] = (), stdin: bytes = b"", timeout: float = 600) -> GuestResult:
        program = [sys.executable, "-m", "softkvm.cli", "run", "--json", "--timeout", str(timeout), *options, "--", *command]
        result = subprocess.run(program, input=stdin, capture_output=True, check=False)
        if not result.stdout:
            raise RuntimeError(f"softkvm run ended with {result.returncode}: {result.stderr.decode(errors='replace').strip()}")
        return msgspec.json.decode(result.stdout, type=GuestResult)

    return run


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the consoles of a failed test's machines."""
    report = yield
    if report.when == "call" and report.failed:
        machines = item.stash.get(_machines, None) or []
        for number, machine in enumerate(machines):
            text = bytes(machine.output)[-_CONSOLE_SHOWN:].decode(errors="replace")
            report.sections.append((f"console of softkvm machine {number}", text))
    return report
