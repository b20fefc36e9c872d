"""The tool at the other end of a stream socket: the receiver thread, and messages out.

Answers to `kvmi_recv_thread()` and `kvmi_sock_{read,write}()` of "VM introspection" v9, patch 40. The peer may be hostile, slow, silent or
gone: what it can occupy is one message of memory here, a bounded number of jobs per vCPU, and a bounded time of whoever sends to it.
"""

from __future__ import annotations

import os
import select
import socket
import stat
import struct
import threading
import time
from contextlib import suppress
from ctypes import Structure
from errno import EINVAL
from typing import TYPE_CHECKING

from softkvm.kvm.introspection import arch, codec
from softkvm.kvm.introspection.dispatch import Work, prepare
from softkvm.kvm.introspection.failures import Broken, Refused
from softkvm.kvm.introspection.vm_commands import Data, answers_with_data
from softkvm.uapi import kvmi
from softkvm.uapi.kvmi import Command, Error, Event, Reply

if TYPE_CHECKING:
    from softkvm.kvm.introspection.session import Session
    from softkvm.kvm.introspection.vcpu import VcpuIntrospection

SEND_TIMEOUT = 10
"""Seconds that a peer may leave a message of ours unread; then it is closed."""
_AWAKE = 100e-6
"""Seconds that a vCPU looks for an answer before it sleeps."""
_RECEIVE = 1 << 16
_LOOK_UP = 200_000
"""Microseconds after which whoever reads the socket looks at the time."""
_LENT = 0.001
"""Seconds for which the receiver leaves the socket to vCPUs after one has read it."""


def adopt(fd: int) -> socket.socket:
    """The stream socket behind a descriptor, of which the caller keeps its own; OSError(EINVAL) if it is none."""
    try:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            raise OSError(EINVAL, "not a socket")
        own = socket.socket(fileno=os.dup(fd))
    except OSError:
        raise OSError(EINVAL, "not a socket") from None
    if own.type != socket.SOCK_STREAM:
        own.close()
        raise OSError(EINVAL, "not a stream socket")
    own.setblocking(True)
    own.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", SEND_TIMEOUT, 0))
    own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", 0, _LOOK_UP))
    return own


