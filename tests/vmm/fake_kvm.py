"""A KVM whose guest is a script: the public methods that the machine uses, without an engine.

The script is a generator of exits. `out()` and `in_()` and the others make one; what a read returned is in `Vcpu.answers`. A guest whose
script is over halts: KVM_RUN waits for a kick.
"""

from __future__ import annotations

import errno
import os
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

from softkvm.uapi import kvm as uapi
from tests.vmm.doubles import HostBlock

PIO_DATA = 4096
Exit = Callable[["Vcpu"], None]
Script = Callable[[], Iterator[Exit]]


def out(port: int, value: int, size: int = 1) -> Exit:
    """OUT."""
    return outs(port, value.to_bytes(size, "little"), size)


def outs(port: int, data: bytes, size: int = 1) -> Exit:
    """REP OUTS."""

    def fill(vcpu: Vcpu) -> None:
        vcpu.kvm_run.exit_reason = uapi.KVM_EXIT_IO
        struct.pack_into("<BBHIQ", vcpu.mmap_area, 32, uapi.KVM_EXIT_IO_OUT, size, port, len(data) // size, PIO_DATA)
        vcpu.mmap_area[PIO_DATA : PIO_DATA + len(data)] = data

    return fill


def in_(port: int, size: int = 1, count: int = 1) -> Exit:
    """IN or REP INS."""

    def fill(vcpu: Vcpu) -> None:
        vcpu.kvm_run.exit_reason = uapi.KVM_EXIT_IO
        struct.pack_into("<BBHIQ", vcpu.mmap_area, 32, uapi.KVM_EXIT_IO_IN, size, port, count, PIO_DATA)
        vcpu.finish = lambda: bytes(vcpu.mmap_area[PIO_DATA : PIO_DATA + size * count])

    return fill


def load(address: int, size: int) -> Exit:
    """A read of device memory."""

    def fill(vcpu: Vcpu) -> None:
        vcpu.kvm_run.exit_reason = uapi.KVM_EXIT_MMIO
        struct.pack_into("<QQIB", vcpu.mmap_area, 32, address, 0, size, 0)
        vcpu.finish = lambda: bytes(vcpu.mmap_area[40 : 40 + size])

    return fill


def store(address: int, value: int, size: int) -> Exit:
    """A write to device memory."""

    def fill(vcpu: Vcpu) -> None:
        vcpu.kvm_run.exit_reason = uapi.KVM_EXIT_MMIO
        struct.pack_into("<QQIB", vcpu.mmap_area, 32, address, value, size, 1)

    return fill


def reason(number: int, **fields: int) -> Exit:
    """Any other exit; `fields` are of the union's arm for it."""

    def fill(vcpu: Vcpu) -> None:
        vcpu.kvm_run.exit_reason = number
        arms = {
            uapi.KVM_EXIT_FAIL_ENTRY: "fail_entry",
            uapi.KVM_EXIT_INTERNAL_ERROR: "internal",
            uapi.KVM_EXIT_SYSTEM_EVENT: "system_event",
        }
        for name, value in fields.items():
            setattr(getattr(vcpu.kvm_run, arms[number]), name, value)

    return fill


def fail(number: int) -> Exit:
    """KVM_RUN fails."""

    def raise_(vcpu: Vcpu) -> None:
        raise OSError(number, os.strerror(number))

    return raise_


def say(text: str) -> Iterator[Exit]:
    """Print on ttyS0 as a polling driver does."""
    return (out(0x3F8, byte) for byte in text.encode())


class Vcpu:
    """A vCPU that plays its script, RIP counting the exits."""

    def __init__(self, vcpu_id: int, script: Iterator[Exit]) -> None:
        self.vcpu_id = vcpu_id
        self.area = bytearray(3 * 4096)
        self.mmap_area = memoryview(self.area)
        self.kvm_run = uapi.Run.from_buffer(self.area)
        self.stats: Counter[str] = Counter()
        self.regs, self.sregs, self.lapic = uapi.Regs(), uapi.Sregs(), uapi.LapicState()
        self.cpuid: list[uapi.CpuidEntry2] = []
        self.msrs: dict[int, int] = {0x1A0: 0}
        self.finish: Callable[[], bytes] | None = None
        self.answers: list[bytes] = []
        self.closed = False
        self._script = script
        self._signal = threading.Event()

    def run(self) -> None:
        if self.finish is not None:
            self.answers.append(self.finish())
            self.finish = None
        if self.kvm_run.immediate_exit or self._signal.is_set():
            self._signal.clear()
            raise InterruptedError(errno.EINTR, "signal")
        exit_ = next(self._script, None)
        if exit_ is None:
            self._signal.wait()
            self._signal.clear()
            raise InterruptedError(errno.EINTR, "signal")
        self.stats["exits"] += 1
        self.regs.rip += 1
        exit_(self)

    def kick(self) -> None:
        self._signal.set()

    def kvmclock_ctrl(self) -> None:
        raise OSError(errno.EINVAL, "kvmclock is not in use")

    def statistics(self) -> dict[str, int]:
        return dict(self.stats)

    def engine_counters(self) -> dict[str, int]:
        return {"instructions": 1000 * self.stats["exits"], "tlb_fills": 2}

    def exits_by_reason(self) -> dict[str, int]:
        return {"EPT_VIOLATION": 1, "IO_INSTRUCTION": 4}

    def set_cpuid2(self, entries: list[uapi.CpuidEntry2]) -> None:
        self.cpuid = entries

    def get_msrs(self, indices: Iterable[int]) -> list[int]:
        return [self.msrs.get(index, 0) for index in indices]

    def set_msrs(self, values: Mapping[int, int]) -> int:
        self.msrs.update(values)
        return len(values)

    def get_lapic(self) -> uapi.LapicState:
        return self.lapic

    def set_lapic(self, state: uapi.LapicState) -> None:
        self.lapic = state

    def get_sregs(self) -> uapi.Sregs:
        return self.sregs

    def set_sregs(self, sregs: uapi.Sregs) -> None:
        self.sregs = sregs

    def get_regs(self) -> uapi.Regs:
        return self.regs

    def set_regs(self, regs: uapi.Regs) -> None:
        self.regs = regs

    def get_mp_state(self) -> uapi.MpState:
        return uapi.MpState()

    def get_tsc_khz(self) -> int:
        return 2_000_000

    def get_sregs2(self) -> uapi.Sregs2:
        return uapi.Sregs2()

    def get_xcrs(self) -> uapi.Xcrs:
        return uapi.Xcrs()

    def get_xsave(self) -> uapi.Xsave:
        return uapi.Xsave()

    def get_debugregs(self) -> uapi.Debugregs:
        return uapi.Debugregs()

    def get_vcpu_events(self) -> uapi.VcpuEvents:
        return uapi.VcpuEvents()

    def close(self) -> None:
        self.closed = True


class Vm:
    """A VM that records how it was set up."""

    def __init__(self, kvm: FakeKvm) -> None:
        self._kvm = kvm
        self.calls: list[str] = []
        self.tsc_khz = 2_000_000
        self.capabilities: set[int] = set()
        self.slots: list[uapi.UserspaceMemoryRegion] = []
        self.routes: list[uapi.IrqRoutingEntry] = []
        self.levels: list[tuple[int, int]] = []
        self.vcpus: list[Vcpu] = []
        self.closed = False

    def __enter__(self) -> Vm:
        return self

    def __exit__(self, *error: object) -> None:
        self.closed = True

    def set_identity_map_addr(self, address: int) -> None:
        self.calls.append("identity")

    def set_tss_addr(self, address: int) -> None:
        self.calls.append("tss")

    def enable_cap(self, cap: uapi.EnableCap) -> None:
        self.capabilities.add(cap.cap)

    def get_tsc_khz(self) -> int:
        return self.tsc_khz

    def set_tsc_khz(self, khz: int) -> None:
        if khz > 10_000_000:
            raise OSError(errno.EINVAL, "TSC frequency out of range")
        self.tsc_khz = khz

    def check_extension(self, cap: int) -> int:
        return 0

    def create_irqchip(self) -> None:
        self.calls.append("irqchip")

    def create_pit2(self, config: uapi.PitConfig) -> None:
        self.calls.append("pit")

    def get_irqchip(self, chip: uapi.Irqchip) -> uapi.Irqchip:
        return chip

    def get_pit2(self) -> uapi.PitState2:
        return uapi.PitState2()

    def set_user_memory_region(self, region: uapi.UserspaceMemoryRegion) -> None:
        self.slots.append(region)

    def set_gsi_routing(self, routes: list[uapi.IrqRoutingEntry]) -> None:
        self.routes = routes

    def irq_line(self, gsi: int, level: int) -> None:
        self.levels.append((gsi, level))

    def create_vcpu(self, vcpu_id: int) -> Vcpu:
        assert "irqchip" in self.calls
        script = self._kvm.script() if vcpu_id == 0 else iter(())
        self.vcpus.append(Vcpu(vcpu_id, script))
        return self.vcpus[-1]


class FakeKvm:
    """Stands for the package `softkvm.kvm`."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.vm = Vm(self)
        self.memory_error: OSError | None = None

    def Model(self, name: str, features: dict[str, bool], tsc_khz: int | None, tier: str) -> Any:
        if name not in ("cascadelake", "epyc"):
            raise ValueError(f"there is no CPU model {name}; there are cascadelake, epyc")
        return SimpleNamespace(name=name, features=features)

    def Process(self) -> None:
        """Nobody watches."""

    def System(self, model: Any, parameters: Any, process: None, cores: int | None, turns: None) -> Any:
        return SimpleNamespace(
            turns=turns,
            create_vm=lambda clock: self.vm,
            check_extension=lambda capability: 1,
            get_msr_index_list=lambda: [0x1A0],
            get_supported_cpuid=lambda: [uapi.CpuidEntry2(function=1)],
        )

    def allocate_memory(self, size: int) -> HostBlock:
        if self.memory_error is not None:
            raise self.memory_error
        return HostBlock(size)
