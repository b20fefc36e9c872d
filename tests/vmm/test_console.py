"""The console record: waiting for text, and noticing a panic."""

from __future__ import annotations

import re

import pytest

from softkvm.vmm.console import WINDOW, Console

PANIC = b"[    1.234567] Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(0,0)\r\n"
END = b"[    1.300000][    T1] ---[ end Kernel panic - not syncing: VFS: Unable to mount root fs ]---\r\n"


def type_in(console: Console, data: bytes) -> list[str]:
    """Feed byte by byte, as a UART does; what was found on the way."""
    return [found for byte in data if (found := console.feed(bytes((byte,)))) is not None]


@pytest.mark.parametrize("wanted", ["login: ", b"login: ", re.compile("log.n: $"), re.compile(rb"log\w+: $")])
def test_text_is_found_when_its_last_byte_comes(wanted: str | bytes | re.Pattern[str] | re.Pattern[bytes]) -> None:
    console = Console()
    assert console.expect(wanted) is None
    assert type_in(console, b"debian login:") == []
    assert type_in(console, b" ") == ["login: "]
    assert console.data == b"debian login: "


def test_nothing_is_found_twice_and_nothing_is_missed_between_waits() -> None:
    console = Console()
    console.expect("# ")
    assert console.feed(b"# one\r\n# two\r\n# ") == "# "
    assert console.expect("# ") == "# "
    assert console.expect("# ") == "# "
    assert console.expect("# ") is None


def test_text_is_not_a_pattern() -> None:
    console = Console()
    console.expect("a.c")
    assert console.feed(b"abc") is None
    assert console.feed(b"a.c") == "a.c"


def test_unicode_text_is_found_as_utf_8() -> None:
    console = Console()
    console.expect("größe")
    assert type_in(console, "größe".encode()) == ["größe"]


def test_waiting_for_nothing_finds_nothing() -> None:
    console = Console()
    console.expect("x")
    console.expect(None)
    assert console.feed(b"x") is None


def test_record_is_bounded_and_keeps_the_newest() -> None:
    console = Console(limit=1000)
    for number in range(20_000):
        console.feed(b"%06d\n" % number)
    assert len(console.data) <= 1000 + WINDOW
    assert console.data.endswith(b"019999\n")
    assert console.expect("000001") is None
    assert console.expect("019999") == "019999"


def test_panic_is_noticed_with_its_message() -> None:
    console = Console()
    type_in(console, b"[    1.0] fine\r\n" + PANIC)
    assert console.panic == "Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(0,0)"
    assert not console.halted
    type_in(console, END)
    assert console.halted


@pytest.mark.parametrize(
    "line", [b"cat: Kernel panic - not syncing: no\n", b"the words Kernel panic\n", b"---[ end Kernel panic\n", b"x" * 10_000 + PANIC]
)
def test_other_lines_are_no_panic(line: bytes) -> None:
    console = Console()
    type_in(console, line)
    assert console.panic is None
    assert not console.halted


def test_panic_without_time_stamp() -> None:
    console = Console()
    console.feed(b"\nKernel panic - not syncing: Attempted to kill init!\n")
    assert console.panic == "Kernel panic - not syncing: Attempted to kill init!"
