"""`softkvm.kvm.irqchip.ioapic`: redirection, level and edge, remote IRR, end of interrupt, storms, state."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from softkvm.kvm.irqchip import irq
from softkvm.kvm.irqchip.ioapic import IOAPIC_BASE, LEVEL, LOGICAL, MASKED, REMOTE_IRR
from softkvm.kvm.irqchip.lapic_registers import Reg
from softkvm.kvm.irqchip.routing import USERSPACE_SOURCE
from tests.kvm.fakes import FakeVcpu, FakeVm


def setup(cpus: int = 1) -> FakeVm:
    vm = FakeVm()
    for vcpu_id in range(cpus):
        vcpu = FakeVcpu(vm, vcpu_id)
        vcpu.apic.mmio_write(Reg.SPIV << 4, 4, 0x1FF)
        vcpu.apic.mmio_write(Reg.LDR << 4, 4, 1 << 24 + vcpu_id)
    return vm


def read(vm: FakeVm, register: int) -> int:
    vm.mmio_bus.write(IOAPIC_BASE, 4, register)
    value = vm.mmio_bus.read(IOAPIC_BASE + 0x10, 4)
    assert value is not None
    return value


def write(vm: FakeVm, register: int, value: int) -> None:
    assert vm.mmio_bus.write(IOAPIC_BASE, 4, register)
    assert vm.mmio_bus.write(IOAPIC_BASE + 0x10, 4, value)


def program(vm: FakeVm, pin: int, low: int, dest: int = 0) -> None:
    write(vm, 0x11 + 2 * pin, dest << 24)
    write(vm, 0x10 + 2 * pin, low)


def line(vm: FakeVm, pin: int, level: bool) -> int:
    return vm.chips.ioapic.set_irq(pin, USERSPACE_SOURCE, level)


def end(vm: FakeVm, cpu: int = 0) -> None:
    vm.vcpus[cpu].apic.mmio_write(Reg.EOI << 4, 4, 0)


def test_registers() -> None:
    vm = setup()
    assert read(vm, 1) == 0x170011
    write(vm, 0, 0xFFFF_FFFF)
    assert read(vm, 0) == read(vm, 2) == 0xF << 24
    assert read(vm, 0x10) == MASKED
    assert read(vm, 0x40) == 0xFFFF_FFFF
    write(vm, 0x11, 0xAB << 24)
    assert read(vm, 0x11) == 0xAB << 24


def test_edge_fires_once_per_rise() -> None:
    vm = setup()
    program(vm, 4, 0x34)
    assert line(vm, 4, True) == 1
    assert line(vm, 4, True) == 0  # coalesced
    assert irq.get_interrupt(vm.vcpus[0]) == 0x34
    end(vm)
    assert not irq.has_interrupt(vm.vcpus[0])
    line(vm, 4, False)
    assert line(vm, 4, True) == 1
    assert irq.get_interrupt(vm.vcpus[0]) == 0x34


def test_level_repeats_until_the_line_falls() -> None:
    vm = setup()
    program(vm, 10, 0x5A | LEVEL)
    line(vm, 10, True)
    assert read(vm, 0x10 + 20) & REMOTE_IRR
    assert irq.get_interrupt(vm.vcpus[0]) == 0x5A
    assert line(vm, 10, True) == -1  # waits for the end of interrupt
    end(vm)
    assert irq.get_interrupt(vm.vcpus[0]) == 0x5A
    line(vm, 10, False)
    end(vm)
    assert not irq.has_interrupt(vm.vcpus[0])
    assert not read(vm, 0x10 + 20) & REMOTE_IRR


def test_several_sources_hold_one_line() -> None:
    vm = setup()
    program(vm, 10, 0x5A | LEVEL)
    vm.chips.ioapic.set_irq(10, 0, True)
    vm.chips.ioapic.set_irq(10, 1, True)
    vm.chips.ioapic.set_irq(10, 0, False)
    irq.get_interrupt(vm.vcpus[0])
    end(vm)
    assert irq.has_interrupt(vm.vcpus[0])
    vm.chips.ioapic.set_irq(10, 1, False)
    irq.get_interrupt(vm.vcpus[0])
    end(vm)
    assert not irq.has_interrupt(vm.vcpus[0])


def test_masked_level_is_delivered_on_unmask_but_an_edge_is_lost() -> None:
    vm = setup()
    program(vm, 10, 0x5A | LEVEL | MASKED)
    program(vm, 4, 0x34 | MASKED)
    assert line(vm, 10, True) == line(vm, 4, True) == -1
    program(vm, 10, 0x5A | LEVEL)
    program(vm, 4, 0x34)
    assert irq.get_interrupt(vm.vcpus[0]) == 0x5A
    assert not vm.vcpus[0].apic.irr


def test_remote_irr_is_read_only_and_falls_when_a_pin_becomes_edge() -> None:
    vm = setup()
    program(vm, 10, 0x5A | LEVEL | REMOTE_IRR)
    assert not read(vm, 0x10 + 20) & REMOTE_IRR
    line(vm, 10, True)
    program(vm, 10, 0x5A | LEVEL)
    assert read(vm, 0x10 + 20) & REMOTE_IRR
    program(vm, 10, 0x5A)
    assert not read(vm, 0x10 + 20) & REMOTE_IRR


def test_logical_destination_and_delivery_modes() -> None:
    vm = setup(3)
    program(vm, 1, 0x41 | LOGICAL, 0b110)
    line(vm, 1, True)
    assert [vcpu.apic.highest_irr() for vcpu in vm.vcpus] == [-1, 0x41, 0x41]
    program(vm, 2, 0x50 | LOGICAL | irq.DM_LOWEST, 0b111)
    assert line(vm, 2, True) == 1
    assert sum(vcpu.apic.highest_irr() == 0x50 for vcpu in vm.vcpus) == 1


def test_only_level_and_listened_vectors_concern_the_chip() -> None:
    vm = setup()
    program(vm, 4, 0x34)
    assert not vm.chips.ioapic.handled_vectors >> 0x34 & 1
    acked: list[int] = []
    vm.routing.add_ack_listener(4, lambda: acked.append(4))
    line(vm, 4, True)
    irq.get_interrupt(vm.vcpus[0])
    end(vm)
    assert acked == [4]


def test_an_interrupt_storm_is_slowed_down() -> None:
    vm = setup()
    program(vm, 10, 0x5A | LEVEL)
    line(vm, 10, True)
    taken = 0
    while irq.get_interrupt(vm.vcpus[0]) == 0x5A:
        taken += 1
        end(vm)
    assert taken == 10_000
    vm.clock.advance(10_000_000)
    assert irq.get_interrupt(vm.vcpus[0]) == 0x5A


def test_save_restore_save_is_equal() -> None:
    vm = setup()
    program(vm, 10, 0x5A | LEVEL)
    program(vm, 4, 0x34)
    line(vm, 10, True)
    line(vm, 4, True)
    program(vm, 5, 0x35 | MASKED)
    line(vm, 5, True)
    saved = vm.chips.ioapic.get_state()
    assert saved.irr == 1 << 10 | 1 << 5  # the edge of pin 4 was delivered
    other = setup()
    other.chips.ioapic.set_state(saved)
    assert bytes(other.chips.ioapic.get_state()) == bytes(saved)


@given(st.lists(st.tuples(st.integers(0, 0x50), st.integers(0, 0xFFFF_FFFF), st.integers(0, 23), st.booleans()), max_size=30))
def test_any_sequence_of_writes_and_lines_is_survived(steps: list[tuple[int, int, int, bool]]) -> None:
    vm = setup(2)
    for register, value, pin, level in steps:
        write(vm, register, value)
        line(vm, pin, level)
        for vcpu in vm.vcpus:
            irq.get_interrupt(vcpu)
            vcpu.apic.mmio_write(Reg.EOI << 4, 4, 0)
    state = vm.chips.ioapic.get_state()
    vm.chips.ioapic.set_state(state)
