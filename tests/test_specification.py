"""SPECIFICATION.md promises nothing without a test."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROW = re.compile(r"^\| (?!promise|---)(?P<promise>.+?) \| (?P<test>.+?) \|$", re.MULTILINE)
ROWS = [(match["promise"], match["test"]) for match in ROW.finditer((ROOT / "SPECIFICATION.md").read_text())]


def names_in(file: Path) -> set[str]:
    """Names of the tests in a Python or Rust file."""
    text = file.read_text()
    if file.suffix == ".rs":
        return set(re.findall(r"#\[test\]\s+fn (\w+)\(", text))
    return {node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_there_are_promises() -> None:
    assert len(ROWS) > 10


@pytest.mark.parametrize(("promise", "test"), ROWS, ids=[promise for promise, _ in ROWS])
def test_promise_has_its_test(promise: str, test: str) -> None:
    match = re.fullmatch(r"`((?:tests|engine)/[\w/]+\.(?:py|rs))::(\w+)`", test)
    assert match, f"{promise!r} names no test but {test!r}"
    assert match[2] in names_in(ROOT / match[1])
