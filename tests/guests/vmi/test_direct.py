"""The same tools on a machine of this process without a socket."""

from __future__ import annotations

import pytest

from softkvm.cli.guest import default_directory
from softkvm.testing import VmFactory
from softkvm.vmi.client import Client
from softkvm.vmi.direct import DirectLink
from softkvm.vmi.linux import tasks
from softkvm.vmi.target import Target
from softkvm.vmi.tools.alarms import Alarms, Executed
from softkvm.vmm import StopReason
from tests.guests.vmi.live import LiveGuest

pytestmark = [pytest.mark.guest, pytest.mark.slow]


def test_processes_and_events_without_a_socket(vm_factory: VmFactory) -> None:
    machine = vm_factory(cpus=2, append="loglevel=3")
    assert machine.run(until="# ", timeout=600).reason is StopReason.UNTIL
    with Client(machine.introspect()) as client:
        by_socket = LiveGuest(machine, client).still(lambda target: tasks.processes(target.kernel))
    with DirectLink.open(machine.introspect_direct) as link, Client(link) as client:
        live = LiveGuest(machine, client)
        target = Target(client, default_directory() / "vmi")
        direct = live.still(lambda _: tasks.processes(target.kernel))
        assert {(process.pid, process.name) for process in direct} >= {
            (process.pid, process.name) for process in by_socket if process.pid == 1
        }
        assert direct[0].arguments == by_socket[0].arguments
        with live.watched(Alarms(live.target)) as records:
            live.shell("/bin/busybox true")
        assert ("/bin/busybox", "true") in [record.arguments for record in records if isinstance(record, Executed)]
