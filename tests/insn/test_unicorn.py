"""The hand-written instruction tables, asked of Unicorn: an independent emulator (QEMU's translator as a library).

The worlds are those of `engine/core/tests/common/system.rs`, so what a kernel's instructions do to descriptor tables, page tables and
segments is seen by somebody who does not share the reading of the manuals that wrote the lines. Unicorn stops at an exception with its
vector and delivers none, and makes callbacks of system calls, so lines about INT n, SYSCALL and SYSENTER are not asked.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest
import unicorn
from unicorn import x86_const as x86

TABLES = Path(__file__).parent
GPR = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15")
SEGMENTS = ("es", "cs", "ss", "ds", "fs", "gs", "ldtr", "tr")
RAM_SIZE = 4 << 20
COMPARED = 0x20_0000
"""RAM below the page tables."""
PAGE_TABLES = COMPARED
CODE = 0x8000
EFER = 0xC000_0080
UD = 6
GDT, IDT, TSS, HANDLERS = 0x1000, 0x2000, 0x3000, 0x4_0000
FLAGS = 0x8D5 | 1 << 10 | 1 << 9
"""Arithmetic flags, DF and IF."""
INT_N, REPEATS = 0xCD, (0xF2, 0xF3)
SYSTEM_CALLS = (b"\x0f\x05", b"\x0f\x34")
BITS = {"system64": 64, "system32": 32, "real16": 16}
MODES = {64: unicorn.UC_MODE_64, 32: unicorn.UC_MODE_32, 16: unicorn.UC_MODE_16}

DIFFERENT = {
    "0f22c0": "MOV to CR0 and CR8 is not checked (PG without PE, reserved bits)",
    "440f22c0": "MOV to CR0 and CR8 is not checked (PG without PE, reserved bits)",
    "0f22e0": "reserved bits of CR4 are not checked",
    "50": "addresses are not checked for being canonical before they are translated, and a stack's are #GP",
    "9c": "addresses are not checked for being canonical before they are translated, and a stack's are #GP",
    "e800000000": "addresses are not checked for being canonical before they are translated, and a stack's are #GP",
    "0f2800": "MOVAPS of a misaligned operand raises nothing",
    "f089c0": "LOCK is ignored where it is undefined",
    "0f01d0": "XCR0 has no AVX",
    "a1ffff": "limits of segments are not checked",
    "678b03": "limits of segments are not checked",
    "9a78560020": "real mode begins with CS = 0, not 8",
}
"""Code that Unicorn 2.1.4, which is QEMU 5.0, runs differently, and why: checks that it does not make, and the two worlds' difference."""


@dataclass
class Line:
    """One line of a table."""

    place: str
    world: str
    code: bytes
    before: dict[str, str]
    after: dict[str, str]

    @property
    def bits(self) -> int:
        """Size of the world's code."""
        return BITS[self.world.partition(".")[0]]

    @property
    def comparable(self) -> bool:
        """Whether Unicorn can be asked: at CPL 0, about what does not go to a handler, and about what it has."""
        return not self.world.endswith(".user") and self.code[0] != INT_N and self.code not in SYSTEM_CALLS

    def memory(self) -> dict[int, int]:
        """Bytes that the line says are there behind the instruction."""
        found: dict[int, int] = {}
        for name, text in self.after.items():
            if name.startswith("["):
                found |= {int(name[1:-1], 16) + n: byte for n, byte in enumerate(bytes.fromhex(text))}
        return found

    def number(self, name: str, default: str = "0") -> int:
        """A register or flags behind the instruction."""
        return int(self.after.get(name, self.before.get(name, default)), 16)


def _items(text: str) -> dict[str, str]:
    return dict(item.split("=", 1) for item in text.split())


def lines() -> list[Line]:
    """Every line of the tables that are written by hand."""
    found, world = [], ""
    for path in (TABLES / name for name in ("system64.ins", "system32.ins", "real16.ins")):
        for number, text in enumerate(path.read_text().splitlines(), 1):
            if text.startswith("@world "):
                world = text.removeprefix("@world ").strip()
            elif text.strip() and not text.startswith("#"):
                code, before, after = text.split("|")
                found.append(Line(f"{path.name}:{number}", world, bytes.fromhex(code), _items(before), _items(after)))
    return found


def flat(access: int, flags: int) -> int:
    """A descriptor of a flat segment."""
    return 0x000F_0000_0000_FFFF | access << 40 | flags << 52


