"""`softkvm.kvm.irqchip.lapic`: registers, priorities, delivery, modes and state of the local APIC."""

from __future__ import annotations

import struct
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softkvm.kvm import msr, request
from softkvm.kvm.irqchip import irq
from softkvm.kvm.irqchip.lapic_registers import LVT_MASKED, Reg
from softkvm.kvm.msr import MsrError
from tests.kvm.fakes import FakeVcpu, FakeVm

ENABLE, X2APIC, BSP = 1 << 11, 1 << 10, 1 << 8
BASE = 0xFEE0_0000


def write(vcpu: FakeVcpu, register: int, value: int) -> None:
    vcpu.apic.mmio_write(register << 4, 4, value)


def read(vcpu: FakeVcpu, register: int) -> int:
    return vcpu.apic.mmio_read(register << 4, 4)


def enabled(vm: FakeVm, vcpu_id: int = 0) -> FakeVcpu:
    """A vCPU whose APIC takes interrupts, in flat logical mode with one bit per vCPU."""
    vcpu = FakeVcpu(vm, vcpu_id)
    write(vcpu, Reg.SPIV, 0x1FF)
    write(vcpu, Reg.LDR, 1 << 24 + vcpu_id)
    return vcpu


def to_x2apic(vcpu: FakeVcpu) -> None:
    msr.set(vcpu, msr.IA32_APIC_BASE, vcpu.apic_base | X2APIC, False)


def test_reset_state() -> None:
    vm = FakeVm()
    bsp, ap = FakeVcpu(vm, 0), FakeVcpu(vm, 1)
    assert bsp.apic_base == BASE | ENABLE | BSP
    assert ap.apic_base == BASE | ENABLE
    assert read(ap, Reg.ID) == 1 << 24
    assert read(bsp, Reg.VERSION) == 0x50014
    assert read(bsp, Reg.SPIV) == 0xFF
    assert read(bsp, Reg.DFR) == 0xFFFF_FFFF
    assert read(bsp, Reg.LVT_LINT0) == irq.DM_EXTINT
    assert read(ap, Reg.LVT_LINT0) == LVT_MASKED


def test_interrupts_are_taken_by_priority_and_ended_in_order() -> None:
    vcpu = enabled(FakeVm())
    for vector in (0x31, 0x52, 0x4F):
        assert vcpu.apic.accept(irq.DM_FIXED, vector, True, False)
    assert irq.get_interrupt(vcpu) == 0x52
    assert not irq.has_injectable(vcpu)  # 4Fh is of a lower class than 52h in service
    assert vcpu.apic.accept(irq.DM_FIXED, 0x61, True, False)
    assert irq.get_interrupt(vcpu) == 0x61
    write(vcpu, Reg.EOI, 0)
    assert read(vcpu, Reg.PPR) == 0x50
    write(vcpu, Reg.EOI, 0)
    assert irq.get_interrupt(vcpu) == 0x4F
    write(vcpu, Reg.EOI, 0)
    assert irq.get_interrupt(vcpu) == 0x31
    write(vcpu, Reg.EOI, 0)
    assert irq.get_interrupt(vcpu) == irq.NO_INTERRUPT


def test_same_class_does_not_nest() -> None:
    vcpu = enabled(FakeVm())
    vcpu.apic.accept(irq.DM_FIXED, 0x51, True, False)
    assert irq.get_interrupt(vcpu) == 0x51
    vcpu.apic.accept(irq.DM_FIXED, 0x5F, True, False)
    assert not irq.has_interrupt(vcpu)


def test_task_priority_holds_interrupts_back_and_mirrors_cr8() -> None:
    vcpu = enabled(FakeVm())
    write(vcpu, Reg.TPR, 0x5A)
    assert vcpu.apic.cr8 == 5
    assert vcpu.state.cr8 == 5
    vcpu.apic.accept(irq.DM_FIXED, 0x5F, True, False)
    assert not irq.has_injectable(vcpu)
    assert vcpu.apic.highest_irr() == 0x5F
    vcpu.take_requests()
    vcpu.apic.cr8 = 4
    assert vcpu.take_requests() & request.REQ_EVENT
    assert read(vcpu, Reg.TPR) == 0x40
    assert irq.get_interrupt(vcpu) == 0x5F


