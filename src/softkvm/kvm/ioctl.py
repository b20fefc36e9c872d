"""One ABI, two doors: each ioctl is one method, registered with its number and the layout of its argument.

Python callers call the method with typed structures and get OSError with Linux's errno. The binary door, `dispatch()`, finds the method
by number and converts: Linux 6.1 `virt/kvm/kvm_main.c` and `arch/x86/kvm/x86.c` (`*_ioctl()` switches), `include/uapi/asm-generic/ioctl.h`.
"""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Callable
from contextlib import AbstractContextManager
from ctypes import Structure
from functools import partial, wraps
from typing import Any, ClassVar, Concatenate, NamedTuple, ParamSpec, TypeVar

from softkvm.host import entry, mm, task
from softkvm.uapi import kvm as uapi

_P = ParamSpec("_P")
_R = TypeVar("_R")
_File = TypeVar("_File", bound="KvmFile")

MAX_MSRS = 255
"""Most MSRs in one call; more is E2BIG."""

Argument = int | memoryview
"""The third argument of ioctl(2): a value, or the caller's memory from the address on (writable, bytes)."""
Decode = Callable[[Argument], tuple[Any, ...]]
Encode = Callable[[Argument, Any], Any]


class Operation(NamedTuple):
    """How the binary door calls one ioctl method."""

    method: Callable[..., Any]
    decode: Decode
    encode: Encode


