"""`softkvm.vmm.suspend`: machines on the real KVM and engine that suspend themselves to RAM, with guests of a few instructions."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from softkvm.host.clock import VirtualClock
from softkvm.vmm import Machine, RunState, StateError, StopReason, acpi, layout
from softkvm.vmm.devices.acpi_pm import CONTROL_SLP_EN, CONTROL_SLP_TYP_SHIFT, PM1_ENABLE, PM1_POWER_BUTTON, PM1_RTC, SLP_TYP_S3
from softkvm.vmm.devices.rtc import ANY, B_24H, B_AIE, HOURS_ALARM, MINUTES_ALARM, REGISTER_B, SECONDS_ALARM
from tests.vmm.boot import images
from tests.vmm.test_on_engine import HALT, MOV_AL_0_OUT_F4, out

VECTOR = 0x2340
"""Where the way back begins, in real mode: CS 0234h, IP 0."""
CELL = 0x6000
"""Memory that the guest writes before it sleeps, and tells when it is back."""
WAY_BACK = bytes.fromhex("b80006 8ed8 8b1e0000 8cc8 01d8 e7f4 f4")
"""mov ax, CELL >> 4; mov ds, ax; mov bx, [0]; mov ax, cs; add ax, bx; out 0xF4, ax; hlt"""
STATUS = (VECTOR >> 4) + 5 << 1 | 1


def out16(port: int, value: int) -> bytes:
    """mov dx, port; mov eax, value; out dx, ax"""
    return b"\x66\xba" + port.to_bytes(2, "little") + b"\xb8" + value.to_bytes(4, "little") + b"\x66\xef"


def store(address: int, data: bytes) -> bytes:
    """mov byte [address], value for each byte"""
    return b"".join(b"\xc6\x04\x25" + (address + at).to_bytes(4, "little") + bytes((value,)) for at, value in enumerate(data))


def cmos(register: int, value: int) -> bytes:
    """Write a register of the RTC."""
    return out(layout.RTC.base, register) + out(layout.RTC.base + 1, value)


ALARM_EACH_SECOND = b"".join(cmos(register, ANY) for register in (SECONDS_ALARM, MINUTES_ALARM, HOURS_ALARM)) + cmos(
    REGISTER_B, B_24H | B_AIE
)
SLEEP = out16(layout.PM1A_CONTROL.base, CONTROL_SLP_EN | SLP_TYP_S3 << CONTROL_SLP_TYP_SHIFT)
WAKE_ME_HERE = store(acpi.FACS_ADDRESS + acpi.WAKING_VECTOR, VECTOR.to_bytes(4, "little")) + store(VECTOR, WAY_BACK)
NEVER = store(CELL, b"\xff\xff") + MOV_AL_0_OUT_F4 + HALT
"""Nothing of this is executed."""

Boot = Callable[..., Machine]


def enable(events: int) -> bytes:
    return out16(layout.PM1A_EVENT.base + PM1_ENABLE, events)


@pytest.fixture(params=["cascadelake", "epyc"])
def boot(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Boot]:
    machines: list[Machine] = []

    def make(code: bytes, **options: Any) -> Machine:
        path = tmp_path / "program"
        path.write_bytes(images.program(store(CELL, b"\x05\x00") + code))
        machines.append(Machine(path, memory="16M", cpu=request.param, **options))
        return machines[-1]

    yield make
    for machine in machines:
        machine.close()


@pytest.mark.parametrize("cpus", [1, 2])
def test_the_alarm_wakes_the_guest_where_it_wants_to(boot: Boot, cpus: int) -> None:
    clock = VirtualClock()
    machine = boot(WAKE_ME_HERE + enable(PM1_RTC) + ALARM_EACH_SECOND + SLEEP + NEVER, cpus=cpus, clock=clock)
    before = clock.realtime_ns()
    stop = machine.run(timeout=60)
    assert (stop.reason, stop.status) == (StopReason.EXIT, STATUS)
    assert before < clock.realtime_ns() <= before + 1_000_000_000


@contextmanager
def sleeping(machine: Machine) -> Iterator[list[int | None]]:
    """Runs a machine until it sleeps, and behind the block to its end; the list then has its status."""
    outcome: list[int | None] = []
    runner = threading.Thread(target=lambda: outcome.append(machine.run(timeout=60).status))
    runner.start()
    while machine.status().state is not RunState.SUSPENDED:
        assert runner.is_alive()
    yield outcome
    runner.join()


def test_a_person_wakes_the_guest_and_a_sleeping_one_is_not_saved(boot: Boot, tmp_path: Path) -> None:
    machine = boot(WAKE_ME_HERE + enable(PM1_POWER_BUTTON) + SLEEP + NEVER)
    with sleeping(machine) as outcome:
        with pytest.raises(StateError, match="suspended itself"):
            machine.save(tmp_path / "snapshot")
        machine.resume()
    assert outcome == [STATUS]


def test_a_paused_machine_wakes_up_when_it_goes_on(boot: Boot) -> None:
    machine = boot(WAKE_ME_HERE + enable(PM1_POWER_BUTTON) + SLEEP + NEVER)
    with sleeping(machine) as outcome:
        machine.pause()
        machine.press_power_button()
        assert machine.status().state is RunState.PAUSED
        machine.resume()
    assert outcome == [STATUS]


def test_a_sleep_can_be_longer_than_a_run(boot: Boot) -> None:
    machine = boot(WAKE_ME_HERE + enable(PM1_POWER_BUTTON) + SLEEP + NEVER)
    with sleeping(machine) as outcome:
        machine.stop()
    assert outcome == [None]
    machine.press_power_button()
    assert machine.run(timeout=60).status == STATUS


@pytest.mark.parametrize("vector", [0, 0x10_0000, 0xFFFF_FFFF])
def test_a_guest_without_a_way_back_is_reset(boot: Boot, vector: int) -> None:
    where = store(acpi.FACS_ADDRESS + acpi.WAKING_VECTOR, vector.to_bytes(4, "little"))
    machine = boot(where + enable(PM1_RTC) + ALARM_EACH_SECOND + SLEEP + NEVER, clock=VirtualClock())
    assert machine.run(timeout=60).reason is StopReason.RESET


def test_parts_without_power_are_as_after_reset(boot: Boot) -> None:
    """The local APIC, the PIT and a serial port have lost what the guest gave them; CMOS memory has not."""
    lapic = (
        b"\xbb" + (layout.LOCAL_APIC.base + 0xF0).to_bytes(4, "little") + bytes.fromhex("c703ff010000")
    )  # mov ebx, SPIV; mov [rbx], 1FFh
    machine = boot(
        WAKE_ME_HERE
        + cmos(0x50, 0x5A)
        + out(layout.COM2.base + 7, 0x77)
        + out(0x43, 0x34)
        + lapic
        + enable(PM1_RTC)
        + ALARM_EACH_SECOND
        + SLEEP
        + NEVER,
        clock=VirtualClock(),
    )
    fresh = boot(MOV_AL_0_OUT_F4, clock=VirtualClock())
    assert machine.run(timeout=60).status == STATUS
    vcpu, new = machine._vcpus[0], fresh._vcpus[0]
    assert bytes(vcpu.get_lapic()) == bytes(new.get_lapic())
    assert bytes(machine._vm.get_pit2().channels[0])[:-8] == bytes(fresh._vm.get_pit2().channels[0])[:-8]
    assert machine._board.serial[1].save() == fresh._board.serial[1].save()
    assert machine._board.rtc.save().cmos[0x50] == 0x5A
    assert vcpu.get_sregs2().cr0 == 0x6000_0010
