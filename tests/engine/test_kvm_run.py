"""KVM_RUN on the real silicon: kicks and Ctrl-C get a busy guest out, and code that the host rewrites runs as rewritten."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable, Iterator

import pytest

from softkvm import kvm
from softkvm.uapi import kvm as uapi

CODE, FLAG = 0x1000, 0x2000
SPIN = bytes.fromhex("c606002001 ebfe")  # mov byte [0x2000], 1; jmp to itself
OUT_1 = bytes.fromhex("b001 e6f4")  # mov al, 1; out 0xF4, al


class Guest:
    """One vCPU in real mode at `CODE`, with 64 KB of RAM."""

    def __init__(self, model: str) -> None:
        system = kvm.System(kvm.Model(model))
        self.vm = system.create_vm()
        self.memory = kvm.allocate_memory(0x10000)
        self.ram = memoryview(self.memory)
        self.vm.set_user_memory_region(uapi.UserspaceMemoryRegion(memory_size=0x10000, userspace_addr=self.memory.address))
        self.vcpu = self.vm.create_vcpu(0)
        self.vcpu.set_cpuid2(system.get_supported_cpuid())
        sregs = self.vcpu.get_sregs()
        sregs.cs.selector = sregs.cs.base = 0
        self.vcpu.set_sregs(sregs)

    def start_at_code(self) -> None:
        self.vcpu.set_regs(uapi.Regs(rip=CODE, rflags=2))

    def once_it_runs(self, act: Callable[[], object]) -> threading.Thread:
        """A thread that does `act()` after the guest has set its flag."""

        def watch() -> None:
            while not self.ram[FLAG]:
                pass
            act()

        thread = threading.Thread(target=watch)
        thread.start()
        return thread


@pytest.fixture(params=["cascadelake", "epyc"])
def guest(request: pytest.FixtureRequest) -> Iterator[Guest]:
    guest = Guest(request.param)
    with guest.vm:
        yield guest


@pytest.fixture
def ctrl_c() -> Iterator[Callable[[], None]]:
    """Sends this process a SIGINT that raises KeyboardInterrupt."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda: os.kill(os.getpid(), signal.SIGINT)
    signal.signal(signal.SIGINT, before)


def test_a_kick_of_another_thread_ends_the_run(guest: Guest) -> None:
    guest.ram[CODE : CODE + len(SPIN)] = SPIN
    guest.start_at_code()
    thread = guest.once_it_runs(guest.vcpu.kick)
    with pytest.raises(InterruptedError) as caught:
        guest.vcpu.run()
    thread.join()
    assert caught.value.errno == errno.EINTR
    assert guest.vcpu.kvm_run.exit_reason == uapi.KVM_EXIT_INTR


def test_ctrl_c_comes_out_of_the_run_and_leaves_the_vcpu_usable(guest: Guest, ctrl_c: Callable[[], None]) -> None:
    guest.ram[CODE : CODE + len(SPIN)] = SPIN
    guest.start_at_code()
    thread = guest.once_it_runs(ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        guest.vcpu.run()
    thread.join()
    assert guest.vcpu.get_regs().rip == CODE + 5
    guest.vcpu.kick()
    with pytest.raises(InterruptedError):
        guest.vcpu.run()


def test_code_that_kvm_rewrites_runs_as_rewritten(guest: Guest) -> None:
    guest.ram[CODE : CODE + len(OUT_1)] = OUT_1
    printed = []
    for value in (1, 2, 3):
        guest.vm.memory.write(CODE + 1, bytes([value]))
        guest.start_at_code()
        guest.vcpu.run()
        assert guest.vcpu.kvm_run.exit_reason == uapi.KVM_EXIT_IO
        printed.append(guest.vcpu.mmap_area[4096])
    assert printed == [1, 2, 3]


def test_counters_stay_with_the_vcpu(guest: Guest) -> None:
    guest.ram[CODE : CODE + len(OUT_1)] = OUT_1
    guest.start_at_code()
    guest.vcpu.run()
    counters, exits = guest.vcpu.engine_counters(), guest.vcpu.exits_by_reason()
    assert counters["instructions"] == 1
    assert exits.keys() <= {"IO_INSTRUCTION", "EPT_VIOLATION", "EXTERNAL_INTERRUPT", "IOIO", "NPF", "INTR"}
    guest.vm.close()
    assert guest.vcpu.engine_counters() == counters
