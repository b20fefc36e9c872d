"""Reset, and the debug-exit port."""

from __future__ import annotations

import pytest

from softkvm.vmm.devices.debug_exit import DebugExit
from softkvm.vmm.devices.reset import RESET_VALUE, RST_CPU, RST_SYS, KeyboardReset, ResetControl


@pytest.fixture
def resets() -> list[None]:
    return []


def test_reset_control_acts_when_the_cpu_bit_rises(resets: list[None]) -> None:
    device = ResetControl(lambda: resets.append(None))
    device.write(0, 1, RST_SYS)
    assert not resets
    device.write(0, 1, RST_SYS | RST_CPU)
    device.write(0, 1, RST_SYS | RST_CPU)
    assert len(resets) == 1
    assert device.read(0, 1) == RST_SYS | RST_CPU


def test_value_of_the_fadt_resets(resets: list[None]) -> None:
    ResetControl(lambda: resets.append(None)).write(0, 1, RESET_VALUE)
    assert resets


@pytest.mark.parametrize(("command", "expected"), [(0xFE, 1), (0xF0, 1), (0xFF, 0), (0xFD, 0), (0xD1, 0), (0x60, 0)])
def test_keyboard_controller_resets_on_a_pulse_of_line_0(resets: list[None], command: int, expected: int) -> None:
    device = KeyboardReset(lambda: resets.append(None))
    device.write(0, 1, command)
    assert len(resets) == expected
    assert device.read(0, 1) & 2 == 0, "the guest would wait for an empty input buffer"


@pytest.mark.parametrize(("value", "status"), [(0, 1), (1, 3), (0x10, 0x21)])
def test_debug_exit_gives_the_status_of_kvm_unit_tests(value: int, status: int) -> None:
    seen: list[int] = []
    device = DebugExit(seen.append)
    device.write(0, 4, value)
    assert seen == [status]
    assert device.read(0, 4) == 0