def ioctl(
    number: int, decode: Decode | None = None, encode: Encode | None = None
) -> Callable[[Callable[Concatenate[_File, _P], _R]], Callable[Concatenate[_File, _P], _R]]:
    """Make a method the ioctl `number`: both doors then cross `host/entry.py` and take the file's lock.

    `decode` turns the raw argument into the method's arguments, `encode` stores the method's result and gives the ioctl's return value.
    """

    def register(method: Callable[Concatenate[_File, _P], _R]) -> Callable[Concatenate[_File, _P], _R]:
        def locked(self: _File, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
            if self.closed:
                raise OSError(errno.EBADF, "the file is closed")
            with self.ioctl_lock:
                return method(self, *args, **kwargs)

        @wraps(method)
        def call(self: _File, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
            if kwargs:
                return entry.syscall(task.current(), number, (self, *args), partial(locked, **kwargs))
            return entry.syscall(task.current(), number, (self, *args), locked)

        call.operation = (number, Operation(call, decode or no_argument, encode or status))  # type: ignore[attr-defined]
        return call

    return register


class KvmFile:
    """Base of the things behind KVM's file descriptors; a subclass's ioctl methods end up in its `operations`."""

    operations: ClassVar[dict[int, Operation]]
    unknown_ioctl: ClassVar[int]
    """errno for a number that the file does not know."""
    ioctl_lock: AbstractContextManager[Any]
    closed = False

    def __init_subclass__(cls) -> None:
        cls.operations = dict(member.operation for member in vars(cls).values() if hasattr(member, "operation"))


def dispatch(file: KvmFile, number: int, argument: Argument = 0) -> int | KvmFile:
    """ioctl(2): call `number` (low 32 bits count) on `file`; returns its value (for a create call the new file), or raises OSError."""
    operation = file.operations.get(number & 0xFFFF_FFFF)
    if operation is None:
        raise OSError(file.unknown_ioctl, f"no ioctl {number & 0xFFFF_FFFF:#x} on this file")
    result: int | KvmFile = operation.encode(argument, operation.method(file, *operation.decode(argument)))
    return result


def _memory(argument: Argument, size: int) -> memoryview:
    """The first `size` bytes behind the argument; EFAULT if it is no address of so many."""
    if isinstance(argument, int) or len(argument) < size:
        raise OSError(errno.EFAULT, "bad ioctl argument")
    return argument[:size]


def no_argument(argument: Argument) -> tuple[()]:
    """The argument is not looked at (clients pass garbage)."""
    return ()


def zero(argument: Argument) -> tuple[()]:
    """The argument must be 0, else EINVAL."""
    if argument != 0:
        raise OSError(errno.EINVAL, "this ioctl takes no argument")
    return ()


def value(argument: Argument) -> tuple[int]:
    """The argument is a number."""
    if not isinstance(argument, int):
        raise OSError(errno.EINVAL, "this ioctl takes a number")
    return (argument,)


def pointed_u64(argument: Argument) -> tuple[int]:
    """The argument points at a u64."""
    return (int.from_bytes(_memory(argument, 8), "little"),)


def takes(layout: type[Structure]) -> Decode:
    """The argument points at a structure, which the method gets a copy of."""

    def decode(argument: Argument) -> tuple[Structure]:
        return (layout.from_buffer_copy(_memory(argument, ctypes.sizeof(layout))),)

    return decode


def takes_array(header: type[Structure], element: type[Structure], limit: int) -> Decode:
    """The argument points at a header whose first u32 counts the elements behind it; more than `limit` is E2BIG."""

    def decode(argument: Argument) -> tuple[list[Structure]]:
        start, size = ctypes.sizeof(header), ctypes.sizeof(element)
        count = int.from_bytes(_memory(argument, start)[:4], "little")
        if count > limit:
            raise OSError(errno.E2BIG, "too many elements")
        body = _memory(argument, start + count * size)
        return ([element.from_buffer_copy(body, start + index * size) for index in range(count)],)

    return decode


def fields(layout: type[Structure], *names: str) -> Decode:
    """The argument points at a structure of which the method takes these fields."""

    def decode(argument: Argument) -> tuple[Any, ...]:
        structure = layout.from_buffer_copy(_memory(argument, ctypes.sizeof(layout)))
        return tuple(getattr(structure, name) for name in names)

    return decode


def takes_signal_set(argument: Argument) -> tuple[set[int] | None]:
    """The argument is null, or points at a length (which must be 8) and a kernel signal set: bit n is signal n + 1."""
    if argument == 0:
        return (None,)
    head = _memory(argument, 12)
    if int.from_bytes(head[:4], "little") != 8:
        raise OSError(errno.EINVAL, "a signal set has 8 bytes")
    bits = int.from_bytes(head[4:], "little")
    return ({number + 1 for number in range(64) if bits >> number & 1},)


def _msr_entries(argument: Argument) -> list[uapi.MsrEntry]:
    entries: list[uapi.MsrEntry] = takes_array(uapi.Msrs, uapi.MsrEntry, MAX_MSRS)(argument)[0]
    return entries


def takes_msr_indices(argument: Argument) -> tuple[list[int]]:
    """The argument points at MSR entries of which the indices count."""
    return ([entry.index for entry in _msr_entries(argument)],)


def takes_msr_values(argument: Argument) -> tuple[list[tuple[int, int]]]:
    """The argument points at MSR entries to write."""
    return ([(entry.index, entry.data) for entry in _msr_entries(argument)],)


def returns_msr_values(argument: Argument, result: list[int]) -> int:
    """Store the values that were read into their entries; the ioctl's value is their number."""
    start, size = ctypes.sizeof(uapi.Msrs), ctypes.sizeof(uapi.MsrEntry)
    body = _memory(argument, start + len(result) * size)
    for index, data in enumerate(result):
        end = start + (index + 1) * size
        body[end - 8 : end] = data.to_bytes(8, "little")
    return len(result)


def status(argument: Argument, result: int | KvmFile | None) -> int | KvmFile:
    """The method's result is the ioctl's value: a number, a new file, or nothing, which is 0."""
    return 0 if result is None else result


def returns(argument: Argument, result: Structure) -> int:
    """Store the returned structure where the argument points."""
    data = bytes(result)
    _memory(argument, len(data))[:] = data
    return 0


def returns_first_u32(argument: Argument, result: int) -> int:
    """Store the returned number over the first u32 of the argument."""
    _memory(argument, 4)[:] = (result & 0xFFFF_FFFF).to_bytes(4, "little")
    return 0


def returns_bitmap(argument: Argument, result: bytes) -> int:
    """Store the returned bitmap where the `dirty_bitmap` of a DirtyLog points; OSError(EFAULT)."""
    log = uapi.DirtyLog.from_buffer_copy(_memory(argument, ctypes.sizeof(uapi.DirtyLog)))
    mm.copy_to_user(log.dirty_bitmap, result)
    return 0


def returns_array(header: type[Structure], element_size: int) -> Encode:
    """Store the returned elements behind the header, E2BIG if its count is smaller; set the count.

    KVM_GET_MSR_INDEX_LIST tells the right count with the error, the CPUID calls leave it alone: the former's header is the 4-byte one.
    """

    def encode(argument: Argument, result: list[Any]) -> int:
        start = ctypes.sizeof(header)
        head = _memory(argument, start)
        room = int.from_bytes(head[:4], "little")
        if room >= len(result) or start == 4:
            head[:4] = len(result).to_bytes(4, "little")
        if room < len(result):
            raise OSError(errno.E2BIG, "the caller's array is too small")
        data = b"".join(item.to_bytes(element_size, "little") if isinstance(item, int) else bytes(item) for item in result)
        _memory(argument, start + len(data))[start:] = data
        return 0

    return encode
