"""Arguments and results of system calls, from registers and the process's memory to values and text.

Source of truth: the types and names in the kernel's own metadata decide what an argument is; strace(1) decides how it looks. Text that the
kernel reads is there when the call begins, or, where its page was not yet, when the call ends; buffers that the kernel fills when it ends.
"""

from __future__ import annotations

import errno
import signal
from enum import Enum, auto

import msgspec

from softkvm.vmi.errors import Unreadable
from softkvm.vmi.linux.syscalls import Call, Parameter
from softkvm.vmi.paging import AddressSpace

_LONGEST_TEXT = 4096
LONGEST_SHOWN = 32
"""Bytes of a buffer that are kept, as strace's -s has it."""
_MOST_WORDS = 32
_ERRORS = 4095
_AT_FDCWD = -100
_BUFFER_NAMES = frozenset({"buf", "ubuf", "buff", "data", "_data", "value", "msg"})
_SIZE_NAMES = frozenset({"count", "size", "len", "buflen", "bufsiz", "nbytes", "msgsz"})
_HEXADECIMAL_NAMES = frozenset({"addr", "start", "brk", "newsp", "clone_flags", "tls", "arg2", "arg"})
_SIGNED_32 = ("int", "const int", "pid_t", "clockid_t", "const clockid_t", "key_t", "timer_t", "mqd_t", "key_serial_t", "__s32")
_INT_TYPES = {**dict.fromkeys(_SIGNED_32, 32), **dict.fromkeys(("long", "loff_t", "off_t"), 64)}
_UNSIGNED_32 = frozenset({"unsigned int", "unsigned", "u32", "__u32", "const __u32", "uid_t", "gid_t", "qid_t", "umode_t"})

# What the kernel returns inside itself while a signal interrupts a call (include/linux/errno.h).
_RESTARTS = {512: "ERESTARTSYS", 513: "ERESTARTNOINTR", 514: "ERESTARTNOHAND", 516: "ERESTART_RESTARTBLOCK"}

_OPEN_ACCESS = ("O_RDONLY", "O_WRONLY", "O_RDWR", "O_ACCMODE")
_OPEN_FLAGS = {
    0o100: "O_CREAT",
    0o200: "O_EXCL",
    0o400: "O_NOCTTY",
    0o1000: "O_TRUNC",
    0o2000: "O_APPEND",
    0o4000: "O_NONBLOCK",
    0o100000: "O_LARGEFILE",
    0o200000: "O_DIRECTORY",
    0o400000: "O_NOFOLLOW",
    0o2000000: "O_CLOEXEC",
    0o10000000: "O_PATH",
}
_PROTECTIONS = {1: "PROT_READ", 2: "PROT_WRITE", 4: "PROT_EXEC"}
_MAP_FLAGS = {1: "MAP_SHARED", 2: "MAP_PRIVATE", 0x10: "MAP_FIXED", 0x20: "MAP_ANONYMOUS", 0x800: "MAP_DENYWRITE", 0x20000: "MAP_STACK"}


class Kind(Enum):
    """What an argument is."""

    NUMBER = auto()
    UNSIGNED = auto()
    HEXADECIMAL = auto()
    OCTAL = auto()
    DIRECTORY = auto()
    SIGNAL = auto()
    OPEN_FLAGS = auto()
    PROTECTION = auto()
    MAP_FLAGS = auto()
    POINTER = auto()
    TEXT = auto()
    INPUT = auto()
    OUTPUT = auto()
    WORDS = auto()


class Argument(msgspec.Struct, frozen=True):
    """An argument: its name, its value as the call has it, how it looks, and the memory it points to as far as that was read."""

    name: str
    value: int
    shown: str
    data: bytes | None = None


def classify(call: Call, position: int) -> Kind:
    """What the argument at `position` of a call is."""
    parameter = call.parameters[position]
    named = _BY_NAME.get((call.name, parameter.name)) or _BY_NAME.get(("", parameter.name))
    if named is not None and "*" not in parameter.type:
        return named
    if parameter.type == "const char *const *":
        return Kind.WORDS
    if "*" in parameter.type:
        return _classify_pointer(call, position, parameter)
    if parameter.type == "umode_t":
        return Kind.OCTAL
    if parameter.type in _INT_TYPES:
        return Kind.NUMBER
    return Kind.HEXADECIMAL if parameter.name in _HEXADECIMAL_NAMES else Kind.UNSIGNED


_BY_NAME = {
    ("", "dfd"): Kind.DIRECTORY,
    ("", "sig"): Kind.SIGNAL,
    ("open", "flags"): Kind.OPEN_FLAGS,
    ("openat", "flags"): Kind.OPEN_FLAGS,
    ("", "prot"): Kind.PROTECTION,
    ("mmap", "flags"): Kind.MAP_FLAGS,
    ("mmap", "fd"): Kind.NUMBER,
    ("mmap", "off"): Kind.HEXADECIMAL,
}


