"""MSR filters and MSRs of user space on guest code: KVM_X86_SET_MSR_FILTER, KVM_CAP_X86_USER_SPACE_MSR (api.rst 4.97, 7.21)."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator

import pytest

from softkvm import kvm, silicon
from softkvm.uapi import kvm as uapi
from tests.helpers.long_guest import CODE, END, Guest

RDMSR, WRMSR = b"\x0f\x32", b"\x0f\x30"
LSTAR, UNKNOWN, TSC_AUX = 0xC000_0082, 0x1234_5678, 0xC000_0103
GP = 13
READ, WRITE, DENY = uapi.KVM_MSR_FILTER_READ, uapi.KVM_MSR_FILTER_WRITE, uapi.KVM_MSR_FILTER_DEFAULT_DENY
ALL_REASONS = uapi.KVM_MSR_EXIT_REASON_INVAL | uapi.KVM_MSR_EXIT_REASON_UNKNOWN | uapi.KVM_MSR_EXIT_REASON_FILTER

Boot = Callable[..., Guest]


@pytest.fixture(params=["cascadelake", "epyc"])
def boot(request: pytest.FixtureRequest) -> Iterator[Boot]:
    """Make guests on both vendors' silicon."""
    guests: list[Guest] = []

    def make(code: bytes, **registers: int) -> Guest:
        guests.append(Guest(kvm.System(silicon.Model(request.param)), code, **registers))
        return guests[-1]

    yield make
    for guest in guests:
        guest.close()


def install(guest: Guest, *ranges: tuple[int, int, bytes], flags: int = 0) -> None:
    """A filter of (flags, base, bitmap)."""
    bitmaps = kvm.allocate_memory(4096)
    view = memoryview(bitmaps)
    request = uapi.MsrFilter(flags=flags)
    for index, (kind, base, bitmap) in enumerate(ranges):
        view[index * 64 : index * 64 + len(bitmap)] = bitmap
        request.ranges[index] = uapi.MsrFilterRange(flags=kind, nmsrs=len(bitmap) * 8, base=base, bitmap=bitmaps.address + index * 64)
    guest.vm.x86_set_msr_filter(request)


def to_user(guest: Guest, reasons: int) -> None:
    guest.vm.enable_cap(uapi.EnableCap(cap=uapi.KVM_CAP_X86_USER_SPACE_MSR, args=(reasons, 0, 0, 0)))


def test_a_filtered_msr_is_a_general_protection_fault_though_silicon_would_do_it(boot: Boot) -> None:
    """LSTAR is passed through: the bitmap of the vCPU has to follow the filter, and to follow it back."""
    guest = boot(RDMSR + END, rcx=LSTAR)
    install(guest, (READ, LSTAR, b"\xfe"))
    outcome = guest.run()
    assert outcome.event is not None
    assert (outcome.event.vector, outcome.event.rip) == (GP, CODE)
    install(guest)
    guest.vcpu.set_regs(uapi.Regs(rip=CODE, rcx=LSTAR, rsp=0x30000, rflags=2))
    assert guest.run().event is None


def test_directions_and_defaults(boot: Boot) -> None:
    guest = boot(RDMSR + WRMSR + END, rcx=TSC_AUX)
    install(guest, (READ, TSC_AUX, b"\x01"), flags=DENY)
    outcome = guest.run()
    assert outcome.event is not None
    assert (outcome.event.vector, outcome.event.rip) == (GP, CODE + len(RDMSR))


@pytest.mark.parametrize("prefix", [b"", b"\x2e"])
def test_user_space_serves_what_is_filtered(boot: Boot, prefix: bytes) -> None:
    guest = boot(prefix + RDMSR + prefix + WRMSR + END, rcx=LSTAR, rdx=5)
    install(guest, (READ | WRITE, LSTAR, b"\x00"))
    to_user(guest, ALL_REASONS)
    shared = guest.vcpu.kvm_run
    guest.vcpu.run()
    assert (shared.exit_reason, shared.msr.index, shared.msr.reason) == (
        uapi.KVM_EXIT_X86_RDMSR,
        LSTAR,
        uapi.KVM_MSR_EXIT_REASON_FILTER,
    )
    shared.msr.data = 0x1122_3344_5566_7788
    guest.vcpu.run()
    assert (shared.exit_reason, shared.msr.index, shared.msr.data) == (uapi.KVM_EXIT_X86_WRMSR, LSTAR, 0x1122_3344_5566_7788)
    assert guest.run().event is None
    assert guest.vcpu.get_msrs([LSTAR]) == [0]  # KVM's own stays, and user space passes the filter by


@pytest.mark.parametrize(
    ("index", "value", "reason"),
    [(UNKNOWN, 0, uapi.KVM_MSR_EXIT_REASON_UNKNOWN), (0x1B, 1 << 62, uapi.KVM_MSR_EXIT_REASON_INVAL)],
)
def test_user_space_hears_why_and_may_refuse(boot: Boot, index: int, value: int, reason: int) -> None:
    guest = boot(WRMSR + END, rcx=index, rax=value & 0xFFFF_FFFF, rdx=value >> 32)
    to_user(guest, reason)
    shared = guest.vcpu.kvm_run
    guest.vcpu.run()
    assert (shared.exit_reason, shared.msr.reason, shared.msr.error) == (uapi.KVM_EXIT_X86_WRMSR, reason, 0)
    shared.msr.error = 1
    outcome = guest.run()
    assert outcome.event is not None
    assert (outcome.event.vector, outcome.event.rip) == (GP, CODE)


def test_what_user_space_did_not_ask_for_is_a_fault(boot: Boot) -> None:
    guest = boot(RDMSR + END, rcx=UNKNOWN)
    to_user(guest, uapi.KVM_MSR_EXIT_REASON_FILTER)
    outcome = guest.run()
    assert outcome.event is not None
    assert outcome.event.vector == GP


def test_x2apic_msrs_are_not_filtered() -> None:
    from softkvm.kvm.msr_filter import MsrFilter

    assert MsrFilter(default_allow=False).allows(0x808, write=True)
    assert not MsrFilter(default_allow=False).allows(0x900, write=True)


def bad_filters() -> list[tuple[str, uapi.MsrFilter, int]]:
    def one(**fields: int) -> uapi.MsrFilter:
        request = uapi.MsrFilter()
        request.ranges[3] = uapi.MsrFilterRange(**{"flags": READ, "nmsrs": 8, "bitmap": 0x1000} | fields)
        return request

    return [
        ("flags", uapi.MsrFilter(flags=2), errno.EINVAL),
        ("denies everything", uapi.MsrFilter(flags=DENY), errno.EINVAL),
        ("no direction", one(flags=0), errno.EINVAL),
        ("bad direction", one(flags=4), errno.EINVAL),
        ("too large", one(nmsrs=0x600 * 8 + 1), errno.EINVAL),
        ("no bitmap", one(), errno.EFAULT),
    ]


@pytest.mark.parametrize(("request_", "error"), [row[1:] for row in bad_filters()], ids=[row[0] for row in bad_filters()])
def test_a_bad_filter_changes_nothing(boot: Boot, request_: uapi.MsrFilter, error: int) -> None:
    guest = boot(RDMSR + END, rcx=LSTAR)
    install(guest, (READ, LSTAR, b"\xfe"))
    before = guest.vm.msr_filter
    with pytest.raises(OSError, match=r".") as caught:
        guest.vm.x86_set_msr_filter(request_)
    assert caught.value.errno == error
    assert guest.vm.msr_filter is before
