"""`softkvm audit replay`: every call that a VMM made of KVM, made again on a new KVM, with the results compared to those of the log.

What a log does not have is guest memory, so KVM_RUN is left out, and so is what maps, reads or waits. User addresses are those of memory
that the replay makes for them: a slot's as large as the slot, any other a few pages of zeros. Eventfds are new ones.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from ctypes import Structure
from inspect import signature
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import click
import msgspec

from softkvm import kvm, silicon
from softkvm.cli import output, status
from softkvm.cli.errors import CliError
from softkvm.host import audit, audit_data
from softkvm.uapi import kvm as uapi
from softkvm.vmm import config
from softkvm.vmm.errors import ConfigError

_SCRATCH = 64 << 10
_LARGEST_SLOT = 1 << 40
_NOT_REPLAYED = frozenset({"KVM_RUN"})
_POINTERS = {"DirtyLog": "dirty_bitmap", "ClearDirtyLog": "dirty_bitmap", "DeviceAttr": "addr", "MsrFilterRange": "bitmap"}
_DESCRIPTORS = ("fd", "resamplefd")


class ReplayError(Exception):
    """The log cannot be replayed; the message is one sentence."""


class Difference(msgspec.Struct, frozen=True):
    """A call that did not give what the log says; results as Linux returns them."""

    seq: int
    call: str
    recorded: int
    replayed: int


class Report(msgspec.Struct, frozen=True):
    """What a replay has found."""

    calls: int
    """Made again."""
    skipped: int
    """Left out: runs of the guest, calls on files that a skipped or a differing call would have made, calls that a filter stopped."""
    differences: list[Difference]


def load(path: str | Path) -> list[audit.Record]:
    """The records of a log in the order in which the calls entered; ReplayError."""
    try:
        lines = Path(path).read_bytes().splitlines()
        records = [msgspec.json.decode(line, type=audit.Record) for line in lines]
    except OSError as error:
        raise ReplayError(f"the audit log {path} cannot be read: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise ReplayError(f"{path} is no audit log: {error}") from error
    return sorted(records, key=lambda record: record.seq)


class Replay:
    """A new KVM and the files of the recorded VMM on it; a context manager that closes them."""

    def __init__(self, system: kvm.System) -> None:
        """Nothing is open but `system`, which stands for the VMM's first /dev/kvm."""
        self._system = system
        self._files: dict[int, Any] = {}
        self._memory: dict[int, Any] = {}
        self._eventfds: dict[int, int] = {}

    def __enter__(self) -> Replay:
        return self

    def __exit__(self, *exception: object) -> None:
        for file in self._files.values():
            if isinstance(file, kvm.Vm):
                file.close()
        for fd in self._eventfds.values():
            os.close(fd)

    def run(self, records: list[audit.Record]) -> Report:
        """Make the calls; ReplayError for a record that no VMM can have made."""
        calls, skipped, differences = 0, 0, []
        for record in records:
            file = self._file(record)
            if file is None or record.result is None or record.syscall != "ioctl" or record.call in _NOT_REPLAYED:
                skipped += 1
                continue
            calls += 1
            replayed = self._make(record, file)
            if replayed != record.result:
                differences.append(Difference(record.seq, record.call, record.result, replayed))
        return Report(calls, skipped, differences)

    def _file(self, record: audit.Record) -> Any:
        if record.file == "system":
            return self._system
        return self._files.get(record.fd)

    def _make(self, record: audit.Record, file: Any) -> int:
        """The call's result as Linux returns it; a new file counts as the descriptor that the log says, and is known by it later."""
        method = _methods(file).get(record.call)
        if method is None:
            return -int(file.unknown_ioctl)
        try:
            arguments = [self._own(audit_data.decode(argument)) for argument in record.data or record.args]
        except (ValueError, TypeError) as error:
            raise ReplayError(f"line {record.seq} has bad arguments: {error}") from error
        if not _accepts(method, arguments):
            raise ReplayError(f"line {record.seq} has not the arguments of {record.call}")
        try:
            result = method(*arguments)
        except OSError as error:
            return -(error.errno or errno.EIO)
        if isinstance(result, int):
            return result
        if isinstance(result, kvm.Vm | kvm.Vcpu):
            self._files[record.result or 0] = result
            return record.result or 0
        return 0

    def _own(self, argument: Any) -> Any:
        """The argument with addresses and descriptors that exist here."""
        for structure in _structures(argument):
            if isinstance(structure, uapi.UserspaceMemoryRegion):
                structure.userspace_addr = self._address(structure.userspace_addr, structure.memory_size)
            pointer = _POINTERS.get(type(structure).__name__)
            if pointer is not None:
                setattr(structure, pointer, self._address(getattr(structure, pointer), _SCRATCH))
            for name in _DESCRIPTORS if isinstance(structure, uapi.Irqfd | uapi.Ioeventfd) else ():
                if hasattr(structure, name):
                    setattr(structure, name, self._eventfd(getattr(structure, name)))
        return argument

    def _address(self, recorded: int, size: int) -> int:
        """Memory of ours for an address of the VMM's; what is no whole number of pages is passed on as it was, to be refused again."""
        if size <= 0 or size % 4096 or recorded % 4096 or size > _LARGEST_SLOT:
            return recorded
        memory = self._memory.get(recorded)
        if memory is None or memory.size < size:
            try:
                memory = self._memory[recorded] = kvm.allocate_memory(size)
            except OSError as error:
                raise ReplayError(f"there is no memory for a slot of {size >> 20} MB") from error
        return int(memory.address)

    def _eventfd(self, recorded: int) -> int:
        if recorded not in self._eventfds:
            self._eventfds[recorded] = os.eventfd(0, os.EFD_NONBLOCK)
        return self._eventfds[recorded]


