"""Port I/O: registers and widths, devices in the kernel."""

from __future__ import annotations

import pytest

from softkvm.kvm import Vcpu, Vm
from softkvm.uapi import kvm as uapi
from tests import fake_engine
from tests.kvm.conftest import Script
from tests.kvm.guest import Latch, leave, out_of_guest

RIP = 0x1000
PORT = 0x3F8
IN = 1


def io(vcpu: Vcpu, flags: int, size: int = 1, length: int = 1, count: int = 1, gla: int = 0) -> fake_engine.Step:
    return leave(vcpu, "io", length, io_port=PORT, io_size=size, io_flags=flags, io_count=count, io_gla=gla)


@pytest.fixture(autouse=True)
def at_rip(vcpu: Vcpu) -> None:
    vcpu.state.rip = RIP


@pytest.mark.parametrize(("size", "value"), [(1, 0x44), (2, 0x3344), (4, 0x1122_3344)])
def test_out_to_user_space(vcpu: Vcpu, play: Script, size: int, value: int) -> None:
    vcpu.gpr[0] = 0x1122_3344
    play(io(vcpu, 0, size, 2))
    vcpu.run()
    out = vcpu.kvm_run.io
    assert vcpu.kvm_run.exit_reason == uapi.KVM_EXIT_IO
    assert (out.direction, out.size, out.port, out.count, out.data_offset) == (1, size, PORT, 1, 4096)
    assert int.from_bytes(vcpu.mmap_area[4096 : 4096 + size], "little") == value
    assert vcpu.state.rip == RIP  # stepped over when user space comes back
    out_of_guest(vcpu, play)
    assert vcpu.state.rip == RIP + 2


@pytest.mark.parametrize(("size", "rax"), [(1, 0xAAAA_AAAA_AAAA_AA04), (2, 0xAAAA_AAAA_AAAA_0304), (4, 0x0102_0304)])
def test_in_from_user_space_merges_into_rax(vcpu: Vcpu, play: Script, size: int, rax: int) -> None:
    vcpu.gpr[0] = 0xAAAA_AAAA_AAAA_AAAA
    play(io(vcpu, IN, size))
    vcpu.run()
    vcpu.mmap_area[4096 : 4096 + size] = (0x0102_0304).to_bytes(4, "little")[:size]
    out_of_guest(vcpu, play)
    assert (vcpu.gpr[0], vcpu.state.rip) == (rax, RIP + 1)


def test_a_reset_by_user_space_is_not_skipped_over(vcpu: Vcpu, play: Script) -> None:
    play(io(vcpu, 0))
    vcpu.run()
    regs = vcpu.get_regs()
    regs.rip = 0xFFF0
    vcpu.set_regs(regs)
    out_of_guest(vcpu, play)
    assert vcpu.state.rip == 0xFFF0


def test_devices_in_the_kernel(vcpu: Vcpu, vm: Vm, ram: object, play: Script) -> None:
    latch = Latch()
    vm.pio_bus.register(PORT, 1, latch)
    vcpu.gpr[0] = 0x55
    out_of_guest(vcpu, play, io(vcpu, 0), io(vcpu, IN))
    assert (latch.written, vcpu.gpr[0], vcpu.state.rip) == ([0x55], 0x41, RIP + 2)
