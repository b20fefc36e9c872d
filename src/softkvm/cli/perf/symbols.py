"""Names for addresses of a guest: its kernel's symbols, and those of the programs that its processes have mapped.

Source of truth: System V ABI, ch. 4 and 5 (symbol tables, program headers). The programs are the guest's, so nothing in them is believed.
"""

from __future__ import annotations

import io
from bisect import bisect_right
from pathlib import PurePosixPath

from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile
from elftools.elf.sections import SymbolTableSection

from softkvm.cli.perf.guest import GuestView, Process


class Program:
    """The functions of one ELF file."""

    def __init__(self, content: bytes) -> None:
        """Those of both symbol tables; none of what is no sound ELF file."""
        self._segments: list[tuple[int, int, int]] = []
        functions: dict[int, tuple[int, str]] = {}
        try:
            elf = ELFFile(io.BytesIO(content))
            for segment in elf.iter_segments("PT_LOAD"):
                self._segments.append((segment["p_offset"], segment["p_filesz"], segment["p_vaddr"]))
            for section in elf.iter_sections():
                if isinstance(section, SymbolTableSection):
                    for symbol in section.iter_symbols():
                        if symbol["st_info"]["type"] in ("STT_FUNC", "STT_GNU_IFUNC") and symbol["st_value"]:
                            functions.setdefault(symbol["st_value"], (symbol["st_size"], symbol.name))
        except (ELFError, ValueError, UnicodeDecodeError, KeyError, OverflowError, AttributeError, TypeError):
            functions = {}
        self._starts = sorted(functions)
        self._functions = [functions[start] for start in self._starts]

    def name(self, offset: int) -> str | None:
        """The function at a place in the file."""
        for start, size, address in self._segments:
            if start <= offset < start + size:
                return self._at(offset - start + address)
        return None

    def _at(self, address: int) -> str | None:
        place = bisect_right(self._starts, address) - 1
        if place < 0:
            return None
        size, name = self._functions[place]
        return name if address < self._starts[place] + max(size, 1) else None


class Symbolizer:
    """Names of one guest."""

    def __init__(self, view: GuestView) -> None:
        """With what the view knows by now."""
        self._view = view
        self._programs: dict[str, Program] = {}

    def kernel(self, address: int) -> str:
        """A function of the kernel, or [kernel]."""
        kernel = self._view.kernel
        symbol = kernel.symbols.lookup(address) if kernel is not None else None
        return symbol.name if symbol is not None else "[kernel]"

    def user(self, process: Process | None, address: int) -> str:
        """A function of a program, or the program in brackets."""
        area = process.area(address) if process is not None else None
        if area is None:
            return "[unknown]"
        if area.name not in self._programs:
            self._programs[area.name] = Program(self._view.files.get(area.name, b""))
        found = self._programs[area.name].name(address - area.start + area.offset)
        return found or f"[{PurePosixPath(area.name).name or 'anonymous'}]"
