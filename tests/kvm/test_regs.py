"""Registers through the ABI: the reset state, round trips, and the states that Linux refuses."""

from __future__ import annotations

import errno

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from softkvm.kvm import Vcpu, Vm, regs
from softkvm.silicon.control import Segment
from softkvm.uapi import kvm as uapi

U64 = st.integers(0, (1 << 64) - 1)


def test_reset_state(vcpu: Vcpu) -> None:
    general, special = vcpu.get_regs(), vcpu.get_sregs()
    assert (general.rip, general.rflags) == (0xFFF0, 2)
    assert (special.cs.selector, special.cs.base, special.cs.limit, special.cs.type) == (0xF000, 0xFFFF_0000, 0xFFFF, 0xB)
    assert (special.cr0, special.apic_base) == (0x6000_0010, 0xFEE0_0900)
    assert (special.tr.type, special.ldt.type, special.ds.type, special.ds.present) == (0xB, 2, 3, 1)
    debug = vcpu.get_debugregs()
    assert (debug.dr6, debug.dr7) == (0xFFFF_0FF0, 0x400)
    fpu = vcpu.get_fpu()
    assert (fpu.fcw, fpu.mxcsr) == (0x37F, 0x1F80)
    assert vcpu.get_xcrs().xcrs[0].value == 1


def test_processor_signature_without_cpuid(vm: Vm) -> None:
    assert vm.create_vcpu(0).get_regs().rdx == 0x600


@settings(max_examples=30)
@given(values=st.lists(U64, min_size=18, max_size=18))
def test_general_registers_round_trip(vcpu: Vcpu, values: list[int]) -> None:
    written = uapi.Regs(*values)
    vcpu.set_regs(written)
    written.rflags |= 2
    assert bytes(vcpu.get_regs()) == bytes(written)


@given(rights=st.integers(0, 0x1_F0FF), base=U64, limit=st.integers(0, 0xFFFF_FFFF), selector=st.integers(0, 0xFFFF))
def test_segments_round_trip(rights: int, base: int, limit: int, selector: int) -> None:
    first = regs.get_segment(Segment(selector=selector, access_rights=rights, limit=limit, base=base))
    stored = Segment()
    regs.set_segment(stored, first)
    assert (stored.selector, stored.limit, stored.base) == (selector, limit, base)
    usable = rights & 1 << 7 and not rights & 1 << 16
    assert bool(stored.access_rights & 1 << 16) is not bool(usable)
    if usable:
        assert stored.access_rights == rights & 0xF0FF


def test_special_registers_round_trip(vcpu: Vcpu) -> None:
    sregs = long_mode(vcpu.get_sregs())
    sregs.gdt.base, sregs.gdt.limit, sregs.cr8 = 0xFFFF_8000_0000_0000, 0x7F, 5
    sregs.interrupt_bitmap[1] = 1 << 3
    vcpu.set_sregs(sregs)
    assert bytes(vcpu.get_sregs()) == bytes(sregs)
    assert vcpu.lapic is not None
    assert vcpu.lapic.tpr() == 0x50
    assert vcpu.control.cr4_shadow == sregs.cr4
    second = vcpu.get_sregs2()
    assert (second.cr3, second.flags) == (sregs.cr3, 0)
    vcpu.set_sregs2(second)
    second.flags = 1
    with pytest.raises(OSError, match="bad flags"):
        vcpu.set_sregs2(second)


def long_mode(sregs: uapi.Sregs) -> uapi.Sregs:
    sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = 0x8005_0033, 0x1000, 0x20, 0x500
    sregs.cs.l, sregs.cs.db = 1, 0
    return sregs


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("cr4", 1 << 13 | 0x20),  # VMXE without VMX
        ("cr4", 0),  # long mode without PAE
        ("efer", 0x100),  # LME and PG without LMA
        ("efer", 0x400),  # LMA without LME
        ("cr0", 0x8005_0032),  # PG without PE
        ("cr0", 0x2005_0033),  # NW without CD
        ("cr0", 1 << 32 | 0x8005_0033),
        ("cr0", 0x0005_0033),  # LMA without PG
        ("cr3", 1 << 52),
        ("apic_base", 0xFEE0_0901),
    ],
)
def test_impossible_states_change_nothing(vcpu: Vcpu, name: str, value: int) -> None:
    before = bytes(vcpu.get_sregs())
    sregs = long_mode(vcpu.get_sregs())
    setattr(sregs, name, value)
    with pytest.raises(OSError) as caught:  # noqa: PT011
        vcpu.set_sregs(sregs)
    assert caught.value.errno == errno.EINVAL
    assert bytes(vcpu.get_sregs()) == before


