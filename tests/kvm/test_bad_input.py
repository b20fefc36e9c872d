"""Bad input to every ioctl that there is: Linux's errno, and nothing changed.

Two tables say what Linux 6.1 answers; a new ioctl fails the tests until it is in them. Every call is made through the binary door, on a VM
without interrupt chips and on one with them.
"""

from __future__ import annotations

import ctypes
import errno
import random
from collections.abc import Iterator
from itertools import product

import pytest

from softkvm import silicon
from softkvm.kvm import System, Vcpu, Vm, dispatch
from softkvm.kvm.ioctl import Argument, KvmFile
from softkvm.uapi import kvm as uapi
from tests.kvm.conftest import ready

OK = 0
FILES: dict[str, type[KvmFile]] = {"system": System, "vm": Vm, "vcpu": Vcpu}
PLAUSIBLE = {
    getattr(errno, name)
    for name in [
        "EINVAL",
        "EFAULT",
        "E2BIG",
        "ENXIO",
        "EEXIST",
        "ENOENT",
        "EBADF",
        "EBUSY",
        "EPERM",
        "ENOTTY",
        "ENODEV",
        "EINTR",
        "EAGAIN",
        "ENOSPC",
    ]
}


NAMES = {
    (kind, number): f"KVM_{operation.method.__name__.upper()}"
    for kind, file in FILES.items()
    for number, operation in file.operations.items()
}
ALL = [(kind, number) for kind, file in FILES.items() for number in sorted(file.operations)]