class SocketChannel:
    """The connection of one session."""

    def __init__(self, session: Session, own: socket.socket) -> None:
        """Takes the socket over; nothing is read before `start()`."""
        self._session = session
        self._socket = own
        self._send_lock = threading.Lock()
        self._responding = True
        self._turn = threading.Lock()
        """Whose it is reads the socket."""
        self._buffer = b""
        self._lent_until = 0.0
        self._reader: VcpuIntrospection | None = None
        """The vCPU whose thread reads the socket."""
        self._thread = threading.Thread(target=self._receive, name="softkvm-kvmi-recv", daemon=True)

    def start(self) -> None:
        """Begin to serve the tool."""
        self._thread.start()

    def close(self) -> None:
        """Shut both directions, which ends the receiver; it closes the socket."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # the peer was faster

    # --- Out ------------------------------------------------------------------------------------------------------------------------

    def deliver(self, vcpu: VcpuIntrospection, event: Event, seq: int, data: Structure | None) -> Reply | None:
        """Send an event; the answer comes as a message."""
        body = b"" if data is None else bytes(data)
        self._send(codec.vcpu_event(self._session.dialect, event, seq, vcpu.index, arch.event(vcpu.vcpu), body))
        return None

    def notify(self, event: Event, seq: int) -> None:
        """Send an event that has no answer."""
        self._send(codec.vm_event(self._session.dialect, event, seq))

    def _send(self, message: bytes, fds: tuple[int, ...] = ()) -> None:
        """All of a message, in one call unless the socket's buffer is full; Broken if it cannot be."""
        try:
            with self._send_lock:
                sent = socket.send_fds(self._socket, [message], fds) if fds else self._socket.send(message)
                if sent < len(message):
                    self._socket.sendall(memoryview(message)[sent:])
        except OSError as error:
            raise Broken(f"a message cannot be sent: {error.strerror}") from None

    # --- In -------------------------------------------------------------------------------------------------------------------------

    def wait(self, vcpu: VcpuIntrospection, deadline: float | None) -> None:
        """A vCPU that waits reads the socket itself, if no other one does: that saves two switches of threads for each event."""
        if not self._turn.acquire(blocking=False):
            return vcpu.wait_for_job(deadline)
        self._reader, self._lent_until = vcpu, time.monotonic() + _LENT
        try:
            if not self._await():
                self._session.lose(self)
        except BlockingIOError:  # SO_RCVTIMEO is over
            if deadline is not None and time.monotonic() > deadline:
                raise Broken(f"no answer to an event of vCPU {vcpu.index} in time") from None
        finally:
            self._reader, self._lent_until = None, time.monotonic() + _LENT
            self._turn.release()
        return None

    def _receive(self) -> None:
        """The receiver thread. While vCPUs read for themselves it stays away from the socket."""
        session, poll = self._session, select.poll()
        poll.register(self._socket, select.POLLIN)
        try:
            while session.channel is self:
                if (lent := self._lent_until - time.monotonic()) > 0:
                    time.sleep(lent)
                    continue
                poll.poll()
                with self._turn, suppress(BlockingIOError):  # somebody else was faster
                    if self._lent_until < time.monotonic() and not self._read(socket.MSG_DONTWAIT):
                        session.lose(self)
        except Broken as error:
            session.lose(self, str(error))
        with self._turn:
            self.close()  # the VMM's copy of the descriptor would keep the connection
            self._socket.close()

    def _await(self) -> bool:
        """`_read()` of a vCPU: it stays awake for a quick tool, as KVM for an interrupt (`halt_poll_ns`), because waking takes long."""
        until = time.monotonic() + _AWAKE
        while time.monotonic() < until:
            with suppress(BlockingIOError):
                return self._read(socket.MSG_DONTWAIT)
        return self._read(0)

    def _read(self, flags: int) -> bool:
        """Take what is there, and act on the messages that are whole; False if the peer has ended the stream.

        Broken; BlockingIOError if nothing comes.
        """
        try:
            data = self._socket.recv(_RECEIVE, flags)
        except BlockingIOError:
            raise
        except OSError:
            data = b""
        if not data and self._buffer:
            raise Broken("the stream ends inside a message")
        buffer, at = self._buffer + data, 0
        while len(buffer) - at >= codec.HEADER.size:
            number, size, seq = codec.HEADER.unpack_from(buffer, at)
            if size > kvmi.MAX_MESSAGE:
                raise Broken(f"a message of {size} bytes")
            start, end = at + codec.HEADER.size, at + codec.HEADER.size + size
            if len(buffer) < end:
                break
            self._handle(number, seq, buffer[start:end])
            at = end
        self._buffer = buffer[at:]
        return bool(data)

    def _handle(self, number: int, seq: int, body: bytes) -> None:
        session = self._session
        dialect = session.dialect
        if number == dialect.event_reply:
            return self._take_reply(seq, body)
        command = dialect.by_id.get(number)
        if command is Command.CONTROL_CMD_RESPONSE:
            return self._control_response(number, seq, body)
        respond = self._responding
        try:
            if command is None:
                raise Refused(Error.ENOSYS)
            vcpu, work = prepare(session, command, body)
        except Refused as refusal:
            if not respond:
                raise Broken(f"message {number} fails, and the peer wants no answers") from None
            return self._send(codec.command_reply(number, seq, refusal.error))
        if not respond and answers_with_data(dialect, command):
            raise Broken(f"{command.name} has an answer, and the peer wants none")
        if vcpu is None:
            return self._finish(number, seq, work, respond)
        return vcpu.post(lambda: self._finish(number, seq, work, respond))

    def _finish(self, number: int, seq: int, work: Work, respond: bool) -> None:
        """Do a command, on whichever thread, and answer it."""
        error, data = 0, Data(b"")
        try:
            result = work()
            data = result if isinstance(result, Data) else Data(result)
        except Refused as refusal:
            error = refusal.error
        except Broken as broken:
            return self._session.lose(self, str(broken))
        try:
            if respond:
                self._send(codec.command_reply(number, seq, error, data.body), data.fds)
        except Broken as broken:
            self._session.lose(self, str(broken))
        finally:
            for fd in data.fds:
                os.close(fd)

    def _control_response(self, number: int, seq: int, body: bytes) -> None:
        """libkvmi's way to have a batch of commands answered once."""
        try:
            request = codec.parse(kvmi.ControlCmdResponse, body)
            if request.enable > 1 or request.now > 1:
                raise Refused(Error.EINVAL)
        except Refused as refusal:
            return self._send(codec.command_reply(number, seq, refusal.error))
        answered = bool(request.enable) if request.now else self._responding
        self._responding = bool(request.enable)
        return self._send(codec.command_reply(number, seq, 0)) if answered else None

    def _take_reply(self, seq: int, body: bytes) -> None:
        """The answer to an event: a job like any other, so that commands before it are done before."""
        index, clean = codec.vcpu_header(body)
        if not clean or index >= len(self._session.vcpus):
            raise Broken("an event's reply names no vCPU")
        vcpu = self._session.vcpus[index]
        event = vcpu.waiting
        if event is None or seq != vcpu.awaited:
            raise Broken(f"an event's reply with number {seq}, which nobody waits for")
        reply = codec.event_reply(self._session.dialect, event, body)
        if vcpu is self._reader and vcpu.is_idle:
            vcpu.take(seq, reply)
        else:
            vcpu.post(lambda: self._answer(vcpu, seq, reply))

    def _answer(self, vcpu: VcpuIntrospection, seq: int, reply: Reply) -> None:
        try:
            vcpu.take(seq, reply)
        except Broken as broken:
            self._session.lose(self, str(broken))
