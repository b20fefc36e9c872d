"""CPUID: what KVM offers of the silicon's leaves, and what a guest sees of the leaves that its VMM has set.

Answers to Linux 6.1 `arch/x86/kvm/cpuid.c`, `Documentation/virt/kvm/x86/cpuid.rst` and SDM vol. 2, CPUID. One bit goes
beyond 6.1: TSC_DEADLINE_TIMER is reported as supported, as later kernels do, because the local APIC in KVM always has it.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from softkvm.kvm.cpuid_policy import KVM_FEATURES, MASKS, MAX_BASIC, MAX_EXTENDED, OFFERED_XCR0, PASSED, Registers
from softkvm.kvm.pmu.offer import supported_leaf
from softkvm.uapi.kvm import KVM_CPUID_FLAG_SIGNIFCANT_INDEX, CpuidEntry2

if TYPE_CHECKING:
    from softkvm.kvm.types import Model, Vcpu

EAX, EBX, ECX, EDX = range(4)

PERFORMANCE_MONITORING = 0xA
BASIC, FEATURES, EXTENDED_FEATURES, TOPOLOGY, XSTATE, TOPOLOGY_V2 = 0, 1, 7, 0xB, 0xD, 0x1F
HYPERVISOR, HYPERVISOR_FEATURES = 0x4000_0000, 0x4000_0001
EXTENDED, EXTENDED_1, ADVANCED_POWER, ADDRESS_SIZES = 0x8000_0000, 0x8000_0001, 0x8000_0007, 0x8000_0008
CENTAUR = 0xC000_0000

KVM_SIGNATURE = (0x4B4D_564B, 0x564B_4D56, 0x4D)
"""EBX, ECX, EDX of leaf 40000000h: "KVMKVMKVM"."""
AMD_SIGNATURES = {(0x6874_7541, 0x6974_6E65, 0x444D_4163), (0x6F67_7948, 0x6E65_476E, 0x656E_6975)}
"""EBX, EDX, ECX of leaf 0: "AuthenticAMD", "HygonGenuine"."""

CR4_OSXSAVE, CR4_PKE = 1 << 18, 1 << 22
_APIC_BASE_ENABLE = 1 << 11

XSAVE_LEGACY_SIZE = 576
"""Legacy region and header of an XSAVE area, in bytes."""
MAX_ENTRIES = 80
"""What KVM_GET_SUPPORTED_CPUID must fit into for the smallest buffer among known clients (Firecracker's)."""


class Feature(NamedTuple):
    """One feature bit of CPUID."""

    leaf: int
    subleaf: int
    register: int
    bit: int


PDCM = Feature(1, 0, ECX, 15)
PCID = Feature(1, 0, ECX, 17)
X2APIC = Feature(1, 0, ECX, 21)
TSC_DEADLINE = Feature(1, 0, ECX, 24)
XSAVE = Feature(1, 0, ECX, 26)
OSXSAVE = Feature(1, 0, ECX, 27)
APIC = Feature(1, 0, EDX, 9)
MCA = Feature(1, 0, EDX, 14)
TSC_ADJUST = Feature(7, 0, EBX, 1)
OSPKE = Feature(7, 0, ECX, 4)
RDPID = Feature(7, 0, ECX, 22)
SPEC_CTRL = Feature(7, 0, EDX, 26)
STIBP = Feature(7, 0, EDX, 27)
ARCH_CAPABILITIES = Feature(7, 0, EDX, 29)
SSBD = Feature(7, 0, EDX, 31)
BHI_CTRL = Feature(7, 2, EDX, 4)
XSAVEC = Feature(0xD, 1, EAX, 1)
PKS = Feature(7, 0, ECX, 31)
XSAVES = Feature(0xD, 1, EAX, 3)
SVM = Feature(EXTENDED_1, 0, ECX, 2)
PERFCTR_CORE = Feature(EXTENDED_1, 0, ECX, 23)
NX = Feature(EXTENDED_1, 0, EDX, 20)
FXSR_OPT = Feature(EXTENDED_1, 0, EDX, 25)
RDTSCP = Feature(EXTENDED_1, 0, EDX, 27)
LM = Feature(EXTENDED_1, 0, EDX, 29)
AMD_IBPB = Feature(ADDRESS_SIZES, 0, EBX, 12)
AMD_IBRS = Feature(ADDRESS_SIZES, 0, EBX, 14)
AMD_STIBP = Feature(ADDRESS_SIZES, 0, EBX, 15)
AMD_SSBD = Feature(ADDRESS_SIZES, 0, EBX, 24)


def _entry(leaf: int, subleaf: int, indexed: bool, registers: Registers) -> CpuidEntry2:
    eax, ebx, ecx, edx = registers
    flags = KVM_CPUID_FLAG_SIGNIFCANT_INDEX if indexed else 0
    return CpuidEntry2(function=leaf, index=subleaf, flags=flags, eax=eax, ebx=ebx, ecx=ecx, edx=edx)


def supported(model: Model) -> list[CpuidEntry2]:
    """KVM_GET_SUPPORTED_CPUID: the leaves of the silicon, cut to what KVM can give a guest, and KVM's own."""
    entries = [_entry(*offer) for offer in _offered(model)]
    entries.append(_entry(HYPERVISOR, 0, False, Registers(HYPERVISOR_FEATURES, *KVM_SIGNATURE)))
    features = sum(1 << bit for bit in KVM_FEATURES)
    entries.append(_entry(HYPERVISOR_FEATURES, 0, False, Registers(features)))
    return entries


def _offered(model: Model) -> Iterator[tuple[int, int, bool, Registers]]:
    xstate = Registers(*model.cpuid(XSTATE, 0))
    xcr0 = OFFERED_XCR0 & (xstate.eax | xstate.edx << 32)
    for leaf, subleaf, indexed, *values in model.leaves():
        registers = Registers(*values)
        mask = MASKS.get((leaf, subleaf))
        if mask is not None:
            registers = mask.apply(registers)
        elif leaf == PERFORMANCE_MONITORING:
            registers = Registers(*supported_leaf(model))
        elif leaf == XSTATE:
            if subleaf >= 2 and not xcr0 >> subleaf & 1:
                continue
        elif leaf not in PASSED:
            continue
        if leaf == BASIC:
            registers = registers._replace(eax=min(registers.eax, MAX_BASIC))
        elif leaf == EXTENDED:
            registers = registers._replace(eax=min(registers.eax, MAX_EXTENDED))
        elif (leaf, subleaf) == (XSTATE, 0):
            size = _xsave_size(xcr0, False, {index: Registers(*model.cpuid(XSTATE, index)) for index in range(2, 64)})
            registers = Registers(xcr0 & 0xFFFF_FFFF, size, size, xcr0 >> 32)
        yield leaf, subleaf, indexed, registers


def _xsave_size(features: int, compacted: bool, components: dict[int, Registers]) -> int:
    """Bytes of an XSAVE area for `features`; `components` are the subleaves of leaf Dh."""
    size = XSAVE_LEGACY_SIZE
    for index in range(2, 64):
        if not features >> index & 1 or index not in components:
            continue
        length, offset, flags, _ = components[index]
        if compacted:
            offset = -(-size // 64) * 64 if flags & 2 else size
        size = max(size, offset + length)
    return size


class CpuidTable:
    """The leaves of one vCPU. Some bits follow the state of the vCPU: see `update_runtime()`."""

    def __init__(self, entries: Sequence[CpuidEntry2]) -> None:
        """The leaves of KVM_SET_CPUID2, which `check()` has passed; the first of equal entries counts."""
        self._entries = [CpuidEntry2.from_buffer_copy(entry) for entry in entries]
        self._plain: dict[int, Registers] = {}
        self._indexed: dict[tuple[int, int], Registers] = {}
        self._runtime: tuple[int, bool, int] | None = None
        for entry in reversed(self._entries):
            self._store(entry)
        xstate = self.lookup(XSTATE, 0) or Registers()
        self.supported_xcr0 = (xstate.eax | xstate.edx << 32) & OFFERED_XCR0
        """XCR0 bits that the guest may set."""
        basic = self.lookup(BASIC, 0) or Registers()
        self.is_amd = (basic.ebx, basic.edx, basic.ecx) in AMD_SIGNATURES
        """Whether the guest believes in an AMD (or Hygon) CPU."""
        self.physical_address_bits = self._physical_address_bits()
        """MAXPHYADDR."""

    def _store(self, entry: CpuidEntry2) -> None:
        registers = Registers(entry.eax, entry.ebx, entry.ecx, entry.edx)
        if entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX:
            self._indexed[entry.function, entry.index] = registers
        else:
            self._plain[entry.function] = registers

    def _physical_address_bits(self) -> int:
        extended, sizes = self.lookup(EXTENDED, 0), self.lookup(ADDRESS_SIZES, 0)
        if extended is None or sizes is None or extended.eax < ADDRESS_SIZES:
            return 36
        return sizes.eax & 0xFF

    @property
    def entries(self) -> list[CpuidEntry2]:
        """KVM_GET_CPUID2: a copy of the leaves with the bits as the guest would now see them."""
        return [CpuidEntry2.from_buffer_copy(entry) for entry in self._entries]

    def lookup(self, leaf: int, subleaf: int) -> Registers | None:
        """The values of an entry, or None if there is none."""
        plain = self._plain.get(leaf)
        return self._indexed.get((leaf, subleaf)) if plain is None else plain

    def has(self, feature: Feature) -> bool:
        """Whether the guest is told of a feature."""
        registers = self.lookup(feature.leaf, feature.subleaf)
        return registers is not None and bool(registers[feature.register] >> feature.bit & 1)

    def execute(self, eax: int, ecx: int) -> Registers:
        """The guest's CPUID instruction, with KVM's answers for leaves that do not exist."""
        found = self.lookup(eax, ecx)
        if found is not None:
            return found
        leaf, redirected = self._out_of_range(eax, ecx)
        if redirected is not None:
            return redirected
        if leaf in (TOPOLOGY, TOPOLOGY_V2) and (level := self.lookup(leaf, 1)) is not None:
            return Registers(0, 0, ecx & 0xFF, level.edx)  # undefined levels still tell the x2APIC id
        return Registers()

    def how_found(self, eax: int, ecx: int) -> tuple[bool, bool]:
        """Whether `execute()` finds an entry of that leaf, and if not, whether it answers with the last basic leaf instead."""
        found = self.lookup(eax, ecx) is not None
        return found, not found and self._out_of_range(eax, ecx)[1] is not None

    def _out_of_range(self, leaf: int, subleaf: int) -> tuple[int, Registers | None]:
        """Intel CPUs answer a leaf beyond the last one of its class with the last basic leaf; AMD CPUs with zeros."""
        basic = self.lookup(BASIC, 0)
        if basic is None or self.is_amd:
            return leaf, None
        if HYPERVISOR <= leaf <= 0x4FFF_FFFF:
            last = self.lookup(leaf & 0xFFFF_FF00, 0)
        elif leaf >= CENTAUR:
            last = self.lookup(CENTAUR, 0)
        else:
            last = self.lookup(leaf & EXTENDED, 0)
        if last is not None and leaf <= last.eax:
            return leaf, None
        return basic.eax, self.lookup(basic.eax, subleaf)

    def update_like(self, other: CpuidTable) -> None:
        """`update()` to the state that `other` shows."""
        if other._runtime is not None:
            self.update(*other._runtime)

    def update(self, cr4: int, apic_enabled: bool, xcr0: int) -> None:
        """Make OSXSAVE, APIC, OSPKE and the XSAVE sizes follow the vCPU's state."""
        runtime = (cr4 & (CR4_OSXSAVE | CR4_PKE), apic_enabled, xcr0)
        if runtime == self._runtime:
            return
        self._runtime = runtime
        components = {subleaf: registers for (leaf, subleaf), registers in self._indexed.items() if leaf == XSTATE}
        for entry in reversed(self._entries):
            if entry.function == FEATURES:
                entry.ecx = _with_bit(entry.ecx, OSXSAVE.bit, bool(cr4 & CR4_OSXSAVE))
                entry.edx = _with_bit(entry.edx, APIC.bit, apic_enabled)
            elif entry.function == EXTENDED_FEATURES and entry.index == 0:
                entry.ecx = _with_bit(entry.ecx, OSPKE.bit, bool(cr4 & CR4_PKE))
            elif entry.function == XSTATE and entry.index == 0:
                entry.ebx = _xsave_size(xcr0, False, components)
            elif entry.function == XSTATE and entry.index == 1 and entry.eax & (1 << XSAVEC.bit | 1 << XSAVES.bit):
                entry.ebx = _xsave_size(xcr0, True, components)
            else:
                continue
            self._store(entry)


def _with_bit(value: int, bit: int, on: bool) -> int:
    return value | 1 << bit if on else value & ~(1 << bit)


def check(vcpu: Vcpu, entries: Sequence[CpuidEntry2]) -> None:
    """OSError(EINVAL) if KVM_SET_CPUID2 must refuse: a linear address width that x86 does not have, or a change after KVM_RUN."""
    for entry in entries:
        if entry.function == ADDRESS_SIZES and entry.eax >> 8 & 0xFF not in (0, 48, 57):
            raise OSError(errno.EINVAL, "linear address width is neither 48 nor 57")
    if vcpu.has_run:
        table = CpuidTable(entries)
        table.update_like(vcpu.cpuid)
        if list(map(bytes, table.entries)) != list(map(bytes, vcpu.cpuid.entries)):
            raise OSError(errno.EINVAL, "CPUID changed after KVM_RUN")


def update_runtime(vcpu: Vcpu) -> None:
    """Refresh the CPUID bits that mirror CR4, APIC_BASE and XCR0; call after a change of any of them."""
    state = vcpu.state
    vcpu.cpuid.update(state.cr4, bool(vcpu.apic_base & _APIC_BASE_ENABLE), state.xcr0)