VALUES = {
    ("system", "KVM_GET_API_VERSION"): errno.EINVAL,
    ("system", "KVM_CREATE_VM"): errno.EINVAL,
    ("system", "KVM_CHECK_EXTENSION"): OK,
    ("system", "KVM_GET_VCPU_MMAP_SIZE"): errno.EINVAL,
    ("vm", "KVM_CHECK_EXTENSION"): OK,
    ("vm", "KVM_CREATE_VCPU"): errno.EINVAL,
    ("vm", "KVM_SET_TSS_ADDR"): errno.EINVAL,
    ("vm", "KVM_SET_BOOT_CPU_ID"): errno.EBUSY,
    ("vm", "KVM_SET_TSC_KHZ"): errno.EINVAL,
    ("vcpu", "KVM_RUN"): errno.EINVAL,
    ("vcpu", "KVM_SET_TSC_KHZ"): errno.EINVAL,
}
"""Calls that take a number: what 2^64 - 1 is answered."""
IGNORED = {
    ("vm", "KVM_CREATE_IRQCHIP"): (errno.EINVAL, errno.EEXIST),
    ("vm", "KVM_RESET_DIRTY_RINGS"): (errno.EINVAL, errno.EINVAL),
    ("vm", "KVM_GET_TSC_KHZ"): (OK, OK),
    ("vm", "KVM_GET_STATS_FD"): (OK, OK),
    ("vcpu", "KVM_GET_STATS_FD"): (OK, OK),
    ("vm", "KVM_INTROSPECTION_UNHOOK"): (OK, OK),
    ("vm", "KVM_INTROSPECTION_PREUNHOOK"): (errno.EFAULT, errno.EFAULT),
    ("vcpu", "KVM_NMI"): (OK, OK),
    ("vcpu", "KVM_SMI"): (OK, OK),
    ("vcpu", "KVM_GET_TSC_KHZ"): (OK, OK),
    ("vcpu", "KVM_KVMCLOCK_CTRL"): (errno.EINVAL, errno.EINVAL),
}
"""Calls that do not look at their argument: without interrupt chips (but with a vCPU), and with them."""
STRUCTURES: dict[tuple[str, str], tuple[int, int]] = {
    ("system", "KVM_GET_DEVICE_ATTR"): (errno.ENXIO, errno.ENXIO),
    ("system", "KVM_HAS_DEVICE_ATTR"): (errno.ENXIO, errno.ENXIO),
    ("system", "KVM_X86_GET_MCE_CAP_SUPPORTED"): (OK, OK),
    ("system", "KVM_GET_MSR_INDEX_LIST"): (errno.EFAULT, errno.EFAULT),
    ("system", "KVM_GET_MSR_FEATURE_INDEX_LIST"): (errno.EFAULT, errno.EFAULT),
    ("system", "KVM_GET_SUPPORTED_CPUID"): (errno.EFAULT, errno.EFAULT),
    ("system", "KVM_GET_MSRS"): (errno.E2BIG, errno.E2BIG),
    ("vm", "KVM_SET_IDENTITY_MAP_ADDR"): (errno.EINVAL, errno.EINVAL),
    ("vm", "KVM_REINJECT_CONTROL"): (errno.ENXIO, errno.ENXIO),
    ("vm", "KVM_IRQ_LINE"): (errno.ENXIO, OK),
    ("vm", "KVM_IRQ_LINE_STATUS"): (errno.ENXIO, OK),
    ("vm", "KVM_SET_GSI_ROUTING"): (errno.E2BIG, errno.E2BIG),
    ("vm", "KVM_GET_DIRTY_LOG"): (errno.EINVAL, errno.EINVAL),
    ("vm", "KVM_CLEAR_DIRTY_LOG"): (errno.EINVAL, errno.EINVAL),
    ("vm", "KVM_REGISTER_COALESCED_MMIO"): (errno.EINVAL, errno.EINVAL),
    ("vm", "KVM_UNREGISTER_COALESCED_MMIO"): (errno.EINVAL, errno.EINVAL),
    ("vm", "KVM_SET_USER_MEMORY_REGION"): (errno.EINVAL, errno.EINVAL),
    ("vm", "KVM_IRQFD"): (errno.EINVAL, errno.EINVAL),
    ("vm", "KVM_IOEVENTFD"): (errno.EINVAL, errno.EINVAL),
    ("vm", "KVM_SIGNAL_MSI"): (errno.EINVAL, errno.EINVAL),
    ("vm", "KVM_SET_PMU_EVENT_FILTER"): (errno.E2BIG, errno.E2BIG),
    ("vm", "KVM_SET_CLOCK"): (errno.EINVAL, errno.EINVAL),
    ("vm", "KVM_GET_CLOCK"): (OK, OK),
    ("vm", "KVM_CREATE_PIT2"): (errno.ENOENT, OK),
    ("vm", "KVM_GET_PIT2"): (errno.ENXIO, errno.ENXIO),
    ("vm", "KVM_SET_PIT2"): (errno.ENXIO, errno.ENXIO),
    ("vm", "KVM_GET_IRQCHIP"): (errno.ENXIO, errno.EINVAL),
    ("vm", "KVM_SET_IRQCHIP"): (errno.ENXIO, errno.EINVAL),
    ("vm", "KVM_ENABLE_CAP"): (errno.EINVAL, errno.EINVAL),
    ("vm", "KVM_X86_SET_MSR_FILTER"): (errno.EINVAL, errno.EINVAL),
    ("vm", "KVM_INTROSPECTION_HOOK"): (errno.EINVAL, errno.EINVAL),
    ("vm", "KVM_INTROSPECTION_COMMAND"): (errno.EINVAL, errno.EINVAL),
    ("vm", "KVM_INTROSPECTION_EVENT"): (errno.EINVAL, errno.EINVAL),
    ("vcpu", "KVM_INTERRUPT"): (errno.EINVAL, errno.EINVAL),
    ("vcpu", "KVM_SET_SIGNAL_MASK"): (errno.EFAULT, errno.EFAULT),
    ("vcpu", "KVM_SET_MP_STATE"): (errno.EINVAL, errno.EINVAL),
    ("vcpu", "KVM_GET_MSRS"): (errno.E2BIG, errno.E2BIG),
    ("vcpu", "KVM_SET_MSRS"): (errno.E2BIG, errno.E2BIG),
    ("vcpu", "KVM_SET_CPUID2"): (errno.E2BIG, errno.E2BIG),
    ("vcpu", "KVM_GET_CPUID2"): (errno.EFAULT, errno.EFAULT),
    ("vcpu", "KVM_X86_SETUP_MCE"): (errno.EINVAL, errno.EINVAL),
    ("vcpu", "KVM_X86_SET_MCE"): (errno.EINVAL, errno.EINVAL),
    ("vcpu", "KVM_SET_DEVICE_ATTR"): (errno.ENXIO, errno.ENXIO),
    ("vcpu", "KVM_GET_DEVICE_ATTR"): (errno.ENXIO, errno.ENXIO),
    ("vcpu", "KVM_HAS_DEVICE_ATTR"): (errno.ENXIO, errno.ENXIO),
    ("vcpu", "KVM_SET_VCPU_EVENTS"): (errno.EINVAL, errno.EINVAL),
    ("vcpu", "KVM_SET_GUEST_DEBUG"): (OK, OK),
    ("vcpu", "KVM_ENABLE_CAP"): (errno.EINVAL, errno.EINVAL),
    ("vcpu", "KVM_SET_DEBUGREGS"): (errno.EINVAL, errno.EINVAL),
    ("vcpu", "KVM_SET_SREGS"): (errno.EINVAL, errno.EINVAL),
    ("vcpu", "KVM_SET_SREGS2"): (errno.EINVAL, errno.EINVAL),
    ("vcpu", "KVM_SET_XCRS"): (errno.EINVAL, errno.EINVAL),
    ("vcpu", "KVM_SET_XSAVE"): (errno.EINVAL, errno.EINVAL),
    ("vcpu", "KVM_GET_LAPIC"): (errno.EINVAL, OK),
    ("vcpu", "KVM_SET_LAPIC"): (errno.EINVAL, OK),
    **{
        ("vcpu", name): (OK, OK)
        for name in [
            "KVM_SET_REGS",
            "KVM_SET_FPU",
            "KVM_GET_MP_STATE",
            "KVM_GET_VCPU_EVENTS",
            "KVM_GET_DEBUGREGS",
            "KVM_GET_REGS",
            "KVM_GET_SREGS",
            "KVM_GET_SREGS2",
            "KVM_GET_XCRS",
            "KVM_GET_FPU",
            "KVM_GET_XSAVE",
            "KVM_GET_XSAVE2",
            "KVM_TRANSLATE",
            "KVM_GET_TSC_OFFSET",
            "KVM_SET_TSC_OFFSET",
        ]
    },
}
"""Calls that take a structure: what one of ones is answered, without interrupt chips and with them."""
NOTHING_IS_FINE = {("vcpu", "KVM_SET_SIGNAL_MASK")}
"""Structures that may be left out."""
STATE_FIRST = {
    ("vm", "KVM_GET_PIT2"): (errno.ENXIO, errno.ENXIO),
    ("vcpu", "KVM_GET_LAPIC"): (errno.EINVAL, errno.EFAULT),
    ("vcpu", "KVM_SET_LAPIC"): (errno.EINVAL, errno.EFAULT),
}
"""Calls that look at the VM before they look at where their argument is, or their answer goes."""