@given(st.lists(st.tuples(st.sampled_from(["raise", "take", "end", "tpr"]), st.integers(0, 255)), max_size=60))
def test_bitmaps_follow_a_simple_model(steps: list[tuple[str, int]]) -> None:
    vcpu = enabled(FakeVm())
    pending: set[int] = set()
    served: list[int] = []
    for step, number in steps:
        if step == "raise" and number >= 16:
            vcpu.apic.accept(irq.DM_FIXED, number, True, False)
            pending.add(number)
        elif step == "tpr":
            write(vcpu, Reg.TPR, number)
        elif step == "end":
            write(vcpu, Reg.EOI, 0)
            if served:
                served.remove(max(served))
        elif step == "take":
            threshold = max(read(vcpu, Reg.TPR) >> 4, max(served, default=0) >> 4)
            best = max(pending, default=0)
            expected = best if pending and best >> 4 > threshold else irq.NO_INTERRUPT
            assert irq.get_interrupt(vcpu) == expected
            if expected >= 0:
                pending.discard(expected)
                served.append(expected)
    irr = sum(read(vcpu, Reg.IRR + word) << 32 * word for word in range(8))
    isr = sum(read(vcpu, Reg.ISR + word) << 32 * word for word in range(8))
    assert irr == sum(1 << vector for vector in pending)
    assert isr == sum(1 << vector for vector in served)


def test_software_disable_masks_lvts_and_refuses_interrupts() -> None:
    vcpu = enabled(FakeVm())
    write(vcpu, Reg.LVT_ERROR, 0x33)
    assert read(vcpu, Reg.LVT_ERROR) == 0x33
    write(vcpu, Reg.SPIV, 0xFF)
    assert read(vcpu, Reg.LVT_ERROR) == 0x33 | LVT_MASKED
    assert not vcpu.apic.accept(irq.DM_FIXED, 0x50, True, False)
    write(vcpu, Reg.LVT_ERROR, 0x33)
    assert read(vcpu, Reg.LVT_ERROR) & LVT_MASKED
    assert vcpu.apic.accept(irq.DM_NMI, 0, True, False)  # NMI, INIT and SIPI still come


def test_odd_accesses_are_dropped() -> None:
    vcpu = enabled(FakeVm())
    vcpu.apic.mmio_write(0x80, 1, 0x40)
    vcpu.apic.mmio_write(0x84, 4, 0x40)
    assert read(vcpu, Reg.TPR) == 0
    assert vcpu.apic.mmio_read(0x32, 4) == 0
    assert vcpu.apic.mmio_read(0x31, 1) == 0
    assert vcpu.apic.mmio_read(0x30, 1) == 0x14
    assert vcpu.apic.mmio_read(0xB0, 4) == 0  # EOI is write-only


@given(offset=st.integers(0, 0xFFF), size=st.sampled_from([1, 2, 4, 8]), value=st.integers(0, (1 << 64) - 1), x2apic=st.booleans())
def test_every_access_is_answered(offset: int, size: int, value: int, x2apic: bool) -> None:
    vcpu = enabled(FakeVm())
    if x2apic:
        to_x2apic(vcpu)
        for access in (lambda: msr.set(vcpu, 0x800 + (offset & 0xFF), value, False), lambda: msr.get(vcpu, 0x800 + (offset & 0xFF), False)):
            try:
                access()
            except MsrError:
                continue
    else:
        vcpu.apic.mmio_write(offset, size, value)
        assert 0 <= vcpu.apic.mmio_read(offset, size) < 1 << 8 * size
    vcpu.apic.get_state()


