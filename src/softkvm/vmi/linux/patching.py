"""Where a kernel legally changes its own code, and how that looks from outside.

Source of truth: Linux 6.1 `arch/x86/kernel/alternative.c`. After boot `text_poke()` is the only way: it maps the page writable at another
address in an address space of its own, `poking_mm`, and copies the new bytes there. What it patches are jump labels, static calls, ftrace's
call at the beginning of functions, and kprobes; the places of the first two are in tables of the kernel's and of each module.
"""

from __future__ import annotations

import struct
from enum import Enum
from functools import cached_property

from softkvm.vmi.errors import VmiError
from softkvm.vmi.linux import modules
from softkvm.vmi.linux.kernel import Kernel
from softkvm.vmi.linux.objects import Struct

_ADDRESS_BITS = 0x000F_FFFF_FFFF_E000
_JUMP_ENTRY, _STATIC_CALL_SITE = 16, 8
_LONGEST_TABLE = 1 << 22
_LONGEST_PATCH = 5
_FENTRY_AFTER = 4  # an ENDBR64 may come before the call


class Site(Enum):
    """What may be patched at an address."""

    JUMP_LABEL = "jump label"
    STATIC_CALL = "static call"
    FTRACE = "ftrace"
    OTHER = "other"


class Patching:
    """Knows the legal writer and the legal places."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel

    @cached_property
    def _poking_root(self) -> int:
        memory = self._kernel.struct("mm_struct", self._kernel.number(self._kernel.symbols["poking_mm"]))
        return self._kernel.physical(memory.number("pgd")) & _ADDRESS_BITS

    def is_poking(self, cr3: int) -> bool:
        """Whether an address space is the one that `text_poke()` uses."""
        return cr3 & _ADDRESS_BITS == self._poking_root

    @cached_property
    def _kernel_sites(self) -> dict[int, Site]:
        symbols, sites = self._kernel.symbols, dict[int, Site]()
        for kind, name, size in (
            (Site.JUMP_LABEL, "jump_table", _JUMP_ENTRY),
            (Site.STATIC_CALL, "static_call_sites", _STATIC_CALL_SITE),
        ):
            if f"__start___{name}" in symbols:
                start, end = symbols[f"__start___{name}"], symbols[f"__stop___{name}"]
            elif f"__start_{name}" in symbols:
                start, end = symbols[f"__start_{name}"], symbols[f"__stop_{name}"]
            else:
                continue
            sites |= self._table(start, end - start, size, kind)
        return sites

    def _table(self, start: int, length: int, size: int, kind: Site) -> dict[int, Site]:
        """Entries that begin with the distance from themselves to the place."""
        data = self._kernel.read(start, max(0, min(length, _LONGEST_TABLE)) // size * size)
        distances = ((start + at, *struct.unpack_from("<i", data, at)) for at in range(0, len(data), size))
        return {place + distance & (1 << 64) - 1: kind for place, distance in distances}

    def _module_sites(self, module: Struct) -> dict[int, Site]:
        sites: dict[int, Site] = {}
        for kind, start, count, size in (
            (Site.JUMP_LABEL, "jump_entries", "num_jump_entries", _JUMP_ENTRY),
            (Site.STATIC_CALL, "static_call_sites", "num_static_call_sites", _STATIC_CALL_SITE),
        ):
            if module.has(start):
                sites |= self._table(module.number(start), module.number(count) * size, size, kind)
        return sites

    def site(self, address: int) -> Site:
        """What the instruction at an address, or just before it, is for: a patch may be written byte by byte."""
        known = self._sites_around(address)
        for distance in range(_LONGEST_PATCH):
            if (kind := known.get(address - distance)) is not None:
                return kind
        symbol = self._kernel.symbols.lookup(address)
        if symbol is not None and address - symbol.address < _FENTRY_AFTER + _LONGEST_PATCH:
            return Site.FTRACE
        return Site.OTHER

    def _sites_around(self, address: int) -> dict[int, Site]:
        if self._kernel.symbols.lookup(address) is not None:
            return self._kernel_sites
        try:
            owner = modules.owner(modules.modules(self._kernel), address)
            return self._module_sites(self._kernel.struct("module", owner.address)) if owner is not None else {}
        except VmiError:
            return {}
