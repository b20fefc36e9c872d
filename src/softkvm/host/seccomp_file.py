"""Filter files: the JSON form of an ioctl filter, after the manner of Firecracker's.

    {"default_action": "kill_process",
     "rules": [{"fd": "vcpu", "ioctl": "KVM_RUN", "action": "allow"},
               {"fd": "vm", "ioctl": "KVM_IRQ_LINE", "args": [{"field": "gsi", "op": "gt", "val": 23}], "action": {"errno": 22}},
               {"syscall": "mmap", "action": "allow"}]}

The first rule that matches decides. Without `fd`, `ioctl`, `syscall` or `args` a rule matches any. An ioctl is a name or its full number.
A comparison names a `field` (a parameter or a structure's member) or an `index` (0 the descriptor, 1 the command, 2 the argument); `op` is
eq, ne, lt, le, gt, ge or `{"masked_eq": MASK}`. Actions: allow, log, trap, kill_thread, kill_process, user_notif,
`{"errno": N}`, `{"trace": N}`.

Firecracker's own files are taken as well (`host/firecracker_filter.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from softkvm.host import firecracker_filter
from softkvm.host.call import SYS_IOCTL, SYS_NAMES
from softkvm.host.seccomp import Action, Comparison, Filter, FilterError, Rule, Verdict
from softkvm.uapi import kvm as uapi

_KVMIO = 0xAE
_MAX_ERRNO = 4095
_NUMBERS = {name: nr for nr, name in SYS_NAMES.items()}

Simple = Literal["allow", "log", "trap", "kill_thread", "kill_process", "user_notif"]


class _Errno(msgspec.Struct, forbid_unknown_fields=True, tag_field=None):
    errno: int | None = None
    trace: int | None = None


class _MaskedEq(msgspec.Struct, forbid_unknown_fields=True):
    masked_eq: int


class _Comparison(msgspec.Struct, forbid_unknown_fields=True):
    val: int
    op: Literal["eq", "ne", "lt", "le", "gt", "ge"] | _MaskedEq = "eq"
    index: int | None = None
    field: str | None = None
    comment: str = ""


class _Rule(msgspec.Struct, forbid_unknown_fields=True):
    action: Simple | _Errno
    fd: Literal["system", "vm", "vcpu"] | None = None
    ioctl: str | int | None = None
    syscall: Literal["ioctl", "mmap", "read", "poll"] | None = None
    args: list[_Comparison] = []
    comment: str = ""


class _File(msgspec.Struct, forbid_unknown_fields=True):
    default_action: Simple | _Errno
    rules: list[_Rule]
    comment: str = ""


def load(path: str | Path) -> tuple[Filter, ...]:
    """The filters in a file, ours or Firecracker's; FilterError, one sentence, for a file that is missing or wrong."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise FilterError(f"the ioctl filter {path} cannot be read: {error.strerror}") from error
    try:
        return firecracker_filter.parse(data) if _is_firecrackers(data) else (parse(data),)
    except FilterError as error:
        raise FilterError(f"the ioctl filter {path} is wrong: {error}") from error


def _is_firecrackers(data: bytes) -> bool:
    """Whether the file is an object of filters by kind of thread, and not one filter."""
    try:
        keys = msgspec.json.decode(data, type=dict[str, msgspec.Raw]).keys()
    except msgspec.DecodeError:
        return False
    return bool(keys) and keys.isdisjoint(_File.__struct_fields__)


def parse(data: bytes | str) -> Filter:
    """The filter in JSON text; FilterError."""
    try:
        file = msgspec.json.decode(data, type=_File)
    except msgspec.DecodeError as error:
        raise FilterError(str(error)) from error
    rules = [_rule(rule, f"rule {number}") for number, rule in enumerate(file.rules, 1)]
    return Filter(rules, _verdict(file.default_action, "default_action"))


def _rule(rule: _Rule, where: str) -> Rule:
    if rule.ioctl is not None and rule.syscall not in (None, "ioctl"):
        raise FilterError(f"{where} names the ioctl {rule.ioctl} and the system call {rule.syscall}")
    nr = SYS_IOCTL if rule.ioctl is not None else _NUMBERS[rule.syscall] if rule.syscall is not None else None
    comparisons = tuple(_comparison(one, where) for one in rule.args)
    return Rule(_verdict(rule.action, where), rule.fd, nr, _command(rule.ioctl, where), comparisons)


def _command(ioctl: str | int | None, where: str) -> int | None:
    if isinstance(ioctl, str):
        number = getattr(uapi, ioctl, None) if ioctl.startswith("KVM_") else None
        if not isinstance(number, int) or number >> 8 & 0xFF != _KVMIO:
            raise FilterError(f"{where} names an ioctl {ioctl}, which does not exist")
        return number
    if ioctl is not None and not 0 <= ioctl < 1 << 32:
        raise FilterError(f"{where} has the ioctl number {ioctl}, which is not one of 32 bits")
    return ioctl


def _comparison(one: _Comparison, where: str) -> Comparison:
    if (one.index is None) == (one.field is None):
        raise FilterError(f"{where} needs either an index or a field in each of its args")
    if one.index is not None and not 0 <= one.index <= 5:
        raise FilterError(f"{where} has the argument index {one.index}, which is not 0 to 5")
    if isinstance(one.op, _MaskedEq):
        return Comparison("eq", one.val & one.op.masked_eq, one.index, one.field, one.op.masked_eq)
    return Comparison(one.op, one.val, one.index, one.field)


def _verdict(action: Simple | _Errno, where: str) -> Verdict:
    if isinstance(action, str):
        return Verdict(Action[action.upper()])
    if (action.errno is None) == (action.trace is None):
        raise FilterError(f"{where} has an action that is neither errno nor trace")
    if action.errno is None:
        return Verdict(Action.TRACE, (action.trace or 0) & 0xFFFF)
    if not 0 < action.errno <= _MAX_ERRNO:
        raise FilterError(f"{where} has the errno {action.errno}, which is not 1 to {_MAX_ERRNO}")
    return Verdict(Action.ERRNO, action.errno)