class TestIpi:
    """The interrupt command register."""

    def send(self, vcpu: FakeVcpu, low: int, dest: int = 0) -> None:
        write(vcpu, Reg.ICR2, dest << 24)
        write(vcpu, Reg.ICR, low)

    def three(self) -> tuple[FakeVcpu, FakeVcpu, FakeVcpu]:
        vm = FakeVm()
        return enabled(vm, 0), enabled(vm, 1), enabled(vm, 2)

    @pytest.mark.parametrize(
        ("low", "dest", "receivers"),
        [
            (0x50, 1, {1}),
            (0x50, 0xFF, {0, 1, 2}),
            (0x50 | irq.SHORTHAND_SELF, 2, {0}),
            (0x50 | irq.SHORTHAND_ALL, 0, {0, 1, 2}),
            (0x50 | irq.SHORTHAND_OTHERS, 0, {1, 2}),
            (0x50 | irq.DEST_LOGICAL, 0b110, {1, 2}),
            (0x50 | irq.DEST_LOGICAL, 0xFF, {0, 1, 2}),
            (0x50 | irq.DM_LOWEST | irq.DEST_LOGICAL, 0b111, {0x50 % 3}),
            (0x50, 9, set()),
        ],
    )
    def test_destinations(self, low: int, dest: int, receivers: set[int]) -> None:
        vcpus = self.three()
        self.send(vcpus[0], low | irq.LEVEL_ASSERT, dest)
        assert {vcpu.vcpu_id for vcpu in vcpus if vcpu.apic.irr} == receivers

    def test_cluster_mode(self) -> None:
        vcpus = self.three()
        for vcpu in vcpus:
            write(vcpu, Reg.DFR, 0x0FFF_FFFF)
            write(vcpu, Reg.LDR, (0x10 | 1 << vcpu.vcpu_id) << 24)
        self.send(vcpus[0], 0x50 | irq.DEST_LOGICAL, 0x15)
        assert [bool(vcpu.apic.irr) for vcpu in vcpus] == [True, False, True]

    def test_init_and_sipi(self) -> None:
        boot, second, _ = self.three()
        self.send(boot, irq.DM_INIT | irq.LEVEL_ASSERT | irq.TRIGGER_LEVEL, 1)
        assert second.apic.pending_init
        assert second.take_requests() & request.REQ_EVENT
        second.apic.pending_init = False
        self.send(boot, irq.DM_INIT | irq.TRIGGER_LEVEL, 1)  # the de-assert
        assert not second.apic.pending_init
        self.send(boot, irq.DM_STARTUP | 0x9A, 1)
        assert second.apic.sipi_vector == 0x9A

    def test_nmi(self) -> None:
        boot, second, third = self.three()
        self.send(boot, irq.DM_NMI | irq.SHORTHAND_OTHERS)
        assert second.take_requests() & third.take_requests() & request.REQ_NMI
        assert not boot.take_requests() & request.REQ_NMI

    def test_delivery_status_reads_idle(self) -> None:
        boot, *_ = self.three()
        self.send(boot, 0x50 | 1 << 12, 1)
        assert read(boot, Reg.ICR) == 0x50
        assert read(boot, Reg.ICR2) == 1 << 24

    def test_hypercall_sends_to_a_bitmap(self) -> None:
        vcpus = self.three()
        assert irq.pv_send_ipi(vcpus[0].vm, 0b101, 0, 0, 0x44, True) == 2
        assert [vcpu.apic.highest_irr() for vcpu in vcpus] == [0x44, -1, 0x44]
        assert irq.pv_send_ipi(vcpus[0].vm, 1, 0, 0, 0x44 | irq.DEST_LOGICAL, True) < 0


