"""The symbol table, decoded from what the kernel's build writes, and from what a hostile guest could."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from softkvm.vmi.errors import KernelNotFound
from softkvm.vmi.linux import kallsyms
from tests.vmi.kernel_image import BASE
from tests.vmi.kernel_image import kallsyms as encode

SYMBOLS = [(f"tname_{number}", BASE + 16 * number) for number in range(600)] + [("A__per_cpu_start", 0), ("Dpcpu_hot", 0x1FB80)]


@pytest.mark.parametrize("new_order", [False, True])
def test_names_and_addresses_come_back(new_order: bool) -> None:
    data = b"\x5a" * 64 + encode(SYMBOLS, new_order=new_order) + b"\x5a" * 64
    decoded = kallsyms.decode(data, kallsyms.locate(data))
    assert decoded.names == [name for name, _ in SYMBOLS]
    assert list(decoded.offsets) == [address - BASE if address >= BASE else -1 - address for _, address in SYMBOLS]


def test_long_names() -> None:
    symbols = [("t" + "x" * 300, BASE), *SYMBOLS]
    data = encode(symbols)
    assert kallsyms.decode(data, kallsyms.locate(data)).names[0] == symbols[0][0]


def test_no_table_is_said() -> None:
    with pytest.raises(KernelNotFound):
        kallsyms.locate(bytes(4096))


def test_markers_that_do_not_agree_are_no_table() -> None:
    data = bytearray(encode(SYMBOLS))
    names = kallsyms.locate(bytes(data)).names
    data[names] += 1
    with pytest.raises(KernelNotFound):
        kallsyms.locate(bytes(data))


@settings(max_examples=200)
@given(st.data())
def test_bent_tables_are_refused_or_decoded(choices: st.DataObject) -> None:
    data = bytearray(encode(SYMBOLS))
    for _ in range(choices.draw(st.integers(1, 4))):
        data[choices.draw(st.integers(0, len(data) - 1))] = choices.draw(st.integers(0, 255))
    try:
        tables = kallsyms.locate(bytes(data))
        assert len(kallsyms.decode(bytes(data), tables).names) == tables.count
    except KernelNotFound:
        pass
