"""The running half of a vCPU: requests, signals, and its stay on a core."""

from __future__ import annotations

from softkvm import kvm
from softkvm.host import task
from softkvm.host.task import TIF_SIGPENDING, Task
from softkvm.kvm import Vcpu, Vm
from softkvm.kvm.request import REQ_EVENT, REQ_NMI
from tests import fake_engine
from tests.kvm.conftest import Script, ready
from tests.kvm.guest import leave, out_of_guest


def test_requests_are_taken_once(vcpu: Vcpu) -> None:
    vcpu.take_requests()
    vcpu.make_request(REQ_NMI)
    vcpu.make_request(REQ_EVENT)
    assert vcpu.take_requests() == REQ_NMI | REQ_EVENT
    assert vcpu.requests == 0


def test_a_request_wakes_a_halted_vcpu_and_leaves_a_busy_thread_alone(vcpu: Vcpu) -> None:
    vcpu.wakeup.clear()
    vcpu.make_request(REQ_EVENT)
    assert not vcpu.wakeup.is_set()
    vcpu.blocked = True
    vcpu.make_request(REQ_EVENT)
    assert vcpu.wakeup.is_set()


def test_a_kick_reaches_the_thread_that_runs_or_will_run(vcpu: Vcpu) -> None:
    mine = Task()
    vcpu.kick()
    vcpu.attach(mine)
    assert mine.flags & TIF_SIGPENDING
    vcpu.handle_signal_exit()
    mine.clear_flag(TIF_SIGPENDING)
    vcpu.kick()
    assert mine.flags & TIF_SIGPENDING
    vcpu.detach()
    assert mine.guest is None


def test_a_running_vcpu_keeps_its_core(vcpu: Vcpu) -> None:
    vcpu.load()
    vcpu.attach(task.current())
    assert not vcpu.yield_core()
    vcpu.detach()
    assert vcpu.yield_core()
    assert vcpu.cpu is None


def test_counters_of_a_core_are_shared_out_to_those_who_were_on_it(vm: Vm, system: kvm.System, play: Script) -> None:
    first, second = ready(vm.create_vcpu(0), system), ready(vm.create_vcpu(1), system)
    out_of_guest(first, play, leave(first, "cpuid", 2))
    out_of_guest(second, play)
    out_of_guest(first, play)
    assert len(fake_engine.Core.cores) == 1
    assert (first.engine_counters(), second.engine_counters()) == ({"entries": 3}, {"entries": 1})
    vm.close()
    assert first.engine_counters() == {"entries": 3}
