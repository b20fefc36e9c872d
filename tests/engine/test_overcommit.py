"""More vCPUs than cores on the real silicon: all of them run, and those that halt do not hold a core."""

from __future__ import annotations

import threading
from itertools import pairwise

import pytest

from softkvm import kvm
from softkvm.host import trace
from softkvm.uapi import kvm as uapi

CODE, COUNTERS = 0x1000, 0x2000
COUNT = bytes.fromhex("66ff07 ebfb")  # inc dword [bx]; jmp back
ENOUGH = 3_000_000


@pytest.mark.parametrize("model", ["cascadelake", "epyc"])
def test_busy_vcpus_share_one_core(model: str) -> None:
    system = kvm.System(kvm.Model(model), cores=1)
    switches: list[str] = []

    def probe(prev_comm: str, prev_pid: int, prev_prio: int, prev_state: str, next_comm: str, next_pid: int, next_prio: int) -> None:
        switches.append(next_comm)

    trace.sched_switch.register(probe)
    try:
        with system.create_vm() as vm:
            memory = kvm.allocate_memory(0x10000)
            ram = memoryview(memory)
            vm.set_user_memory_region(uapi.UserspaceMemoryRegion(memory_size=0x10000, userspace_addr=memory.address))
            ram[CODE : CODE + len(COUNT)] = COUNT
            vcpus = [make_vcpu(system, vm, index) for index in range(3)]
            words = ram.cast("I")
            threads = [threading.Thread(target=run, args=(vcpu,), name=f"vcpu{index}") for index, vcpu in enumerate(vcpus)]
            for thread in threads:
                thread.start()
            while min(words[COUNTERS // 4 + index] for index in range(3)) < ENOUGH:
                pass
            for vcpu in vcpus:
                vcpu.kick()
            for thread in threads:
                thread.join()
            assert {vcpu.cpu_index for vcpu in vcpus} == {0}
    finally:
        trace.sched_switch.unregister(probe)
    assert {"vcpu0", "vcpu1", "vcpu2"} <= set(switches)
    assert all(before != after for before, after in pairwise(name for name in switches if name.startswith("vcpu")))


def make_vcpu(system: kvm.System, vm: kvm.Vm, index: int) -> kvm.Vcpu:
    vcpu = vm.create_vcpu(index)
    vcpu.set_cpuid2(system.get_supported_cpuid())
    sregs = vcpu.get_sregs()
    sregs.cs.selector = sregs.cs.base = 0
    vcpu.set_sregs(sregs)
    vcpu.set_regs(uapi.Regs(rip=CODE, rbx=COUNTERS + 4 * index, rflags=2))
    return vcpu


def run(vcpu: kvm.Vcpu) -> None:
    with pytest.raises(InterruptedError):
        vcpu.run()
