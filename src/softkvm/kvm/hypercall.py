"""Hypercalls of a KVM guest.

Answers to Linux 6.1 `kvm_emulate_hypercall()`, `em_hypercall()`, `emulator_fix_hypercall()` and
`Documentation/virt/kvm/x86/hypercalls.rst`: number in RAX, arguments in RBX, RCX, RDX, RSI, result in RAX.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING

from softkvm.host import trace
from softkvm.kvm import emulator_ops as ops
from softkvm.kvm import events, exits, regs
from softkvm.kvm.irqchip import irq
from softkvm.silicon import RIGHT_W
from softkvm.uapi.kvm import (
    KVM_ENOSYS,
    KVM_FEATURE_PV_SCHED_YIELD,
    KVM_FEATURE_PV_SEND_IPI,
    KVM_FEATURE_PV_UNHALT,
    KVM_HC_KICK_CPU,
    KVM_HC_SCHED_YIELD,
    KVM_HC_SEND_IPI,
)

if TYPE_CHECKING:
    from softkvm.kvm.vcpu import Vcpu

VMCALL, VMMCALL = b"\x0f\x01\xc1", b"\x0f\x01\xd9"
INSTRUCTIONS = (VMCALL, VMMCALL)
_OWN = {"intel": VMCALL, "amd": VMMCALL}
_FEATURES_LEAF = 0x4000_0001


def _kick_cpu(vcpu: Vcpu, flags: int, apic_id: int, high: int, icr: int) -> int:
    """Wake the vCPU of an APIC id from its HLT."""
    irq.deliver(vcpu.vm, irq.LapicIrq(vector=0, dest_id=apic_id, delivery_mode=irq.DM_REMRD))
    return 0


def _send_ipi(vcpu: Vcpu, low: int, high: int, first: int, icr: int) -> int:
    """One IPI to up to 128 APIC ids; the number that took it."""
    if vcpu.lapic is None:
        return -KVM_ENOSYS
    return irq.pv_send_ipi(vcpu.vm, low, high, first, icr, regs.is_64_bit_mode(vcpu))


def _sched_yield(vcpu: Vcpu, apic_id: int, a1: int, a2: int, a3: int) -> int:
    """The guest waits for another vCPU: the host's scheduler runs every thread that can run, nothing to do."""
    return 0


_CALLS: dict[int, tuple[int, Callable[[Vcpu, int, int, int, int], int]]] = {
    KVM_HC_KICK_CPU: (KVM_FEATURE_PV_UNHALT, _kick_cpu),
    KVM_HC_SEND_IPI: (KVM_FEATURE_PV_SEND_IPI, _send_ipi),
    KVM_HC_SCHED_YIELD: (KVM_FEATURE_PV_SCHED_YIELD, _sched_yield),
}
"""Number -> the feature bit that the guest's CPUID must have, and the function."""


def handle_hypercall(vcpu: Vcpu) -> int:
    """VMCALL and VMMCALL."""
    gpr = vcpu.gpr
    mask = (1 << 64) - 1 if regs.is_64_bit_mode(vcpu) else 0xFFFF_FFFF
    nr, a0, a1, a2, a3 = (gpr[register] & mask for register in (regs.RAX, regs.RBX, regs.RCX, regs.RDX, regs.RSI))
    if trace.kvm_hypercall.enabled:
        trace.kvm_hypercall(nr, a0, a1, a2, a3)
    vcpu.stats["hypercalls"] += 1
    result = -errno.EPERM if regs.cpl(vcpu) else _call(vcpu, nr, a0, a1, a2, a3)
    gpr[regs.RAX] = result & mask
    return exits.skip(vcpu)


def _call(vcpu: Vcpu, nr: int, *arguments: int) -> int:
    feature, call = _CALLS.get(nr, (0, None))
    features = vcpu.cpuid.lookup(_FEATURES_LEAF, 0) or (0, 0, 0, 0)
    if call is None or not features[0] >> feature & 1:
        return -KVM_ENOSYS
    return call(vcpu, *arguments)


def fix(vcpu: Vcpu, prefixes: int, opcode: bytes) -> int:
    """The other vendor's hypercall, behind `prefixes` bytes: the silicon's own is stored over it, and the guest executes that.

    The silicon's own is here only if one of its prefixes makes it undefined, and stays so. The store is to the guest's own code, by its
    page tables: where they forbid it the guest gets #PF. Code in read-only memory cannot be mended and stays undefined. KVM checks the
    privilege of VMCALL here, not of VMMCALL.
    """
    own = _OWN[vcpu.model.vendor]
    if opcode.startswith(own):
        events.inject_ud(vcpu)
        return 1
    if opcode.startswith(VMCALL) and regs.cpl(vcpu):
        events.inject_gp(vcpu)
        return 1
    mask = (1 << 64) - 1 if regs.is_64_bit_mode(vcpu) else 0xFFFF_FFFF
    pieces = ops.translate(vcpu, [regs.linear_rip(vcpu) + prefixes & mask], len(own), RIGHT_W)
    if isinstance(pieces, int):
        return pieces
    if ops.is_device(vcpu, pieces[0], write=True):
        events.inject_ud(vcpu)
    else:
        ops.write_memory(vcpu, pieces[0], own)
    return 1
