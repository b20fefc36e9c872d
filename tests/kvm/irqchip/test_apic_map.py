"""`softkvm.kvm.irqchip.apic_map`: the table gives what asking every APIC would give."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from softkvm.kvm import msr
from softkvm.kvm.irqchip.lapic_registers import Reg
from tests.kvm.fakes import FakeVcpu, FakeVm

ENABLE, X2APIC = 1 << 11, 1 << 10
IDS = st.sampled_from([0, 1, 2, 3, 0x7F, 0xFE, 0xFF, 0x100, 0x1FF, 0xFFFF_FFFF])


def set_base(vcpu: FakeVcpu, on: int, off: int = 0) -> None:
    msr.set(vcpu, msr.IA32_APIC_BASE, (vcpu.apic_base | on) & ~off, True)


def asked(vm: FakeVm, destination: int) -> list[FakeVcpu]:
    """Who says that a message to `destination` is for him."""
    return [vcpu for vcpu in vm.vcpus if vcpu.apic.hw_enabled and vcpu.apic.matches(destination, logical=False, is_ipi=True)]


@given(st.lists(IDS, unique=True, max_size=6), st.lists(st.tuples(st.integers(0, 5), st.sampled_from(["x2apic", "off", "id"]), IDS)))
def test_the_table_is_what_every_apic_says(vcpu_ids: list[int], changes: list[tuple[int, str, int]]) -> None:
    vm = FakeVm()
    for vcpu_id in vcpu_ids:
        if vcpu_id < 1 << 12:
            FakeVcpu(vm, vcpu_id)
    for position, change, value in [(0, "", 0), *changes]:
        if position < len(vm.vcpus):
            vcpu = vm.vcpus[position]
            if change == "id":
                vcpu.apic.mmio_write(Reg.ID << 4, 4, value << 24 & 0xFFFF_FFFF)
            elif change == "off":
                set_base(vcpu, 0, ENABLE | X2APIC)
            elif change == "x2apic":
                set_base(vcpu, ENABLE | X2APIC)
        for destination in (0, 1, 2, 3, 0x7F, 0xFE, 0xFF, 0x100, 0x1FF, 0x200, 0xFFFF_FFFF):
            found, everybody = vm.apic_map.physical(destination), asked(vm, destination)
            assert found in (None, *(vcpu.apic for vcpu in everybody))
            if destination not in (0xFF, 0xFFFF_FFFF) and len(everybody) != 1:
                assert found is None
            if found is not None:
                assert [vcpu.apic for vcpu in everybody] == [found]


def test_an_id_of_one_apic_is_found_and_an_id_of_two_is_not() -> None:
    vm = FakeVm()
    first, second = FakeVcpu(vm, 0), FakeVcpu(vm, 1)
    assert [vm.apic_map.physical(destination) for destination in (0, 1, 2, 0xFF)] == [first.apic, second.apic, None, None]
    second.apic.mmio_write(Reg.ID << 4, 4, 7 << 24)
    assert [vm.apic_map.physical(destination) for destination in (1, 7)] == [None, second.apic]
    second.apic.mmio_write(Reg.ID << 4, 4, 0)
    assert vm.apic_map.physical(0) is None


def test_a_new_vcpu_and_a_restored_page_are_seen() -> None:
    vm = FakeVm()
    FakeVcpu(vm, 0)
    assert vm.apic_map.physical(1) is None
    late = FakeVcpu(vm, 1)
    assert vm.apic_map.physical(1) is late.apic
    page = bytearray(late.apic.get_state())
    page[Reg.ID * 16 + 3] = 9
    late.apic.set_state(bytes(page))
    assert [vm.apic_map.physical(destination) for destination in (1, 9)] == [None, late.apic]
