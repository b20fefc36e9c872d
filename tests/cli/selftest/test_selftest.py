"""The self-test's verdict on what a guest printed."""

from __future__ import annotations

import pytest

from softkvm.cli import app
from softkvm.cli.selftest import VENDORS, image, verdict
from softkvm.vmm import Stop, StopReason
from tests.helpers.fake_machine import FakeMachine

PASSED = Stop(StopReason.EXIT, 0, 0x100300, "", image.PASSED_STATUS)


@pytest.mark.parametrize("vendor", VENDORS)
def test_right_output_and_end_pass(vendor: str) -> None:
    assert verdict(PASSED, image.expected(vendor).replace("\n", "\r\n")) is None


def test_missing_line_is_named() -> None:
    printed = image.expected(VENDORS[0]).partition("paging")[0]
    problem = verdict(Stop(StopReason.TRIPLE_FAULT, 0, 0, "shutdown"), printed)
    assert problem == "the guest did not print 'paging' (triple fault: shutdown)"


def test_empty_output_names_the_first_line() -> None:
    assert "'softkvm self-test'" in str(verdict(Stop(StopReason.TIMEOUT, 0, 0, ""), ""))


def test_right_output_with_a_wrong_end_fails() -> None:
    assert "power-off" in str(verdict(Stop(StopReason.POWER_OFF, 0, 0, ""), image.expected(VENDORS[0])))


def test_command_reports_and_passes(machine: type[FakeMachine], capfd: pytest.CaptureFixture[str]) -> None:
    def play(self: FakeMachine) -> Stop:
        self.print(image.expected(VENDORS[0]))
        return PASSED

    machine.guest = play
    assert app.main(["run", "--selftest"]) == 0
    assert "the self-test passed" in capfd.readouterr().err


def test_command_reports_a_failure(machine: type[FakeMachine], capfd: pytest.CaptureFixture[str]) -> None:
    machine.guest = lambda self: Stop(StopReason.TRIPLE_FAULT, 0, 0, "shutdown")
    assert app.main(["run", "--selftest"]) == 125
    assert "the self-test failed: the guest did not print 'softkvm self-test'" in capfd.readouterr().err
