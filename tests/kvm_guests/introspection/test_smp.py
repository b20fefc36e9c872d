"""Several vCPUs and one tool: breakpoints and rights hold on all of them, always."""

from __future__ import annotations

import struct
import threading

from softkvm import kvm
from softkvm.uapi import kvm as uapi
from softkvm.uapi.kvmi import Access, Action, Command, Event, Reply
from tests.helpers.long_guest import CODE, DATA, END, STACK, Guest

ROUNDS = 200
VCPUS = 4
PROCESSOR_STACK = 0x1000


def processors(guest: Guest, system: kvm.System) -> list[kvm.Vcpu]:
    """The guest's vCPU, and more that are in the same state."""
    first = guest.vcpu
    vcpus = [first]
    for index in range(1, VCPUS):
        vcpu = guest.vm.create_vcpu(index)
        vcpu.set_cpuid2(system.get_supported_cpuid())
        vcpu.set_sregs(first.get_sregs())
        regs = first.get_regs()
        regs.rsp = STACK + index * PROCESSOR_STACK
        vcpu.set_regs(regs)
        vcpus.append(vcpu)
    return vcpus


def run_all(vcpus: list[kvm.Vcpu]) -> None:
    """Run them at once until each has written to its port."""
    threads = [threading.Thread(target=vcpu.run) for vcpu in vcpus]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert {vcpu.kvm_run.exit_reason for vcpu in vcpus} == {uapi.KVM_EXIT_IO}


def test_every_vcpu_meets_every_breakpoint(model: kvm.Model) -> None:
    system = kvm.System(model)
    guest = Guest(system, b"\xf0\x48\xff\x03\xff\xc9\x75\xf8" + END, rbx=DATA, rcx=ROUNDS)  # 1: lock inc qword [rbx]; dec ecx; jnz 1b
    vcpus = processors(guest, system)
    met = [0] * VCPUS

    def count(event: kvm.DirectEvent) -> Reply:
        met[event.vcpu] += 1
        return Reply(Action.CONTINUE)

    channel = guest.vm.introspect(count)
    for index in range(VCPUS):
        channel.request(Command.VCPU_CONTROL_EVENTS, struct.pack("<HBBI", Event.HIDDEN_BREAKPOINT, 1, 0, 0), index)
    channel.request(Command.VM_SET_BREAKPOINTS, struct.pack("<HHIQB7x", 1, 0, 0, CODE, 1))
    run_all(vcpus)
    assert met == [ROUNDS] * VCPUS
    assert struct.unpack_from("<Q", guest.ram, DATA) == (VCPUS * ROUNDS,)
    guest.close()


def test_every_write_is_asked_for(model: kvm.Model) -> None:
    """While one vCPU's write is let through, those of the others are not."""
    system = kvm.System(model)
    guest = Guest(system, b"\xf0\x48\xff\x03\xff\xc9\x75\xf8" + END, rbx=DATA, rcx=ROUNDS)
    vcpus = processors(guest, system)
    asked = [0] * VCPUS

    def count(event: kvm.DirectEvent) -> Reply:
        asked[event.vcpu] += 1
        return Reply(Action.CONTINUE)

    channel = guest.vm.introspect(count)
    for index in range(VCPUS):
        channel.request(Command.VCPU_CONTROL_EVENTS, struct.pack("<HBBI", Event.PF, 1, 0, 0), index)
    entry = struct.pack("<QBBHI", DATA, Access.R | Access.X, 1, 0, 0)
    channel.request(Command.VM_SET_PAGE_ACCESS, struct.pack("<HHI", 1, 0, 0) + entry)
    run_all(vcpus)
    assert asked == [ROUNDS] * VCPUS
    assert struct.unpack_from("<Q", guest.ram, DATA) == (VCPUS * ROUNDS,)
    guest.close()
