"""The two save areas of system management mode, written and read back; `tests/kvm_guests/test_smm.py` has guests that use them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from softkvm import kvm
from softkvm.kvm import System, Vcpu, Vm, cpuid, smm
from softkvm.uapi import kvm as uapi
from tests.kvm.conftest import ready


@pytest.fixture(params=["64-bit", "32-bit"])
def vcpu(request: pytest.FixtureRequest, vm: Vm, system: System) -> Iterator[Vcpu]:
    """A vCPU in protected mode, with long mode in its CPUID or not, and with a value of its own in every register."""
    memory = kvm.allocate_memory(1 << 20)
    vm.set_user_memory_region(uapi.UserspaceMemoryRegion(slot=1 << 16, memory_size=memory.size, userspace_addr=memory.address))
    vcpu = ready(vm.create_vcpu(0), system)
    if request.param == "32-bit":
        entries = vcpu.get_cpuid2()
        for entry in entries:
            if entry.function == cpuid.EXTENDED_1:
                entry.edx &= ~(1 << cpuid.LM.bit)
        vcpu.set_cpuid2(entries)
    sregs = vcpu.get_sregs()
    for number, name in enumerate(("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt"), 1):
        rights = {"type": 0xB, "s": 0} if name == "tr" else {"type": 2, "s": 0} if name == "ldt" else {"type": 3, "s": 1, "dpl": 0}
        segment = uapi.Segment(selector=8 * number, base=0x1000 * number, limit=0xFFF0 + number, present=1, db=1, g=number & 1, **rights)
        setattr(sregs, name, segment)
    sregs.fs.present, sregs.fs.unusable = 0, 1
    sregs.gdt.base, sregs.gdt.limit, sregs.idt.base, sregs.idt.limit = 0x7000, 0x77, 0x8000, 0x88
    sregs.cr0, sregs.cr3, sregs.cr4 = 0x11, 0x5000, 0x10
    vcpu.set_sregs(sregs)
    names = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi")
    vcpu.set_regs(uapi.Regs(rip=0x1234, rflags=0x202, **{name: 0x100 + number for number, name in enumerate(names)}))
    vcpu.set_debugregs(uapi.Debugregs(dr6=0xFFFF_0FF1, dr7=0x400))
    yield vcpu
    assert memory.size  # it had to live until here


def test_rsm_undoes_an_smi(vcpu: Vcpu) -> None:
    before = [bytes(it) for it in (vcpu.get_regs(), vcpu.get_sregs(), vcpu.get_debugregs())]
    vcpu.smm.pending = True
    assert vcpu.enter_smm()
    assert not vcpu.enter_smm()
    assert (vcpu.state.rip, vcpu.state.cr0 & 1, vcpu.state.idtr.limit) == (0x8000, 0, 0)
    assert smm.leave(vcpu) == 1
    assert [bytes(it) for it in (vcpu.get_regs(), vcpu.get_sregs(), vcpu.get_debugregs())] == before


@pytest.mark.parametrize("blocked", [0, 8])
def test_nmis_stay_blocked_behind_rsm_if_they_were(vcpu: Vcpu, blocked: int) -> None:
    vcpu.state.interruptibility = blocked
    vcpu.smm.pending = True
    vcpu.enter_smm()
    assert vcpu.state.interruptibility == 8
    assert vcpu.get_vcpu_events().smi.smm_inside_nmi == bool(blocked)
    smm.leave(vcpu)
    assert vcpu.state.interruptibility == blocked