@pytest.fixture(params=[False, True], ids=["bare", "irqchip"])
def files(request: pytest.FixtureRequest) -> Iterator[dict[str, KvmFile]]:
    """A system, a VM and a vCPU."""
    system = System(silicon.Model("cascadelake"))
    with system.create_vm() as vm:
        if request.param:
            vm.create_irqchip()
        yield {"system": system, "vm": vm, "vcpu": ready(vm.create_vcpu(0), system)}


def outcome(file: KvmFile, number: int, argument: Argument) -> int:
    """0 for what is not refused, else its errno; anything but OSError comes out."""
    try:
        dispatch(file, number, argument)
    except OSError as error:
        if error.errno is None or error.errno not in PLAUSIBLE:
            raise
        return error.errno
    return OK


def fingerprint(files: dict[str, KvmFile]) -> list[object]:
    """All that a refused call must leave alone."""
    vm, vcpu = files["vm"], files["vcpu"]
    assert isinstance(vm, Vm)
    assert isinstance(vcpu, Vcpu)
    chips = [bytes(vm.irqchip.get_state(chip)) for chip in range(uapi.KVM_NR_IRQCHIPS)] if vm.irqchip is not None else []
    options = (vm.msr_filter, vm.user_space_msr, vm.disabled_exits, vm.split_irqchip, vm.exception_payload, vm.triple_fault_event)
    return [
        bytes(vcpu.state),
        bytes(vcpu.control),
        bytes(vcpu.get_vcpu_events()),
        vcpu.mp_state,
        vcpu.apic_base,
        list(map(bytes, vcpu.get_cpuid2())),
        dict(vcpu.msrs.values),
        vcpu.msrs.machine_check.capabilities,
        vcpu.guest_debug,
        vcpu.userspace_irq,
        vcpu.signal_mask,
        chips,
        options,
        vm.pit is not None,
        vm.tss_addr,
        vm.identity_map_addr,
        vm.boot_cpu_id,
        list(vm.mmu.slots._by_id),
        vm.routing._routes,
        (vm.mmu.manual_protect, vm.mmu.ring_size, len(vm.vcpus)),
    ]


def size_of(number: int) -> int:
    """Bytes of the argument, which the number tells, but for one that was numbered before that was the rule."""
    return number >> 16 & 0x3FFF or (ctypes.sizeof(uapi.ReinjectControl) if number == uapi.KVM_REINJECT_CONTROL else 0)


def of_ones(number: int) -> memoryview:
    return memoryview(bytearray(b"\xff" * size_of(number)))


def test_the_tables_are_complete() -> None:
    tables = {*VALUES, *IGNORED, *STRUCTURES}
    assert {(kind, NAMES[kind, number]) for kind, number in ALL} == tables
    assert len(tables) == len(VALUES) + len(IGNORED) + len(STRUCTURES)


