"""One ABI, two doors: each ioctl is one method, registered with its number and the layout of its argument.

Python callers call the method with typed structures and get OSError with Linux's errno. The binary door, `dispatch()`, finds the method
by number and converts: Linux 6.1 `virt/kvm/kvm_main.c` and `arch/x86/kvm/x86.c` (`*_ioctl()` switches), `include/uapi/asm-generic/ioctl.h`.
"""

from __future__ import annotations

import ctypes
import errno
import select
from collections.abc import Callable
from contextlib import AbstractContextManager
from ctypes import Structure
from functools import partial, wraps
from typing import Any, ClassVar, Concatenate, NamedTuple, NoReturn, ParamSpec, TypeVar

from softkvm.host import mm, task
from softkvm.host.call import SYS_IOCTL, SYS_MMAP, SYS_NAMES, SYS_POLL, SYS_READ
from softkvm.host.process import Process
from softkvm.uapi import kvm as uapi

_P = ParamSpec("_P")
_R = TypeVar("_R")
_File = TypeVar("_File", bound="KvmFile")

_U32 = 0xFFFF_FFFF
_DEFAULT_POLLMASK = select.POLLIN | select.POLLOUT | select.POLLRDNORM | select.POLLWRNORM
MAX_MSRS = 255
"""Most MSRs in one call; more is E2BIG."""
MAX_PMU_EVENTS = 300
"""Most events of a PMU event filter (`KVM_PMU_EVENT_FILTER_MAX_EVENTS`); more is E2BIG."""

Argument = int | memoryview
"""The third argument of ioctl(2): a value, or the caller's memory from the address on (writable, bytes)."""
Decode = Callable[[Argument], tuple[Any, ...]]
Encode = Callable[[Argument, Any], Any]


class Operation(NamedTuple):
    """How the binary door calls one ioctl method; `locked` is what the call itself does, behind the crossing."""

    method: Callable[..., Any]
    locked: Callable[..., Any]
    decode: Decode
    encode: Encode
    before: Callable[..., object] | None


def ioctl(
    number: int, decode: Decode | None = None, encode: Encode | None = None, before: Callable[[Any], object] | None = None
) -> Callable[[Callable[Concatenate[_File, _P], _R]], Callable[Concatenate[_File, _P], _R]]:
    """Make a method the ioctl `number`: both doors then cross `host/entry.py` and take the file's lock.

    `decode` turns the raw argument into the method's arguments, `encode` stores the method's result and gives the ioctl's return value.
    `before` raises what Linux refuses the file before it looks at the argument.
    """

    def register(method: Callable[Concatenate[_File, _P], _R]) -> Callable[Concatenate[_File, _P], _R]:
        door = _door_without_arguments if decode in (None, no_argument, zero) else _door
        bare_call, locked = door(number, method)
        call = wraps(method)(bare_call)
        locked.__wrapped__ = method  # type: ignore[attr-defined] # filters look parameters up by name
        call.operation = (number, Operation(call, locked, decode or no_argument, encode or status, before))  # type: ignore[attr-defined]
        return call

    return register


def _door(number: int, method: Callable[..., _R]) -> tuple[Callable[..., _R], Callable[..., _R]]:
    """The method behind a crossing, and what it does there."""

    def locked(file: KvmFile, /, *args: Any, **kwargs: Any) -> _R:
        if file.closed:
            raise OSError(errno.EBADF, "the file is closed")
        with file.ioctl_lock:
            return method(file, *args, **kwargs)

    def call(file: KvmFile, /, *args: Any, **kwargs: Any) -> _R:
        handler = partial(locked, **kwargs) if kwargs else locked
        result: _R = file.process.cross(task.current(), file, SYS_IOCTL, number, args, handler)
        return result

    return call, locked


def _door_without_arguments(number: int, method: Callable[..., _R]) -> tuple[Callable[..., _R], Callable[..., _R]]:
    """The same at half the price, which KVM_RUN pays ten thousand times a second."""

    def locked(file: KvmFile) -> _R:
        if file.closed:
            raise OSError(errno.EBADF, "the file is closed")
        with file.ioctl_lock:
            return method(file)

    def call(file: KvmFile) -> _R:
        result: _R = file.process.cross(task.current(), file, SYS_IOCTL, number, (), locked)
        return result

    return call, locked


