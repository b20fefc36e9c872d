"""The file of a snapshot: a heading, the record of the machine's state, and memory without the pages that are all zero.

    "softkvm snapshot 1\\n"                 the format and its version
    u64                                     length of the record
    MessagePack array [state, runs]         `MachineState`, and a list of (guest-physical address, bytes) of what memory holds
    zeros to the next multiple of 4096
    the runs, one after the other

Nothing is believed of a file before it is checked; whatever is wrong is one sentence.
"""

from __future__ import annotations

import os
import struct
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Annotated

import msgspec
from msgspec import Meta

from softkvm.vmm.errors import StateError
from softkvm.vmm.memory import Block, GuestMemory
from softkvm.vmm.snapshot.records import MachineState

_HEADING = b"softkvm snapshot 1\n"
_LENGTH = struct.Struct("<Q")
_LONGEST_RECORD = 1 << 28
_PAGE = 4096
_CHUNK = 256 * _PAGE
_ZERO_PAGE, _ZERO_CHUNK = bytes(_PAGE), bytes(_CHUNK)

_Run = tuple[Annotated[int, Meta(ge=0, lt=1 << 62)], Annotated[int, Meta(ge=_PAGE, lt=1 << 62)]]
_Content = tuple[MachineState, list[_Run]]


def write(path: Path, state: MachineState, memory: GuestMemory) -> int:
    """Write a snapshot, whole or not at all, and return its size in bytes; OSError."""
    runs = [run for block in memory.blocks for run in _used(block)]
    record = msgspec.msgpack.encode((state, runs))
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            file.write(_HEADING + _LENGTH.pack(len(record)) + record)
            file.write(bytes(-file.tell() % _PAGE))
            for address, size in runs:
                file.write(memory.view(address, size))
            size = file.tell()
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(file.name)
            raise
    return size


def _used(block: Block) -> Iterator[_Run]:
    """What a block holds, in runs of pages that are not all zero."""
    start: int | None = None
    for offset, is_used in _pages(block):
        if is_used and start is None:
            start = offset
        elif not is_used and start is not None:
            yield block.base + start, offset - start
            start = None
    if start is not None:
        yield block.base + start, len(block.view) - start


def _pages(block: Block) -> Iterator[tuple[int, bool]]:
    """Offsets at which it changes, or may change, whether pages hold something. Memory that was never touched is not touched here."""
    end = len(block.view)
    offset = 0
    while offset < end:
        data = _seek(block.host.fd, offset, os.SEEK_DATA, end)
        if data > offset:
            yield offset, False
        hole = _seek(block.host.fd, data, os.SEEK_HOLE, end)
        for chunk in range(data, hole, _CHUNK):
            yield from _pages_of_chunk(block, chunk, min(chunk + _CHUNK, hole))
        offset = max(hole, data)


def _pages_of_chunk(block: Block, start: int, end: int) -> Iterator[tuple[int, bool]]:
    content = bytes(block.view[start:end])
    if content == _ZERO_CHUNK[: len(content)]:
        yield start, False
        return
    for page in range(0, len(content), _PAGE):
        yield start + page, content[page : page + _PAGE] != _ZERO_PAGE


def _seek(descriptor: int, offset: int, whence: int, end: int) -> int:
    """lseek(2) for the next data or hole, `end` where there is none."""
    try:
        return min(os.lseek(descriptor, offset, whence), end)
    except OSError:  # ENXIO: a hole up to the end
        return end


class SnapshotFile:
    """A snapshot that was opened: its state, and its memory still in the file; a context manager."""

    def __init__(self, path: Path) -> None:
        """Open and check; StateError, one sentence, for whatever is wrong with the file."""
        self._path = path
        try:
            self._file = path.open("rb")
        except OSError as error:
            raise StateError(f"the snapshot {path} cannot be read: {error.strerror}") from error
        try:
            self.state, self._runs = self._read_record()
        except BaseException:
            self._file.close()
            raise

    def _read_record(self) -> _Content:
        if self._take(len(_HEADING)) != _HEADING:
            raise StateError(f"{self._path} is not a snapshot of this version of softkvm")
        (length,) = _LENGTH.unpack(self._take(_LENGTH.size))
        if length > _LONGEST_RECORD:
            raise self._damaged("its record is too long")
        try:
            content: _Content = msgspec.msgpack.decode(self._take(length), type=_Content)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise self._damaged(str(error)) from error
        start = -(-self._file.tell() // _PAGE) * _PAGE
        self._check_runs(content[1], start)
        self._file.seek(start)
        return content

    def _check_runs(self, runs: Sequence[_Run], start: int) -> None:
        reached = 0
        for address, size in runs:
            if address % _PAGE or size % _PAGE or address < reached:
                raise self._damaged("its list of pages is in disorder")
            reached = address + size
        if os.fstat(self._file.fileno()).st_size != start + sum(size for _, size in runs):
            raise self._damaged("it has another size than it should have")

    def load(self, memory: GuestMemory) -> None:
        """Fill memory that is all zero; StateError if the file's does not fit into it."""
        for address, size in self._runs:
            try:
                view = memory.view(address, size)
            except IndexError as error:
                raise self._damaged("it has memory where the machine has none") from error
            if self._file.readinto(view) != size:
                raise self._damaged("it ends too early")

    def _take(self, size: int) -> bytes:
        try:
            data = self._file.read(size)
        except OSError as error:
            raise StateError(f"the snapshot {self._path} cannot be read: {error.strerror}") from error
        if len(data) != size:
            raise StateError(f"{self._path} is not a snapshot, or it ends too early")
        return data

    def _damaged(self, reason: str) -> StateError:
        return StateError(f"the snapshot {self._path} is damaged: {reason}")

    def __enter__(self) -> SnapshotFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._file.close()
