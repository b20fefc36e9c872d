"""`softkvm run --selftest`: boot the built-in guest and compare what it prints with what a working installation makes it print.

It needs neither network nor apt nor a cache: the guest (`image.py`) is assembled from its source when it is asked for.
"""

from __future__ import annotations

import tempfile
import time
from contextlib import closing

from softkvm.cli import output, session, status
from softkvm.cli.errors import CliError
from softkvm.cli.options import StatsFormat
from softkvm.cli.selftest import image
from softkvm.vmm import ConfigError, Machine, Stop, StopReason

VENDORS = ("GenuineIntel", "AuthenticAMD")
_TIMEOUT = 60.0


def run(memory: str, cpu: str, timeout: float | None, stats: StatsFormat | None) -> int:
    """Run the self-test on the machine that the options describe and return the exit status; `timeout` is in seconds."""
    with tempfile.NamedTemporaryFile(prefix="softkvm-selftest-") as kernel:
        kernel.write(image.build())
        kernel.flush()
        try:
            machine = Machine(kernel=kernel.name, memory=memory, cpu=cpu)
        except ConfigError as error:
            raise CliError(str(error)) from error
    with machine, closing(session.Doorbell()) as doorbell:
        output.say(f"software CPU {cpu}, {memory} of memory; the self-test guest")
        started = time.monotonic()
        stop, signal = session.run(machine, None, doorbell, timeout or _TIMEOUT)
        seconds = time.monotonic() - started
        if stats is not None:
            output.print_stats(machine.stats(), stats)
        if signal is not None:
            return status.SIGNALLED + signal
        if problem := verdict(stop, machine.output.decode(errors="replace")):
            output.say(f"the self-test failed: {problem}")
            return status.OWN_ERROR
    output.say(f"the self-test passed in {seconds:.2f} seconds")
    return status.SUCCESS


def verdict(stop: Stop, printed: str) -> str | None:
    """What is wrong with the guest's output or its end, in words; None if nothing is."""
    lines = printed.replace("\r\n", "\n")
    candidates = [image.expected(vendor) for vendor in VENDORS]
    if lines not in candidates:
        best = max((_common_lines(lines, candidate), candidate) for candidate in candidates)
        expected = best[1].splitlines()
        return f"the guest did not print {expected[min(best[0], len(expected) - 1)]!r} ({stop.reason.value}: {stop.detail})"
    if stop.reason is not StopReason.EXIT or stop.status != image.PASSED_STATUS:
        return f"the guest ended by {stop.reason.value} ({stop.detail})"
    return None


def _common_lines(left: str, right: str) -> int:
    """How many lines from the start are equal."""
    pairs = zip(left.splitlines(), right.splitlines(), strict=False)
    return next((number for number, (a, b) in enumerate(pairs) if a != b), min(left.count("\n"), right.count("\n")))