class TestX2apic:
    """x2APIC mode and its MSRs."""

    def test_ids_and_registers(self) -> None:
        vm = FakeVm()
        vcpu = FakeVcpu(vm, 0x25)
        to_x2apic(vcpu)
        assert msr.get(vcpu, 0x802, False) == 0x25
        assert msr.get(vcpu, 0x80D, False) == 0x0002_0020
        assert vcpu.apic.mmio_read(0x20, 4) == 0xFFFF_FFFF  # the page answers no more

    @pytest.mark.parametrize("index", [0x80E, 0x831, 0x809, 0x80B, 0x83F, 0x800, 0x8FF])
    def test_registers_that_cannot_be_read(self, index: int) -> None:
        vcpu = FakeVcpu(FakeVm())
        to_x2apic(vcpu)
        with pytest.raises(MsrError):
            msr.get(vcpu, index, False)

    @pytest.mark.parametrize(
        ("index", "value"), [(0x802, 0), (0x80D, 0), (0x80E, 0), (0x828, 1), (0x808, 1 << 32), (0x83F, 0x100), (0x839, 0)]
    )
    def test_writes_that_are_refused(self, index: int, value: int) -> None:
        vcpu = FakeVcpu(FakeVm())
        to_x2apic(vcpu)
        with pytest.raises(MsrError):
            msr.set(vcpu, index, value, False)

    def test_msrs_fault_in_xapic_mode(self) -> None:
        vcpu = FakeVcpu(FakeVm())
        with pytest.raises(MsrError):
            msr.get(vcpu, 0x802, False)

    def test_icr_is_one_register_of_64_bits(self) -> None:
        vm = FakeVm()
        boot, far = enabled(vm, 0), enabled(vm, 300)
        for vcpu in (boot, far):
            to_x2apic(vcpu)
        msr.set(boot, 0x830, 300 << 32 | 0x60, False)
        assert far.apic.highest_irr() == 0x60
        assert msr.get(boot, 0x830, False) == 300 << 32 | 0x60
        cluster = 300 >> 4 << 16 | 1 << 300 % 16
        msr.set(boot, 0x830, cluster << 32 | irq.DEST_LOGICAL | 0x61, False)
        assert far.apic.highest_irr() == 0x61
        msr.set(boot, 0x83F, 0x70, False)
        assert boot.apic.highest_irr() == 0x70
        msr.set(boot, 0x830, 0xFFFF_FFFF << 32 | 0x80, False)
        assert {boot.apic.highest_irr(), far.apic.highest_irr()} == {0x80}

    def test_mode_transitions(self) -> None:
        vcpu = FakeVcpu(FakeVm())
        base = vcpu.apic_base & ~(ENABLE | X2APIC)

        def go(modes: int) -> None:
            msr.set(vcpu, msr.IA32_APIC_BASE, base | modes, False)

        with pytest.raises(MsrError):
            go(X2APIC)
        go(ENABLE | X2APIC)
        with pytest.raises(MsrError):
            go(ENABLE)
        go(0)
        assert not vcpu.cpuid.execute(1, 0).edx >> 9 & 1
        with pytest.raises(MsrError):
            go(ENABLE | X2APIC)
        go(ENABLE)
        go(ENABLE | X2APIC)
        with pytest.raises(MsrError):
            msr.set(vcpu, msr.IA32_APIC_BASE, vcpu.apic_base | 1 << 9, False)
        with pytest.raises(MsrError):
            msr.set(vcpu, msr.IA32_APIC_BASE, vcpu.apic_base | 1 << 46, False)

    def test_init_keeps_mode_and_ids(self) -> None:
        vcpu = enabled(FakeVm(), 5)
        to_x2apic(vcpu)
        vcpu.apic.reset(init=True)
        assert msr.get(vcpu, 0x802, False) == 5
        assert msr.get(vcpu, 0x80D, False) == 1 << 5
        assert msr.get(vcpu, 0x80F, False) == 0xFF


