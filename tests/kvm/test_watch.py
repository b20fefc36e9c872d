"""A VM entry that somebody watches, and one that nobody does."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from softkvm.host import context_tracking, entry, trace
from softkvm.host.task import current
from softkvm.kvm import Vcpu
from softkvm.silicon import control
from softkvm.uapi import kvm as uapi
from tests import fake_engine
from tests.kvm.conftest import Script
from tests.kvm.guest import leave, out_of_guest

Hits = list[tuple[object, ...]]


@pytest.fixture
def listen(request: pytest.FixtureRequest) -> Callable[[trace.Tracepoint], Hits]:
    """Record an event until the test is over."""

    def register(point: trace.Tracepoint) -> Hits:
        hits: Hits = []

        def probe(*values: object) -> None:
            hits.append(values)

        point.register(probe)
        request.addfinalizer(lambda: point.unregister(probe))
        return hits

    return register


def test_an_entry_that_nobody_watches_is_the_cores_own(vcpu: Vcpu) -> None:
    vcpu.load()
    assert vcpu.cpu is not None
    assert vcpu.enter.func == vcpu.cpu.core.enter  # type: ignore[attr-defined]
    assert vcpu.process.cross is entry.syscall_bare
    context_tracking.enable()
    assert vcpu.enter.func != vcpu.cpu.core.enter  # type: ignore[attr-defined]
    context_tracking.disable()
    assert vcpu.enter.func == vcpu.cpu.core.enter  # type: ignore[attr-defined]


def test_entry_and_exit_are_traced_around_the_guest(vcpu: Vcpu, play: Script, listen: Callable[[trace.Tracepoint], Hits]) -> None:
    entries, exits = listen(trace.kvm_entry), listen(trace.kvm_exit)
    vcpu.state.rip = 0x1000
    out_of_guest(vcpu, play, leave(vcpu, "cpuid", 2, qualification=7))
    assert [hit[1] for hit in entries] == [0x1000, 0x1002]
    isa = trace.ISA_VMX if vcpu.model.vendor == "intel" else trace.ISA_SVM
    assert exits[0][1:4] == (0x1000, isa, 7)
    assert " CPUID " in trace.kvm_exit.print(*exits[0])


def test_cpuid_is_traced_with_what_the_guest_gets(vcpu: Vcpu, play: Script, listen: Callable[[trace.Tracepoint], Hits]) -> None:
    hits = listen(trace.kvm_cpuid)
    vcpu.gpr[0], vcpu.gpr[1] = 1, 0
    out_of_guest(vcpu, play, leave(vcpu, "cpuid", 2))
    assert hits == [(1, 0, *vcpu.cpuid.execute(1, 0), True, False)]


def test_cpuid_beyond_the_last_leaf_is_traced_as_such(vcpu: Vcpu, play: Script, listen: Callable[[trace.Tracepoint], Hits]) -> None:
    """Intel answers with the last basic leaf, AMD with zeros."""
    hits = listen(trace.kvm_cpuid)
    basic = [entry for entry in vcpu.get_cpuid2() if entry.function in (0, 1)]
    basic[0].eax = 1
    vcpu.set_cpuid2(basic)
    vcpu.gpr[0], vcpu.gpr[1] = 0x4FFF, 0
    out_of_guest(vcpu, play, leave(vcpu, "cpuid", 2))
    assert hits[0][6:] == (False, vcpu.model.vendor == "intel")


def test_the_return_to_user_space_is_traced(vcpu: Vcpu, play: Script, listen: Callable[[trace.Tracepoint], Hits]) -> None:
    returns = listen(trace.kvm_userspace_exit)
    out_of_guest(vcpu, play)
    assert returns == [(uapi.KVM_EXIT_SHUTDOWN, 0)]


def test_a_hook_that_is_turned_on_in_the_guest_counts_from_the_next_entry(
    vcpu: Vcpu, play: Script, listen: Callable[[trace.Tracepoint], Hits]
) -> None:
    heard: list[Hits] = []

    def turn_on(view: control.ControlBlock) -> int | None:
        heard.append(listen(trace.kvm_entry))
        return leave(vcpu, "cpuid", 2)(view)

    out_of_guest(vcpu, play, turn_on)
    assert len(heard[0]) == 1
    task = current()
    assert (task.irqs_off, task.lockdep_irqs_off, task.call) == (False, False, None)


def test_what_a_probe_raises_comes_out_of_kvm_run(vcpu: Vcpu, play: Script) -> None:
    def probe(*values: object) -> None:
        raise RuntimeError("the probe's bug")

    step: fake_engine.Step = leave(vcpu, "cpuid", 2)
    play(step)
    trace.kvm_exit.register(probe)
    try:
        with pytest.raises(RuntimeError, match="the probe's bug"):
            vcpu.run()
    finally:
        trace.kvm_exit.unregister(probe)
    task = current()
    assert (task.irqs_off, task.lockdep_irqs_off, task.call, task.guest) == (False, False, None, None)


def test_the_vcpus_pages_are_mapped_by_mmap(vcpu: Vcpu) -> None:
    area = vcpu.mmap(12288)
    area[4096] = 7
    assert vcpu.pio_data[0] == 7
    for length, offset in ((0, 0), (4096, 12288), (4096, 1), (16384, 0), (4096, -4096)):
        with pytest.raises(OSError, match="no such range"):
            vcpu.mmap(length, offset)


def test_other_files_cannot_be_mapped_and_none_can_be_read(vcpu: Vcpu) -> None:
    with pytest.raises(OSError, match="cannot be mapped"):
        vcpu.vm.mmap(4096)
    with pytest.raises(OSError, match="cannot be read"):
        vcpu.read(8)
    assert vcpu.poll(1) == 1
