"""Arguments of system calls as strace shows them, and memory that is not there."""

from __future__ import annotations

import struct

import pytest

from softkvm.vmi.linux.syscalls import Call, Parameter
from softkvm.vmi.memory import BufferMemory
from softkvm.vmi.paging import AddressSpace
from softkvm.vmi.tools import arguments
from softkvm.vmi.tools.arguments import Kind
from tests.vmi.kernel_image import map_page

PAGE = 0x40_0000
OPENAT = Call(257, "openat", (Parameter("dfd", "int"), Parameter("filename", "const char *"), Parameter("flags", "int")))
WRITE = Call(1, "write", (Parameter("fd", "unsigned int"), Parameter("buf", "const char *"), Parameter("count", "size_t")))
READ = Call(0, "read", (Parameter("fd", "unsigned int"), Parameter("buf", "char *"), Parameter("count", "size_t")))
EXECVE = Call(59, "execve", (Parameter("filename", "const char *"), Parameter("argv", "const char *const *")))


@pytest.fixture
def space() -> AddressSpace:
    """One page of user memory."""
    ram = bytearray(1 << 16)
    map_page(ram, 0x1000, PAGE, 0x9000 | 7, iter(range(0x2000, 0x8000, 0x1000)))
    ram[0x9000:0x9010] = b"/etc/passwd\0tab\t"
    ram[0x9100:0x9118] = struct.pack("<3Q", PAGE, PAGE + 12, 0)
    ram[0x9FFC:0xA000] = b"tail"
    return AddressSpace(BufferMemory([(0, memoryview(ram))]), 0x1000)


def show(call: Call, position: int, value: int, space: AddressSpace, following: int = 0) -> str:
    return arguments.decode(call, position, value, space, following).shown


def test_paths_flags_and_directories(space: AddressSpace) -> None:
    assert show(OPENAT, 0, (1 << 64) - 100, space) == "AT_FDCWD"
    assert show(OPENAT, 1, PAGE, space) == '"/etc/passwd"'
    assert show(OPENAT, 2, 0o2000101, space) == "O_WRONLY|O_CREAT|O_CLOEXEC"


def test_text_that_is_not_there_is_an_address(space: AddressSpace) -> None:
    assert show(OPENAT, 1, 0x1234, space) == "0x1234"
    assert show(OPENAT, 1, PAGE + 0xFFC, space) == hex(PAGE + 0xFFC)  # no NUL before the hole
    assert show(OPENAT, 1, 0, space) == "NULL"


def test_buffers_have_their_length(space: AddressSpace) -> None:
    assert show(WRITE, 1, PAGE + 12, space, 4) == '"tab\\t"'
    assert show(WRITE, 1, PAGE, space, 1 << 40).endswith('"...')
    assert arguments.classify(READ, 1) is Kind.OUTPUT
    assert arguments.buffer("buf", PAGE, 4, space).data == b"/etc"


def test_words(space: AddressSpace) -> None:
    assert show(EXECVE, 1, PAGE + 0x100, space) == '["/etc/passwd", "tab\\t"]'.replace(
        '"tab\\t"', arguments.text("", PAGE + 12, space).shown
    )
    assert show(EXECVE, 1, 0x5000, space) == "0x5000"


@pytest.mark.parametrize(
    ("value", "address", "shown"),
    [
        (3, False, "3"),
        ((1 << 64) - 2, False, "-1 ENOENT"),
        (0x7F00_0000_0000, True, "0x7f0000000000"),
        ((1 << 64) - 512, False, "? ERESTARTSYS"),
    ],
)
def test_results(value: int, address: bool, shown: str) -> None:
    assert arguments.show_result(value, address=address) == shown


def test_what_a_terminal_would_obey_is_quoted() -> None:
    assert arguments.quote(b'\x1b[2J"\\\n') == '"\\33[2J\\"\\\\\\n"'


def test_an_octal_escape_does_not_swallow_a_digit() -> None:
    assert arguments.quote(b"\x107\x10x") == '"\\0207\\20x"'