def _classify_pointer(call: Call, position: int, parameter: Parameter) -> Kind:
    sized = position + 1 < len(call.parameters) and call.parameters[position + 1].name in _SIZE_NAMES
    if parameter.type == "const char *":
        return Kind.INPUT if sized and parameter.name in _BUFFER_NAMES else Kind.TEXT
    if parameter.type == "char *":
        return Kind.OUTPUT if sized and parameter.name in _BUFFER_NAMES else Kind.TEXT
    return Kind.POINTER


def decode(call: Call, position: int, value: int, space: AddressSpace, following: int) -> Argument:
    """The argument as it is when the call begins; `following` is the value of the next one, which may be its size."""
    kind, name = classify(call, position), call.parameters[position].name
    number = _signed(value, call.parameters[position].type)
    if kind is Kind.TEXT:
        return text(name, value, space)
    if kind is Kind.INPUT:
        return buffer(name, value, following, space)
    if kind is Kind.WORDS:
        return _words(name, value, space)
    if kind in (Kind.POINTER, Kind.OUTPUT):
        return Argument(name, value, hex(value) if value else "NULL")
    return Argument(name, number, _show(kind, number))


def text(name: str, address: int, space: AddressSpace) -> Argument:
    """A text in the process's memory; its address where it cannot be read, or not yet."""
    if not address:
        return Argument(name, 0, "NULL")
    data = space.read_available(address, _LONGEST_TEXT)
    found, end, _ = data.partition(b"\0")
    return Argument(name, address, quote(found), found) if end else Argument(name, address, hex(address))


def buffer(name: str, address: int, size: int, space: AddressSpace) -> Argument:
    """The beginning of a buffer in the process's memory."""
    if not address:
        return Argument(name, 0, "NULL")
    try:
        data = space.read(address, min(size, LONGEST_SHOWN))
    except Unreadable:
        return Argument(name, address, hex(address))
    return Argument(name, address, quote(data) + ("..." if size > len(data) else ""), data)


def _words(name: str, address: int, space: AddressSpace) -> Argument:
    words: list[str] = []
    try:
        for position in range(_MOST_WORDS if address else 0):
            pointer = int.from_bytes(space.read(address + 8 * position, 8), "little")
            if not pointer:
                break
            words.append(text("", pointer, space).shown)
    except Unreadable:
        return Argument(name, address, hex(address))
    return Argument(name, address, f"[{', '.join(words)}{', ...' if len(words) == _MOST_WORDS else ''}]" if address else "NULL")


def quote(data: bytes) -> str:
    """Bytes between quotes, with C's escapes; one in octal has three digits where a digit follows."""
    return '"' + "".join(_quote_byte(byte, data[at + 1 : at + 2].isdigit()) for at, byte in enumerate(data)) + '"'


def _quote_byte(byte: int, digit_follows: bool) -> str:
    if (escape := _ESCAPES.get(byte)) is not None:
        return escape
    if 32 <= byte < 127:
        return chr(byte)
    return f"\\{byte:03o}" if digit_follows else f"\\{byte:o}"


_ESCAPES = {ord("\n"): "\\n", ord("\t"): "\\t", ord("\r"): "\\r", ord('"'): '\\"', ord("\\"): "\\\\"}


def _signed(value: int, kind: str) -> int:
    bits = _INT_TYPES.get(kind)
    if bits is None:
        return value & 0xFFFF_FFFF if kind in _UNSIGNED_32 else value
    value &= (1 << bits) - 1
    return value - (value >> (bits - 1) << bits)


def _show(kind: Kind, value: int) -> str:
    if kind is Kind.DIRECTORY and value == _AT_FDCWD:
        return "AT_FDCWD"
    if kind is Kind.SIGNAL and value in signal.Signals.__members__.values():
        return signal.Signals(value).name
    if kind is Kind.OPEN_FLAGS:
        return "|".join([_OPEN_ACCESS[value & 3], *_flags(value & ~3, _OPEN_FLAGS)])
    if kind is Kind.PROTECTION:
        return "|".join(_flags(value, _PROTECTIONS)) or "PROT_NONE"
    if kind is Kind.MAP_FLAGS:
        return "|".join(_flags(value, _MAP_FLAGS)) or "0"
    if kind is Kind.HEXADECIMAL:
        return hex(value)
    if kind is Kind.OCTAL:
        return f"0{value:o}" if value else "0"
    return str(value - (1 << 32) if kind is Kind.NUMBER and value >> 31 == 1 else value)


def _flags(value: int, names: dict[int, str]) -> list[str]:
    shown = [name for bit, name in names.items() if value & bit]
    rest = value & ~sum(names)
    return [*shown, hex(rest)] if rest else shown


def show_result(value: int, *, address: bool) -> str:
    """The result of a call as strace shows it: a number, an address, or -1 with the error's name."""
    signed = value - (value >> 63 << 64)
    if -_ERRORS <= signed < 0:
        if (name := _RESTARTS.get(-signed)) is not None:
            return f"? {name}"
        return f"-1 {errno.errorcode.get(-signed, f'errno {-signed}')}"
    return hex(value) if address else str(signed)
