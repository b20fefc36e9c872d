"""The parts of a machine to and from one record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import NamedTuple

from softkvm import kvm
from softkvm.host.clock import Clock
from softkvm.uapi import kvm as uapi
from softkvm.vmm import cpuid
from softkvm.vmm import state as device_state
from softkvm.vmm.board import Board
from softkvm.vmm.config import Hardware
from softkvm.vmm.errors import StateError
from softkvm.vmm.snapshot import clock, vcpu
from softkvm.vmm.snapshot.records import CHIPS, HardwareState, MachineState, from_blob, to_blob


class Parts(NamedTuple):
    """What has state; all vCPUs stand still, and the board's lock is held."""

    system: kvm.System
    vm: kvm.Vm
    vcpus: Sequence[kvm.Vcpu]
    board: Board
    time: Clock


def save(hardware: Hardware, parts: Parts) -> MachineState:
    """The state now."""
    status = parts.vm.tsc_status()
    instant = parts.time.tsc_to_ns(status.host_tsc)
    indices = parts.system.get_msr_index_list()
    pit = parts.vm.get_pit2()
    with parts.board.timers.standing_at(instant):
        devices = {name: device_state.encode(device.save()) for name, device in parts.board.stateful().items()}
    return MachineState(
        hardware=HardwareState(
            cpu=hardware.cpu_name,
            cpus=hardware.cpus,
            memory=hardware.memory,
            parameters=[f"{name}={int(value)}" for name, value in asdict(hardware.parameters).items()],
            cpuid=_cpuid_digest(hardware, parts.system),
        ),
        clock=clock.save(status),
        vcpus=[vcpu.save(each, indices, tsc.guest_tsc) for each, tsc in zip(parts.vcpus, status.vcpus, strict=True)],
        irqchips=[to_blob(parts.vm.get_irqchip(uapi.Irqchip(chip_id=chip))) for chip in CHIPS],
        pit=to_blob(pit),
        pit_ages=[instant - counter.count_load_time for counter in pit.channels],
        devices=devices,
    )


def _cpuid_digest(hardware: Hardware, system: kvm.System) -> bytes:
    return cpuid.digest(cpuid.identify(system.get_supported_cpuid(), cpuid.identity(0, hardware)))


def restore(state: MachineState, parts: Parts) -> None:
    """Take over a state, with memory filled already; StateError for one that this machine cannot be in."""
    if state.hardware.cpuid != _cpuid_digest(state.hardware.check(), parts.system):
        raise StateError(f"the snapshot is of another softkvm, whose CPU {state.hardware.cpu} has other features")
    if len(state.vcpus) != len(parts.vcpus):
        raise StateError(f"the snapshot has {len(state.vcpus)} vCPUs for {len(parts.vcpus)} CPUs")
    try:
        _restore_kvm(state, parts)
        host_tsc, passed = clock.restore(parts.vm, parts.vcpus, state.clock, state.vcpus)
        for each, saved in zip(parts.vcpus, state.vcpus, strict=True):
            vcpu.restore_events(each, saved)
    except OSError as error:
        raise StateError(f"KVM refuses the snapshot's state: {error.strerror}") from error
    with parts.board.timers.standing_at(parts.time.tsc_to_ns(host_tsc) - passed):
        _restore_devices(state, parts.board)


def _restore_kvm(state: MachineState, parts: Parts) -> None:
    for blob in state.irqchips:
        parts.vm.set_irqchip(from_blob(uapi.Irqchip, blob))
    pit = from_blob(uapi.PitState2, state.pit)
    now = parts.time.monotonic_ns()
    for counter, age in zip(pit.channels, state.pit_ages, strict=False):
        counter.count_load_time = now - age
    parts.vm.set_pit2(pit)
    for each, saved in zip(parts.vcpus, state.vcpus, strict=True):
        vcpu.restore_registers(each, saved)


def _restore_devices(state: MachineState, board: Board) -> None:
    devices = board.stateful()
    if devices.keys() != state.devices.keys():
        raise StateError("the snapshot is of a board with other devices")
    for name, device in devices.items():
        device.restore(device_state.decode(state.devices[name], type(device.save())))