class KvmFile:
    """Base of the things behind KVM's file descriptors; a subclass's ioctl methods end up in its `operations`."""

    operations: ClassVar[dict[int, Operation]] = {}
    unknown_ioctl: ClassVar[int]
    """errno for a number that the file does not know."""
    fd_class: ClassVar[str]
    """What filters and logs call such a file."""
    ioctl_lock: AbstractContextManager[Any]
    closed = False
    vm_id: int | None = None
    """Number of the VM that the file belongs to."""

    def __init__(self, process: Process) -> None:
        """A new descriptor of `process`."""
        self.process = process
        self.fd = process.install(self)

    def __init_subclass__(cls) -> None:
        members = (member for base in reversed(cls.__mro__) for member in vars(base).values())
        cls.operations = dict(member.operation for member in members if hasattr(member, "operation"))

    # --- The other system calls -----------------------------------------------------------------------------------------------------

    def mmap(self, length: int, offset: int = 0) -> memoryview:
        """mmap(2); OSError ENODEV where there is nothing to map, EINVAL for a range that is not there."""
        result: memoryview = self.process.cross(task.current(), self, SYS_MMAP, 0, (length, offset), type(self)._mmap)
        return result

    def _mmap(self, length: int, offset: int) -> memoryview:
        raise OSError(errno.ENODEV, "the file cannot be mapped")

    def read(self, length: int) -> bytes:
        """read(2): OSError(EINVAL) but for files of statistics, as no other is one to read."""
        result: bytes = self.process.cross(task.current(), self, SYS_READ, 0, (length,), type(self)._read)
        return result

    def _read(self, length: int) -> bytes:
        raise OSError(errno.EINVAL, "the file cannot be read")

    def poll(self, events: int) -> int:
        """poll(2): which of the `events` are there; always POLLIN, POLLOUT and their like, as for any file without poll of its own."""
        result: int = self.process.cross(task.current(), self, SYS_POLL, 0, (events,), KvmFile._poll)
        return result

    def _poll(self, events: int) -> int:
        return events & _DEFAULT_POLLMASK

    def _system_calls(self) -> dict[int, Callable[..., Any]]:
        return {SYS_MMAP: type(self)._mmap, SYS_READ: type(self)._read, SYS_POLL: KvmFile._poll}

    # --- What the host asks of a file -----------------------------------------------------------------------------------------------

    def syscall_handler(self, nr: int, command: int) -> Callable[..., Any]:
        """What does the call `nr`, behind the crossing; OSError ENOSYS, or for an ioctl that the file does not know its errno."""
        if nr == SYS_IOCTL:
            operation = self.operations.get(command & _U32)
            if operation is None:
                raise OSError(self.unknown_ioctl, f"no ioctl {command & _U32:#x} on this file")
            return operation.locked
        handlers = self._system_calls()
        if nr not in handlers:
            raise OSError(errno.ENOSYS, f"no system call {nr}")
        return handlers[nr]

    def syscall_name(self, nr: int, command: int) -> str:
        """`KVM_RUN`, `mmap`; a number for what the file does not know."""
        if nr != SYS_IOCTL:
            return SYS_NAMES.get(nr, str(nr))
        operation = self.operations.get(command & _U32)
        return f"{command & _U32:#x}" if operation is None else "KVM_" + operation.method.__name__.upper()

    def killed(self) -> None:
        """The process was killed."""


def dispatch(file: KvmFile, number: int, argument: Argument = 0) -> int | KvmFile:
    """ioctl(2): call `number` (low 32 bits count) on `file`; returns its value (for a create call the new file), or raises OSError."""
    operation = file.operations.get(number & _U32)
    if file.closed:
        return _refuse(file, number, argument, OSError(errno.EBADF, "the file is closed"))
    if operation is None:
        return _refuse(file, number, argument, OSError(file.unknown_ioctl, f"no ioctl {number & _U32:#x} on this file"))
    try:
        if operation.before is not None:
            operation.before(file)
        arguments = operation.decode(argument)
    except OSError as error:
        return _refuse(file, number, argument, error)
    result: int | KvmFile = operation.encode(argument, operation.method(file, *arguments))
    return result


def _refuse(file: KvmFile, number: int, argument: Argument, error: OSError) -> int | KvmFile:
    """A call that fails before it reaches a method crosses like any other: filters and logs see it."""

    def refuse(file: KvmFile, argument: int) -> NoReturn:
        raise error

    value = argument if isinstance(argument, int) else 0
    result: int | KvmFile = file.process.cross(task.current(), file, SYS_IOCTL, number & _U32, (value,), refuse)
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


def takes_pmu_event_filter(argument: Argument) -> tuple[uapi.PmuEventFilter, list[int]]:
    """The argument points at a PMU event filter, whose second u32 counts the events behind it; more than its limit is E2BIG."""
    start = ctypes.sizeof(uapi.PmuEventFilter)
    header = uapi.PmuEventFilter.from_buffer_copy(_memory(argument, start))
    if header.nevents > MAX_PMU_EVENTS:
        raise OSError(errno.E2BIG, "too many events")
    body = _memory(argument, start + 8 * header.nevents)
    return header, list(body[start:].cast("Q"))


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


def returns_u64(argument: Argument, result: int) -> int:
    """Store the returned number where the argument points."""
    _memory(argument, 8)[:] = result.to_bytes(8, "little")
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
