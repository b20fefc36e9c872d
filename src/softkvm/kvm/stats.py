"""KVM's statistics as files: a header, an id, descriptors that say what each number is, and the numbers.

Answers to Linux 6.1 `virt/kvm/binary_stats.c`, `kvm_{vm,vcpu}_stats_desc` and `Documentation/virt/kvm/api.rst` (KVM_GET_STATS_FD). The
format describes itself, so there is what this KVM counts: the kernel's names where it counts the same, no zeroes where it counts nothing.
"""

from __future__ import annotations

import ctypes
import errno
import struct
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from softkvm.host import task
from softkvm.host.call import SYS_PREAD64
from softkvm.host.clock import KHZ_NSEC
from softkvm.kvm.ioctl import KvmFile
from softkvm.uapi import kvm as uapi
from softkvm.uapi.svm import ExitCode
from softkvm.uapi.vmx import ExitReason

if TYPE_CHECKING:
    from softkvm.host.process import Process
    from softkvm.kvm.irqchip.apicv import ApicV
    from softkvm.kvm.vcpu import Vcpu
    from softkvm.kvm.vm import Vm

_NAME_SIZE = 48
_HEADER, _DESCRIPTOR = ctypes.sizeof(uapi.StatsHeader), ctypes.sizeof(uapi.StatsDesc) + _NAME_SIZE
_COUNTER = uapi.KVM_STATS_TYPE_CUMULATIVE | uapi.KVM_STATS_UNIT_NONE
_NANOSECONDS = uapi.KVM_STATS_TYPE_CUMULATIVE | uapi.KVM_STATS_UNIT_SECONDS
_NANO = -9
_FLAG = uapi.KVM_STATS_TYPE_INSTANT | uapi.KVM_STATS_UNIT_BOOLEAN


class Statistic(NamedTuple):
    """What a number is (KVM_STATS_*), and where it comes from."""

    flags: int
    read: Callable[[Vcpu], int]


class VmStatistic(NamedTuple):
    """The same of a VM."""

    flags: int
    read: Callable[[Vm], int]


def _count(name: str, vcpu: Vcpu) -> int:
    return vcpu.stats[name]


def _counted(name: str) -> Statistic:
    return Statistic(_COUNTER, partial(_count, name))


def _apicv(vcpu: Vcpu) -> ApicV | None:
    return None if vcpu.lapic is None else vcpu.lapic.apicv


def _polls(name: str, vcpu: Vcpu) -> int:
    """Polls of HLT, with those that the core has made by itself: all were successful."""
    apicv = _apicv(vcpu)
    return vcpu.stats[name] + (0 if apicv is None else apicv.halts)


