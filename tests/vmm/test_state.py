"""Saved state: every device of the board comes back as it was, byte for byte."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from softkvm.host.clock import VirtualClock
from softkvm.vmm import layout, state
from softkvm.vmm.board import Board, Chassis
from softkvm.vmm.devices import acpi_pm, rtc, serial
from softkvm.vmm.errors import StateError
from softkvm.vmm.layout import GIB


def make_board(clock: VirtualClock) -> Board:
    chassis = Chassis(
        power_off=lambda: None, reset=lambda: None, debug_exit=lambda status: None, suspend=lambda: None, wake_up=lambda: None
    )
    board = Board(chassis, lambda gsi, level: None, clock, (GIB, 0), 1, [lambda data: None] * 4)
    board.plug_in_test_device(lambda address: None)
    return board


def fresh(board: Board, clock: VirtualClock) -> None:
    """As it left the factory."""


def used(board: Board, clock: VirtualClock) -> None:
    """After a guest has been at every device, and time has passed."""
    for uart in board.serial:
        for register, value in (
            (serial.LCR, 0x83),
            (0, 1),
            (1, 0),
            (serial.LCR, 3),
            (serial.IIR_FCR, 0xC1),
            (serial.MCR, 0x0B),
            (serial.IER, 7),
        ):
            uart.write(register, 1, value)
        uart.write(serial.SCR, 1, 0x5A)
        uart.receive(bytes(range(40)))
    for address, value in ((rtc.SECONDS_ALARM, 0xC0), (rtc.REGISTER_B, rtc.B_24H | rtc.B_AIE | rtc.B_PIE), (0x50, 7)):
        board.rtc.write(0, 1, address)
        board.rtc.write(1, 1, value)
    board.pm.event.write(acpi_pm.PM1_ENABLE, 2, acpi_pm.PM1_TIMER | acpi_pm.PM1_POWER_BUTTON)
    board.pm.press_power_button()
    board.pm.control.write(0, 2, 3 << 10)
    board.pm.wake()
    board.pm.event.write(acpi_pm.PM1_ENABLE, 2, acpi_pm.PM1_TIMER | acpi_pm.PM1_POWER_BUTTON)
    board.reset.write(0, 1, 2)
    board.ports.write(layout.FW_CFG.base, 2, 3)
    board.ports.write(layout.TEST_IOPORT.base, 4, 0x12345678)
    board.memory.write(layout.TEST_MEMORY.base, 8, 0x0123456789ABCDEF)
    board.ports.write(0xCF8, 4, 0x80000010)
    board.ports.write(0xCFC, 4, 0xFFFFFFFF)
    clock.advance(700_000_000_000)


DEVICES = sorted(make_board(VirtualClock()).stateful())


@pytest.mark.parametrize("prepare", [fresh, used])
@pytest.mark.parametrize("name", DEVICES)
def test_save_restore_save_gives_equal_bytes(name: str, prepare: Callable[[Board, VirtualClock], None]) -> None:
    clock = VirtualClock()
    board = make_board(clock)
    prepare(board, clock)
    saved = board.stateful()[name].save()
    data = state.encode(saved)
    other_host = VirtualClock(start_ns=99)
    device = make_board(other_host).stateful()[name]
    device.restore(state.decode(data, type(saved)))
    assert state.encode(device.save()) == data


@pytest.mark.parametrize("name", DEVICES)
def test_use_changes_the_record(name: str) -> None:
    clock = VirtualClock()
    board = make_board(clock)
    before = state.encode(board.stateful()[name].save())
    used(board, clock)
    unchanged = state.encode(board.stateful()[name].save()) == before
    assert unchanged == name.startswith("pci.")  # the host bridge has nothing that a guest can change


@pytest.mark.parametrize("name", DEVICES)
def test_record_of_another_version_is_refused(name: str) -> None:
    saved = make_board(VirtualClock()).stateful()[name].save()
    fields = msgspec.to_builtins(saved, builtin_types=(bytes,)) | {"version": 99}
    with pytest.raises(StateError, match=type(saved).__name__):
        state.decode(msgspec.msgpack.encode(fields), type(saved))
    with pytest.raises(StateError):
        state.decode(b"\xc1", type(saved))
