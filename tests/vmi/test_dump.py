"""Dumps, read back: the ELF core by pyelftools, LiME by its own header."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

from elftools.elf.elffile import ELFFile

from softkvm.uapi.kvm import Regs, Sregs
from softkvm.vmi import dump
from softkvm.vmi.memory import BufferMemory, Range
from softkvm.vmi.requests import Registers

LOW, HIGH = b"low" + bytes(0x2FFD), bytes(0x1000) + b"high".ljust(0x1000, b"\0")
MEMORY = BufferMemory([(0, memoryview(LOW)), (1 << 32, memoryview(HIGH))])
DIRECT_MAP = 0xFFFF_8880_0000_0000


def parse_notes(data: bytes) -> list[tuple[str, int, bytes]]:
    """Name, type and content of each note."""
    found, position = [], 0
    while position < len(data):
        name_size, size, kind = struct.unpack_from("<III", data, position)
        start = position + 12 + (name_size + 3 & ~3)
        found.append((data[position + 12 : position + 12 + name_size - 1].decode(), kind, data[start : start + size]))
        position = start + (size + 3 & ~3)
    return found


def test_elf_core(tmp_path: Path) -> None:
    cpu = Registers(8, Regs(rip=0x1234, rsp=0x5678), Sregs(), {})
    with (tmp_path / "core").open("w+b") as stream:
        dump.elf(stream, MEMORY, MEMORY.ranges(), [cpu, cpu], [("VMCOREINFO", 0, b"OSRELEASE=6.1\n")], DIRECT_MAP)
        core = ELFFile(stream)
        notes, low, high = core.iter_segments()
        assert core["e_type"] == "ET_CORE"
        assert [(segment["p_paddr"], segment["p_vaddr"], segment["p_filesz"]) for segment in (low, high)] == [
            (0, DIRECT_MAP, len(LOW)),
            (1 << 32, DIRECT_MAP + (1 << 32), len(HIGH)),
        ]
        assert (low.data(), high.data()) == (LOW, HIGH)
        first, second, info = parse_notes(notes.data())
    assert (first[:2], second[:2]) == (("CORE", 1), ("CORE", 1))
    registers = struct.unpack_from("<27Q", first[2], 112)
    assert (registers[16], registers[19]) == (0x1234, 0x5678)
    assert (first[2][32], second[2][32]) == (0, 1)
    assert info == ("VMCOREINFO", 0, b"OSRELEASE=6.1\n")


def lime(folder: Path, areas: Sequence[Range]) -> bytes:
    """The file as it is read back."""
    with (folder / "lime").open("wb") as stream:
        dump.lime(stream, MEMORY, areas)
    return (folder / "lime").read_bytes()


def test_lime(tmp_path: Path) -> None:
    data = lime(tmp_path, MEMORY.ranges())
    assert struct.unpack_from("<IIQQQ", data) == (0x4C694D45, 1, 0, len(LOW) - 1, 0)
    assert data[32 : 32 + len(LOW)] == LOW
    assert struct.unpack_from("<IIQQQ", data, 32 + len(LOW)) == (0x4C694D45, 1, 1 << 32, (1 << 32) + len(HIGH) - 1, 0)
    assert data[64 + len(LOW) :] == HIGH


def test_holes_are_zeros(tmp_path: Path) -> None:
    assert lime(tmp_path, [Range(0x2000, 0x5000)])[32:] == bytes(0x3000)
