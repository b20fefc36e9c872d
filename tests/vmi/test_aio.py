"""The asyncio client: answers by sequence number, events while answers are awaited, and the end of the session."""

from __future__ import annotations

import asyncio

import pytest

from softkvm.uapi import kvmi
from softkvm.uapi.kvmi import Command, Event
from softkvm.vmi import requests
from softkvm.vmi.aio import AsyncClient
from softkvm.vmi.errors import ChannelClosed, CommandFailed
from softkvm.vmi.events import HypercallEvent
from tests.vmi.fake_server import FakeServer


def test_answers_may_overtake_each_other() -> None:
    waiting: list[int] = []

    with FakeServer() as server:

        def hold(body: bytes) -> None:
            waiting.append(server.received[-1][1])
            if len(waiting) == 2:
                for number in reversed(waiting):
                    server.send(Command.VCPU_GET_XCR, number, bytes(kvmi.ErrorCode()) + bytes(kvmi.GetXcrReply(value=number)))

        server.handlers[Command.VCPU_GET_XCR] = hold

        async def run() -> list[int]:
            async with AsyncClient(server.client_end) as client:
                return list(await asyncio.gather(client.ask(requests.xcr0(0)), client.ask(requests.xcr0(1))))

        assert asyncio.run(run()) == waiting


def test_events_and_refusals() -> None:
    with FakeServer() as server:

        async def run() -> None:
            async with AsyncClient(server.client_end) as client:
                with pytest.raises(CommandFailed):
                    await client.ask(requests.xcr0(0))
                server.send_event(Event.HYPERCALL)
                async for event in client.events():
                    assert isinstance(event, HypercallEvent)
                    event.continue_()
                    break
                await asyncio.to_thread(server.wait_for, None)

        asyncio.run(run())


def test_the_end_of_the_session_reaches_everybody() -> None:
    with FakeServer() as server:
        server.handlers[Command.VCPU_GET_XCR] = lambda body: server.server_end.close()

        async def run() -> None:
            async with AsyncClient(server.client_end) as client:
                with pytest.raises(ChannelClosed):
                    await client.ask(requests.xcr0(0))
                with pytest.raises(ChannelClosed):
                    await anext(client.events())
                with pytest.raises(ChannelClosed):
                    await client.ask(requests.xcr0(0))

        asyncio.run(run())
