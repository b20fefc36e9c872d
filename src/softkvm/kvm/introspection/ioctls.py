"""The ioctls of introspection on a VM's file, three times: their numbers tell which dialect the VMM was built for.

Answers to `kvmi_ioctl_*()` of "VM introspection" v9, patches 38, 39 and 44, and `Documentation/virt/kvm/api.rst` there.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from softkvm.kvm.introspection.direct_channel import DirectChannel, Handler
from softkvm.kvm.introspection.session import Session
from softkvm.kvm.introspection.socket_channel import SocketChannel, adopt
from softkvm.kvm.ioctl import KvmFile, fields, ioctl, takes
from softkvm.uapi import kvmi
from softkvm.uapi.kvmi import ALWAYS_ALLOWED, Command, Dialect, Event

if TYPE_CHECKING:
    from softkvm.kvm.vcpu import Vcpu
    from softkvm.kvm.vm import Vm

_ALL = -1
_Id = TypeVar("_Id", Command, Event)


class IntrospectedFile(KvmFile):
    """The part of a VM's file that introspection adds."""

    introspection: Session | None = None
    _hook_lock: threading.Lock
    vcpus: list[Vcpu]

    def _hook(self, dialect: Dialect, hook: kvmi.Hook, allow_all: bool) -> None:
        if hook.padding:
            raise OSError(errno.EINVAL, "padding is not zero")
        own = adopt(hook.fd)
        try:
            session = self._begin(dialect)
        except OSError:
            own.close()
            raise
        if allow_all:
            _allow_all(session)
        channel = SocketChannel(session, own)
        session.open(channel)
        channel.start()

    def _begin(self, dialect: Dialect) -> Session:
        """A session in place of none; OSError(EEXIST) if there is one, or a vCPU has not yet left the last one."""
        with self._hook_lock:
            if self.introspection is not None or any(vcpu.introspection is not None for vcpu in self.vcpus):
                raise OSError(errno.EEXIST, "the VM is introspected already")
            self.introspection = session = Session(self._as_vm(), dialect)
        return session

    def _as_vm(self) -> Vm:
        raise NotImplementedError

    def introspect(self, handler: Handler) -> DirectChannel:
        """Hook a tool of this process without a socket: everything is allowed; OSError(EEXIST) if the VM is introspected already."""
        session = self._begin(kvmi.V9)
        _allow_all(session)
        channel = DirectChannel(session, handler)
        session.open(channel)
        return channel

    def set_introspection_timeout(self, seconds: float) -> None:
        """How long a vCPU waits for the answer to an event before the tool is given up, 0 for ever; OSError(EFAULT) if not hooked."""
        self._need_session().reply_timeout = seconds

    def waits_for_tool(self) -> bool:
        """Whether a vCPU waits for the tool's answer to an event now."""
        session = self.introspection
        return session is not None and any(vcpu.waiting is not None for vcpu in session.vcpus)

    def introspection_leave(self, session: Session) -> None:
        """End that session, if it is still the VM's."""
        with self._hook_lock:
            if self.introspection is not session:
                return
            self.introspection = None
        session.end()

    def _unhook(self) -> None:
        session = self.introspection
        if session is not None:
            self.introspection_leave(session)

    def preunhook(self) -> None:
        """Send the UNHOOK event; OSError as KVM_INTROSPECTION_PREUNHOOK."""
        session = self._need_session()
        if not session.announce_end():
            raise OSError(errno.ENOENT, "the tool does not want to know")

    def _need_session(self) -> Session:
        if self.introspection is None:
            raise OSError(errno.EFAULT, "the VM is not introspected")
        return self.introspection

    def _allow_command(self, dialect: Dialect, allow: int, number: int) -> None:
        chosen = _chosen(dialect.by_id, allow, number)
        session = self._need_session()
        if not allow and number != _ALL and chosen & ALWAYS_ALLOWED:
            raise OSError(errno.EPERM, "the queries are always allowed")
        session.allow_commands(chosen, bool(allow))

    def _allow_event(self, dialect: Dialect, allow: int, number: int) -> None:
        chosen = _chosen(dialect.event_by_id, allow, number)
        self._need_session().allow_events(chosen, bool(allow))