def test_debug_registers(vcpu: Vcpu) -> None:
    debug = uapi.Debugregs(db=(1, 2, 3, 4), dr6=0xFFFF_0FF1, dr7=0x401)
    vcpu.set_debugregs(debug)
    assert bytes(vcpu.get_debugregs()) == bytes(debug)
    for bad in (uapi.Debugregs(flags=1), uapi.Debugregs(dr6=1 << 32), uapi.Debugregs(dr7=1 << 32)):
        with pytest.raises(OSError, match="bad debug registers"):
            vcpu.set_debugregs(bad)


def test_events_round_trip(vcpu: Vcpu, vm: Vm) -> None:
    vm.enable_cap(uapi.EnableCap(cap=uapi.KVM_CAP_EXCEPTION_PAYLOAD, args=(1, 0, 0, 0)))
    vm.enable_cap(uapi.EnableCap(cap=uapi.KVM_CAP_X86_TRIPLE_FAULT_EVENT, args=(1, 0, 0, 0)))
    new = vcpu.get_vcpu_events()
    new.exception.pending, new.exception.nr, new.exception.has_error_code, new.exception.error_code = 1, 14, 1, 2
    new.exception_has_payload, new.exception_payload = 1, 0x1234
    new.nmi.pending, new.nmi.masked = 1, 1
    new.interrupt.shadow = uapi.KVM_X86_SHADOW_INT_STI
    new.triple_fault.pending = 1
    vcpu.set_vcpu_events(new)
    assert vcpu.state.interruptibility == 1 | 8
    assert bytes(vcpu.get_vcpu_events()) == bytes(new)
    new.triple_fault.pending = 0
    vcpu.set_vcpu_events(new)
    assert vcpu.get_vcpu_events().triple_fault.pending == 0


def test_a_pending_exception_reads_as_injected_without_payloads(vcpu: Vcpu) -> None:
    vcpu.events.exception_pending, vcpu.events.vector = True, 6
    read = vcpu.get_vcpu_events()
    assert (read.exception.injected, read.exception.pending, read.exception.nr) == (1, 0, 6)


@pytest.mark.parametrize("bad", ["flags", "vector", "nmi", "pending", "smm", "triple fault"])
def test_bad_events(vcpu: Vcpu, bad: str) -> None:
    new = vcpu.get_vcpu_events()
    if bad == "flags":
        new.flags = 1 << 20
    elif bad == "smm":
        new.smi.smm = 1
        vcpu.mp_state = uapi.KVM_MP_STATE_INIT_RECEIVED
    elif bad == "triple fault":
        new.flags |= uapi.KVM_VCPUEVENT_VALID_TRIPLE_FAULT
    elif bad == "pending":
        new.exception.pending = 1
    else:
        new.exception.injected, new.exception.nr = 1, 32 if bad == "vector" else 2
    with pytest.raises(OSError, match="bad vCPU events"):
        vcpu.set_vcpu_events(new)


def test_mp_state(vcpu: Vcpu) -> None:
    vcpu.set_mp_state(uapi.MpState(mp_state=uapi.KVM_MP_STATE_HALTED))
    assert vcpu.get_mp_state().mp_state == uapi.KVM_MP_STATE_HALTED
    with pytest.raises(OSError, match="bad multiprocessing state"):
        vcpu.set_mp_state(uapi.MpState(mp_state=5))


def test_interrupt_errors(vcpu: Vcpu) -> None:
    for vector, expected in ((0x30, errno.ENXIO), (256, errno.EINVAL)):
        with pytest.raises(OSError) as caught:  # noqa: PT011
            vcpu.interrupt(vector)
        assert caught.value.errno == expected


def test_translate(vcpu: Vcpu) -> None:
    found = vcpu.translate(0x1234)
    assert (found.linear_address, found.physical_address, found.valid) == (0x1234, 0x1234, 1)


def test_cpuid_is_fixed_once_the_vcpu_has_run(vcpu: Vcpu) -> None:
    vcpu.set_cpuid2(vcpu.get_cpuid2())
    vcpu.load()
    vcpu.set_cpuid2(vcpu.get_cpuid2())
    with pytest.raises(OSError, match="CPUID") as caught:
        vcpu.set_cpuid2([])
    assert caught.value.errno == errno.EINVAL
