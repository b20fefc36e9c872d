"""Physical memory of a guest as a file: an ELF core as crash(8), drgn and Volatility read it, or LiME's format.

Source of truth: ELF gABI (program headers, notes), Linux 6.1 `include/linux/elfcore.h` and `arch/x86/include/asm/user_64.h` (NT_PRSTATUS),
`Documentation/admin-guide/kdump/vmcoreinfo.rst`; LiME's `doc/README.md` for its header. Zeros become holes in the file.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from io import BufferedIOBase
from typing import BinaryIO

from softkvm.vmi.errors import Unreadable
from softkvm.vmi.memory import PAGE_SIZE, Memory, Range
from softkvm.vmi.requests import Registers

_CHUNK = 1 << 18
_ZEROS = bytes(_CHUNK)
_ELF_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_PROGRAM_HEADER = struct.Struct("<IIQQQQQQ")
_ET_CORE, _EM_X86_64, _PT_LOAD, _PT_NOTE, _PF_RWX = 4, 62, 1, 4, 7
_AS_IN_VMCORE = 0
"""The segments' alignment: by it crash(8) tells a kdump, whose VMCOREINFO it follows, from a netdump."""
_NT_PRSTATUS = 1
_PRSTATUS_SIZE, _PRSTATUS_PID, _PRSTATUS_REGISTERS = 336, 32, 112
_LIME_MAGIC, _LIME_VERSION = 0x4C69_4D45, 1

Progress = Callable[[int, int], None]
"""Bytes done, and bytes in all."""


def elf(
    file: BinaryIO | BufferedIOBase,
    memory: Memory,
    areas: Sequence[Range],
    cpus: Iterable[Registers] = (),
    notes: Iterable[tuple[str, int, bytes]] = (),
    direct_map: int = 0,
    progress: Progress = lambda done, total: None,
) -> None:
    """Write an ELF core: a segment for each of `areas`, a note for each CPU, and `notes` (name, type, content) besides.

    `direct_map` is where the kernel maps all physical memory, for the segments' virtual addresses. OSError from the file.
    """
    content = b"".join(_note("CORE", _NT_PRSTATUS, _prstatus(number, cpu)) for number, cpu in enumerate(cpus))
    content += b"".join(_note(*note) for note in notes)
    headers = _ELF_HEADER.size + _PROGRAM_HEADER.size * (1 + len(areas))
    start = -(-(headers + len(content)) // PAGE_SIZE) * PAGE_SIZE
    identity = b"\x7fELF\2\1\1".ljust(16, b"\0")
    file.write(
        _ELF_HEADER.pack(
            identity, _ET_CORE, _EM_X86_64, 1, 0, _ELF_HEADER.size, 0, 0, _ELF_HEADER.size, _PROGRAM_HEADER.size, 1 + len(areas), 0, 0, 0
        )
    )
    file.write(_PROGRAM_HEADER.pack(_PT_NOTE, 0, headers, 0, 0, len(content), len(content), 4))
    position = start
    for area in areas:
        size = area.end - area.base
        virtual = direct_map + area.base if direct_map else 0
        file.write(_PROGRAM_HEADER.pack(_PT_LOAD, _PF_RWX, position, virtual, area.base, size, size, _AS_IN_VMCORE))
        position += size
    file.write(content)
    _write_areas(file, memory, [(area, b"") for area in areas], start, progress)


def lime(file: BinaryIO | BufferedIOBase, memory: Memory, areas: Sequence[Range], progress: Progress = lambda done, total: None) -> None:
    """Write LiME's format: before each range a header with its first and its last address. OSError from the file."""
    pieces = [(area, struct.pack("<IIQQQ", _LIME_MAGIC, _LIME_VERSION, area.base, area.end - 1, 0)) for area in areas]
    _write_areas(file, memory, pieces, 0, progress)


def _write_areas(
    file: BinaryIO | BufferedIOBase, memory: Memory, pieces: Sequence[tuple[Range, bytes]], position: int, progress: Progress
) -> None:
    total, done = sum(area.end - area.base for area, _ in pieces), 0
    for area, header in pieces:
        file.seek(position)
        file.write(header)
        position += len(header)
        for address in range(area.base, area.end, _CHUNK):
            size = min(_CHUNK, area.end - address)
            data = _read(memory, address, size)
            if data != _ZEROS[:size]:
                file.seek(position)
                file.write(data)
            position += size
            done += size
            progress(done, total)
    file.truncate(position)


def _read(memory: Memory, address: int, size: int) -> bytes:
    """Memory with zeros where there is none."""
    try:
        return memory.read(address, size)
    except Unreadable:
        return b"".join(_read_page(memory, page) for page in range(address, address + size, PAGE_SIZE))


def _read_page(memory: Memory, address: int) -> bytes:
    try:
        return memory.read(address, PAGE_SIZE)
    except Unreadable:
        return bytes(PAGE_SIZE)


def _note(name: str, kind: int, content: bytes) -> bytes:
    label = name.encode() + b"\0"
    return struct.pack("<III", len(label), len(content), kind) + _padded(label) + _padded(content)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def _prstatus(number: int, cpu: Registers) -> bytes:
    """`struct elf_prstatus`: the CPU's number in place of a PID, as kdump has it, and `struct user_regs_struct`."""
    r, s = cpu.regs, cpu.sregs
    registers = struct.pack(
        "<27Q",
        *(r.r15, r.r14, r.r13, r.r12, r.rbp, r.rbx, r.r11, r.r10, r.r9, r.r8, r.rax, r.rcx, r.rdx, r.rsi, r.rdi),
        *((1 << 64) - 1, r.rip, s.cs.selector, r.rflags, r.rsp, s.ss.selector, s.fs.base, s.gs.base),
        *(s.ds.selector, s.es.selector, s.fs.selector, s.gs.selector),
    )
    status = bytearray(_PRSTATUS_SIZE)
    struct.pack_into("<i", status, _PRSTATUS_PID, number)
    status[_PRSTATUS_REGISTERS : _PRSTATUS_REGISTERS + len(registers)] = registers
    return bytes(status)
