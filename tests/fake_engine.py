"""A stand-in for `softkvm._engine` without a CPU in it: cores play scripts of exits. For tests of the floors above the silicon."""

from __future__ import annotations

import ctypes
import mmap
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from softkvm.silicon import control

PAGE = 4096
CONTROL_BLOCK_SIZE = 0x5000
EVENT_VALID = 1 << 31

Step = Callable[["control.ControlBlock"], int | None]
"""A piece of the guest: changes the block as the silicon would and returns the exit reason, None if the guest runs on to the next step."""


class Memory(mmap.mmap):
    """Anonymous memory with the face of the engine's."""

    fd = -1

    def __new__(cls, size: int) -> Memory:
        if size <= 0 or size % PAGE:
            raise ValueError("size must be a positive multiple of 4096")
        return super().__new__(cls, -1, size)

    @property
    def size(self) -> int:  # type: ignore[override]
        return len(self)

    @property
    def address(self) -> int:
        return ctypes.addressof(ctypes.c_char.from_buffer(self))


class NestedPageTable:
    """Page by page in a dictionary."""

    def __init__(self) -> None:
        self.pages: dict[int, tuple[int, int]] = {}

    def map(self, gpa: int, size: int, memory: Memory, offset: int, rights: int) -> None:
        assert not (gpa | size | offset) % PAGE
        assert size > 0
        assert offset >= 0
        assert offset + size <= memory.size
        for step in range(0, size, PAGE):
            self.pages[gpa + step] = (memory.address + offset + step, rights)

    def unmap(self, gpa: int, size: int) -> None:
        for page in list(self._within(gpa, size)):
            del self.pages[page]

    def protect(self, gpa: int, size: int, rights: int) -> None:
        for page in list(self._within(gpa, size)):
            self.pages[page] = (self.pages[page][0], rights)

    def wrote(self, gpa: int, size: int) -> None:
        """Nobody has made code of it."""

    def lookup(self, gpa: int) -> tuple[int, int] | None:
        found = self.pages.get(gpa & -PAGE)
        return None if found is None else (found[0] + gpa % PAGE, found[1])

    def _within(self, gpa: int, size: int) -> Iterator[int]:
        return (page for page in self.pages if gpa <= page < gpa + size)


class Model:
    """A CPU with just enough CPUID for KVM."""

    def __init__(self, name: str, features: dict[str, bool] | None = None) -> None:
        self.name = name
        self.vendor = "amd" if name == "epyc" else "intel"
        optional = dict.fromkeys(("nrip-save", "tsc-scale"), self.vendor == "amd") | (features or {})
        self.features = [feature for feature, on in optional.items() if on]

    def cpuid(self, leaf: int, subleaf: int) -> tuple[int, int, int, int]:
        vendor = (0x756E6547, 0x6C65746E, 0x49656E69) if self.vendor == "intel" else (0x68747541, 0x444D4163, 0x69746E65)
        everything = 0xFFFF_FFFF
        return {
            0: (0x16, *vendor),
            1: (0x50657, 0x800, everything, everything),
            7: (0, everything, everything, everything),
            0xD: (0x7, 0x340, 0x340, 0),
            0x8000_0000: (0x8000_0008, 0, 0, 0),
            0x8000_0001: (0, 0, everything, everything),
            0x8000_0008: (0x302E, 0, 0, 0),
        }.get(leaf, (0, 0, 0, 0))

    def leaves(self) -> list[tuple[int, int, bool, int, int, int, int]]:
        return [(leaf, 0, leaf in (7, 0xD), *self.cpuid(leaf, 0)) for leaf in (0, 1, 7, 0xD, 0x8000_0000, 0x8000_0001, 0x8000_0008)]

    def instruction_length(self, code: bytes, bits: int) -> int | None:
        """Without a decoder nothing is an instruction."""

    def msrs(self) -> dict[int, int]:
        return {0x10A: 0, 0x17: 0, 0x8B: 0x1000_0000, 0x1A0: 1, 0xCE: 0}


class ControlBlock(bytearray):
    """The bytes of a control block."""

    def __init__(self) -> None:
        super().__init__(CONTROL_BLOCK_SIZE)


class Core:
    """A CPU that plays `Core.script`, and records what it was given at each entry."""

    script: Iterator[Step] = iter(())
    cores: list[Core] = []  # noqa: RUF012 - one list for all cores is the point

    def __init__(self, model: Any, index: int) -> None:
        self.vendor = model.vendor
        self.kicked = False
        self.timer = 0
        self.entries = 0
        self.injected: list[int] = []
        self.pmu: dict[int, int] = {}
        self.identity_mapped = True
        Core.cores.append(self)

    def enter(self, block: Any, npt: NestedPageTable) -> int:
        from softkvm.silicon import control  # which imports this module in the engine's place

        view = control.ControlBlock.from_buffer(block)
        self.entries += 1
        if self.kicked:
            self.kicked = False
            return 0x60 if self.vendor == "amd" else 1
        if view.control.event & EVENT_VALID:
            self.injected.append(view.control.event)
            view.control.event = 0
        reason = None
        while reason is None:
            step = next(Core.script, None)
            assert step is not None, "the guest ran on past the end of its script"
            reason = step(view)
        view.exit.reason = reason & 0xFFFF_FFFF
        return reason

    def kick(self) -> None:
        self.kicked = True

    def set_apic(self, posted: PostedInterrupts | None, table: IpiTable | None) -> None:
        self.posted, self.table = posted, table

    def set_timer(self, tsc: int) -> None:
        self.timer = tsc

    def translate(self, block: Any, npt: NestedPageTable, gva: int, access: int) -> int | None:
        return gva if self.identity_mapped else None

    def counters(self) -> dict[str, int]:
        return {"entries": self.entries}

    def pmu_read(self, index: int) -> int:
        return self.pmu.get(index, 0)

    def pmu_write(self, index: int, value: int) -> None:
        self.pmu[index] = value


class Wakeup(threading.Event):
    """Without polling."""

    def poll(self, ns: int) -> bool:
        return self.is_set()


class PostedInterrupts:
    """An integer with a bit per vector."""

    def __init__(self, wakeup: Wakeup) -> None:
        self.wakeup = wakeup
        self.vectors = 0

    def post(self, vector: int) -> None:
        self.vectors |= 1 << vector
        self.wakeup.set()

    def take(self) -> bytes | None:
        vectors, self.vectors = self.vectors, 0
        return vectors.to_bytes(32, "little") if vectors else None


class IpiTable(dict[int, PostedInterrupts]):
    """Descriptors by APIC id."""

    def set(self, apic_id: int, posted: PostedInterrupts | None) -> None:
        self.pop(apic_id, None)
        if posted is not None:
            self[apic_id] = posted


def model_names() -> list[str]:
    return ["cascadelake", "epyc"]


def feature_names() -> list[str]:
    return []


def tsc() -> int:
    return 0


def tsc_khz() -> int:
    return 2_000_000


def build_info() -> dict[str, str]:
    return {"version": "fake"}


def exits_with(reason: int, **exit_fields: int) -> Step:
    """A step that leaves with `reason` and these fields of `Exit`."""

    def step(view: control.ControlBlock) -> int:
        for name, value in {"vectoring": 0, **exit_fields}.items():
            setattr(view.exit, name, value)
        return reason

    return step


def as_bytes(memory: object) -> memoryview:
    """The contents of a (fake or real) memory."""
    return memoryview(cast(Any, memory))
