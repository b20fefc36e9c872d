"""Memory type range registers and PAT, as state: guest memory is always write-back here, but what a guest writes it must read again.

Answers to SDM vol. 3, 12.11 and 12.12 and Linux 6.1 `arch/x86/kvm/mtrr.c`.
"""

from __future__ import annotations

from collections.abc import Callable

from softkvm.kvm.msr_index import IA32_PAT, MTRR_DEF_TYPE, MTRR_FIXED, MTRR_PHYSBASE0

VARIABLE_RANGES = 8
CAPABILITIES = 0x500 | VARIABLE_RANGES
"""IA32_MTRRCAP: write combining, fixed ranges."""
VARIABLE = range(MTRR_PHYSBASE0, MTRR_PHYSBASE0 + 2 * VARIABLE_RANGES)
ALL = (*VARIABLE, *MTRR_FIXED, MTRR_DEF_TYPE)

_MTRR_TYPES = frozenset({0, 1, 4, 5, 6})  # UC, WC, WT, WP, WB
_PAT_TYPES = _MTRR_TYPES | {7}  # and UC-
_DEF_TYPE_RESERVED = ~0xCFF


def _bytes_in(value: int, types: frozenset[int]) -> bool:
    return types.issuperset(value.to_bytes(8, "little"))


def is_valid(index: int, value: int, physical_address_bits: int) -> bool:
    """Whether WRMSR accepts `value` for the MTRR or PAT `index`."""
    if index == IA32_PAT:
        return _bytes_in(value, _PAT_TYPES)
    if index == MTRR_DEF_TYPE:
        return not value & _DEF_TYPE_RESERVED and value & 0xFF in _MTRR_TYPES
    if index in MTRR_FIXED:
        return _bytes_in(value, _MTRR_TYPES)
    if value >> physical_address_bits:
        return False
    if index & 1:  # PHYSMASK: bit 11 is its valid bit
        return not value & 0x7FF
    return not value & 0xF00 and value & 0xFF in _MTRR_TYPES


# --- What the registers say of an address --------------------------------------------------------------------------------------------

_ENABLED, _FIXED_ENABLED, _VALID = 1 << 11, 1 << 10, 1 << 11
_UC, _WT, _WB = 0, 4, 6
_FIXED_RANGES = ((0, 0x1_0000), (0x8_0000, 0x4000), (0xC_0000, 0x1000))
"""Start and size of what one byte of the first, the next two and the last eight fixed registers stands for."""
_FIXED_END = 0x10_0000


def memory_type(read: Callable[[int], int], gpa: int, physical_address_bits: int) -> int:
    """The MTRRs' type of the page at `gpa` (SDM vol. 3, 12.11.4; `kvm_mtrr_get_guest_memory_type()`); `read` gives the registers."""
    default = read(MTRR_DEF_TYPE)
    if not default & _ENABLED:
        return _UC
    if default & _FIXED_ENABLED and gpa < _FIXED_END:
        return _fixed_type(read, gpa)
    types = set()
    for base, mask in zip(VARIABLE[::2], VARIABLE[1::2], strict=True):
        valid = read(mask)
        bits = valid & (1 << physical_address_bits) - 1 & ~0xFFF
        if valid & _VALID and gpa & bits == read(base) & bits:
            types.add(read(base) & 0xFF)
    if not types:
        return default & 0xFF
    if len(types) == 1:
        return types.pop()
    return _WT if types == {_WT, _WB} else _UC


def _fixed_type(read: Callable[[int], int], gpa: int) -> int:
    start, size = next((start, size) for start, size in reversed(_FIXED_RANGES) if gpa >= start)
    first = {0: 0, 0x8_0000: 1, 0xC_0000: 3}[start]
    index, byte = divmod((gpa - start) // size, 8)
    return read(MTRR_FIXED[first + index]) >> 8 * byte & 0xFF
