"""Unwinding a kernel's stack by its own tables, whatever the tables and the stack say."""

from __future__ import annotations

import struct
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softkvm.cli.perf.orc import DEEPEST, Frame, Unwinder
from softkvm.vmi.errors import UnknownName, Unreadable

TEXT, TABLE, ENTRIES, STACK = 0xFFFF_FFFF_8100_0000, 0xFFFF_FFFF_8200_0000, 0xFFFF_FFFF_8201_0000, 0xFFFF_C900_0000_0000
SP, BP = 5, 4


class Kernel:
    """A kernel of a few functions, each 256 bytes, and a stack."""

    def __init__(self, entries: list[tuple[int, int, int]], stack: list[int]) -> None:
        relative = b"".join(struct.pack("<i", TEXT + 256 * number - TABLE - 4 * number) for number in range(len(entries)))
        self.memory = {TABLE: relative, ENTRIES: b"".join(struct.pack("<hhH", *entry) for entry in entries)}
        self.memory[STACK] = b"".join(word.to_bytes(8, "little") for word in stack)
        end = TABLE + len(relative)
        self.symbols = {"__start_orc_unwind_ip": TABLE, "__stop_orc_unwind_ip": end, "__start_orc_unwind": ENTRIES}

    def read(self, address: int, size: int) -> bytes:
        for start, data in self.memory.items():
            if start <= address and address + size <= start + len(data):
                return data[address - start : address - start + size]
        raise Unreadable(address)

    def number(self, address: int, size: int = 8) -> int:
        return int.from_bytes(self.read(address, size), "little")


def unwinder(entries: list[tuple[int, int, int]], stack: list[int]) -> Unwinder:
    return Unwinder(cast(Any, Kernel(entries, stack)))


def test_a_chain_of_calls_ends_in_user_mode() -> None:
    entries = [(8, 0, SP), (24, -16, SP | 1 << 4), (0, 0, SP | 1 << 8)]  # a leaf, a frame that saves BP, an entry with registers
    registers = [0] * 17 + [0x33, 0, 0, 0]  # CS: user mode
    stack = [TEXT + 0x110, 0, 0x77, TEXT + 0x210, *registers]
    chain = unwinder(entries, stack).chain(Frame(TEXT + 0x10, STACK, 0))
    assert chain == [TEXT + 0x10, TEXT + 0x110, TEXT + 0x210]


def test_without_tables_the_chain_is_one_function() -> None:
    class Bare(Kernel):
        def __init__(self) -> None:
            super().__init__([], [])
            self.symbols = cast(Any, Nothing())

    class Nothing:
        def __getitem__(self, name: str) -> int:
            raise UnknownName(name)

    assert Unwinder(cast(Any, Bare())).chain(Frame(TEXT, STACK, 0)) == [TEXT]


words = st.integers(0, (1 << 64) - 1) | st.integers(TEXT, TEXT + 1024) | st.integers(STACK, STACK + 256)
entries = st.tuples(st.integers(-(1 << 15), (1 << 15) - 1), st.integers(-(1 << 15), (1 << 15) - 1), st.integers(0, 0xFFFF))


@given(st.lists(entries, max_size=4), st.lists(words, max_size=32), words, words, words)
def test_hostile_tables_and_stacks_end(table: list[tuple[int, int, int]], stack: list[int], ip: int, sp: int, bp: int) -> None:
    assert len(unwinder(table, stack).chain(Frame(ip, sp, bp))) <= DEEPEST


@pytest.mark.parametrize("size", [0, 3])
def test_a_short_table(size: int) -> None:
    assert unwinder([(8, 0, SP)] * size, []).chain(Frame(TEXT, STACK, 0)) == [TEXT]
