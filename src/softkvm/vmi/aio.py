"""The KVMI client for asyncio: the same requests and events, many answers awaited at once.

`async with AsyncClient(socket) as vm: registers = await vm.ask(requests.registers(0))`, and `async for event in vm.events()`.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import suppress
from types import TracebackType

from softkvm.uapi import kvmi
from softkvm.uapi.kvmi import Action, Dialect, Header
from softkvm.vmi.errors import ChannelClosed, NoAnswer
from softkvm.vmi.events import Unhook, VcpuEvent
from softkvm.vmi.requests import Request, T
from softkvm.vmi.session import HEADER_SIZE, Reply, Session

_MOST_KEPT = 1 << 16
_ANSWER_TIMEOUT = 15.0


class AsyncClient:
    """One session with a VM; an asynchronous context manager. `ask()` raises CommandFailed if the server refuses."""

    def __init__(self, connection: socket.socket, dialect: Dialect = kvmi.V9, *, timeout: float = _ANSWER_TIMEOUT) -> None:
        """`connection` is connected, and the session's from now on."""
        self._connection = connection
        self._session = Session(dialect, self._answer)
        self._timeout = timeout
        self._waiting: dict[int, asyncio.Future[Reply]] = {}
        self._events: asyncio.Queue[VcpuEvent | Unhook | ChannelClosed] = asyncio.Queue(_MOST_KEPT)
        self._end: ChannelClosed | None = None

    async def __aenter__(self) -> AsyncClient:
        self._reader, self._writer = await asyncio.open_connection(sock=self._connection)
        self._task = asyncio.create_task(self._receive())
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task
        self._writer.close()
        with suppress(OSError):
            await self._writer.wait_closed()

    async def ask(self, request: Request[T]) -> T:
        """Send a command and wait for its answer; NoAnswer if none comes in time."""
        if self._end is not None:
            raise self._end
        sequence, message = self._session.encode(request)
        answer = self._waiting[sequence] = asyncio.get_running_loop().create_future()
        try:
            self._writer.write(message)
            async with asyncio.timeout(self._timeout):
                return self._session.result(request, await answer)
        except TimeoutError:
            raise NoAnswer(f"the VM has not answered {request.command.name} in {self._timeout:g} seconds") from None
        finally:
            del self._waiting[sequence]

    async def events(self) -> AsyncIterator[VcpuEvent | Unhook]:
        """What happens, as it happens; ends with ChannelClosed with the session."""
        while True:
            event = await self._events.get()
            if isinstance(event, ChannelClosed):
                raise event
            yield event

    def _answer(self, event: VcpuEvent, action: Action, data: bytes) -> None:
        self._writer.write(self._session.encode_answer(event, action, data))

    async def _receive(self) -> None:
        try:
            while True:
                header = Header.from_buffer_copy(await self._reader.readexactly(HEADER_SIZE))
                incoming = self._session.receive(header, await self._reader.readexactly(header.size))
                if not isinstance(incoming, Reply):
                    self._events.put_nowait(incoming)
                elif (answer := self._waiting.get(incoming.sequence)) is not None and not answer.done():
                    answer.set_result(incoming)
        except asyncio.QueueFull:
            self._fail(ChannelClosed("the server floods us with events"))
        except (asyncio.IncompleteReadError, OSError):
            self._fail(ChannelClosed("the VM has closed the introspection channel"))
        except ChannelClosed as error:
            self._fail(error)

    def _fail(self, error: ChannelClosed) -> None:
        self._end = error
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(error)
        if self._events.full():
            self._events.get_nowait()
        self._events.put_nowait(error)
