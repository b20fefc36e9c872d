"""Filter files of Firecracker, in the form that its documentation describes."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softkvm.host import firecracker_filter, seccomp_file
from softkvm.host.call import SYS_IOCTL, Call
from softkvm.host.seccomp import Action, FilterError, Verdict, judge, thread_class
from softkvm.uapi import kvm as uapi
from tests.host.doubles import File

FILE: dict[str, Any] = {
    "vmm": {
        "default_action": "trap",
        "filter_action": "allow",
        "filter": [{"syscall": "ioctl", "comment": "any"}, {"syscall": "futex"}],
    },
    "api": {"default_action": {"errno": 1}, "filter_action": "allow", "filter": []},
    "vcpu": {
        "default_action": "trap",
        "filter_action": "allow",
        "filter": [
            {"syscall": "exit"},
            {"syscall": "ioctl", "args": [{"index": 1, "type": "dword", "op": "eq", "val": 44672, "comment": "KVM_RUN"}]},
            {"syscall": "ioctl", "args": [{"index": 1, "type": "dword", "op": {"masked_eq": 0xFF00}, "val": 0xAF00}]},
        ],
    },
}


def verdict(command: int, comm: str) -> Verdict:
    return judge(firecracker_filter.parse(json.dumps(FILE)), Call(File(), SYS_IOCTL, command, (), lambda file: None), comm)


@pytest.mark.parametrize(
    ("comm", "command", "action"),
    [
        ("softkvm-vcpu0", uapi.KVM_RUN, Action.ALLOW),
        ("fc_vcpu 1", uapi.KVM_RUN | 1 << 40, Action.ALLOW),  # a dword: the upper half does not count
        ("fc_vcpu 1", uapi.KVM_CREATE_VM, Action.TRAP),
        ("fc_vcpu 1", 0xAF03, Action.ALLOW),
        ("fc_api", uapi.KVM_RUN, Action.ERRNO),
        ("MainThread", uapi.KVM_CREATE_VM, Action.ALLOW),
    ],
)
def test_each_kind_of_thread_has_its_filter(comm: str, command: int, action: Action) -> None:
    assert verdict(command, comm).action is action


def test_threads_by_their_names() -> None:
    assert [thread_class(name) for name in ("MainThread", "fc_api", "softkvm-vcpu3", "")] == ["vmm", "api", "vcpu", "vmm"]


def test_either_kind_of_file_can_be_loaded(tmp_path: Path) -> None:
    path = tmp_path / "filter.json"
    path.write_text(json.dumps(FILE))
    assert [one.thread for one in seccomp_file.load(path)] == ["vmm", "api", "vcpu"]
    path.write_text('{"default_action": "log", "rules": []}')
    assert [one.thread for one in seccomp_file.load(path)] == [None]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"gpu": FILE["api"]}, "'gpu' is no kind of thread; there are vmm, api, vcpu"),
        ({"vmm": {"default_action": "trap", "filter_action": "allow"}}, "missing required field `filter`"),
        ({"vmm": {**FILE["vmm"], "default_action": "explode"}}, "explode|Invalid"),
        ({"vmm": {**FILE["vmm"], "default_action": {"errno": 1 << 16}}}, "the default_action of vmm is neither"),
        (
            {"vmm": {**FILE["vmm"], "filter": [{"syscall": "ioctl", "args": [{"index": 9, "type": "qword", "op": "eq", "val": 0}]}]}},
            "rule 1 of vmm has the argument index 9",
        ),
        ({"vmm": {**FILE["vmm"], "filter": [{"syscall": "ioctl", "args": [{"index": 1, "op": "eq", "val": 0}]}]}}, "type"),
    ],
)
def test_a_wrong_file_is_one_sentence(tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    path = tmp_path / "filter.json"
    path.write_text(json.dumps(change))
    with pytest.raises(FilterError, match=sentence):
        seccomp_file.load(path)


documents = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5), lambda inner: st.dictionaries(st.text(max_size=5), inner)
)


@given(documents)
def test_no_file_raises_anything_else(document: object) -> None:
    with contextlib.suppress(FilterError):
        firecracker_filter.parse(json.dumps(document))
