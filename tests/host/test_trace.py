"""Tracepoints: silent until somebody listens, and silent again afterwards."""

from __future__ import annotations

import pytest

from softkvm.host import entry, trace
from softkvm.host.task import Task


def test_tracepoints_are_off_until_somebody_listens() -> None:
    hits: list[tuple[int, tuple[object, ...]]] = []
    probe = lambda nr, args: hits.append((nr, args))  # noqa: E731
    assert not trace.sys_enter.enabled
    trace.sys_enter.register(probe)
    assert trace.sys_enter.enabled
    entry.syscall(Task(), 3, ("a",), lambda argument: None)
    trace.sys_enter.unregister(probe)
    assert not trace.sys_enter.enabled
    assert hits == [(3, ("a",))]


def test_points_are_registered_by_name_and_refuse_strangers() -> None:
    assert trace.registry["kvm_exit"] is trace.kvm_exit
    with pytest.raises(ValueError, match="not in list"):
        trace.kvm_exit.unregister(print)
