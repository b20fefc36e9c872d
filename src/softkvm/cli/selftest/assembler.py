"""An assembler for the few instructions of the self-test guest, in 16-, 32- and 64-bit code.

Source of truth: SDM vol. 2, appendix B. Registers are the 32-bit ones in every mode (16-bit code gets the operand-size prefix), and
memory operands are absolute addresses below 4 GiB, so that one encoding of each instruction serves all modes.
"""

from __future__ import annotations

from collections.abc import Callable

REGISTERS = ("eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi")
SEGMENTS = ("es", "cs", "ss", "ds", "fs", "gs")

_PLAIN = {
    "cld": "fc",
    "cli": "fa",
    "cpuid": "0f a2",
    "dec ebp": "ff cd",
    "hlt": "f4",
    "in al, dx": "ec",
    "iretq": "48 cf",
    "lodsb": "ac",
    "lretq": "48 cb",
    "mov eax, [rbx]": "8b 03",
    "out dx, al": "ee",
    "pop rax": "58",
    "rdmsr": "0f 32",
    "rep movsb": "f3 a4",
    "rep stosd": "f3 ab",
    "ret": "c3",
    "sti": "fb",
    "test al, al": "84 c0",
    "wrmsr": "0f 30",
}
_CONDITIONS = {"z": 4, "nz": 5}
_GROUP = {"or": 1, "and": 4, "cmp": 7}  # the reg field of opcode 81

_OPERAND_SIZE = b"\x66"
# ModRM.rm = 100 and SIB = 25h: a 32-bit absolute address in 32-bit code and, sign-extended, in 64-bit code.
_RM_ABSOLUTE, _SIB_ABSOLUTE = 4, 0x25


class Assembler:
    """Code that will run at `base`; `bits` is the mode of what is emitted next."""

    def __init__(self, base: int, bits: int) -> None:
        self.base = base
        self.bits = bits
        self._code = bytearray()
        self._labels: dict[str, int] = {}
        self._fixups: list[Callable[[], None]] = []

    def finish(self) -> bytes:
        """The code with all references to labels filled in; raises KeyError for a label that does not exist."""
        for fixup in self._fixups:
            fixup()
        return bytes(self._code)

    def address(self, label: str) -> int:
        """Where `label` will be at run time."""
        return self.base + self._labels[label]

    def label(self, name: str) -> None:
        """Name the next byte."""
        self._labels[name] = len(self._code)

    def org(self, offset: int) -> None:
        """Continue at `offset`, with zeros in between."""
        self._code += bytes(offset - len(self._code))

    def data(self, data: bytes) -> None:
        """Emit bytes as they are."""
        self._code += data

    def do(self, *instructions: str) -> None:
        """Instructions without operands of their own."""
        for instruction in instructions:
            self._code += bytes.fromhex(_PLAIN[instruction])

    def mov(self, register: str, value: int | str) -> None:
        """Load a number or the address of a label."""
        self._code += self._wide() + bytes([0xB8 + REGISTERS.index(register)])
        self._absolute(value)

    def load(self, register: str, address: int | str) -> None:
        """Load from memory (32- and 64-bit code)."""
        self._memory(0x8B, REGISTERS.index(register), address)

    def store(self, address: int | str, value: str | int) -> None:
        """Store a register or a number to memory (32- and 64-bit code)."""
        if isinstance(value, str):
            self._memory(0x89, REGISTERS.index(value), address)
        else:
            self._memory(0xC7, 0, address)
            self._absolute(value)

    def arithmetic(self, operation: str, register: str, value: int) -> None:
        """`or`, `and` or `cmp` of a register with a number."""
        self._code += self._wide() + bytes([0x81, 0xC0 | _GROUP[operation] << 3 | REGISTERS.index(register)])
        self._absolute(value)

    def compare(self, address: int | str, value: int) -> None:
        """`cmp` of memory with a number (32- and 64-bit code)."""
        self._memory(0x81, _GROUP["cmp"], address)
        self._absolute(value)

    def mov_to_cr(self, number: int, register: str = "eax") -> None:
        """Write a control register."""
        self._code += bytes([0x0F, 0x22, 0xC0 | number << 3 | REGISTERS.index(register)])

    def mov_from_cr(self, number: int, register: str = "eax") -> None:
        """Read a control register."""
        self._code += bytes([0x0F, 0x20, 0xC0 | number << 3 | REGISTERS.index(register)])

    def load_segments(self, *names: str) -> None:
        """Load segment registers from EAX."""
        for name in names:
            self._code += bytes([0x8E, 0xC0 | SEGMENTS.index(name) << 3])

    def load_table(self, instruction: str, address: int | str) -> None:
        """`lgdt` or `lidt` of a pseudo-descriptor in memory; in 16-bit code with a 32-bit base."""
        extension = {"lgdt": 2, "lidt": 3}[instruction]
        if self.bits == 16:
            self._code += _OPERAND_SIZE + bytes([0x0F, 0x01, extension << 3 | 6])
            self._absolute(address, size=2)
        else:
            self._memory(0x01, extension, address, escape=b"\x0f")

    def invlpg(self, address: int) -> None:
        """Drop the TLB entry of an address (32- and 64-bit code)."""
        self._memory(0x01, 7, address, escape=b"\x0f")

    def push(self, value: int | str) -> None:
        """Push a number or the address of a label (64-bit code)."""
        self._code.append(0x68)
        self._absolute(value)

    def call(self, label: str) -> None:
        """Near call."""
        self._code.append(0xE8)
        self._relative(label, 2 if self.bits == 16 else 4)

    def jump(self, label: str, condition: str | None = None) -> None:
        """Jump, under `condition` (`z` or `nz`) if given; 128 bytes far at most in 16-bit code."""
        if self.bits == 16:
            self._code.append(0x70 | _CONDITIONS[condition] if condition else 0xEB)
            self._relative(label, 1)
        else:
            self._code += bytes([0x0F, 0x80 | _CONDITIONS[condition]]) if condition else b"\xe9"
            self._relative(label, 4)

    def far_jump(self, selector: int, target: int | str, size: int = 4) -> None:
        """Jump to another code segment with an offset of `size` bytes (16- and 32-bit code)."""
        self._code += (self._wide() if size == 4 else b"") + b"\xea"
        self._absolute(target, size)
        self._code += selector.to_bytes(2, "little")

    def _wide(self) -> bytes:
        return _OPERAND_SIZE if self.bits == 16 else b""

    def _memory(self, opcode: int, field: int, address: int | str, escape: bytes = b"") -> None:
        self._code += escape + bytes([opcode, field << 3 | _RM_ABSOLUTE, _SIB_ABSOLUTE])
        self._absolute(address)

    def _absolute(self, value: int | str, size: int = 4) -> None:
        if isinstance(value, int):
            self._code += value.to_bytes(size, "little")
        else:
            self._later(size, lambda _: self.address(value))

    def _relative(self, label: str, size: int) -> None:
        self._later(size, lambda end: self._labels[label] - end)

    def _later(self, size: int, value: Callable[[int], int]) -> None:
        """Reserve `size` bytes for `value`, which gets the offset behind them, once all labels are known."""
        start = len(self._code)
        self._code += bytes(size)

        def fill() -> None:
            number = value(start + size)
            self._code[start : start + size] = number.to_bytes(size, "little", signed=number < 0 or size == 1)

        self._fixups.append(fill)
