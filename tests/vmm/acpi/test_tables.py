"""The ACPI tables: our own checks, and Intel's compiler as a second opinion where it is installed."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from softkvm.vmm import acpi, layout
from softkvm.vmm.acpi import fadt

CPUS = 3


@pytest.fixture(scope="module")
def tables() -> dict[str, bytes]:
    """Every table by signature, found as a guest finds them: from the RSDP."""
    blob = acpi.build(CPUS)

    def at(address: int) -> bytes:
        start = address - blob.address
        (size,) = struct.unpack_from("<I", blob.data, start + 4)
        return blob.data[start : start + size]

    (xsdt_address,) = struct.unpack_from("<Q", blob.data, 24)
    xsdt = at(xsdt_address)
    found = {"RSDP": blob.data[:36], "XSDT": xsdt}
    for (address,) in struct.iter_unpack("<Q", xsdt[36:]):
        found[at(address)[:4].decode()] = at(address)
    facs_address, dsdt_address = struct.unpack_from("<II", found["FACP"], 36)
    assert facs_address == acpi.FACS_ADDRESS
    assert facs_address % 64 == 0
    return found | {"FACS": at(facs_address), "DSDT": at(dsdt_address)}


def test_the_blob_fits_its_place_and_starts_with_the_root() -> None:
    blob = acpi.build(64)
    assert blob.address == layout.ACPI_TABLES.base
    assert len(blob.data) <= layout.ACPI_TABLES.size
    assert blob.data.startswith(b"RSD PTR ")


def test_all_tables_are_there_with_good_checksums(tables: dict[str, bytes]) -> None:
    assert set(tables) == {"RSDP", "XSDT", "FACP", "APIC", "MCFG", "DSDT", "FACS"}
    assert sum(tables["RSDP"][:20]) % 256 == 0
    assert all(sum(data) % 256 == 0 for name, data in tables.items() if name != "FACS")
    assert len(tables["FACS"]) == 64


def test_fadt_describes_the_fixed_hardware(tables: dict[str, bytes]) -> None:
    table = tables["FACP"]
    assert len(table) == 276
    assert struct.unpack_from("<H", table, 46)[0] == layout.IRQ_SCI.gsi
    assert struct.unpack_from("<I", table, 48)[0] == 0  # no SMI command: always in ACPI mode
    assert struct.unpack_from("<I", table, 76)[0] == layout.PM_TIMER.base
    assert struct.unpack_from("<H", table, 109)[0] & 0b10 == 0  # no keyboard controller
    assert struct.unpack_from("<I", table, 112)[0] == fadt.FLAGS
    assert table[116:128] == struct.pack("<BBBBQ", 1, 8, 0, 1, 0xCF9)
    assert table[128] == 6


def test_madt_lists_processors_and_the_timer_override(tables: dict[str, bytes]) -> None:
    table = tables["APIC"]
    entries = []
    position = 44
    while position < len(table):
        entries.append(table[position : position + table[position + 1]])
        position += table[position + 1]
    assert struct.unpack_from("<II", table, 36) == (0xFEE00000, 1)
    assert [entry[3] for entry in entries if entry[0] == 0] == [0, 1, 2]
    assert struct.unpack("<BBBBII", next(entry for entry in entries if entry[0] == 1))[4:] == (0xFEC00000, 0)
    overrides = [struct.unpack("<BBBBIH", entry)[3:] for entry in entries if entry[0] == 2]
    assert overrides == [(0, 2, 0), (9, 9, 0xD)]


def test_mcfg_covers_all_buses_of_the_ecam(tables: dict[str, bytes]) -> None:
    assert struct.unpack_from("<QHBB", tables["MCFG"], 44) == (layout.PCI_ECAM.base, 0, 0, layout.PCI_BUSES - 1)


@pytest.mark.skipif(shutil.which("iasl") is None, reason="acpica-tools is not installed")
def test_iasl_reads_every_table_without_complaint(tables: dict[str, bytes], tmp_path: Path) -> None:
    for name in set(tables) - {"RSDP"}:
        (tmp_path / f"{name}.dat").write_bytes(tables[name])
        result = subprocess.run(["iasl", "-d", f"{name}.dat"], cwd=tmp_path, capture_output=True, text=True, check=True)
        assert "rror" not in result.stdout + result.stderr
        assert "arning" not in result.stdout + result.stderr
        assert "Invalid" not in (tmp_path / f"{name}.dsl").read_text(), name


@pytest.mark.skipif(shutil.which("iasl") is None, reason="acpica-tools is not installed")
def test_disassembled_dsdt_compiles_again(tables: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "DSDT.dat").write_bytes(tables["DSDT"])
    subprocess.run(["iasl", "-d", "DSDT.dat"], cwd=tmp_path, capture_output=True, check=True)
    result = subprocess.run(["iasl", "DSDT.dsl"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "0 Errors, 0 Warnings" in result.stdout
    source = (tmp_path / "DSDT.dsl").read_text()
    assert source.count('"ACPI0007"') == CPUS
    assert source.count('EisaId ("PNP0501")') == 4
    assert "Name (\\_S5, Package (0x04)" in source
    assert "Method (_OSC, 4" in source
