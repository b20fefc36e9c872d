"""CPUID as a guest sees it: what KVM can offer, and what only the VMM knows: which CPU this is, and how many there are.

Source of truth: Intel SDM vol. 2A, CPUID; AMD APM vol. 3, appendix E; Linux 6.1 `Documentation/virt/kvm/api.rst`, KVM_GET_SUPPORTED_CPUID
(which leaves the hypervisor bit and the topology to user space).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from softkvm.uapi import kvm as uapi
from softkvm.vmm.config import Hardware

_LEAF1_ECX_HYPERVISOR = 1 << 31
_LEAF1_EDX_HTT = 1 << 28
_POWER_EDX_INVARIANT_TSC = 1 << 8
_LEVEL_SMT, _LEVEL_CORE = 1, 2
_EXTENDED_TOPOLOGY = (0xB, 0x1F)
_OF_KVM = {
    "x2apic": (0x1, "ecx", 21),
    "tsc-deadline": (0x1, "ecx", 24),
    "arat": (0x6, "eax", 2),
    "tsc-adjust": (0x7, "ebx", 1),
    "arch-capabilities": (0x7, "edx", 29),
}
"""Features that KVM provides whatever the silicon has (leaf, register, bit), so that switching them off is up to the VMM."""


@dataclass(frozen=True)
class Identity:
    """One of `cpus` single-threaded cores in one package, and what the VMM decides about its clocks."""

    apic_id: int
    cpus: int
    invariant_tsc: bool
    """Whether to promise that the TSC never changes its rate, which restoring a snapshot on another host would break."""
    without: frozenset[str] = frozenset()
    """Features that are switched off, with `-` in their names."""

    @property
    def core_bits(self) -> int:
        """Bits of the APIC id that number the cores."""
        return (self.cpus - 1).bit_length()


def identity(apic_id: int, hardware: Hardware) -> Identity:
    """The CPU `apic_id` of a machine."""
    without = frozenset(name.replace("_", "-") for name, on in hardware.features.items() if not on)
    return Identity(apic_id, hardware.cpus, hardware.features.get("invtsc", False), without)


def digest(entries: Sequence[uapi.CpuidEntry2]) -> bytes:
    """What tells one set of CPUID entries from another."""
    return hashlib.sha256(b"".join(bytes(memoryview(entry)) for entry in entries)).digest()


def identify(supported: Sequence[uapi.CpuidEntry2], identity: Identity) -> list[uapi.CpuidEntry2]:
    """What KVM can offer, for this CPU."""
    entries = [uapi.CpuidEntry2.from_buffer_copy(entry) for entry in supported if entry.function not in _EXTENDED_TOPOLOGY]
    if len(entries) < len(supported):
        entries += _extended_topology(identity)
    amd = any(entry.function == 0x8000001E for entry in entries)
    for entry in entries:
        _adapt(entry, identity, amd)
        for name in _OF_KVM.keys() & identity.without:
            leaf, register, bit = _OF_KVM[name]
            if (entry.function, entry.index) == (leaf, 0):
                setattr(entry, register, getattr(entry, register) & ~(1 << bit))
    return entries


def _extended_topology(identity: Identity) -> Iterator[uapi.CpuidEntry2]:
    """Leaf 0xB: a level of threads, a level of cores, and the end of the list."""
    levels = ((0, 1, _LEVEL_SMT), (identity.core_bits, identity.cpus, _LEVEL_CORE), (0, 0, 0))
    for index, (shift, count, kind) in enumerate(levels):
        yield uapi.CpuidEntry2(
            function=0xB,
            index=index,
            flags=uapi.KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax=shift,
            ebx=count,
            ecx=index | kind << 8,
            edx=identity.apic_id,
        )


def _adapt(entry: uapi.CpuidEntry2, identity: Identity, amd: bool) -> None:
    if entry.function == 0x1:
        entry.ebx = entry.ebx & 0xFFFF | identity.cpus << 16 | identity.apic_id << 24
        entry.ecx |= _LEAF1_ECX_HYPERVISOR
        entry.edx = entry.edx | _LEAF1_EDX_HTT if identity.cpus > 1 else entry.edx & ~_LEAF1_EDX_HTT
    elif entry.function in (0x4, 0x8000001D) and entry.eax & 0x1F:
        third_level = entry.eax >> 5 & 7 == 3  # the package's; the others are each core's own
        entry.eax = entry.eax & 0x3FFF | (identity.cpus - 1 if third_level else 0) << 14
        if entry.function == 0x4:
            entry.eax |= (1 << identity.core_bits) - 1 << 26
    elif entry.function == 0x80000007 and not identity.invariant_tsc:
        entry.edx &= ~_POWER_EDX_INVARIANT_TSC
    elif entry.function == 0x80000008 and amd:
        entry.ecx = entry.ecx & ~0xF0FF | identity.core_bits << 12 | identity.cpus - 1
    elif entry.function == 0x8000001E:
        entry.eax, entry.ebx, entry.ecx = identity.apic_id, identity.apic_id, 0
