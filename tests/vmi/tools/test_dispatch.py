"""The dispatcher against a scripted server: when the guest begins to report, and that nothing of it is left behind."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from softkvm.uapi import kvmi
from softkvm.uapi.kvmi import Access, Action, Command, Event, FilterField
from softkvm.vmi import requests
from softkvm.vmi.client import Client
from softkvm.vmi.errors import Corrupt
from softkvm.vmi.events import PageEvent
from softkvm.vmi.target import Target
from softkvm.vmi.tools.dispatch import Dispatcher
from tests.vmi.fake_server import FakeServer

PAGE = 0x5000
LET_GO = {Command.VM_SET_PAGE_ACCESS, Command.VCPU_CONTROL_EVENTS, Command.VCPU_CONTROL_MSR}


class Pages(Dispatcher[int]):
    """Notes the page of each event."""

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        self.only(Event.PF, FilterField.CHANGE, [(1, 1)])
        self.protect([PAGE, PAGE + 0x1000], Access.R, self.touched)
        self.on_msr(0x176, lambda event: None)

    def touched(self, event: PageEvent) -> None:
        self.note(event.gpa)


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as made:
        for command in made.dialect.commands:
            made.handlers.setdefault(command, lambda body: b"")
        yield made


@pytest.fixture
def client(server: FakeServer) -> Iterator[Client]:
    with Client(server.client_end) as made:
        yield made


def touch(server: FakeServer, sequence: int = 1) -> None:
    server.send_event(Event.PF, sequence, data=bytes(kvmi.EventPf(gva=PAGE, gpa=PAGE, access=Access.W)))


def commands(server: FakeServer) -> set[Command | None]:
    """What was asked since the last call."""
    with server.arrived:
        asked = {command for command, _, _ in server.received}
        server.received.clear()
    return asked


def actions(server: FakeServer, count: int) -> list[Action]:
    """The first `count` answers to events, which nothing comes back for, so they may be under way still."""
    with server.arrived:
        assert server.arrived.wait_for(lambda: len(_answers(server)) >= count, 60), f"fewer than {count} answers came"
        return _answers(server)


def _answers(server: FakeServer) -> list[Action]:
    return [Action(body[8]) for command, _, body in server.received if command is None]


def test_the_guest_notices_nothing_before_records_are_taken(server: FakeServer, client: Client) -> None:
    pages = Pages(Target(client))
    assert commands(server) == {Command.VM_CHECK_COMMAND}
    pages.arm()
    assert commands(server) >= LET_GO | {Command.VM_SET_EVENT_FILTER, Command.VM_CONTROL_EVENTS, Command.VM_CONTROL_CLEANUP}
    pages.arm()
    assert commands(server) == set()


def test_who_takes_no_more_records_lets_the_guest_go(server: FakeServer, client: Client) -> None:
    records = Pages(Target(client)).records()
    touch(server)
    assert next(records) == PAGE
    assert actions(server, 1) == [Action.CONTINUE]
    commands(server)
    touch(server, 2)
    records.close()  # type: ignore[attr-defined]
    assert actions(server, 1) == [Action.CONTINUE]
    assert commands(server) >= LET_GO | {Command.VM_SET_EVENT_FILTER}


def test_the_next_tool_of_the_session_starts_afresh(server: FakeServer, client: Client) -> None:
    for sequence in (1, 2, 3):
        touch(server, sequence)
        records = Pages(Target(client)).records()
        assert next(records) == PAGE
        touch(server, sequence + 10)
        records.close()  # type: ignore[attr-defined]
        assert client.ask(requests.vcpu_count()) == 2
        assert client.next_event(0) is None
    assert actions(server, 6) == [Action.CONTINUE] * 6


def test_what_a_guest_bends_does_not_end_a_tool(server: FakeServer, client: Client) -> None:
    class Fragile(Pages):
        def touched(self, event: PageEvent) -> None:
            if event.sequence == 1:
                raise Corrupt("the list goes round in circles")
            super().touched(event)

    touch(server, 1)
    touch(server, 2)
    assert next(Fragile(Target(client)).records()) == PAGE


@pytest.mark.parametrize("politely", [True, False])
def test_an_end_by_the_vm_is_told(server: FakeServer, client: Client, politely: bool) -> None:
    pages = Pages(Target(client))
    pages.arm()
    if politely:
        body = bytes(kvmi.EventCommon(size=544, event=server.dialect.events[Event.UNHOOK]))
        server.send(server.dialect.vm_event, 1, body)
    else:
        server.server_end.shutdown(2)
    assert list(pages.records()) == []
    assert pages.lost


def test_stop_ends_the_records(server: FakeServer, client: Client) -> None:
    pages = Pages(Target(client))
    pages.stop()
    assert list(pages.records()) == []
    assert not pages.lost