@dataclass
class Machine:
    """A CPU of Unicorn in one of the worlds."""

    line: Line
    vector: int | None = None
    changed: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.cpu = unicorn.Uc(unicorn.UC_ARCH_X86, MODES[self.line.bits])
        self.cpu.mem_map(0, RAM_SIZE)
        self.cpu.hook_add(unicorn.UC_HOOK_INTR, self._interrupt)
        if self.line.bits == 16:
            self._write("CR0", 0x10)
            for name in ("ES", "SS", "DS", "FS", "GS"):
                self._write(name, 0)
        else:
            self._tables()
        for name in GPR[: 16 if self.line.bits == 64 else 8]:
            self._set(name, int(self.line.before.get(name, "0"), 16))
        self.cpu.reg_write(x86.UC_X86_REG_EFLAGS, int(self.line.before.get("flags", "202"), 16))
        for name, text in self.line.before.items():
            if name.startswith("["):
                self.cpu.mem_write(int(name[1:-1], 16), bytes.fromhex(text))
        self.cpu.mem_write(CODE, self.line.code)

    def _write(self, name: str, value: object) -> None:
        self.cpu.reg_write(getattr(x86, f"UC_X86_REG_{name}"), value)

    def _set(self, name: str, value: int) -> None:
        self._write(self._name(name), value)

    def get(self, name: str) -> int:
        """A general register or a selector, as wide as the world has it."""
        value = self.cpu.reg_read(getattr(x86, f"UC_X86_REG_{self._name(name)}"))
        return int(value[0] if isinstance(value, tuple) else value)

    def _name(self, name: str) -> str:
        return "E" + name[1:].upper() if name in GPR and self.line.bits != 64 else name.upper()

    def _interrupt(self, cpu: unicorn.Uc, vector: int, _user: object) -> None:
        self.vector = vector
        cpu.emu_stop()

    def _tables(self) -> None:
        long = self.line.bits == 64
        native = 0xA if long else 0xC
        table: tuple[int, ...] = (
            0,
            flat(0x9B, native),
            flat(0x93, 0xC),
            flat(0xFB, 0xC),
            flat(0xF3, 0xC),
            flat(0xFB, native),
            0x8900_0000_0067 | TSS << 16,
        )
        table += (0, flat(0x13, 0xC), flat(0x9F, native), flat(0x92, 0xC), 0, 0)
        self.cpu.mem_write(GDT, struct.pack("<13Q", *table))
        for vector in range(64):
            offset = HANDLERS + 16 * vector
            gate = offset & 0xFFFF | 8 << 16 | 0x8E << 40 | (offset >> 16) << 48
            self.cpu.mem_write(IDT + (16 if long else 8) * vector, struct.pack("<Q", gate))
        if long:
            self._map()
        self._write("GDTR", (0, GDT, 0x67, 0))
        self._write("IDTR", (0, IDT, 64 * (16 if long else 8) - 1, 0))
        self._write("TR", (0x30, TSS, 0x67, 0x8B00))
        self._write("CR4", 0x40600 | (0x20 if long else 0))
        self._write("CS", 8)
        for name in ("SS", "DS", "ES", "FS", "GS"):
            self._write(name, 0x10)

    def _map(self) -> None:
        """RAM identity-mapped in 4 KB pages."""
        entries = [page << 12 | 0x67 for page in range(RAM_SIZE >> 12)]
        tables = PAGE_TABLES + 0x3000
        self.cpu.mem_write(PAGE_TABLES, struct.pack("<Q", PAGE_TABLES + 0x1000 | 0x67))
        self.cpu.mem_write(PAGE_TABLES + 0x1000, struct.pack("<Q", PAGE_TABLES + 0x2000 | 0x67))
        self.cpu.mem_write(PAGE_TABLES + 0x2000, struct.pack("<2Q", tables | 0x67, tables + 0x1000 | 0x67))
        self.cpu.mem_write(tables, struct.pack(f"<{len(entries)}Q", *entries))
        self._write("MSR", (EFER, 0xD01))
        self._write("CR3", PAGE_TABLES)
        self._write("CR0", 0x8001_0031)

    def run(self) -> int:
        """Run the instruction; RIP behind it."""
        before = self.cpu.mem_read(0, COMPARED)
        once = 0 if self.line.code[0] in REPEATS else 1
        undefined = False
        try:
            self.cpu.emu_start(CODE, CODE + len(self.line.code), count=once)
        except unicorn.UcError as error:
            undefined = error.errno == unicorn.UC_ERR_INSN_INVALID
        if undefined and self.vector is None:
            self.vector = UD
        after = self.cpu.mem_read(0, COMPARED)
        self.changed = {at: after[at] for at in range(COMPARED) if before[at] != after[at]} if before != after else {}
        return self.get("rip" if self.line.bits == 64 else "eip")

    def differences(self) -> list[str]:
        """Run the instruction, and tell what is not as the table says: name, what Unicorn has, what the table has."""
        line, rip = self.line, self.run()
        fault = line.after.get("fault")
        wanted = None if fault is None else int(fault.partition("@")[0].partition(":")[0])
        pairs: dict[str, tuple[int | None, int | None]] = {"vector": (self.vector, wanted)}
        if fault is None:
            names = GPR[: 16 if line.bits == 64 else 8]
            pairs |= {name: (self.get(name), line.number(name)) for name in names}
            flags = FLAGS & ~int(line.after.get("flags~", "0"), 16)
            pairs["flags"] = (int(self.cpu.reg_read(x86.UC_X86_REG_EFLAGS)) & flags, line.number("flags", "202") & flags)
            pairs["rip"] = (rip, int(line.after.get("rip", f"{CODE + len(line.code):x}"), 16))
            pairs |= {name: (self.get(name), line.number(name)) for name in SEGMENTS if name in line.after}
            pairs |= {f"[{at:x}]": (self.cpu.mem_read(at, 1)[0], byte) for at, byte in line.memory().items()}
            pairs |= {f"[{at:x}]": (byte, None) for at, byte in self.changed.items() if at not in line.memory()}
        return [f"{name}: {found} instead of {wanted}" for name, (found, wanted) in pairs.items() if found != wanted]


@cache
def _asked() -> dict[str, tuple[Line, list[str]]]:
    return {line.place: (line, Machine(line).differences()) for line in lines() if line.comparable}


@pytest.mark.parametrize("place", [line.place for line in lines() if line.comparable])
def test_unicorn_reads_the_manuals_as_the_tables_do(place: str) -> None:
    line, found = _asked()[place]
    assert not found or line.code.hex() in DIFFERENT


def test_every_excuse_is_needed() -> None:
    assert {line.code.hex() for line, found in _asked().values() if found} == set(DIFFERENT)
