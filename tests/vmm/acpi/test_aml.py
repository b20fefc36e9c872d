"""AML encoding, against bytes worked out from the specification by hand."""

from __future__ import annotations

import pytest

from softkvm.vmm.acpi import aml


@pytest.mark.parametrize(
    ("value", "encoded"),
    [
        (0, "00"),
        (1, "01"),
        (2, "0a02"),
        (0xFF, "0aff"),
        (0x100, "0b0001"),
        (0x10000, "0c00000100"),
        (0xFFFFFFFF, "0cffffffff"),
        (1 << 32, "0e0000000001000000"),
    ],
)
def test_integers_take_their_shortest_form(value: int, encoded: str) -> None:
    assert aml.integer(value).hex() == encoded


def test_integer_beyond_64_bits_is_refused() -> None:
    with pytest.raises(ValueError, match="64 bits"):
        aml.integer(1 << 64)


@pytest.mark.parametrize(
    ("name", "encoded"), [("\\_SB", b"\\_SB_"), ("MB", b"MB__"), ("\\_SB.PCI0", b"\\\x2e_SB_PCI0"), ("A.B.C", b"\x2f\x03A___B___C___")]
)
def test_paths(name: str, encoded: bytes) -> None:
    assert aml.path(name) == encoded


def test_eisa_id_of_the_specification() -> None:
    assert aml.eisa_id("PNP0A03").hex() == "0c41d00a03"


@pytest.mark.parametrize(("size", "length"), [(62, 1), (63, 2), (4093, 2), (4094, 3), (1 << 20, 4)])
def test_package_length_counts_itself(size: int, length: int) -> None:
    encoded = aml._sized(bytes(size))
    assert len(encoded) == size + length
    lead = encoded[0]
    assert lead >> 6 == length - 1
    total = lead & 0x3F if length == 1 else lead & 0x0F | int.from_bytes(encoded[1:length], "little") << 4
    assert total == len(encoded)


def test_resource_template_ends_with_its_tag() -> None:
    template = aml.resources(aml.io_ports(0x3F8, 8), aml.isa_irq(4))
    assert template.hex() == "1110" + "0a0d" + "4701f803f8030108" + "221000" + "7900"
