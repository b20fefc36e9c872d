"""Which CPUID bits of the silicon KVM lets a guest have: the tables behind KVM_GET_SUPPORTED_CPUID.

Answers to `kvm_set_cpu_caps()` and `__do_cpuid_func()` of Linux 6.1 `arch/x86/kvm/cpuid.c`. A bit is missing here either because it is a
host matter (thermal, power, monitoring, debug store) or because no part of this KVM virtualises it yet (VMX, SVM, SGX, PT).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from softkvm.uapi.kvm import (
    KVM_FEATURE_CLOCKSOURCE,
    KVM_FEATURE_CLOCKSOURCE2,
    KVM_FEATURE_CLOCKSOURCE_STABLE_BIT,
    KVM_FEATURE_NOP_IO_DELAY,
    KVM_FEATURE_POLL_CONTROL,
    KVM_FEATURE_PV_SCHED_YIELD,
    KVM_FEATURE_PV_SEND_IPI,
    KVM_FEATURE_PV_UNHALT,
    KVM_FEATURE_STEAL_TIME,
)


class Registers(NamedTuple):
    """What CPUID returns for one leaf."""

    eax: int = 0
    ebx: int = 0
    ecx: int = 0
    edx: int = 0


NOTHING = Registers()


KVM_FEATURES = (
    KVM_FEATURE_CLOCKSOURCE,
    KVM_FEATURE_NOP_IO_DELAY,
    KVM_FEATURE_CLOCKSOURCE2,
    KVM_FEATURE_STEAL_TIME,
    KVM_FEATURE_PV_UNHALT,
    KVM_FEATURE_PV_SEND_IPI,
    KVM_FEATURE_POLL_CONTROL,
    KVM_FEATURE_PV_SCHED_YIELD,
    KVM_FEATURE_CLOCKSOURCE_STABLE_BIT,
)
"""Bits of leaf 40000001h EAX."""

MAX_BASIC, MAX_EXTENDED = 0x1F, 0x8000_0021

OFFERED_XCR0 = 0x2E7
"""x87, SSE, AVX, AVX-512 and PKRU: the states that `State.fpu` holds and `fpu.py` saves."""

ALL = 0xFFFF_FFFF


def _bits(*ranges: int | tuple[int, int]) -> int:
    """A mask of single bits and inclusive (low, high) ranges."""
    mask = 0
    for item in ranges:
        low, high = item if isinstance(item, tuple) else (item, item)
        mask |= (1 << high + 1) - (1 << low)
    return mask


@dataclass(frozen=True, slots=True)
class Mask:
    """What of one leaf is offered (`keep`), and what KVM adds of its own (`add`)."""

    keep: Registers
    add: Registers = NOTHING

    def apply(self, registers: Registers) -> Registers:
        """The offered value of a leaf."""
        return Registers(*(value & keep | add for value, keep, add in zip(registers, self.keep, self.add, strict=True)))


_FEATURES_ECX = _bits(0, 1, 9, 12, 13, 15, 17, 19, 20, 22, 23, 25, 26, 28, 29, 30)
# SSE3 PCLMULQDQ SSSE3 FMA CX16 PDCM PCID SSE4.1 SSE4.2 MOVBE POPCNT AES XSAVE AVX F16C RDRAND
_FEATURES_ECX_KVM = _bits(21, 24, 31)  # x2APIC, TSC_DEADLINE and HYPERVISOR are KVM's own work
_FEATURES_EDX = _bits((0, 9), (11, 17), 19, (23, 27), 28)
# up to APIC, SEP to PSE36, CLFLUSH, MMX to SS, HTT; without serial number, debug store, ACPI, TM, PBE

_LEAF7_EBX = _bits(0, (3, 11), 13, 14, (16, 21), 23, 24, (26, 31))  # without SGX, CQM, RDT, PT
_LEAF7_EBX_KVM = _bits(1)  # TSC_ADJUST
_LEAF7_ECX = _bits(1, 2, 3, 6, (8, 12), 14, 16, 22, 25, 27, 28, 31)
# VBMI UMIP PKU VBMI2 GFNI VAES VPCLMULQDQ VNNI BITALG VPOPCNTDQ LA57 RDPID CLDEMOTE MOVDIRI MOVDIR64B PKS
_LEAF7_EDX = _bits(2, 3, 4, 8, 10, 14, 16, 23, 26, 27, 31)
# 4VNNIW 4FMAPS FSRM VP2INTERSECT MD_CLEAR SERIALIZE TSXLDTRK FP16 SPEC_CTRL STIBP SSBD
_LEAF7_EDX_KVM = _bits(29)  # ARCH_CAPABILITIES is emulated for every silicon
_LEAF7_1_EAX = _bits(4, 5)  # AVX-VNNI, AVX512-BF16
_LEAF7_2_EDX = _bits((0, 4))  # PSFD and controls of indirect predictors, which KVM offers since Linux 6.8: IPRED RRSBA DDPD_U BHI

_EXTENDED_ECX = _bits(0, 1, 4, 5, 6, 7, 8, 9, 11, 16, 21, 22, 23)
# LAHF CMP_LEGACY CR8 ABM SSE4A MISALIGNSSE PREFETCHW OSVW XOP FMA4 TBM TOPOEXT PERFCTR_CORE
_EXTENDED_EDX = _bits((0, 9), (11, 17), 20, 22, 23, 24, 25, 26, 27, 29, 30, 31)
# the basic ones again, SYSCALL, NX MMXEXT MMX FXSR FXSR_OPT GBPAGES RDTSCP LM 3DNOW
_SIZES_EBX = _bits(0, 2, 9, 12, 14, 15, 17, 24, 26, 28)
# CLZERO XSAVEERPTR WBNOINVD IBPB IBRS STIBP STIBP_ALWAYS SSBD SSB_NO PSFD

MASKS: dict[tuple[int, int], Mask] = {
    (0x1, 0): Mask(Registers(ALL, ALL, _FEATURES_ECX, _FEATURES_EDX), Registers(0, 0, _FEATURES_ECX_KVM, 0)),
    (0x6, 0): Mask(NOTHING, Registers(1 << 2, 0, 0, 0)),  # ARAT: the APIC timer never stops
    (0x7, 0): Mask(Registers(3, _LEAF7_EBX, _LEAF7_ECX, _LEAF7_EDX), Registers(0, _LEAF7_EBX_KVM, 0, _LEAF7_EDX_KVM)),
    (0x7, 1): Mask(Registers(_LEAF7_1_EAX, 0, 0, 0)),
    (0x7, 2): Mask(Registers(0, 0, 0, _LEAF7_2_EDX)),
    (0xB, 0): Mask(Registers(0, 0, 0, ALL)),  # no topology: the VMM knows it, and adds the levels
    (0xD, 1): Mask(Registers(_bits(0, 1, 2, 3), ALL, 0, 0)),  # XSAVEOPT XSAVEC XGETBV1 XSAVES, without supervisor states
    (0x8000_0001, 0): Mask(Registers(ALL, ALL, _EXTENDED_ECX, _EXTENDED_EDX)),
    (0x8000_0007, 0): Mask(Registers(0, 0, 0, 1 << 8)),  # invariant TSC
    (0x8000_0008, 0): Mask(Registers(0xFFFF, _SIZES_EBX, 0, 0)),
    (0x8000_0021, 0): Mask(Registers(_bits(0, 2, 6, 8), 0, 0, 0)),
}
"""Leaves of which only some bits pass. TSX, MPX and the like need no entry: the silicon says what it executes."""

PASSED = frozenset({0x0, 0x2, 0x4, 0x8000_0000, 0x8000_0002, 0x8000_0003, 0x8000_0004, 0x8000_0005, 0x8000_0006, 0x8000_001D})
"""Leaves that pass whole. All others are not offered: the guest reads zeros, unless its VMM fills them in (topology, frequencies)."""
