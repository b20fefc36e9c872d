"""Filter files of Firecracker: the JSON that its compiler of seccomp filters reads, taken for what our files can be asked.

Answers to Firecracker's `docs/seccompiler.md`. A file has a filter for each kind of thread (`vmm`, `api`, `vcpu`); the first rule that
matches a call gives `filter_action`, no match `default_action`:

    {"vcpu": {"default_action": "trap", "filter_action": "allow",
              "filter": [{"syscall": "ioctl", "args": [{"index": 1, "type": "dword", "op": "eq", "val": 44672, "comment": "KVM_RUN"}]}]}}

Rules for system calls that never come to KVM (Firecracker allows `futex` and its like) are read and left out.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from softkvm.host.call import SYS_NAMES
from softkvm.host.seccomp import THREAD_CLASSES, Action, Comparison, Filter, FilterError, Rule, Verdict

_NUMBERS = {name: nr for nr, name in SYS_NAMES.items()}
_DWORD = (1 << 32) - 1
_QWORD = (1 << 64) - 1
_DATA_LIMIT = 0xFFFF

_Simple = Literal["allow", "trap", "kill_thread", "kill_process", "log"]


class _WithData(msgspec.Struct, forbid_unknown_fields=True):
    errno: int | None = None
    trace: int | None = None


class _MaskedEq(msgspec.Struct, forbid_unknown_fields=True):
    masked_eq: int


class _Argument(msgspec.Struct, forbid_unknown_fields=True):
    index: int
    type: Literal["dword", "qword"]
    op: Literal["eq", "ge", "gt", "le", "lt", "ne"] | _MaskedEq
    val: int
    comment: str = ""


class _Rule(msgspec.Struct, forbid_unknown_fields=True):
    syscall: str
    args: list[_Argument] = []
    comment: str = ""


class _ThreadFilter(msgspec.Struct, forbid_unknown_fields=True):
    default_action: _Simple | _WithData
    filter_action: _Simple | _WithData
    filter: list[_Rule]


def parse(data: bytes | str) -> tuple[Filter, ...]:
    """The filters in JSON text, one for each kind of thread; FilterError, one sentence."""
    try:
        file = msgspec.json.decode(data, type=dict[str, _ThreadFilter])
    except msgspec.DecodeError as error:
        raise FilterError(str(error)) from error
    strange = sorted(file.keys() - set(THREAD_CLASSES))
    if strange:
        raise FilterError(f"{strange[0]!r} is no kind of thread; there are {', '.join(THREAD_CLASSES)}")
    return tuple(_filter(thread, one) for thread, one in file.items())


def _filter(thread: str, one: _ThreadFilter) -> Filter:
    verdict = _verdict(one.filter_action, f"the filter_action of {thread}")
    rules = [
        Rule(
            verdict,
            nr=_NUMBERS[rule.syscall],
            comparisons=tuple(_comparison(argument, f"rule {number} of {thread}") for argument in rule.args),
        )
        for number, rule in enumerate(one.filter, 1)
        if rule.syscall in _NUMBERS
    ]
    return Filter(rules, _verdict(one.default_action, f"the default_action of {thread}"), thread)


def _comparison(argument: _Argument, where: str) -> Comparison:
    if not 0 <= argument.index <= 5:
        raise FilterError(f"{where} has the argument index {argument.index}, which is not 0 to 5")
    width = _DWORD if argument.type == "dword" else _QWORD
    if isinstance(argument.op, _MaskedEq):
        mask = argument.op.masked_eq & width
        return Comparison("eq", argument.val & mask, argument.index, mask=mask)
    return Comparison(argument.op, argument.val & width, argument.index, mask=width)


def _verdict(action: _Simple | _WithData, where: str) -> Verdict:
    if isinstance(action, str):
        return Verdict(Action[action.upper()])
    kind, data = ("ERRNO", action.errno) if action.errno is not None else ("TRACE", action.trace)
    if data is None or not 0 <= data <= _DATA_LIMIT:
        raise FilterError(f"{where} is neither an errno nor a trace with a number of 16 bits")
    return Verdict(Action[kind], data)