def _poll_success_ns(vcpu: Vcpu) -> int:
    apicv = _apicv(vcpu)
    return vcpu.stats["halt_poll_success_ns"] + (0 if apicv is None else apicv.halt_cycles * KHZ_NSEC // vcpu.clock.tsc_khz)


def _exits(intel: int, amd: int) -> Statistic:
    return Statistic(_COUNTER, lambda vcpu: vcpu.exit_counts.get(intel if vcpu.model.vendor == "intel" else amd, 0))


def _exponent(flags: int) -> int:
    """Of the power of ten that the number is to be multiplied by."""
    return _NANO if flags & uapi.KVM_STATS_UNIT_SECONDS else 0


VCPU: Mapping[str, Statistic] = {
    "exits": Statistic(_COUNTER, lambda vcpu: sum(vcpu.exit_counts.copy().values())),
    "io_exits": _exits(ExitReason.IO_INSTRUCTION, ExitCode.IOIO),
    "irq_exits": _exits(ExitReason.EXTERNAL_INTERRUPT, ExitCode.INTR),
    "pf_taken": _exits(ExitReason.EPT_VIOLATION, ExitCode.NPF),
    **{
        name: _counted(name)
        for name in (
            "halt_exits",
            "signal_exits",
            "irq_window_exits",
            "nmi_window_exits",
            "request_irq_exits",
            "hypercalls",
            "insn_emulation",
            "insn_emulation_fail",
            "dirty_ring_overflows",
            "smram_missing",
        )
    },
    **{name: Statistic(_COUNTER, partial(_polls, name)) for name in ("halt_successful_poll", "halt_attempted_poll")},
    "halt_poll_success_ns": Statistic(_NANOSECONDS, _poll_success_ns),
    **{name: Statistic(_NANOSECONDS, partial(_count, name)) for name in ("halt_poll_fail_ns", "halt_wait_ns")},
    "blocking": Statistic(_FLAG, lambda vcpu: int(vcpu.blocked)),
}
"""Of a vCPU; `dirty_ring_overflows` and `smram_missing` are this KVM's own."""
VM: Mapping[str, VmStatistic] = {
    "remote_tlb_flush": VmStatistic(_COUNTER, lambda vm: vm.mmu.remote_tlb_flushes + vm.smm_mmu.remote_tlb_flushes),
}
"""Of a VM."""


def of_vcpu(vcpu: Vcpu) -> dict[str, int]:
    """The numbers of a vCPU now, by name."""
    return {name: statistic.read(vcpu) for name, statistic in VCPU.items()}


def of_vm(vm: Vm) -> dict[str, int]:
    """The numbers of a VM now, by name."""
    return {name: statistic.read(vm) for name, statistic in VM.items()}


class StatsFile(KvmFile):
    """What KVM_GET_STATS_FD returns; it lives on its own, as long as it is not closed, and keeps its VM or vCPU."""

    unknown_ioctl = errno.ENOTTY
    fd_class = "stats"
    ioctl_lock = nullcontext()

    def __init__(
        self, process: Process, vm_id: int | None, name: str, flags: Mapping[str, int], values: Callable[[], Mapping[str, int]]
    ) -> None:
        """A file at its beginning; `flags` say what each of the numbers that `values()` returns is, both in the same order."""
        super().__init__(process)
        self.vm_id = vm_id
        self._values = values
        self._position = 0
        data = _HEADER + _NAME_SIZE + len(flags) * _DESCRIPTOR
        header = uapi.StatsHeader(
            name_size=_NAME_SIZE, num_desc=len(flags), id_offset=_HEADER, desc_offset=_HEADER + _NAME_SIZE, data_offset=data
        )
        descriptors = (
            bytes(uapi.StatsDesc(flags=flags[statistic], exponent=_exponent(flags[statistic]), size=1, offset=8 * index))
            + statistic.encode().ljust(_NAME_SIZE, b"\0")
            for index, statistic in enumerate(flags)
        )
        self._description = bytes(header) + name.encode().ljust(_NAME_SIZE, b"\0") + b"".join(descriptors)

    def pread(self, length: int, offset: int) -> bytes:
        """pread(2): at most `length` bytes from `offset`, none behind the end; OSError EBADF if closed, EINVAL for a negative number."""
        result: bytes = self.process.cross(task.current(), self, SYS_PREAD64, 0, (length, offset), StatsFile._pread)
        return result

    def _pread(self, length: int, offset: int) -> bytes:
        if self.closed:
            raise OSError(errno.EBADF, "the file is closed")
        if length < 0 or offset < 0:
            raise OSError(errno.EINVAL, "a negative length or offset")
        numbers = self._values().values()
        content = self._description + struct.pack(f"<{len(numbers)}Q", *numbers)
        return content[offset : offset + length]

    def _system_calls(self) -> dict[int, Callable[..., Any]]:
        return super()._system_calls() | {SYS_PREAD64: StatsFile._pread}

    def _read(self, length: int) -> bytes:
        data = self._pread(length, self._position)
        self._position += len(data)
        return data

    def close(self) -> None:
        """close(2)."""
        self.closed = True


def open_vcpu(vcpu: Vcpu) -> StatsFile:
    """The file of a vCPU."""
    flags = {name: statistic.flags for name, statistic in VCPU.items()}
    return StatsFile(vcpu.process, vcpu.vm_id, f"kvm-{vcpu.vm_id}/vcpu-{vcpu.vcpu_id}", flags, lambda: of_vcpu(vcpu))


def open_vm(vm: Vm) -> StatsFile:
    """The file of a VM."""
    flags = {name: statistic.flags for name, statistic in VM.items()}
    return StatsFile(vm.process, vm.vm_id, f"kvm-{vm.vm_id}", flags, lambda: of_vm(vm))
