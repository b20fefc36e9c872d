"""The parts of KVM that a machine is put together from: silicon, RAM, VM and vCPUs.

Source of truth for the order of ioctls: Linux 6.1 `Documentation/virt/kvm/api.rst`.
"""

from __future__ import annotations

import errno

from softkvm import kvm
from softkvm.host.clock import Clock, VirtualClock
from softkvm.uapi import kvm as uapi
from softkvm.vmm import cpuid, layout
from softkvm.vmm.boot import cpu as boot_cpu
from softkvm.vmm.config import Hardware
from softkvm.vmm.errors import ConfigError
from softkvm.vmm.irq import default_routing
from softkvm.vmm.memory import GuestMemory


def open_kvm(settings: Hardware, process: kvm.Process, cores: int | None, clock: Clock, seed: int | None, tier: str) -> kvm.System:
    """/dev/kvm on silicon of the model, deterministic with a seed; ConfigError for a model or a feature that is not to be had."""
    virtual = clock if isinstance(clock, VirtualClock) and seed is not None else None
    try:
        model = kvm.Model(settings.cpu, dict(settings.features), None if virtual is None else virtual.tsc_khz, tier)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    turns = None if virtual is None or seed is None else kvm.Turns(model, virtual, seed)
    return kvm.System(model, settings.parameters, process, cores, turns)


def allocate(size: int) -> GuestMemory:
    """RAM; ConfigError if this host has not as much."""
    try:
        return GuestMemory(size, kvm.allocate_memory)
    except OSError as error:
        raise ConfigError(f"this host cannot provide {size // layout.MIB} MB of memory: {error.strerror}") from error


def set_up_vm(vm: kvm.Vm, guest: GuestMemory, tsc_khz: int | None) -> None:
    """Memory, interrupt chips, PIT and routes, and the rate of the TSCs; ConfigError if the silicon cannot run them at that rate."""
    if tsc_khz is not None:
        _set_tsc_khz(vm, tsc_khz)
    vm.set_identity_map_addr(layout.KVM_IDENTITY_MAP.base)
    vm.set_tss_addr(layout.KVM_TSS.base)
    for slot in guest.slots():
        vm.set_user_memory_region(slot)
    for capability in (uapi.KVM_CAP_EXCEPTION_PAYLOAD, uapi.KVM_CAP_X86_TRIPLE_FAULT_EVENT):
        vm.enable_cap(_enabled(capability))  # so that no event is in two minds when it is saved
    vm.create_irqchip()
    vm.create_pit2(uapi.PitConfig(flags=uapi.KVM_PIT_SPEAKER_DUMMY))
    vm.set_gsi_routing(list(default_routing()))


def _enabled(capability: int) -> uapi.EnableCap:
    cap = uapi.EnableCap(cap=capability)
    cap.args[0] = 1
    return cap


def _set_tsc_khz(vm: kvm.Vm, khz: int) -> None:
    host_khz = vm.get_tsc_khz()
    try:
        vm.set_tsc_khz(khz)
    except OSError as error:
        raise ConfigError(f"a TSC of {khz} kHz is too fast for this silicon, whose own runs at {host_khz} kHz") from error
    if khz < host_khz and not vm.check_extension(uapi.KVM_CAP_VM_TSC_CONTROL):
        raise ConfigError(f"without TSC scaling no TSC is slower than the host's {host_khz} kHz, and {khz} kHz were asked for")


def forget_page(vm: kvm.Vm, guest: GuestMemory, address: int) -> None:
    """Make the next access to a page of RAM a nested page fault again, by taking its whole memslot away for a moment."""
    for slot in guest.slots():
        if slot.guest_phys_addr <= address < slot.guest_phys_addr + slot.memory_size:
            size, slot.memory_size = slot.memory_size, 0
            vm.set_user_memory_region(slot)
            slot.memory_size = size
            vm.set_user_memory_region(slot)


def make_vcpu(system: kvm.System, vm: kvm.Vm, index: int, settings: Hardware) -> kvm.Vcpu:
    """A vCPU with its CPUID, and what firmware does to MSRs and local APIC; otherwise as after reset."""
    vcpu = vm.create_vcpu(index)
    vcpu.set_cpuid2(cpuid.identify(system.get_supported_cpuid(), cpuid.identity(index, settings)))
    (misc_enable,) = vcpu.get_msrs([boot_cpu.MSR_MISC_ENABLE])
    vcpu.set_msrs(boot_cpu.msrs(misc_enable))
    lapic = vcpu.get_lapic()
    boot_cpu.wire_lapic(lapic, boot_cpu=index == 0)
    vcpu.set_lapic(lapic)
    return vcpu


def tell_of_pause(vcpu: kvm.Vcpu) -> None:
    """A vCPU has stood still: a guest with kvmclock is told, so that its watchdogs stay quiet."""
    try:
        vcpu.kvmclock_ctrl()
    except OSError as error:
        if error.errno != errno.EINVAL:  # it has no kvmclock
            raise
