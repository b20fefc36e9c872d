"""`softkvm.kvm.eventfd`: irqfd and ioeventfd with real eventfds; the waiting thread is bypassed except where it is the matter."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest

from softkvm.host import trace
from softkvm.host.task import CONTEXT_IDLE, current
from softkvm.kvm.eventfd import EventFds
from softkvm.kvm.irqchip import irq
from softkvm.kvm.irqchip.ioapic import LEVEL
from softkvm.kvm.irqchip.lapic_registers import LVT_MASKED, Reg
from softkvm.uapi import kvm as uapi
from tests.kvm.fakes import FakeVcpu, FakeVm

VECTOR, PIN = 0x60, 20
PIO, MATCH, DEASSIGN = uapi.KVM_IOEVENTFD_FLAG_PIO, uapi.KVM_IOEVENTFD_FLAG_DATAMATCH, uapi.KVM_IOEVENTFD_FLAG_DEASSIGN


@pytest.fixture
def vm() -> FakeVm:
    vm = FakeVm()
    vcpu = FakeVcpu(vm)
    vcpu.apic.mmio_write(Reg.SPIV << 4, 4, 0x1FF)
    vcpu.apic.mmio_write(Reg.LVT_LINT0 << 4, 4, LVT_MASKED)
    return vm


@pytest.fixture
def eventfds(vm: FakeVm, monkeypatch: pytest.MonkeyPatch) -> Iterator[EventFds]:
    monkeypatch.setattr(EventFds, "_wait", lambda self, epoll: None)
    eventfds = EventFds(vm)
    yield eventfds
    eventfds.close()


@pytest.fixture
def fd() -> Iterator[int]:
    fd = os.eventfd(0)
    yield fd
    os.close(fd)


def program(vm: FakeVm, low: int) -> None:
    vm.chips.ioapic.write(0x00, 4, 0x10 + 2 * PIN)
    vm.chips.ioapic.write(0x10, 4, low)


def poll(eventfds: EventFds) -> None:
    """What the thread does when epoll reports every irqfd."""
    for fd in list(eventfds._irqfds):
        eventfds.poll_irqfd(fd)


def take(vm: FakeVm) -> int:
    vector = irq.get_interrupt(vm.vcpus[0])
    vm.vcpus[0].apic.mmio_write(Reg.EOI << 4, 4, 0)
    return vector


class TestIrqfd:
    def test_signal_is_a_pulse_and_consumes_the_counter(self, vm: FakeVm, eventfds: EventFds, fd: int) -> None:
        program(vm, VECTOR)
        eventfds.irqfd(uapi.Irqfd(fd=fd, gsi=PIN))
        poll(eventfds)
        assert take(vm) == -1
        os.eventfd_write(fd, 3)
        poll(eventfds)
        poll(eventfds)
        assert [take(vm), take(vm)] == [VECTOR, -1]

    def test_level_without_resample_also_pulses(self, vm: FakeVm, eventfds: EventFds, fd: int) -> None:
        program(vm, VECTOR | LEVEL)
        eventfds.irqfd(uapi.Irqfd(fd=fd, gsi=PIN))
        os.eventfd_write(fd, 1)
        poll(eventfds)
        assert [take(vm), take(vm)] == [VECTOR, -1]

    def test_resample_lowers_the_line_and_tells(self, vm: FakeVm, eventfds: EventFds, fd: int) -> None:
        program(vm, VECTOR | LEVEL)
        resample = os.eventfd(0, os.EFD_NONBLOCK)
        eventfds.irqfd(uapi.Irqfd(fd=fd, gsi=PIN, flags=uapi.KVM_IRQFD_FLAG_RESAMPLE, resamplefd=resample))
        os.eventfd_write(fd, 1)
        poll(eventfds)
        assert irq.get_interrupt(vm.vcpus[0]) == VECTOR
        assert vm.chips.ioapic.get_state().irr == 1 << PIN
        vm.vcpus[0].apic.mmio_write(Reg.EOI << 4, 4, 0)
        assert os.eventfd_read(resample) == 1
        assert vm.chips.ioapic.get_state().irr == 0
        assert take(vm) == -1
        eventfds.irqfd(uapi.Irqfd(fd=fd, gsi=PIN, flags=uapi.KVM_IRQFD_FLAG_DEASSIGN))
        os.close(resample)

    def test_deassign(self, vm: FakeVm, eventfds: EventFds, fd: int) -> None:
        program(vm, VECTOR)
        eventfds.irqfd(uapi.Irqfd(fd=fd, gsi=PIN))
        eventfds.irqfd(uapi.Irqfd(fd=fd, gsi=5, flags=uapi.KVM_IRQFD_FLAG_DEASSIGN))  # another GSI: nothing happens
        assert eventfds._irqfds
        eventfds.irqfd(uapi.Irqfd(fd=fd, gsi=PIN, flags=uapi.KVM_IRQFD_FLAG_DEASSIGN))
        assert not eventfds._irqfds

    def test_errors(self, vm: FakeVm, eventfds: EventFds, fd: int) -> None:
        copy = os.dup(fd)
        eventfds.irqfd(uapi.Irqfd(fd=fd, gsi=PIN))
        with pytest.raises(OSError, match=r"\[Errno 16\]"):
            eventfds.irqfd(uapi.Irqfd(fd=copy, gsi=5))
        os.close(copy)
        with pytest.raises(OSError, match=r"\[Errno 9\]"):
            eventfds.irqfd(uapi.Irqfd(fd=copy, gsi=5))
        read, write = os.pipe()
        with pytest.raises(OSError, match=r"\[Errno 22\]"):
            eventfds.irqfd(uapi.Irqfd(fd=read, gsi=5))
        with pytest.raises(OSError, match=r"\[Errno 22\]"):
            eventfds.irqfd(uapi.Irqfd(fd=fd, gsi=5, flags=4))
        os.close(read)
        os.close(write)
        with pytest.raises(OSError, match=r"\[Errno 22\]"):
            EventFds(FakeVm(irqchip=False)).irqfd(uapi.Irqfd(fd=fd, gsi=5))
        eventfds.irqfd(uapi.Irqfd(fd=fd, gsi=5000, flags=uapi.KVM_IRQFD_FLAG_DEASSIGN))

    def test_the_thread_delivers_what_was_signalled_before(self, vm: FakeVm, fd: int) -> None:
        program(vm, VECTOR)
        os.eventfd_write(fd, 1)
        arrived = threading.Event()
        vm.vcpus[0].make_request = lambda request: arrived.set()  # type: ignore[method-assign]
        eventfds = EventFds(vm)
        eventfds.irqfd(uapi.Irqfd(fd=fd, gsi=PIN))
        assert arrived.wait(60)
        eventfds.close()
        eventfds.close()
        assert take(vm) == VECTOR


class TestIoeventfd:
    def add(self, eventfds: EventFds, fd: int, flags: int = 0, length: int = 4, match: int = 0, addr: int = 0x1000) -> None:
        eventfds.ioeventfd(uapi.Ioeventfd(addr=addr, len=length, fd=fd, flags=flags, datamatch=match))

    def counted(self, fd: int) -> int:
        os.eventfd_write(fd, 1)
        return os.eventfd_read(fd) - 1

    def test_match_of_address_length_and_data(self, vm: FakeVm, eventfds: EventFds, fd: int) -> None:
        self.add(eventfds, fd, MATCH, 4, 7)
        assert vm.mmio_bus.write(0x1000, 4, 7)
        assert not vm.mmio_bus.write(0x1000, 4, 8)
        assert not vm.mmio_bus.write(0x1000, 2, 7)
        assert not vm.mmio_bus.write(0x1001, 4, 7)
        assert vm.mmio_bus.read(0x1000, 4) is None
        assert self.counted(fd) == 1

    def test_any_length(self, vm: FakeVm, eventfds: EventFds, fd: int) -> None:
        self.add(eventfds, fd, length=0)
        assert vm.mmio_bus.write(0x1000, 1, 7)
        assert vm.mmio_bus.write(0x1000, 8, 9)
        assert self.counted(fd) == 2

    def test_ports_and_memory_are_different(self, vm: FakeVm, eventfds: EventFds, fd: int) -> None:
        self.add(eventfds, fd, PIO, 2)
        assert not vm.mmio_bus.write(0x1000, 2, 0)
        assert vm.pio_bus.write(0x1000, 2, 0)

    def test_collisions(self, vm: FakeVm, eventfds: EventFds, fd: int) -> None:
        self.add(eventfds, fd, MATCH, 4, 7)
        self.add(eventfds, fd, MATCH, 4, 8)
        self.add(eventfds, fd, MATCH, 2, 7)
        for flags, length, match in ((MATCH, 4, 7), (0, 4, 0), (0, 0, 0)):
            with pytest.raises(OSError, match=r"\[Errno 17\]"):
                self.add(eventfds, fd, flags, length, match)

    @pytest.mark.parametrize(("flags", "length", "addr"), [(0, 3, 0), (MATCH, 0, 0), (16, 4, 0), (0, 4, (1 << 64) - 4)])
    def test_bad_arguments(self, eventfds: EventFds, fd: int, flags: int, length: int, addr: int) -> None:
        with pytest.raises(OSError, match=r"\[Errno 22\]"):
            self.add(eventfds, fd, flags, length, addr=addr)

    def test_bad_descriptors(self, eventfds: EventFds) -> None:
        with pytest.raises(OSError, match=r"\[Errno 9\]"):
            self.add(eventfds, -1)

    def test_deassign(self, vm: FakeVm, eventfds: EventFds, fd: int) -> None:
        self.add(eventfds, fd, MATCH, 4, 7)
        with pytest.raises(OSError, match=r"\[Errno 2\]"):
            self.add(eventfds, fd, MATCH | DEASSIGN, 4, 8)
        self.add(eventfds, fd, MATCH | DEASSIGN, 4, 7)
        assert not vm.mmio_bus.write(0x1000, 4, 7)


def test_the_thread_takes_signals_as_interrupts_out_of_idle(vm: FakeVm, fd: int) -> None:
    """RCU watches and interrupts are off while the handler runs, and the thread is idle before and after."""
    seen: list[tuple[int, bool, bool]] = []
    raised = threading.Event()

    def probe(gsi: int, level: int, source: int) -> None:
        mine = current()
        seen.append((mine.context, mine.rcu_watching, mine.irqs_off))
        raised.set()

    program(vm, VECTOR)
    eventfds = EventFds(vm)
    trace.kvm_set_irq.register(probe)
    try:
        eventfds.irqfd(uapi.Irqfd(fd=fd, gsi=PIN))
        os.eventfd_write(fd, 1)
        assert raised.wait(60)
    finally:
        eventfds.close()
        trace.kvm_set_irq.unregister(probe)
    assert set(seen) == {(CONTEXT_IDLE, True, True)}
