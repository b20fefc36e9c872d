"""Where a Linux kernel lies in guest memory, wherever KASLR has put it.

Source of truth: Linux 6.1 `Documentation/x86/x86_64/mm.rst` and `arch/x86/kernel/vmlinux.lds.S`. The image is one piece of physical memory,
and one gigabyte of virtual addresses belongs to it. The symbol table in its read-only data holds the address that it runs at. With a CR3
the page tables lead there; without one, or with one that leads nowhere, all memory is searched.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from softkvm.vmi.errors import Corrupt, KernelNotFound, Unreadable
from softkvm.vmi.linux import kallsyms
from softkvm.vmi.memory import PAGE_MASK, Memory, Range
from softkvm.vmi.paging import PTI_USER_PGTABLE, AddressSpace, Mapping

Decoder = Callable[[bytes, kallsyms.Tables], kallsyms.Decoded]

KERNEL_MAP = Range(0xFFFF_FFFF_8000_0000, 0xFFFF_FFFF_C000_0000)
_BTF_HEADER = struct.pack("<HBBI", 0xEB9F, 1, 0, 24)
_BTF_LARGEST = 1 << 26
_LARGEST_PIECE = 1 << 28
_SEARCH_STEP = 1 << 24
_SEARCH_OVERLAP = 1 << 24


@dataclass(frozen=True, slots=True)
class Image:
    """What was read of a kernel: its symbols and types, and how to find the rest."""

    symbols: kallsyms.Decoded
    base: int
    """The address that all symbols are relative to: `_text`, wherever KASLR has put it."""
    shift: int
    """Virtual minus physical address of everything in the image."""
    btf: bytes

    def physical(self, address: int) -> int:
        """The guest-physical address of a virtual one inside the image."""
        return address - self.shift


def find(memory: Memory, cr3: int | None = None, *, la57: bool = False, decode: Decoder = kallsyms.decode) -> Image:
    """The kernel in `memory`; KernelNotFound if there is none. `cr3` of any vCPU makes it quick."""
    for address, data in _candidates(memory, cr3, la57):
        try:
            tables = kallsyms.locate(data)
        except KernelNotFound:
            continue
        if (image := _complete(address, data, tables, decode(data, tables))) is not None:
            return image
    raise KernelNotFound("there is no Linux kernel with kallsyms and BTF in this memory (is it still booting?)")


def _candidates(memory: Memory, cr3: int | None, la57: bool) -> Iterator[tuple[int, bytes]]:
    """Pieces of memory that may be the kernel's read-only data, with their physical addresses, the likeliest first."""
    if cr3 is not None:
        for root in dict.fromkeys((cr3, cr3 & ~PTI_USER_PGTABLE)):
            for piece in _read_only_pieces(AddressSpace(memory, root, la57=la57)):
                if (data := _read(memory, piece)) is not None:
                    yield piece.base, data
    for area in memory.ranges():
        for base in range(area.base, area.end, _SEARCH_STEP):
            piece = Range(base, min(base + _SEARCH_STEP + _SEARCH_OVERLAP, area.end))
            if (data := _read(memory, piece)) is not None:
                yield piece.base, data


def _read_only_pieces(space: AddressSpace) -> Sequence[Range]:
    """Physical ranges that the kernel's gigabyte maps without a gap, neither writable nor executable; the largest first."""
    try:
        pages = sorted(
            (page for page in space.mappings(*KERNEL_MAP) if not page.writable and not page.executable), key=lambda page: page.virtual
        )
    except Corrupt:
        return []
    pieces: list[Range] = []
    before: Mapping | None = None
    for page in pages:
        adjoins = before is not None and (before.virtual + before.size, before.physical + before.size) == (page.virtual, page.physical)
        start = pieces.pop().base if adjoins else page.physical
        pieces.append(Range(start, page.physical + page.size))
        before = page
    return sorted((piece for piece in pieces if piece.end - piece.base <= _LARGEST_PIECE), key=lambda piece: piece.base - piece.end)


def _read(memory: Memory, piece: Range) -> bytes | None:
    try:
        return memory.read(piece.base, piece.end - piece.base)
    except Unreadable:
        return None


def _complete(address: int, data: bytes, tables: kallsyms.Tables, symbols: kallsyms.Decoded) -> Image | None:
    """Add the types. `__start_BTF` is the one symbol whose place in the data is known as well: that gives virtual minus physical."""
    number = next((number for number, name in enumerate(symbols.names) if name[1:] == "__start_BTF"), None)
    if number is None:
        return None
    (base,) = struct.unpack_from("<Q", data, tables.base)
    at = data.find(_BTF_HEADER)
    while at >= 0:
        size = _btf_size(data, at)
        shift = base + symbols.offsets[number] - (address + at)
        if size is not None and not shift & PAGE_MASK:
            return Image(symbols, base, shift, data[at : at + size])
        at = data.find(_BTF_HEADER, at + 1)
    return None


def _btf_size(data: bytes, at: int) -> int | None:
    header = data[at : at + 24]
    if len(header) < 24:
        return None
    types, types_size, strings, strings_size = struct.unpack_from("<IIII", header, 8)
    size = 24 + max(types + types_size, strings + strings_size)
    return size if size <= min(_BTF_LARGEST, len(data) - at) else None
