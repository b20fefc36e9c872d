"""The map of the machine, and its page in the docs."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from softkvm.vmm import layout
from softkvm.vmm.layout import Range

DOCS = Path(__file__).parents[2] / "docs" / "memory-map.md"


def test_the_page_in_docs_is_current() -> None:
    assert DOCS.read_text() == layout.markdown(), "the page must be written anew from layout.markdown()"


@pytest.mark.parametrize("ranges", [layout.MEMORY_MAP, layout.PORT_MAP], ids=["memory", "ports"])
def test_every_range_of_the_module_is_in_a_map(ranges: tuple[Range, ...]) -> None:
    known = {id(each) for each in (*layout.MEMORY_MAP, *layout.PORT_MAP)}
    assert all(id(each) in known for each in vars(layout).values() if isinstance(each, Range))
    assert [each.base for each in ranges] == sorted(each.base for each in ranges)


def test_boot_structures_do_not_overlap() -> None:
    placed = sorted(
        (
            layout.BOOT_GDT,
            layout.ZERO_PAGE,
            layout.BOOT_STACK,
            layout.BOOT_PAGE_TABLES,
            layout.COMMAND_LINE,
            layout.EBDA,
            layout.LEGACY_VIDEO,
            layout.ACPI_TABLES,
            layout.KERNEL_FLOOR,
        ),
        key=lambda each: each.base,
    )
    assert all(first.end <= second.base for first, second in pairwise(placed))


def test_device_windows_do_not_overlap_ram() -> None:
    placed = [each for each in layout.MEMORY_MAP if each.base >= layout.RAM_BELOW_4G.end] + [layout.RAM_BELOW_4G]
    placed.sort(key=lambda each: each.base)
    assert all(first.end <= second.base for first, second in pairwise(placed))


def test_pci_lines_stay_on_the_io_apic() -> None:
    lines = {layout.pci_line(slot, pin) for slot in range(32) for pin in range(4)}
    assert min(lines) == 16
    assert max(lines) < layout.IOAPIC_PINS
