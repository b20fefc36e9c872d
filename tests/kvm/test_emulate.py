"""Device accesses of emulated instructions: in the kernel, in user space, several of one instruction, and what goes wrong."""

from __future__ import annotations

import errno

from softkvm import silicon
from softkvm.kvm import Vcpu, Vm
from softkvm.silicon import control
from softkvm.uapi import kvm as uapi
from tests import fake_engine
from tests.kvm.conftest import Script
from tests.kvm.guest import REASONS, done, leave, needs, no_memory, out_of_guest, run_errno

DEVICE = 0xD000_0000
APIC_VERSION = 0xFEE0_0030
APIC_TPR = 0xFEE0_0080


def accesses(view: control.ControlBlock) -> list[tuple[int, int, int, int]]:
    return [(one.gpa, one.size, one.write, one.data[0]) for one in view.access[: view.control.access_count]]


def test_read_in_user_space(vcpu: Vcpu, ram: object, play: Script) -> None:
    play(no_memory(vcpu, DEVICE, False), needs(DEVICE, 4))
    vcpu.run()
    mmio = vcpu.kvm_run.mmio
    assert vcpu.kvm_run.exit_reason == uapi.KVM_EXIT_MMIO
    assert (mmio.phys_addr, mmio.len, mmio.is_write) == (DEVICE, 4, 0)
    mmio.data[0:4] = [0x78, 0x56, 0x34, 0x12]

    def restarted(view: control.ControlBlock) -> int | None:
        assert accesses(view) == [(DEVICE, 4, 0, 0x1234_5678)]
        return done(view)

    out_of_guest(vcpu, play, restarted)
    assert vcpu.control.emulate == 0


def test_write_in_user_space(vcpu: Vcpu, ram: object, play: Script) -> None:
    play(no_memory(vcpu, DEVICE, True), needs(DEVICE, 2, write=0xBEEF))
    vcpu.run()
    mmio = vcpu.kvm_run.mmio
    assert (mmio.phys_addr, mmio.len, mmio.is_write, bytes(mmio.data[:2])) == (DEVICE, 2, 1, b"\xef\xbe")

    def restarted(view: control.ControlBlock) -> int | None:
        assert accesses(view) == [(DEVICE, 2, 1, 0xBEEF)]
        return done(view)

    out_of_guest(vcpu, play, restarted)


def test_immediate_exit_completes_the_access_first(vcpu: Vcpu, ram: object, play: Script) -> None:
    play(no_memory(vcpu, DEVICE, False), needs(DEVICE, 4))
    vcpu.run()
    vcpu.kvm_run.immediate_exit = 1
    play(done)
    assert run_errno(vcpu) == errno.EINTR
    assert vcpu.complete_userspace_io is None


def test_local_apic_is_in_the_kernel(vcpu: Vcpu, ram: object, play: Script) -> None:
    assert vcpu.lapic is not None

    def version_read(view: control.ControlBlock) -> int | None:
        assert accesses(view) == [(APIC_VERSION, 4, 0, 0x50014)]
        return done(view)

    write = (no_memory(vcpu, APIC_TPR, True), needs(APIC_TPR, 4, write=0x20), done)
    out_of_guest(vcpu, play, no_memory(vcpu, APIC_VERSION, False), needs(APIC_VERSION, 4), version_read, *write)
    assert vcpu.lapic.tpr() == 0x20


def test_a_known_device_costs_no_violation(vcpu: Vcpu, ram: object, play: Script) -> None:
    def both(view: control.ControlBlock) -> int | None:
        assert accesses(view) == [(APIC_TPR, 4, 1, 0x30)]
        return done(view)

    first = (no_memory(vcpu, APIC_TPR, True), needs(APIC_TPR, 4, write=0x20), done)
    out_of_guest(vcpu, play, *first, needs(APIC_TPR, 4, write=0x30, emulated=False), both)
    assert vcpu.lapic is not None
    assert vcpu.lapic.tpr() == 0x30
    assert not vcpu.half_done


def test_one_instruction_with_two_devices_and_ram(vcpu: Vcpu, vm: Vm, ram: object, play: Script) -> None:
    def both(view: control.ControlBlock) -> int | None:
        assert [one[:3] for one in accesses(view)] == [(APIC_VERSION, 4, 0), (APIC_TPR, 4, 1)]
        return done(view)

    out_of_guest(
        vcpu,
        play,
        no_memory(vcpu, APIC_VERSION, False),
        needs(APIC_VERSION, 4),
        needs(0x5000, 4),  # RAM that nobody has touched yet is mapped, not emulated
        needs(APIC_TPR, 4, write=0),
        both,
    )
    assert vm.mmu.npt.lookup(0x5000) is not None


def test_ram_is_mapped_without_emulation(vcpu: Vcpu, vm: Vm, ram: object, play: Script) -> None:
    def mapped(view: control.ControlBlock) -> int:
        assert view.control.emulate == 0
        return REASONS[vcpu.model.vendor]["interrupt"]

    out_of_guest(vcpu, play, no_memory(vcpu, 0x1000, True), mapped)
    assert vm.mmu.npt.lookup(0x1000) is not None


