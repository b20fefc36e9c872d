"""kvmclock as a guest computes it from its page and RDTSC, against KVM_GET_CLOCK.

The stages of the kernel's own `tools/testing/selftests/kvm/x86_64/kvm_clock_test.c` (Linux 6.1), and what user space may get wrong.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softkvm import kvm, silicon
from softkvm.kvm import dispatch
from softkvm.kvm.kvmclock import scale_delta
from softkvm.uapi import kvm as uapi
from tests.helpers.long_guest import CODE, DATA, END, STACK, Guest
from tests.kvm_guests.test_tsc_msrs import JOIN, RDTSC, WRMSR

SECOND = 10**9
ALL_FLAGS = uapi.KVM_CLOCK_TSC_STABLE | uapi.KVM_CLOCK_REALTIME | uapi.KVM_CLOCK_HOST_TSC
ENABLE = WRMSR
"""RCX, RAX and RDX say what to write."""


@pytest.fixture(params=["cascadelake", "epyc"])
def guest(request: pytest.FixtureRequest) -> Iterator[Guest]:
    """A guest that writes the MSR in its registers, and reads its TSC into RBX after an exit in which its page is refreshed."""
    made = Guest(kvm.System(silicon.Model(request.param)), ENABLE + b"\x0f\xa2" + RDTSC + JOIN + END)
    yield made
    made.close()


def guest_clock(guest: Guest) -> int:
    """kvmclock in ns as the guest computes it."""
    registers = {"rcx": uapi.MSR_KVM_SYSTEM_TIME_NEW, "rax": DATA | 1, "rip": CODE, "rsp": STACK, "rflags": 2}
    guest.vcpu.set_regs(uapi.Regs(**registers))
    assert guest.run().event is None
    (vcpu,) = guest.vm.tsc_status().vcpus
    info = vcpu.hv_clock
    assert info is not None
    return info.system_time + scale_delta(guest.vcpu.get_regs().rbx - info.tsc_timestamp, info.tsc_shift, info.tsc_to_system_mul)


def between(guest: Guest) -> tuple[int, int, int]:
    """KVM's clock before and after, and the guest's in the middle."""
    before = guest.vm.get_clock()
    clock = guest_clock(guest)
    after = guest.vm.get_clock()
    return before.clock, clock, after.clock


ROUNDING = 2
"""ns: the guest's scale and KVM's are rounded apart."""


@pytest.mark.parametrize("base", [0, 180 * SECOND])
def test_guest_and_kvm_have_one_clock(guest: Guest, base: int) -> None:
    guest.vm.set_clock(uapi.ClockData(clock=base))
    for _ in range(3):
        before, clock, after = between(guest)
        assert base <= before <= clock + ROUNDING
        assert clock <= after + ROUNDING


@pytest.mark.parametrize("rate", [1, 3])
def test_at_another_rate_too(guest: Guest, rate: int) -> None:
    guest.vcpu.set_tsc_khz(rate * silicon.tsc_khz())
    guest.vcpu.set_tsc_offset(1 << 52)
    before, clock, after = between(guest)
    assert before - ROUNDING <= clock <= after + ROUNDING


@pytest.mark.parametrize("realtime", [-180 * SECOND, 180 * SECOND])
def test_set_clock_adds_real_time_and_never_steps_back(guest: Guest, realtime: int) -> None:
    guest.vm.set_clock(uapi.ClockData(clock=7))
    now = guest.vm.get_clock()
    assert now.flags == ALL_FLAGS
    guest.vm.set_clock(uapi.ClockData(clock=10 * SECOND, flags=uapi.KVM_CLOCK_REALTIME, realtime=now.realtime + realtime))
    clock = guest.vm.get_clock().clock
    if realtime < 0:
        assert clock >= 10 * SECOND - realtime
    else:
        assert 10 * SECOND <= clock < 100 * SECOND, "a time to come adds nothing"
    before, guests, after = between(guest)
    assert before - ROUNDING <= guests <= after + ROUNDING


def test_the_master_clock_is_looked_at_in_set_clock_and_not_before(guest: Guest) -> None:
    guest.vm.create_vcpu(1)
    assert guest.vm.get_clock().flags == 0
    guest.vcpu.kvm_run.immediate_exit = 1
    with pytest.raises(InterruptedError):
        guest.vcpu.run()
    guest.vcpu.kvm_run.immediate_exit = 0
    assert guest.vm.get_clock().flags == 0
    guest.vm.set_clock(uapi.ClockData(clock=0))
    assert guest.vm.get_clock().flags == ALL_FLAGS == guest.vm.check_extension(uapi.KVM_CAP_ADJUST_CLOCK)


FLAG = DATA + 0x100
WAIT = b"\x80\x3c\x25" + FLAG.to_bytes(4, "little") + b"\x00\x74\xf6"
"""1: cmp byte [FLAG], 0; je 1b"""


def test_the_clock_is_set_while_a_vcpu_is_in_the_guest(guest: Guest) -> None:
    """Its stay in the guest ends, and the next one begins with a page of the new clock."""
    guest.ram[CODE : CODE + 14] = WRMSR + WAIT + END
    guest.vcpu.set_regs(uapi.Regs(rip=CODE, rsp=STACK, rflags=2, rcx=uapi.MSR_KVM_SYSTEM_TIME_NEW, rax=DATA | 1))
    thread = threading.Thread(target=guest.run)
    thread.start()
    while guest.vm.tsc_status().vcpus[0].hv_clock is None:
        time.sleep(0)
    for second in range(1, 20):
        guest.vm.set_clock(uapi.ClockData(clock=second * SECOND))
    guest.ram[FLAG] = 1
    thread.join()
    info = guest.vm.tsc_status().vcpus[0].hv_clock
    assert info is not None
    assert info.system_time == guest.vm.tsc_status().master_kernel_ns + guest.vm.tsc_status().kvmclock_offset == 19 * SECOND


def test_what_was_stopped_is_told_once(guest: Guest) -> None:
    with pytest.raises(OSError, match=r"\[Errno 22\]"):
        guest.vcpu.kvmclock_ctrl()
    guest_clock(guest)
    guest.vcpu.kvmclock_ctrl()
    guest_clock(guest)
    stopped = 2
    assert guest.ram[DATA + 29] & stopped
    guest.ram[DATA + 29] &= ~stopped  # as the guest does when it has seen it
    guest_clock(guest)
    assert not guest.ram[DATA + 29] & stopped


@given(data=st.binary(min_size=48, max_size=48), size=st.integers(0, 60))
def test_no_clock_data_of_user_space_breaks_the_clock(data: bytes, size: int) -> None:
    guest = Guest(kvm.System(silicon.Model("cascadelake")), END)
    try:
        guest.vm.set_clock(uapi.ClockData(clock=5))
        before = guest.vm.tsc_status().kvmclock_offset
        flags = int.from_bytes(data[8:12], "little")
        argument = memoryview(bytearray((data + bytes(12))[:size]))
        expected = errno.EFAULT if size < len(data) else errno.EINVAL if flags & ~ALL_FLAGS else 0
        with nullcontext() if not expected else pytest.raises(OSError, match=rf"\[Errno {expected}\]"):
            dispatch(guest.vm, uapi.KVM_SET_CLOCK, argument)
        assert not expected or guest.vm.tsc_status().kvmclock_offset == before, "what fails changes nothing"
        assert 0 <= guest.vm.get_clock().clock < 1 << 64
    finally:
        guest.close()
