"""Exit statuses, one row for each promise of `softkvm.cli.status`."""

import signal

import pytest

from softkvm.cli.ending import Ending
from softkvm.vmm import Stop, StopReason


def stop(reason: StopReason, status: int | None = None) -> Stop:
    return Stop(reason, 0, 0, "", status)


@pytest.mark.parametrize(
    ("ending", "has_command", "status"),
    [
        (Ending(stop(StopReason.POWER_OFF)), False, 0),
        (Ending(stop(StopReason.RESET)), False, 0),
        (Ending(stop(StopReason.INTERRUPTED)), False, 0),
        (Ending(stop(StopReason.PANIC)), False, 255),
        (Ending(stop(StopReason.TRIPLE_FAULT)), False, 255),
        (Ending(stop(StopReason.TIMEOUT)), False, 124),
        (Ending(stop(StopReason.INTERNAL_ERROR)), False, 125),
        (Ending(stop(StopReason.EXIT, 5)), False, 5),
        (Ending(stop(StopReason.EXIT, 0x1234)), False, 0x34),
        (Ending(stop(StopReason.RESET)), True, 255),
        (Ending(stop(StopReason.POWER_OFF)), True, 0),
        (Ending(stop(StopReason.INTERRUPTED), command_status=7), True, 7),
        (Ending(stop(StopReason.TIMEOUT)), True, 124),
        (Ending(stop(StopReason.INTERRUPTED), signal=signal.SIGINT), True, 130),
        (Ending(stop(StopReason.INTERRUPTED), signal=signal.SIGTERM), False, 143),
        (Ending(stop(StopReason.INTERRUPTED), output_lost=True), True, 141),
    ],
)
def test_status(ending: Ending, has_command: bool, status: int) -> None:
    assert ending.exit_status(has_command) == status


def test_every_reason_has_a_status() -> None:
    for reason in StopReason:
        assert 0 <= Ending(stop(reason)).exit_status(has_command=False) <= 255
