"""Runs the guest that a QEMU command line asked for (`qemu.py`), and ends as QEMU would."""

from __future__ import annotations

import os
import signal
import sys

from softkvm.cli import qemu_cpu
from softkvm.cli.qemu import FAILURE, PROGRAM, STDOUT, Invocation
from softkvm.vmm import ConfigError, Machine, Stop, StopReason
from softkvm.vmm.config import DEFAULT_TIER

_SUCCESSFUL = frozenset({StopReason.POWER_OFF, StopReason.RESET, StopReason.TRIPLE_FAULT})
"""Ends after which QEMU, told not to reboot, leaves with status 0."""


def run(invocation: Invocation) -> int:
    """Run it; the exit status as QEMU's."""
    try:
        return _run(invocation)
    except ConfigError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return FAILURE


def _run(invocation: Invocation) -> int:
    cpu, warnings = qemu_cpu.translate(invocation.cpu)
    for warning in invocation.warnings + warnings:
        print(f"{PROGRAM}: warning: {warning}", file=sys.stderr)
    with Machine(
        kernel=invocation.kernel,
        initrd=invocation.initrd,
        append=invocation.append,
        memory=invocation.memory,
        cpu=cpu,
        cpus=invocation.cpus,
        serial={0: _print} if invocation.serial == "stdio" else None,
        test_device=invocation.test_device,
        deterministic=0 if invocation.virtual_time else None,
        tier=invocation.tier or DEFAULT_TIER,
    ) as machine:
        signal.signal(signal.SIGTERM, lambda *_: machine.stop())
        return _status(machine.run())


def _print(data: bytes) -> None:
    while data:
        data = data[os.write(STDOUT, data) :]


def _status(stop: Stop) -> int:
    if stop.reason is StopReason.EXIT and stop.status is not None:
        return stop.status & 0xFF
    if stop.reason in _SUCCESSFUL:
        return 0
    print(f"{PROGRAM}: the guest ended by {stop.reason.value} at {stop.rip:#x}: {stop.detail}", file=sys.stderr)
    return FAILURE
