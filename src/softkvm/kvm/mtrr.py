"""Memory type range registers and PAT, as state: guest memory is always write-back here, but what a guest writes it must read again.

Answers to SDM vol. 3, 12.11 and 12.12 and Linux 6.1 `arch/x86/kvm/mtrr.c`.
"""

from __future__ import annotations

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