def cases(table: dict[tuple[str, str], object]) -> list[object]:
    return [pytest.param(kind, number, id=f"{kind} {NAMES[kind, number]}") for kind, number in ALL if (kind, NAMES[kind, number]) in table]


@pytest.mark.parametrize(("kind", "number"), cases(dict(VALUES)))
def test_numbers_out_of_range(files: dict[str, KvmFile], kind: str, number: int) -> None:
    before = fingerprint(files)
    assert outcome(files[kind], number, (1 << 64) - 1) == VALUES[kind, NAMES[kind, number]]
    assert fingerprint(files) == before


@pytest.mark.parametrize(("kind", "number"), cases(dict(IGNORED)))
@pytest.mark.parametrize("garbage", [0, 0xC, (1 << 64) - 1])
def test_arguments_that_nobody_looks_at(files: dict[str, KvmFile], kind: str, number: int, garbage: int) -> None:
    before = fingerprint(files)
    chips = files["vcpu"].lapic is not None  # type: ignore[attr-defined]
    assert outcome(files[kind], number, garbage) == IGNORED[kind, NAMES[kind, number]][chips]
    if NAMES[kind, number] not in ("KVM_NMI", "KVM_SMI"):
        assert fingerprint(files) == before


@pytest.mark.parametrize(("kind", "number"), cases(dict(STRUCTURES)))
def test_structures_that_are_not_there_or_too_short(files: dict[str, KvmFile], kind: str, number: int) -> None:
    before = fingerprint(files)
    key = (kind, NAMES[kind, number])
    chips = files["vcpu"].lapic is not None  # type: ignore[attr-defined]
    expected = STATE_FIRST[key][chips] if key in STATE_FIRST else errno.EFAULT
    size = size_of(number)
    arguments: list[Argument] = [0x1000, *(memoryview(bytearray(length)) for length in {0, size // 2, size - 1} if length < size)]
    if number == uapi.KVM_SET_GSI_ROUTING or key[1] in ("KVM_GET_MSRS", "KVM_SET_MSRS", "KVM_SET_SIGNAL_MASK"):
        arguments = arguments[:2]  # the header alone may say that there is nothing behind it
    for argument in arguments:
        assert outcome(files[kind], number, argument) == expected
    assert outcome(files[kind], number, 0) == (OK if key in NOTHING_IS_FINE else expected)
    assert fingerprint(files) == before


@pytest.mark.parametrize(("kind", "number"), cases(dict(STRUCTURES)))
def test_structures_of_ones(files: dict[str, KvmFile], kind: str, number: int) -> None:
    before = fingerprint(files)
    chips = files["vcpu"].lapic is not None  # type: ignore[attr-defined]
    result = outcome(files[kind], number, of_ones(number))
    assert result == STRUCTURES[kind, NAMES[kind, number]][chips]
    if result != OK:
        assert fingerprint(files) == before


@pytest.mark.parametrize(("kind", "number"), [pytest.param(*one, id=f"{one[0]} {NAMES[one]}") for one in ALL])
def test_numbers_of_another_size_do_not_exist(files: dict[str, KvmFile], kind: str, number: int) -> None:
    """Dispatch is on the whole number: an old or a future layout is another ioctl."""
    file = files[kind]
    for other in (number ^ 1 << 16, number ^ 3 << 30):
        if other not in file.operations:
            assert outcome(file, other, of_ones(number)) == file.unknown_ioctl


@pytest.mark.parametrize(("kind", "number"), [pytest.param(*one, id=f"{one[0]} {NAMES[one]}") for one in ALL if one[0] != "system"])
def test_closed_files_take_nothing(files: dict[str, KvmFile], kind: str, number: int) -> None:
    vm = files["vm"]
    assert isinstance(vm, Vm)
    vm.close()
    argument: Argument = memoryview(bytearray(size_of(number))) if (kind, NAMES[kind, number]) in STRUCTURES else 0
    assert outcome(files[kind], number, argument) == errno.EBADF


@pytest.mark.parametrize(("kind", "number"), cases(dict(STRUCTURES)))
def test_random_structures_are_taken_whole_or_not_at_all(files: dict[str, KvmFile], kind: str, number: int) -> None:
    source = random.Random(number)
    size = size_of(number)
    for _, sparse in product(range(6), (False, True)):
        data = bytearray(size + 256)
        for position in range(size if not sparse else 4):
            data[source.randrange(size) if sparse else position] = source.randrange(256)
        before = fingerprint(files)
        if outcome(files[kind], number, memoryview(data)) != OK:
            assert fingerprint(files) == before