def test_slot_without_memory_is_efault(vcpu: Vcpu, vm: Vm, play: Script) -> None:
    vm.set_user_memory_region(uapi.UserspaceMemoryRegion(memory_size=0x1000, userspace_addr=0x1000))
    play(no_memory(vcpu, 0, True))
    assert run_errno(vcpu) == errno.EFAULT


def test_read_only_slot_reads_ram_and_writes_mmio(vcpu: Vcpu, vm: Vm, play: Script) -> None:
    memory = silicon.allocate(4096)
    region = uapi.UserspaceMemoryRegion(memory_size=4096, userspace_addr=memory.address, flags=uapi.KVM_MEM_READONLY)
    vm.set_user_memory_region(region)
    play(no_memory(vcpu, 0, False), no_memory(vcpu, 0, True), needs(0, 1, write=5))
    vcpu.run()
    assert (vcpu.kvm_run.exit_reason, vcpu.kvm_run.mmio.is_write) == (uapi.KVM_EXIT_MMIO, 1)


def test_code_in_device_memory_is_an_emulation_failure(vcpu: Vcpu, ram: object, play: Script) -> None:
    play(no_memory(vcpu, DEVICE, False), no_memory(vcpu, DEVICE, False))
    vcpu.run()
    assert vcpu.kvm_run.exit_reason == uapi.KVM_EXIT_INTERNAL_ERROR
    assert vcpu.kvm_run.internal.suberror == uapi.KVM_INTERNAL_ERROR_EMULATION
    assert vcpu.control.emulate == 0


def test_an_endless_list_of_accesses_is_an_emulation_failure(vcpu: Vcpu, ram: object, play: Script) -> None:
    play(no_memory(vcpu, APIC_VERSION, False), *[needs(APIC_VERSION, 4)] * 9)
    vcpu.run()
    assert vcpu.kvm_run.exit_reason == uapi.KVM_EXIT_INTERNAL_ERROR


def test_nothing_comes_between_the_accesses_and_the_end_of_an_instruction(vcpu: Vcpu, ram: object, play: Script) -> None:
    core = fake_engine.Core.cores

    def asks_while_an_nmi_comes(view: control.ControlBlock) -> int | None:
        vcpu.queue_nmi()
        core[-1].kicked = False  # as the silicon, which holds interrupts back meanwhile
        return needs(APIC_VERSION, 4)(view)

    def stops_behind_it(view: control.ControlBlock) -> int | None:
        assert (view.control.emulate, core[-1].injected) == (1, [])
        return done(view)

    def then_the_nmi(view: control.ControlBlock) -> int | None:
        assert (view.control.emulate, core[-1].injected) == (0, [1 << 31 | 2 << 8 | 2])
        return None

    out_of_guest(vcpu, play, no_memory(vcpu, APIC_VERSION, False), asks_while_an_nmi_comes, stops_behind_it, then_the_nmi)


def test_a_kick_waits_for_the_end_of_an_instruction(vcpu: Vcpu, ram: object, play: Script) -> None:
    def asks_while_a_signal_comes(view: control.ControlBlock) -> int | None:
        vcpu.kick()
        fake_engine.Core.cores[-1].kicked = False
        return needs(APIC_VERSION, 4)(view)

    play(no_memory(vcpu, APIC_VERSION, False), asks_while_a_signal_comes, done)
    assert run_errno(vcpu) == errno.EINTR
    assert not vcpu.half_done


def test_an_exception_ends_the_instruction(vcpu: Vcpu, ram: object, play: Script) -> None:
    cut_short = fake_engine.exits_with(REASONS[vcpu.model.vendor]["memory"], gpa=0x1000, info2=0x1000, vectoring=1 << 31 | 3 << 8 | 13)

    def delivered_again(view: control.ControlBlock) -> int | None:
        assert view.control.emulate == 0
        assert fake_engine.Core.cores[-1].injected == [1 << 31 | 3 << 8 | 13]
        return None

    out_of_guest(vcpu, play, no_memory(vcpu, APIC_VERSION, False), needs(APIC_VERSION, 4), cut_short, delivered_again)


def test_an_intercepted_instruction_leaves_emulation(vcpu: Vcpu, ram: object, play: Script) -> None:
    vcpu.state.rip = 0x1000
    steps = no_memory(vcpu, APIC_VERSION, False), needs(APIC_VERSION, 4), leave(vcpu, "cpuid", 2)
    out_of_guest(vcpu, play, *steps)
    assert (vcpu.state.rip, vcpu.control.emulate, vcpu.half_done) == (0x1002, 0, False)


def test_a_reset_by_user_space_drops_the_instruction(vcpu: Vcpu, ram: object, play: Script) -> None:
    play(no_memory(vcpu, DEVICE, False), needs(DEVICE, 4))
    vcpu.run()
    regs = vcpu.get_regs()
    regs.rip = 0x500
    vcpu.set_regs(regs)

    def elsewhere(view: control.ControlBlock) -> int | None:
        assert (view.state.rip, view.control.emulate) == (0x500, 0)
        return None

    out_of_guest(vcpu, play, elsewhere)
