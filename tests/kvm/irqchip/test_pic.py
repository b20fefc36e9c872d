"""`softkvm.kvm.irqchip.pic`: initialisation, priorities, ends of interrupt, poll, ELCR, state."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softkvm.kvm import request
from softkvm.uapi.kvm import PicState
from tests.kvm.fakes import FakeVcpu, FakeVm

MASTER, SLAVE, ELCR = 0x20, 0xA0, 0x4D0
EOI, SPECIFIC_EOI, READ_ISR, READ_IRR, POLL = 0x20, 0x60, 0x0B, 0x0A, 0x0C


def out(vm: FakeVm, port: int, value: int) -> None:
    assert vm.pio_bus.write(port, 1, value)


def inb(vm: FakeVm, port: int) -> int:
    value = vm.pio_bus.read(port, 1)
    assert value is not None
    return value


def setup(icw4: int = 1) -> FakeVm:
    """Both chips as firmware leaves them: vectors 30h and 38h, nothing masked."""
    vm = FakeVm()
    for port, base, cascade in ((MASTER, 0x30, 4), (SLAVE, 0x38, 2)):
        out(vm, port, 0x11)
        for value in (base, cascade, icw4, 0):
            out(vm, port + 1, value)
    return vm


def raise_line(vm: FakeVm, line: int) -> None:
    vm.chips.pic.set_irq(line, 0, True)


def take(vm: FakeVm) -> int | None:
    return vm.chips.pic.read_irq() if vm.chips.pic.output else None


def test_vectors_of_both_chips() -> None:
    vm = setup()
    raise_line(vm, 4)
    assert take(vm) == 0x34
    out(vm, MASTER, EOI)
    raise_line(vm, 12)
    assert take(vm) == 0x3C
    out(vm, SLAVE, READ_ISR)
    assert inb(vm, SLAVE) == 1 << 4
    out(vm, MASTER, READ_ISR)
    assert inb(vm, MASTER) == 1 << 2


def test_fixed_priority_with_the_slave_between_1_and_3() -> None:
    vm = setup()
    for line in (7, 3, 9, 0):
        raise_line(vm, line)
    taken = []
    while (vector := take(vm)) is not None:
        taken.append(vector)
        if vector >= 0x38:
            out(vm, SLAVE, EOI)
        out(vm, MASTER, EOI)
    assert taken == [0x30, 0x39, 0x33, 0x37]


def test_a_served_line_holds_back_lower_ones() -> None:
    vm = setup()
    raise_line(vm, 3)
    take(vm)
    raise_line(vm, 5)
    assert not vm.chips.pic.output
    raise_line(vm, 1)
    assert take(vm) == 0x31
    out(vm, MASTER, SPECIFIC_EOI | 1)
    out(vm, MASTER, SPECIFIC_EOI | 3)
    assert take(vm) == 0x35


def test_edge_needs_a_new_rise_and_level_does_not() -> None:
    vm = setup()
    out(vm, ELCR, 0xFF)
    assert inb(vm, ELCR) == 0xF8  # timer, keyboard and cascade stay edge-triggered
    out(vm, ELCR + 1, 0xFF)
    assert inb(vm, ELCR + 1) == 0xDE
    raise_line(vm, 1)
    raise_line(vm, 5)
    assert take(vm) == 0x31
    out(vm, MASTER, EOI)
    assert take(vm) == 0x35
    out(vm, MASTER, EOI)
    assert take(vm) == 0x35
    vm.chips.pic.set_irq(5, 0, False)
    out(vm, MASTER, EOI)
    assert take(vm) is None


def test_a_request_that_goes_away_is_spurious() -> None:
    vm = setup()
    out(vm, ELCR, 0x20)
    raise_line(vm, 5)
    vm.chips.pic.set_irq(5, 0, False)
    assert vm.chips.pic.read_irq() == 0x37
    out(vm, MASTER, READ_ISR)
    assert inb(vm, MASTER) == 0


def test_masking() -> None:
    vm = setup()
    out(vm, MASTER + 1, 0x10)
    assert inb(vm, MASTER + 1) == 0x10
    assert vm.chips.pic.set_irq(4, 0, True) == -1
    assert not vm.chips.pic.output
    out(vm, MASTER, READ_IRR)
    assert inb(vm, MASTER) == 0x10
    out(vm, MASTER + 1, 0)
    assert take(vm) == 0x34


def test_rotation() -> None:
    vm = setup()
    raise_line(vm, 4)
    take(vm)
    out(vm, MASTER, 0xA0)  # end and rotate: 4 has now the lowest priority
    for line in (3, 5):
        raise_line(vm, line)
    assert take(vm) == 0x35
    out(vm, MASTER, EOI)
    out(vm, MASTER, 0xC0 | 2)  # 3 is the highest
    assert take(vm) == 0x33


def test_automatic_end() -> None:
    vm = setup(icw4=3)
    acked: list[int] = []
    vm.routing.add_ack_listener(4, lambda: acked.append(4))
    raise_line(vm, 4)
    assert take(vm) == 0x34
    assert acked == [4]
    raise_line(vm, 5)
    assert take(vm) == 0x35


def test_special_mask_mode_lets_lower_lines_through() -> None:
    vm = setup()
    raise_line(vm, 3)
    take(vm)
    out(vm, MASTER + 1, 1 << 3)
    raise_line(vm, 6)
    assert not vm.chips.pic.output
    out(vm, MASTER, 0x68)
    raise_line(vm, 5)
    assert take(vm) == 0x35


def test_poll() -> None:
    vm = setup()
    raise_line(vm, 4)
    out(vm, MASTER, POLL)
    assert inb(vm, MASTER) == 0x84
    out(vm, MASTER, POLL)
    assert inb(vm, MASTER) == 0x07


def test_ends_are_announced() -> None:
    vm = setup()
    acked: list[int] = []
    vm.routing.add_ack_listener(12, lambda: acked.append(12))
    raise_line(vm, 12)
    take(vm)
    out(vm, SLAVE, EOI)
    assert acked == [12]


def test_masks_are_announced() -> None:
    vm = setup()
    masked: list[bool] = []
    vm.routing.add_mask_listener(0, masked.append)
    out(vm, MASTER + 1, 0xFF)
    out(vm, MASTER + 1, 0xFE)
    assert masked == [True, False]


def test_output_wakes_vcpus_that_listen_to_the_pic() -> None:
    vm = setup()
    first, second = FakeVcpu(vm, 0), FakeVcpu(vm, 1)
    raise_line(vm, 4)
    assert first.take_requests() & request.REQ_EVENT
    assert not second.take_requests()


@pytest.mark.parametrize("chip", [0, 1])
def test_save_restore_save_is_equal(chip: int) -> None:
    vm = setup()
    for line in (3, 12):
        raise_line(vm, line)
    take(vm)
    saved = vm.chips.pic.get_state(chip)
    other = FakeVm()
    other.chips.pic.set_state(chip, saved)
    assert bytes(other.chips.pic.get_state(chip)) == bytes(saved)


@given(st.lists(st.tuples(st.sampled_from([0x20, 0x21, 0xA0, 0xA1, 0x4D0, 0x4D1]), st.integers(0, 255), st.integers(0, 15)), max_size=40))
def test_any_sequence_of_port_writes_is_survived(steps: list[tuple[int, int, int]]) -> None:
    vm = setup()
    for port, value, line in steps:
        out(vm, port, value)
        vm.chips.pic.set_irq(line, 0, bool(value & 1))
        inb(vm, port)
        assert vm.chips.pic.read_irq() in range(256 + 8)


@given(st.binary(min_size=16, max_size=16))
def test_any_state_can_be_set(data: bytes) -> None:
    vm = FakeVm()
    vm.chips.pic.set_state(0, PicState.from_buffer_copy(data))
    vm.chips.pic.set_state(1, PicState.from_buffer_copy(data))
    vm.chips.pic.read_irq()
    out(vm, MASTER, 0xA0)