def _methods(file: Any) -> dict[str, Any]:
    """Ioctls of a file by the names that logs have for them, bound to it."""
    return {f"KVM_{operation.method.__name__.upper()}": operation.method.__get__(file) for operation in file.operations.values()}


def _accepts(method: Any, arguments: list[Any]) -> bool:
    """Whether the arguments are what an ioctl method is declared to take."""
    hints = get_type_hints(method)
    parameters = list(signature(method).parameters.values())
    required = [one for one in parameters if one.default is one.empty]
    if not len(required) <= len(arguments) <= len(parameters):
        return False
    return all(_fits(argument, hints[one.name]) for argument, one in zip(arguments, parameters, strict=False))


def _fits(argument: Any, hint: Any) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if origin is None:
        return isinstance(argument, hint)
    if origin in (Union, UnionType):
        return any(_fits(argument, one) for one in inner)
    if origin is tuple:
        return isinstance(argument, list) and len(argument) == len(inner) and all(map(_fits, argument, inner))
    if isinstance(argument, dict):
        keys, values = inner if issubclass(dict, origin) and len(inner) == 2 else (NoneType, NoneType)
        return all(_fits(key, keys) and _fits(value, values) for key, value in argument.items())
    return isinstance(argument, list | set) and len(inner) == 1 and all(_fits(item, inner[0]) for item in argument)


def _structures(argument: Any) -> Iterator[Structure]:
    for item in argument if isinstance(argument, list) else (argument,):
        if isinstance(item, Structure):
            yield item
            if isinstance(item, uapi.MsrFilter):
                yield from item.ranges


# --- The command -------------------------------------------------------------------------------------------------------------------


def run(file: Path, cpu: str, parameters: Sequence[str], json: bool) -> int:
    """Replay `file`; exit status 1 if a result differs. CliError, one sentence, for what cannot be replayed."""
    try:
        name, features = config.parse_cpu(cpu)
        system = kvm.System(silicon.Model(name, features), config.parse_parameters(parameters))
        with Replay(system) as replay:
            report = replay.run(load(file))
    except (ConfigError, ReplayError, ValueError) as error:
        raise CliError(str(error)) from error
    if json:
        click.echo(msgspec.json.encode(report))
    else:
        rows = [(str(one.seq), one.call, str(one.recorded), str(one.replayed)) for one in report.differences]
        if rows:
            output.table("Calls with another result", ("line", "call", "recorded", "now"), rows, on_stdout=True)
        click.echo(f"{report.calls} calls made again, {len(rows)} with another result; {report.skipped} left out")
    return 1 if report.differences else status.SUCCESS
