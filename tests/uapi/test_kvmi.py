"""`uapi/kvmi.py` against the numbers of the series: no header of Debian's has them, so they stand here again."""

import ctypes

import pytest

from softkvm.uapi import kvm, kvmi
from softkvm.uapi.kvmi import Command, Event
from softkvm.uapi.layout import offset_of

SIZES = {
    kvmi.Header: 8,
    kvmi.ErrorCode: 8,
    kvmi.VcpuHeader: 8,
    kvmi.GetVersionReply: 16,
    kvmi.GetVersionReplyLibkvmi: 16,
    kvmi.GetVersionReplyV12: 8,
    kvmi.Check: 8,
    kvmi.GetInfoReply: 16,
    kvmi.ControlEvents: 8,
    kvmi.Physical: 16,
    kvmi.Pause: 8,
    kvmi.PauseV12: 8,
    kvmi.GetRegisters: 8,
    kvmi.GetRegistersReply: 472,
    kvmi.SetRegisters: 144,
    kvmi.GetCpuid: 8,
    kvmi.GetCpuidReply: 16,
    kvmi.ControlCleanup: 8,
    kvmi.ControlCr: 8,
    kvmi.ControlCrLibkvmi: 8,
    kvmi.InjectException: 16,
    kvmi.GetXcr: 8,
    kvmi.GetMtrrTypeReply: 8,
    kvmi.ControlMsr: 8,
    kvmi.SetPageAccess: 8,
    kvmi.SetPageAccessLibkvmi: 8,
    kvmi.PageAccessEntry: 16,
    kvmi.PageAccessEntryV12: 16,
    kvmi.ControlSinglestep: 8,
    kvmi.EventArch: 536,
    kvmi.EventCommon: 544,
    kvmi.EventCommonV12: 544,
    kvmi.EventReply: 8,
    kvmi.EventBreakpoint: 16,
    kvmi.EventCr: 24,
    kvmi.EventTrap: 16,
    kvmi.EventXsetbv: 24,
    kvmi.EventDescriptor: 8,
    kvmi.EventMsr: 24,
    kvmi.EventPf: 24,
    kvmi.PfReplyLibkvmi: 272,
    kvmi.EventSinglestep: 8,
    kvmi.Hook: 24,
    kvmi.Feature: 8,
    kvmi.HandshakeToTool: 96,
    kvmi.HandshakeToToolV12: 104,
    kvmi.HandshakeFromTool: 24,
}

IOCTLS = {
    "v9": (184, 0x4018AEC3, 0xAEC4, 0x4008AEC5, 0x4008AEC6, 0xAEC7),
    "libkvmi": (180, 0x4018AEFF, 0xAEFB, 0x4008AEFD, 0x4008AEFC, 0xAEFE),
    "v12": (206, 0x4018AEC8, 0xAEC9, 0x4008AECA, 0x4008AECB, 0xAECC),
}


@pytest.mark.parametrize("structure", SIZES, ids=lambda structure: structure.__name__)
def test_sizes(structure: type[ctypes.Structure]) -> None:
    assert ctypes.sizeof(structure) == SIZES[structure]


def test_offsets_inside_an_event() -> None:
    base = offset_of(kvmi.EventCommon, "arch")
    regs, sregs, msrs = (base + offset_of(kvmi.EventArch, name) for name in ("regs", "sregs", "msrs"))
    assert regs + offset_of(kvm.Regs, "rip") == 144
    assert sregs + offset_of(kvm.Sregs, "cr3") == 400
    assert sregs + offset_of(kvm.Sregs, "apic_base") == 432
    assert msrs + offset_of(kvmi.EventMsrs, "efer") == 496
    assert msrs + offset_of(kvmi.EventMsrs, "shadow_gs") == 536


@pytest.mark.parametrize("name", IOCTLS)
def test_ioctl_numbers(name: str) -> None:
    numbers = kvmi.DIALECTS[name].ioctls
    assert (numbers.capability, numbers.hook, numbers.unhook, numbers.command, numbers.event, numbers.preunhook) == IOCTLS[name]


@pytest.mark.parametrize("dialect", kvmi.DIALECTS.values(), ids=lambda dialect: dialect.name)
def test_a_dialect_numbers_each_command_and_event_once(dialect: kvmi.Dialect) -> None:
    assert len(dialect.by_id) == len(dialect.commands)
    assert len(dialect.event_by_id) == len(dialect.events) == len(Event)
    assert not {dialect.vm_event, dialect.vcpu_event, dialect.event_reply} & set(dialect.by_id)


def test_v12_tells_vm_from_vcpu_by_the_lowest_bit() -> None:
    own = {command: number for command, number in kvmi.V12.commands.items() if number < kvmi.EXTENSION}
    assert {command for command, number in own.items() if number & 1} == kvmi.V12.vcpu_commands & own.keys()


def test_every_v9_number_is_there() -> None:
    assert sorted(kvmi.V9.by_id)[: kvmi.NUM_MESSAGES - 1] == list(range(1, kvmi.NUM_MESSAGES))
    assert sorted(kvmi.V9.event_by_id)[: kvmi.NUM_EVENTS] == list(range(kvmi.NUM_EVENTS))
    assert Command.CONTROL_CMD_RESPONSE not in kvmi.V9.commands


@pytest.mark.parametrize("event", Event, ids=lambda event: event.name)
def test_filter_fields_exist(event: Event) -> None:
    layout = kvmi.EVENTS[event]
    names = () if layout.data is None else layout.data.__annotations__
    assert set(layout.filters.values()) <= set(names)
