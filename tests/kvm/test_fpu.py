"""`softkvm.kvm.fpu`: layouts of kvm_fpu and of the XSAVE area."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softkvm.kvm import fpu
from softkvm.uapi.kvm import Xsave
from tests.kvm.fakes import XSTATE, FakeVcpu, FakeVm


@pytest.fixture
def vcpu() -> FakeVcpu:
    """Every register holds its own number."""
    vcpu = FakeVcpu(FakeVm())
    state = vcpu.state.fpu
    state.fcw, state.fsw, state.ftw, state.fop, state.fip, state.fdp = 0x27F, 3 << 11, 0xF0, 0x123, 0x1122334455, 0x66
    state.mxcsr, state.pkru = 0x1FA0, 0x55555554
    for number in range(8):
        state.st[number][:10] = [number + 1] * 10
        state.mask[number] = 0x100 + number
    for number in range(32):
        state.vector[number][:] = [number + 1] * 16 + [number + 0x41] * 16 + [number + 0x81] * 32
    return vcpu


def area(vcpu: FakeVcpu) -> bytearray:
    return bytearray(fpu.get_xsave(vcpu))


def put(vcpu: FakeVcpu, data: bytes | bytearray) -> None:
    fpu.set_xsave(vcpu, Xsave.from_buffer_copy(data))


def test_kvm_fpu_is_in_stack_order(vcpu: FakeVcpu) -> None:
    saved = fpu.get_fpu(vcpu)
    assert [saved.fpr[position][0] for position in range(8)] == [4, 5, 6, 7, 8, 1, 2, 3]
    assert [saved.xmm[number][15] for number in range(16)] == list(range(1, 17))
    assert (saved.fcw, saved.ftwx, saved.last_opcode, saved.last_ip, saved.mxcsr) == (0x27F, 0xF0, 0x123, 0x1122334455, 0x1FA0)


def test_kvm_fpu_round_trip_leaves_upper_halves(vcpu: FakeVcpu) -> None:
    saved = fpu.get_fpu(vcpu)
    other = FakeVcpu(FakeVm())
    other.state.fpu.vector[3][20] = 0x77
    fpu.set_fpu(other, saved)
    assert bytes(fpu.get_fpu(other)) == bytes(saved)
    assert other.state.fpu.vector[3][20] == 0x77
    assert bytes(other.state.fpu.st) == bytes(vcpu.state.fpu.st)


def test_xsave_layout(vcpu: FakeVcpu) -> None:
    data = area(vcpu)
    assert struct.unpack_from("<HHBxHQQII", data) == (0x27F, 3 << 11, 0xF0, 0x123, 0x1122334455, 0x66, 0x1FA0, 0xFFFF)
    assert data[32] == 4
    assert data[160 + 16 * 15] == 16
    assert struct.unpack_from("<QQ", data, 512) == (0x2E7, 0)
    for component, first in ((2, 0x41), (5, 0), (6, 0x81), (7, 17), (9, 0x54)):
        assert data[XSTATE[component][1]] == first
    assert data[2688 + 3] == 0x55


def test_xsave_round_trip(vcpu: FakeVcpu) -> None:
    data = area(vcpu)
    other = FakeVcpu(FakeVm())
    put(other, data)
    assert bytes(other.state.fpu) == bytes(vcpu.state.fpu)
    assert area(other) == data


def test_components_in_their_initial_state_are_not_named() -> None:
    vcpu = FakeVcpu(FakeVm())
    assert struct.unpack_from("<Q", area(vcpu), 512) == (3,)


def test_components_that_are_not_named_are_initialised(vcpu: FakeVcpu) -> None:
    data = area(vcpu)
    struct.pack_into("<Q", data, 512, 1 << fpu.YMM)
    put(vcpu, data)
    state = vcpu.state.fpu
    assert (state.fcw, state.fsw, state.mxcsr, state.pkru) == (0x37F, 0, 0x1FA0, 0)
    assert bytes(state.vector[2])[:33] == bytes(16) + b"\x43" * 16 + b"\0"
    struct.pack_into("<Q", data, 512, 0)
    put(vcpu, data)
    assert state.mxcsr == 0x1F80


@pytest.mark.parametrize(("offset", "value"), [(512, 1 << 3), (512, 1 << 63), (520, 1 << 63), (528, 1), (568, 1), (24, 1 << 16)])
def test_bad_areas(vcpu: FakeVcpu, offset: int, value: int) -> None:
    data = area(vcpu)
    before = bytes(vcpu.state.fpu)
    struct.pack_into("<Q" if offset >= 512 else "<I", data, offset, value)
    with pytest.raises(OSError, match=r"\[Errno 22\]"):
        put(vcpu, data)
    assert bytes(vcpu.state.fpu) == before


@given(top=st.integers(0, 7), registers=st.binary(min_size=128, max_size=128))
def test_stack_rotation_is_its_own_inverse(top: int, registers: bytes) -> None:
    vcpu = FakeVcpu(FakeVm())
    data = area(vcpu)
    struct.pack_into("<H", data, 2, top << 11)
    data[32:160] = registers
    put(vcpu, data)
    assert area(vcpu)[32:160] == registers
    assert bytes(vcpu.state.fpu.st)[16 * top : 16 * top + 16] == registers[:16]