class TestState:
    """KVM_GET_LAPIC and KVM_SET_LAPIC."""

    def busy(self) -> FakeVcpu:
        vcpu = enabled(FakeVm(), 3)
        write(vcpu, Reg.TPR, 0x20)
        write(vcpu, Reg.TIMER_DIVIDE, 0b1011)
        write(vcpu, Reg.LVT_TIMER, 0xEF | 1 << 17)
        write(vcpu, Reg.TIMER_INITIAL, 1_000_000)
        vcpu.apic.accept(irq.DM_FIXED, 0x71, True, True)
        vcpu.apic.acknowledge()
        vcpu.apic.accept(irq.DM_FIXED, 0x81, True, False)
        vcpu.vm.clock.advance(250_000)
        return vcpu

    @pytest.mark.parametrize("x2apic", [False, True])
    def test_save_restore_save_is_equal(self, x2apic: bool) -> None:
        first = self.busy()
        second = FakeVcpu(FakeVm(), 3)
        if x2apic:
            to_x2apic(first)
            to_x2apic(second)
        saved = first.apic.get_state()
        second.apic.set_state(saved)
        assert second.apic.get_state() == saved
        assert second.state.cr8 == 2
        assert irq.get_interrupt(second) == 0x81
        second.vm.clock.advance(750_000)
        assert second.apic.highest_irr() == 0xEF

    def test_layout(self) -> None:
        page = self.busy().apic.get_state()
        assert len(page) == 1024
        assert struct.unpack_from("<I", page, 0x20) == (3 << 24,)
        assert struct.unpack_from("<I", page, 0x100 + 0x10 * 3) == (1 << 0x71 - 0x60,)
        assert struct.unpack_from("<I", page, 0x390) == (750_000,)

    def test_x2apic_id_format(self) -> None:
        vcpu = FakeVcpu(FakeVm(), 3)
        to_x2apic(vcpu)
        assert struct.unpack_from("<I", vcpu.apic.get_state(), 0x20) == (3 << 24,)
        vcpu.vm.routing.x2apic_format = True
        page = bytearray(vcpu.apic.get_state())
        assert struct.unpack_from("<I", page, 0x20) == (3,)
        struct.pack_into("<I", page, 0x20, 4)
        with pytest.raises(OSError, match="differs"):
            vcpu.apic.set_state(bytes(page))

    @given(st.binary(min_size=1024, max_size=1024))
    def test_any_page_can_be_set(self, page: bytes) -> None:
        vcpu = FakeVcpu(FakeVm())
        vcpu.apic.set_state(page)
        saved = vcpu.apic.get_state()
        vcpu.apic.set_state(saved)
        assert vcpu.apic.get_state() == saved
        irq.get_interrupt(vcpu)


def test_no_interrupt_from_another_thread_is_lost() -> None:
    vcpu = enabled(FakeVm())
    vectors = range(0x20, 0x100)

    def send(first: int) -> None:
        for vector in vectors[first::4]:
            vcpu.apic.accept(irq.DM_FIXED, vector, True, bool(vector & 1))

    senders = [threading.Thread(target=send, args=(first,)) for first in range(4)]
    for sender in senders:
        sender.start()
    taken = set()
    while any(sender.is_alive() for sender in senders) or irq.has_interrupt(vcpu):
        taken.add(irq.get_interrupt(vcpu))
        write(vcpu, Reg.EOI, 0)
    for sender in senders:
        sender.join()
    assert taken - {irq.NO_INTERRUPT} == set(vectors)
    assert vcpu.apic.tmr == sum(1 << vector for vector in vectors if vector & 1)


def test_pic_reaches_the_core_only_through_lint0() -> None:
    vm = FakeVm()
    vcpu = FakeVcpu(vm)
    for port, value in ((0x20, 0x11), (0x21, 0x30), (0x21, 4), (0x21, 1), (0x21, 0)):
        vm.pio_bus.write(port, 1, value)
    vm.routing.set_irq(0, 3, True)
    assert irq.has_extint(vcpu)
    write(vcpu, Reg.SPIV, 0x1FF)
    write(vcpu, Reg.LVT_LINT0, LVT_MASKED)
    assert not irq.has_interrupt(vcpu)
    vcpu.take_requests()
    write(vcpu, Reg.LVT_LINT0, irq.DM_EXTINT)
    assert vcpu.take_requests() & request.REQ_EVENT
    assert irq.get_interrupt(vcpu) == 0x33


def test_without_local_apic_only_the_injected_vector_counts() -> None:
    vcpu = FakeVcpu(FakeVm(irqchip=False), lapic=False)
    assert not irq.has_injectable(vcpu)
    vcpu.userspace_irq = 0x42
    assert irq.has_interrupt(vcpu)
    assert irq.get_interrupt(vcpu) == 0x42
    assert irq.get_interrupt(vcpu) == irq.NO_INTERRUPT
