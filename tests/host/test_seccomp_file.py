"""Filter files: what they mean, and one sentence for each mistake."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softkvm.host import seccomp_file
from softkvm.host.call import SYS_IOCTL, SYS_MMAP
from softkvm.host.seccomp import Action, Comparison, FilterError, Rule, Verdict
from softkvm.host.seccomp_file import parse
from softkvm.uapi import kvm as uapi


def the_rule(**rule: Any) -> Rule:
    return parse(json.dumps({"default_action": "kill_process", "rules": [{"action": "allow", **rule}]})).rules[0]


def test_rules_mean_what_they_say() -> None:
    assert the_rule() == Rule(Verdict(Action.ALLOW))
    assert the_rule(fd="vcpu", ioctl="KVM_RUN") == Rule(Verdict(Action.ALLOW), "vcpu", SYS_IOCTL, uapi.KVM_RUN)
    assert the_rule(ioctl=0xAE80).command == uapi.KVM_RUN
    assert the_rule(syscall="mmap").nr == SYS_MMAP
    assert the_rule(action={"errno": 13}).verdict == Verdict(Action.ERRNO, 13)
    assert the_rule(action={"trace": 5}).verdict == Verdict(Action.TRACE, 5)
    assert the_rule(args=[{"index": 2, "op": "le", "val": 7}]).comparisons == (Comparison("le", 7, index=2),)
    assert the_rule(args=[{"field": "slot", "op": {"masked_eq": 0xF0}, "val": 0x85}]).comparisons == (
        Comparison("eq", 0x80, field="slot", mask=0xF0),
    )


def test_example_of_the_documentation_is_right() -> None:
    text = seccomp_file.__doc__ or ""
    assert len(parse(text[text.index("{") : text.index("\n\nThe first rule")]).rules) == 3


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "malformed|truncated"),
        ("[]", "Expected `object`"),
        ('{"rules": []}', "missing required field `default_action`"),
        ('{"default_action": "maybe", "rules": []}', "maybe|Invalid"),
        ('{"default_action": "allow", "rules": [], "extra": 1}', "unknown field `extra`"),
        ('{"default_action": "allow", "rules": [{"action": "allow", "fd": "disk"}]}', "disk"),
        ('{"default_action": "allow", "rules": [{"action": "allow", "ioctl": "KVM_FLY"}]}', "rule 1 names an ioctl KVM_FLY"),
        ('{"default_action": "allow", "rules": [{"action": "allow", "ioctl": "KVM_EXIT_IO"}]}', "rule 1 names an ioctl KVM_EXIT_IO"),
        ('{"default_action": "allow", "rules": [{"action": "allow", "ioctl": "__doc__"}]}', "does not exist"),
        ('{"default_action": "allow", "rules": [{"action": "allow", "ioctl": -1}]}', "not one of 32 bits"),
        ('{"default_action": "allow", "rules": [{"action": "allow", "ioctl": 1, "syscall": "mmap"}]}', "the system call mmap"),
        ('{"default_action": "allow", "rules": [{"action": {"errno": 0}}]}', "errno 0"),
        ('{"default_action": {"errno": 5000}, "rules": []}', "errno 5000"),
        ('{"default_action": {}, "rules": []}', "neither errno nor trace"),
        ('{"default_action": "allow", "rules": [{"action": "allow", "args": [{"val": 1}]}]}', "either an index or a field"),
        ('{"default_action": "allow", "rules": [{"action": "allow", "args": [{"val": 1, "index": 6}]}]}', "index 6"),
    ],
)
def test_every_mistake_is_a_sentence(text: str, sentence: str) -> None:
    with pytest.raises(FilterError, match=sentence):
        parse(text)


@given(
    st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))
)
def test_no_json_breaks_it(value: Any) -> None:
    with pytest.raises(FilterError):
        parse(json.dumps({"default_action": "allow", "rules": [{"action": value}]} if value != "allow" else []))


def test_a_missing_file_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(FilterError, match=r"cannot be read: No such file"):
        seccomp_file.load(tmp_path / "none")
