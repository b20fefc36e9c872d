"""What a scripted guest does, in the words of either vendor."""

from __future__ import annotations

import pytest

from softkvm.kvm import Vcpu
from softkvm.silicon import control
from softkvm.uapi import kvm as uapi
from tests import fake_engine
from tests.fake_engine import exits_with
from tests.kvm.conftest import Script

REASONS = {
    "intel": {
        "interrupt": 1,
        "shutdown": 2,
        "window": 7,
        "cpuid": 10,
        "hlt": 12,
        "hypercall": 18,
        "io": 30,
        "pause": 40,
        "rdmsr": 31,
        "wrmsr": 32,
        "memory": 48,
        "xsetbv": 55,
        "unknown": 63,
        "invalid": 0x8000_0021,
    },
    "amd": {
        "interrupt": 0x60,
        "shutdown": 0x7F,
        "window": 0x64,
        "cpuid": 0x72,
        "hlt": 0x78,
        "hypercall": 0x81,
        "io": 0x7B,
        "pause": 0x77,
        "rdmsr": 0x7C,
        "wrmsr": 0x7C,
        "memory": 0x400,
        "xsetbv": 0x8D,
        "unknown": 0x3FF,
        "invalid": 0xFFFF_FFFF,
    },
}


def leave(vcpu: Vcpu, name: str, length: int = 1, **fields: int) -> fake_engine.Step:
    """The guest exits for `name` at an instruction of `length` bytes."""
    if name == "wrmsr":
        fields["qualification"] = 1  # how SVM tells it from RDMSR
    if name == "rdmsr":
        fields["qualification"] = 0
    step = exits_with(REASONS[vcpu.model.vendor][name], instruction_length=length, **fields)

    def at_instruction(view: control.ControlBlock) -> int | None:
        view.exit.next_rip = view.state.rip + length
        return step(view)

    return at_instruction


def run_errno(vcpu: Vcpu) -> int:
    with pytest.raises(OSError) as caught:  # noqa: PT011 - the errno is the result
        vcpu.run()
    assert caught.value.errno is not None
    return caught.value.errno


def out_of_guest(vcpu: Vcpu, play: Script, *steps: fake_engine.Step) -> None:
    """Play the steps, then leave for user space."""
    play(*steps, leave(vcpu, "shutdown"))
    vcpu.run()
    assert vcpu.kvm_run.exit_reason == uapi.KVM_EXIT_SHUTDOWN


def no_memory(vcpu: Vcpu, gpa: int, write: bool) -> fake_engine.Step:
    """The guest exits at an access that the nested page tables do not allow."""
    return exits_with(REASONS[vcpu.model.vendor]["memory"], gpa=gpa, info2=gpa, qualification=2 if write else 1)


def needs(gpa: int, size: int, write: int | None = None, emulated: bool = True) -> fake_engine.Step:
    """An instruction, which is `emulated` or the guest's next one, asks for a device access; `write` is the value that it writes."""

    def step(view: control.ControlBlock) -> int:
        assert bool(view.control.emulate) is emulated
        access = view.exit.access
        access.gpa, access.size, access.write = gpa, size, write is not None
        access.data[0] = write or 0
        view.exit.vectoring = 0
        return 0x10001

    return step


def done(view: control.ControlBlock) -> int | None:
    """The emulated instruction has run; the guest stops behind it or runs on, as it was asked to."""
    mode, view.control.emulate = view.control.emulate, 0
    assert mode in (1, 2)
    return 0x10000 if mode == 1 else None


class Latch:
    """A port that counts up when read, and keeps what is written."""

    def __init__(self) -> None:
        self.value = 0x40
        self.written: list[int] = []

    def read(self, address: int, size: int) -> int | None:
        self.value += 1
        return self.value

    def write(self, address: int, size: int, value: int) -> bool:
        self.written.append(value)
        return True