def _allow_all(session: Session) -> None:
    session.allow_commands(frozenset(session.dialect.commands), True)
    session.allow_events(frozenset(session.dialect.events), True)


def _chosen(known: Any, allow: int, number: int) -> frozenset[Any]:
    """The command or event with a number, all for -1; OSError(EINVAL) for another one, or an `allow` that is neither 0 nor 1."""
    if allow > 1 or (number != _ALL and number not in known):
        raise OSError(errno.EINVAL, "no such command or event")
    return frozenset(known.values()) if number == _ALL else frozenset({known[number]})


def _hook(dialect: Dialect) -> Callable[..., None]:
    @ioctl(dialect.ioctls.hook, takes(kvmi.Hook))
    def introspection_hook(self: IntrospectedFile, hook: kvmi.Hook, allow_all: bool = False) -> None:
        """KVM_INTROSPECTION_HOOK: give KVM the tool's socket; OSError EINVAL for padding or no stream socket, EEXIST if there is one.

        `allow_all` allows every command and event before the tool's first message is read, which the ioctls behind this one cannot.
        """
        self._hook(dialect, hook, allow_all)

    return introspection_hook


def _unhook(dialect: Dialect) -> Callable[[IntrospectedFile], None]:
    @ioctl(dialect.ioctls.unhook)
    def introspection_unhook(self: IntrospectedFile) -> None:
        """KVM_INTROSPECTION_UNHOOK: end it; no error if there is nothing to end."""
        self._unhook()

    return introspection_unhook


def _preunhook(dialect: Dialect) -> Callable[[IntrospectedFile], None]:
    @ioctl(dialect.ioctls.preunhook)
    def introspection_preunhook(self: IntrospectedFile) -> None:
        """KVM_INTROSPECTION_PREUNHOOK: tell the tool to leave; OSError EFAULT if not hooked, ENOENT if it cannot or will not be told."""
        self.preunhook()

    return introspection_preunhook


def _command(dialect: Dialect) -> Callable[[IntrospectedFile, int, int], None]:
    @ioctl(dialect.ioctls.command, fields(kvmi.Feature, "allow", "id"))
    def introspection_command(self: IntrospectedFile, allow: int, id: int) -> None:
        """KVM_INTROSPECTION_COMMAND: allow (1) or disallow (0) a command, -1 for all; OSError EINVAL, EFAULT if not hooked, EPERM."""
        self._allow_command(dialect, allow, id)

    return introspection_command


def _event(dialect: Dialect) -> Callable[[IntrospectedFile, int, int], None]:
    @ioctl(dialect.ioctls.event, fields(kvmi.Feature, "allow", "id"))
    def introspection_event(self: IntrospectedFile, allow: int, id: int) -> None:
        """KVM_INTROSPECTION_EVENT: allow (1) or disallow (0) an event, -1 for all; OSError EINVAL, EFAULT if not hooked."""
        self._allow_event(dialect, allow, id)

    return introspection_event


class IntrospectionIoctls(IntrospectedFile):
    """The methods behind the numbers of all dialects."""

    introspection_hook = _hook(kvmi.V9)
    introspection_unhook = _unhook(kvmi.V9)
    introspection_preunhook = _preunhook(kvmi.V9)
    introspection_command = _command(kvmi.V9)
    introspection_event = _event(kvmi.V9)
    introspection_hook_libkvmi = _hook(kvmi.LIBKVMI)
    introspection_unhook_libkvmi = _unhook(kvmi.LIBKVMI)
    introspection_preunhook_libkvmi = _preunhook(kvmi.LIBKVMI)
    introspection_command_libkvmi = _command(kvmi.LIBKVMI)
    introspection_event_libkvmi = _event(kvmi.LIBKVMI)
    introspection_hook_v12 = _hook(kvmi.V12)
    introspection_unhook_v12 = _unhook(kvmi.V12)
    introspection_preunhook_v12 = _preunhook(kvmi.V12)
    introspection_command_v12 = _command(kvmi.V12)
    introspection_event_v12 = _event(kvmi.V12)
