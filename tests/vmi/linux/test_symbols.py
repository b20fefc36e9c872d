"""A kernel found in memory, with and without the help of page tables, and its symbols by name and address."""

from __future__ import annotations

from pathlib import Path

import pytest

from softkvm.vmi.errors import KernelNotFound, UnknownName
from softkvm.vmi.linux import symbols
from softkvm.vmi.memory import BufferMemory
from tests.vmi.kernel_image import BASE, BUILD_ID, PHYSICAL, Types, build, memory


def types() -> bytes:
    made = Types()
    made.integer("int", 4, 1)
    return made.blob()


IMAGE = build({"Tstart_kernel": 0x5000, "Dinit_task": 0x7_0000}, types())


@pytest.mark.parametrize("with_page_tables", [True, False])
@pytest.mark.parametrize("slide", [0, 0x1C0_0000])
def test_kernel_is_found_wherever_it_lies(with_page_tables: bool, slide: int) -> None:
    base = BASE + slide
    ram, _, cr3 = memory(build({"Tstart_kernel": 0x5000}, types(), base=base), base)
    found = symbols.find(ram, cr3 if with_page_tables else None)
    assert found.symbols["start_kernel"] == base + 0x5000
    assert found.image.physical(base + 0x5000) == PHYSICAL + 0x5000
    assert found.build_id == BUILD_ID.hex()
    assert found.image.btf == types()


def test_addresses_are_described() -> None:
    found = symbols.find(*memory(IMAGE)[::2]).symbols
    assert found.describe(BASE + 0x5000) == "start_kernel"
    assert found.describe(BASE + 0x5004) == "start_kernel+0x4"
    assert found.describe(BASE - 1) == hex(BASE - 1)
    assert found.describe(0x1234) == "0x1234"


def test_per_cpu_symbols_are_offsets() -> None:
    assert symbols.find(*memory(IMAGE)[::2]).symbols["cpu_number"] == 0x1234


def test_unknown_symbol() -> None:
    with pytest.raises(UnknownName, match="nosuch"):
        symbols.find(*memory(IMAGE)[::2]).symbols["nosuch"]


def test_memory_without_a_kernel() -> None:
    with pytest.raises(KernelNotFound):
        symbols.find(BufferMemory([(0, memoryview(bytearray(1 << 20)))]), 0x1000)


def test_tables_that_point_at_themselves_end() -> None:
    ram = bytearray(1 << 16)
    ram[0x1000:0x2000] = (0x1003).to_bytes(8, "little") * 512
    with pytest.raises(KernelNotFound):
        symbols.find(BufferMemory([(0, memoryview(ram))]), 0x1000)


def test_cache_serves_the_same_kernel_at_another_place(tmp_path: Path) -> None:
    first = symbols.find(*memory(IMAGE)[::2], cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    moved = BASE + 0x20_0000
    ram, _, cr3 = memory(build({"Tstart_kernel": 0x5000, "Dinit_task": 0x7_0000}, types(), base=moved), moved)
    second = symbols.find(ram, cr3, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    assert second.symbols["init_task"] - first.symbols["init_task"] == 0x20_0000


def test_false_symbols_under_a_known_build_id_stay_their_guests_own(tmp_path: Path) -> None:
    symbols.find(*memory(build({"Tstart_kernel": 0x6000, "Dinit_task": 0x7_0000}, types()))[::2], cache=tmp_path)
    assert symbols.find(*memory(IMAGE)[::2], cache=tmp_path).symbols["start_kernel"] == BASE + 0x5000


def test_damaged_cache_is_passed_by(tmp_path: Path) -> None:
    symbols.find(*memory(IMAGE)[::2], cache=tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(b"\xc1")
    assert symbols.find(*memory(IMAGE)[::2], cache=tmp_path).symbols["start_kernel"] == BASE + 0x5000
