"""Control registers that KVM writes in the guest's place, because the write exits.

Answers to Linux 6.1 `kvm_set_cr{0,3,4}()`, `kvm_post_set_cr0()` and `load_pdptrs()` in `arch/x86/kvm/x86.c`; SDM vol. 3, 2.5 and 4.1.2.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from softkvm.kvm import regs
from softkvm.kvm.memslots import PAGE_SIZE

if TYPE_CHECKING:
    from softkvm.kvm.vcpu import Vcpu

CR0_TS = 1 << 3
CR0_GUEST_OWNED = CR0_TS
"""Bits that the guest may change without an exit while writes are watched (`KVM_POSSIBLE_CR0_GUEST_BITS`)."""
CR4_GUEST_OWNED = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 7 | 1 << 8 | 1 << 9 | 1 << 10 | 1 << 16
"""PVI, TSD, DE, PGE, PCE, OSFXSR, OSXMMEXCPT, FSGSBASE (`KVM_POSSIBLE_CR4_GUEST_BITS`)."""
NO_FLUSH = 1 << 63
"""MOV to CR3 that keeps the translations of its PCID."""

_CR0_ET = 1 << 4
_CR0_KNOWN = 0xE005_003F
_CS_LONG = 1 << 13
_PDPTE_RESERVED = 0x1E6


def read(vcpu: Vcpu, number: int) -> int:
    """CR0, CR3 or CR4."""
    return int(getattr(vcpu.state, f"cr{number}"))


def refuses(vcpu: Vcpu, number: int, value: int) -> bool:
    """Whether a MOV of `value` to CR0, CR3 or CR4 is #GP."""
    return {0: _refuses_cr0, 3: _refuses_cr3, 4: _refuses_cr4}[number](vcpu, value)


def _refuses_cr0(vcpu: Vcpu, value: int) -> bool:
    state = vcpu.state
    pg, pe, nw, cd = (value & bit for bit in (regs.CR0_PG, regs.CR0_PE, regs.CR0_NW, regs.CR0_CD))
    if value >> 32 or (nw and not cd) or (pg and not pe):
        return True
    code_64 = bool(state.segments[regs.CS].access_rights & _CS_LONG)
    if pg and not state.cr0 & regs.CR0_PG and state.efer & regs.EFER_LME:
        return not state.cr4 & regs.CR4_PAE or code_64
    return not pg and bool(state.cr4 & regs.CR4_PCIDE or (state.efer & regs.EFER_LMA and code_64))


def _refuses_cr3(vcpu: Vcpu, value: int) -> bool:
    if vcpu.state.cr4 & regs.CR4_PCIDE:
        value &= ~NO_FLUSH
    return bool(vcpu.state.efer & regs.EFER_LMA) and value >> vcpu.cpuid.physical_address_bits != 0


def _refuses_cr4(vcpu: Vcpu, value: int) -> bool:
    state = vcpu.state
    long_mode = state.efer & regs.EFER_LMA
    return bool(
        value & regs.cr4_reserved(vcpu)
        or (long_mode and not value & regs.CR4_PAE)
        or (long_mode and (value ^ state.cr4) & regs.CR4_LA57)
        or (value & ~state.cr4 & regs.CR4_PCIDE and (not long_mode or state.cr3 & 0xFFF))
    )


def load(vcpu: Vcpu, number: int, value: int) -> bool:
    """Write a value that `refuses()` lets pass; False, with nothing changed, for #GP after all: PDPTEs that cannot be loaded."""
    state = vcpu.state
    before = state.cr0, state.cr3, state.cr4, state.efer
    if number == 0:
        state.cr0 = value & _CR0_KNOWN | _CR0_ET
        if state.efer & regs.EFER_LME:
            state.efer = state.efer | regs.EFER_LMA if value & regs.CR0_PG else state.efer & ~regs.EFER_LMA
    elif number == 3:
        state.cr3 = value & ~NO_FLUSH
    else:
        state.cr4 = value
    if not _load_pdptes(vcpu):
        state.cr0, state.cr3, state.cr4, state.efer = before
        return False
    regs.control_registers_changed(vcpu)
    return True


def _load_pdptes(vcpu: Vcpu) -> bool:
    state = vcpu.state
    if not (state.cr0 & regs.CR0_PG and state.cr4 & regs.CR4_PAE) or state.efer & regs.EFER_LMA:
        return True
    address = state.cr3 & 0xFFFF_FFE0
    try:
        entries = struct.unpack("<4Q", vcpu.mmu.read(address, 32))
    except OSError:
        return False
    reserved = _PDPTE_RESERVED | ~((1 << vcpu.cpuid.physical_address_bits) - 1) & -PAGE_SIZE
    if any(entry & 1 and entry & reserved for entry in entries):
        return False
    state.pdpte[:] = entries
    return True
