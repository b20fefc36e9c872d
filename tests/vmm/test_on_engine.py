"""The machine on the real KVM and engine, with guests of a few instructions."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from softkvm.vmm import Machine, StopReason, layout
from tests.vmm.boot import images

MOV_AL_0_OUT_F4 = bytes.fromhex("b000e6f4")
HALT = bytes.fromhex("fa f4 ebfd")  # cli; again: hlt; jmp again

Boot = Callable[..., Machine]


def out(port: int, value: int) -> bytes:
    """mov dx, port; mov eax, value; out dx, al"""
    return b"\x66\xba" + port.to_bytes(2, "little") + b"\xb8" + value.to_bytes(4, "little") + b"\xee"


def exit_with_memory(address: int) -> bytes:
    """mov ebx, address; mov eax, [rbx]; out 0xF4, eax"""
    return b"\xbb" + address.to_bytes(4, "little") + bytes.fromhex("8b03 e7f4")


@pytest.fixture(params=["cascadelake", "epyc"])
def boot(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Boot]:
    """Make machines with the given program as their kernel."""
    machines: list[Machine] = []

    def make(code: bytes, **options: Any) -> Machine:
        path = tmp_path / "program"
        path.write_bytes(images.program(code))
        machines.append(Machine(path, memory="32M", cpu=request.param, **options))
        return machines[-1]

    yield make
    for machine in machines:
        machine.close()


def test_guest_prints_and_exits(boot: Boot) -> None:
    vm = boot(b"".join(out(layout.COM1.base, byte) for byte in b"hello\n") + MOV_AL_0_OUT_F4)
    stop = vm.run(timeout=60)
    assert (stop.reason, stop.status, vm.output) == (StopReason.EXIT, 1, b"hello\n")


def test_guest_reads_devices_in_memory(boot: Boot) -> None:
    stop = boot(exit_with_memory(layout.PCI_ECAM.base)).run(timeout=60)
    assert stop.status == 0x00081B36 << 1 | 1


def test_guest_reads_input(boot: Boot) -> None:
    vm = boot(bytes.fromhex("66baf803 ec e6f4"))  # mov dx, 0x3F8; in al, dx; out 0xF4, al
    vm.send("Z")
    assert vm.run(timeout=60).status == ord("Z") << 1 | 1


def test_repeated_string_output_is_one_exit(boot: Boot) -> None:
    code = bytes.fromhex("66baf803 be00000200 b90d000000 f36e")  # mov dx, 0x3F8; mov esi, 0x20000 (command line); mov ecx, 13; rep outsb
    vm = boot(code + MOV_AL_0_OUT_F4)
    vm.run(timeout=60)
    assert vm.output == b"console=ttyS0"
    assert vm.stats().user_exits["io"] <= 3


def test_counters_come_from_the_silicon(boot: Boot) -> None:
    vm = boot(bytes.fromhex("bde8030000 0fa2 ffcd 75fa") + MOV_AL_0_OUT_F4)  # mov ebp, 1000; again: cpuid; dec ebp; jnz again
    vm.run(timeout=60)
    stats = vm.stats()
    assert stats.exits["CPUID"] == 1000
    assert stats.exits.keys() & {"IO_INSTRUCTION", "IOIO"}
    assert stats.instructions >= 2000  # KVM has done the CPUIDs
    assert stats.engine["tlb_fills"] > 0
    vm.close()
    assert vm.stats().instructions == stats.instructions


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (bytes.fromhex("66ba0406 66b80034 66ef"), StopReason.POWER_OFF),  # out 0x604, SLP_EN | S5
        (out(0xCF9, 6), StopReason.RESET),
        (out(0x64, 0xFE), StopReason.RESET),
        (bytes.fromhex("0f0b"), StopReason.TRIPLE_FAULT),  # ud2 without an IDT
    ],
)
def test_ends(boot: Boot, code: bytes, reason: StopReason) -> None:
    assert boot(code + HALT).run(timeout=60).reason is reason


def test_halted_guest_can_be_stopped_and_run_again(boot: Boot) -> None:
    vm = boot(HALT, cpus=2)
    while (stop := vm.run(timeout=0.01)).rip == 0x1000200:
        assert stop.reason is StopReason.TIMEOUT, "it has not begun yet"
    assert stop.reason is StopReason.TIMEOUT
    assert vm.run(timeout=0.01).rip - 0x1000200 in (1, 2)


def test_busy_guest_can_be_stopped(boot: Boot) -> None:
    assert boot(bytes.fromhex("ebfe")).run(timeout=0.01).rip == 0x1000200  # jmp to itself


def test_exception_of_a_listener_leaves_the_guest_at_its_output(boot: Boot) -> None:
    def full(data: bytes) -> None:
        raise OSError(28, "No space left on device")

    vm = boot(out(layout.COM1.base, 1) + HALT, serial={0: full})
    with pytest.raises(OSError, match="No space left") as info:
        vm.run(timeout=60)
    assert any("vCPU 0" in note for note in info.value.__notes__)


def test_ctrl_c_comes_out_of_the_run_and_leaves_the_machine_usable(boot: Boot) -> None:
    printed = threading.Event()
    vm = boot(out(layout.COM1.base, ord("x")) + bytes.fromhex("ebfe"), serial={0: lambda data: printed.set()})
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupt() -> None:
        printed.wait()
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            vm.run(timeout=60)
    finally:
        thread.join()
        signal.signal(signal.SIGINT, before)
    assert vm.run(timeout=0.01).reason is StopReason.TIMEOUT
