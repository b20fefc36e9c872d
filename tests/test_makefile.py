"""The Makefile lists itself, and names what a machine lacks."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAKE = shutil.which("make")

pytestmark = pytest.mark.skipif(MAKE is None, reason="make is not installed")


def make(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": str(path)} if path else None
    return subprocess.run([str(MAKE), "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False, env=environment)


def test_help_lists_every_target_for_people() -> None:
    listed = set(re.findall(r"^  make ([a-z0-9-]+) ", make("help").stdout, re.MULTILINE))
    assert {"help", "boot", "test", "lint", "bench"} <= listed
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony
    assert set(phony[1].split()) - {"prerequisites"} == listed


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A PATH with all that the check of the prerequisites looks for."""
    for name in ("sh", "python3", "cc", "cargo"):
        (tmp_path / name).symlink_to(shutil.which(name) or "/bin/true")
    return tmp_path


@pytest.mark.parametrize(("missing", "sentence"), [("cc", "softkvm needs a C compiler"), ("cargo", "softkvm needs a Rust toolchain")])
def test_missing_prerequisite_is_one_sentence(tools: Path, missing: str, sentence: str) -> None:
    (tools / missing).unlink()
    result = make("-s", "prerequisites", path=tools)
    assert result.returncode != 0
    assert sentence in result.stderr.splitlines()[0]


def test_python_that_is_too_old_is_one_sentence(tools: Path) -> None:
    (tools / "python3").unlink()
    (tools / "python3").write_text("#!/bin/sh\nexit 1\n")
    (tools / "python3").chmod(0o755)
    assert "softkvm needs Python 3.11 or later" in make("-s", "prerequisites", path=tools).stderr
