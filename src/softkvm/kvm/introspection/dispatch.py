"""From a command's number to its handler, with every check in between, in the order that the protocol has.

Answers to `kvmi_msg_process()` of "VM introspection" v9, patches 40, 42, 47 and 53: known? allowed? header's padding? such a vCPU? is it
initialised? then the command's own checks, of which padding comes first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from softkvm.kvm.introspection import vcpu_commands, vm_commands
from softkvm.kvm.introspection.codec import parse, vcpu_header
from softkvm.kvm.introspection.failures import Refused
from softkvm.kvm.introspection.session import Session
from softkvm.kvm.introspection.vcpu import VcpuIntrospection
from softkvm.kvm.introspection.vm_commands import Data
from softkvm.uapi import kvmi
from softkvm.uapi.kvm import KVM_MP_STATE_UNINITIALIZED
from softkvm.uapi.kvmi import Command, Error, Event

Work = Callable[[], bytes | Data]
"""The rest of a command: its answer's data, or Refused or Broken."""

_VCPU_HEADER = 8


def prepare(session: Session, command: Command, body: bytes) -> tuple[VcpuIntrospection | None, Work]:
    """What is to be done for a message, and by which vCPU, None for at once; Refused if it may not be."""
    if command not in session.allowed_commands:
        raise Refused(Error.EPERM)
    if command is Command.VCPU_PAUSE:
        return None, lambda: _pause(session, body)
    if command not in session.dialect.vcpu_commands:
        return None, lambda: vm_commands.COMMANDS[command](session, *_split(session, command, body))
    index, clean = vcpu_header(body)
    if not clean or index >= len(session.vcpus):
        raise Refused(Error.EINVAL)
    vcpu = session.vcpus[index]
    if vcpu.vcpu.mp_state == KVM_MP_STATE_UNINITIALIZED and vcpu.waiting is None:
        raise Refused(Error.EAGAIN)
    return vcpu, lambda: vcpu_commands.COMMANDS[command](vcpu, *_split(session, command, body[_VCPU_HEADER:]))


def _split(session: Session, command: Command, body: bytes) -> tuple[Any, bytes]:
    """The request, and what trails it."""
    layout = session.dialect.messages[command].request
    if layout is None:
        return None, body
    request = parse(layout, body)
    return request, body[len(bytes(request)) :]


def _pause(session: Session, body: bytes) -> bytes:
    """VCPU_PAUSE: EINVAL, then EPERM if the event is disallowed, then the vCPU; answered, with `wait`, when it is out of the guest."""
    request: kvmi.Pause | kvmi.PauseV12
    if Command.VCPU_PAUSE in session.dialect.vcpu_commands:
        index, clean = vcpu_header(body)
        request = parse(kvmi.Pause, body[_VCPU_HEADER:])
    else:
        request = parse(kvmi.PauseV12, body)
        index, clean = request.vcpu, True
    if not clean or request.wait > 1:
        raise Refused(Error.EINVAL)
    if Event.PAUSE_VCPU not in session.allowed_events:
        raise Refused(Error.EPERM)
    if index >= len(session.vcpus):
        raise Refused(Error.EINVAL)
    vcpu = session.vcpus[index]
    if not vcpu.pause():
        raise Refused(Error.EBUSY)
    if request.wait:
        vcpu.wait_until_out()
    return b""
