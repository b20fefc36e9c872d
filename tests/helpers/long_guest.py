"""Tiny guests in 64-bit mode, run by KVM's ioctls on the real engine: flat segments, 2 MB of identity-mapped RAM, an IDT that reports.

There are no interrupt chips in the kernel, so HLT comes to user space and interrupts come from it. A guest ends with a byte on a port:
the event that it took on `EVENT_PORT`, or its normal end on `END_PORT`.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from softkvm import kvm
from softkvm.uapi import kvm as uapi

RAM_SIZE = 2 << 20
PML4, PDPT, PD, GDT, IDT, HANDLERS, CODE, DATA, STACK = 0x1000, 0x2000, 0x3000, 0x4000, 0x5000, 0x6000, 0x10000, 0x20000, 0x30000
HANDLER_SIZE = 16
CODE_SELECTOR, DATA_SELECTOR, TSS_SELECTOR = 8, 16, 24
EVENT_PORT, END_PORT = 0xE9, 0xE8
END = bytes([0xE6, END_PORT])
"""out END_PORT, al"""
CR4_PAE, CR4_OSXSAVE = 1 << 5, 1 << 18
INPUT = 0x5A
"""What every byte of the guest's input is."""

_ERROR_CODES = frozenset({8, 10, 11, 12, 13, 14, 17, 21})
_LARGE_PAGE = 0x83
_GDT = struct.pack("<3Q", 0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF)


@dataclass(frozen=True)
class Event:
    """An exception or interrupt that the guest took, and the frame on its stack."""

    vector: int
    rip: int
    rflags: int
    error: int | None


@dataclass
class Outcome:
    """How a guest ended: with an event, or with None at its normal end; and the exits to user space before that."""

    event: Event | None
    exits: list[tuple[int, ...]] = field(default_factory=list)


class Guest:
    """One VM with one vCPU, at `CODE` with interrupts off."""

    caps: ClassVar[Sequence[tuple[int, int]]] = ()
    """Capabilities of the VM, and their first arguments."""

    def __init__(self, system: kvm.System, code: bytes, **registers: int) -> None:
        self.vm = system.create_vm()
        for cap, argument in self.caps:
            self.vm.enable_cap(uapi.EnableCap(cap=cap, args=(argument, 0, 0, 0)))
        self.memory = kvm.allocate_memory(RAM_SIZE)
        self.ram = memoryview(self.memory)
        self.vm.set_user_memory_region(uapi.UserspaceMemoryRegion(memory_size=RAM_SIZE, userspace_addr=self.memory.address))
        self._write_tables()
        self.ram[CODE : CODE + len(code)] = code
        self.vcpu = self.vm.create_vcpu(0)
        self.vcpu.set_cpuid2(system.get_supported_cpuid())
        self._enter_long_mode()
        self.vcpu.set_regs(uapi.Regs(**{"rip": CODE, "rsp": STACK, "rflags": 2} | registers))

    def _write_tables(self) -> None:
        ram = self.ram
        for table, entry in ((PML4, PDPT | 3), (PDPT, PD | 3), (PD, _LARGE_PAGE)):
            ram[table : table + 8] = struct.pack("<Q", entry)
        ram[GDT : GDT + len(_GDT)] = _GDT
        for vector in range(256):
            handler = HANDLERS + vector * HANDLER_SIZE
            gate = struct.pack("<HHBBHII", handler & 0xFFFF, CODE_SELECTOR, 0, 0x8E, handler >> 16, 0, 0)
            ram[IDT + vector * 16 : IDT + vector * 16 + 16] = gate
            ram[handler : handler + 4] = bytes([0xB0, vector, 0xE6, EVENT_PORT])  # mov al, vector; out EVENT_PORT, al

    def _enter_long_mode(self) -> None:
        sregs = self.vcpu.get_sregs()
        sregs.cs = uapi.Segment(selector=CODE_SELECTOR, limit=0xFFFF_FFFF, type=0xB, present=1, s=1, l=1, g=1)
        for name in ("ds", "es", "fs", "gs", "ss"):
            setattr(sregs, name, uapi.Segment(selector=DATA_SELECTOR, limit=0xFFFF_FFFF, type=3, present=1, s=1, db=1, g=1))
        sregs.tr = uapi.Segment(selector=TSS_SELECTOR, limit=0x67, type=0xB, present=1)
        sregs.gdt.base, sregs.gdt.limit = GDT, len(_GDT) - 1
        sregs.idt.base, sregs.idt.limit = IDT, 0xFFF
        sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = 0x8000_0031, PML4, CR4_PAE | CR4_OSXSAVE, 0x500
        self.vcpu.set_sregs(sregs)

    @property
    def retired(self) -> int:
        """Instructions that the guest has retired, on the silicon and by KVM."""
        return self.vcpu.instructions_skipped + self.vcpu._on_core.counters().get("instructions", 0)

    def run(self) -> Outcome:
        """Run to the end, serving the guest's ports."""
        outcome = Outcome(None)
        run = self.vcpu.kvm_run
        while True:
            self.vcpu.run()
            if run.exit_reason == uapi.KVM_EXIT_IO and run.io.port in (EVENT_PORT, END_PORT):
                outcome.event = self._event() if run.io.port == EVENT_PORT else None
                return outcome
            outcome.exits.append(self._serve())
            if run.exit_reason not in (uapi.KVM_EXIT_IO, uapi.KVM_EXIT_HLT):
                return outcome

    def _serve(self) -> tuple[int, ...]:
        run = self.vcpu.kvm_run
        if run.exit_reason != uapi.KVM_EXIT_IO:
            return (run.exit_reason,)
        io = run.io
        if io.direction == uapi.KVM_EXIT_IO_IN:
            self.vcpu.pio_data[: io.size * io.count] = bytes([INPUT]) * (io.size * io.count)
        return (run.exit_reason, io.direction, io.port, io.size * io.count)

    def _event(self) -> Event:
        vector = self.vcpu.pio_data[0]
        frame = self.vcpu.get_regs().rsp
        error = None
        if vector in _ERROR_CODES:
            (error,) = struct.unpack_from("<Q", self.ram, frame)
            frame += 8
        rip, _cs, rflags = struct.unpack_from("<3Q", self.ram, frame)
        return Event(vector, rip, rflags, error)

    def close(self) -> None:
        """Free the VM."""
        self.vm.close()
