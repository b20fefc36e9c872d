"""The self-test guest on our own silicon."""

from __future__ import annotations

from pathlib import Path

import pytest

from softkvm import silicon
from softkvm.cli import app
from softkvm.cli.selftest import image
from softkvm.vmm import Machine, StopReason

pytestmark = pytest.mark.skipif("profile" not in silicon.build_info(), reason="the engine is not built")


@pytest.mark.parametrize("cpu", ["cascadelake", "epyc"])
def test_selftest_passes(cpu: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert app.main(["run", "--selftest", "--cpu", cpu]) == 0
    assert "the self-test passed" in capfd.readouterr().err


def test_triple_fault_is_a_stop(tmp_path: Path) -> None:
    kernel = tmp_path / "kernel"
    invalid_opcode = b"\x0f\x0b"  # ud2, and no IDT that could take it
    kernel.write_bytes(image.bzimage(invalid_opcode.rjust(image.ENTRY64 + len(invalid_opcode), b"\0")))
    with Machine(kernel=kernel, memory="16M") as machine:
        stop = machine.run(timeout=60)
    assert (stop.reason, stop.rip) == (StopReason.TRIPLE_FAULT, 0x100000 + image.ENTRY64)
