"""Guest memory behind a KVMI channel, by the best means that the server has.

softkvm's server gives descriptors of the memory itself, so that it is mapped and read like any memory of this process; without them,
fifteen pages at a time; any other server one page at a time.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Protocol

from softkvm.uapi import kvmi
from softkvm.uapi.kvmi import Command
from softkvm.vmi import requests
from softkvm.vmi.errors import CommandFailed, Unreadable
from softkvm.vmi.memory import PAGE_MASK, PAGE_SIZE, BufferMemory, Memory, PageCache, Range
from softkvm.vmi.requests import MappedRange, Request, T

_FALLBACK_FRAMES = 1 << 20


class Asker(Protocol):
    """The part of the client that memory needs."""

    def ask(self, request: Request[T], timeout: float | None = None) -> T:
        """Send a command and wait for its answer."""
        ...

    def supports(self, command: Command) -> bool:
        """Whether the server has a command."""
        ...

    def take_descriptors(self) -> list[int]:
        """Descriptors that came along."""
        ...


def open_memory(client: Asker) -> Memory:
    """The guest's memory."""
    if client.supports(Command.VM_GET_MEMORY_MAP):
        ranges = client.ask(requests.memory_map())
        descriptors = client.take_descriptors()
        try:
            if (mapped := _map(ranges, descriptors)) is not None:
                return mapped
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        areas = sorted(entry.area for entry in ranges)
    else:
        areas = [Range(0, _frames(client) * PAGE_SIZE)]
    read = _read_many if client.supports(Command.VM_READ_PAGES) else _read_one
    return PageCache(RemoteMemory(client, areas, read))


def _frames(client: Asker) -> int:
    with suppress(CommandFailed):
        return client.ask(requests.max_gfn())
    return _FALLBACK_FRAMES


def _map(ranges: Sequence[MappedRange], descriptors: Sequence[int]) -> BufferMemory | None:
    """All ranges mapped for reading; None if the server gave no descriptors, or others than it said."""
    blocks = []
    for entry in ranges:
        if entry.descriptor >= len(descriptors) or not _keeps_its_size(descriptors[entry.descriptor]):
            return None
        size = entry.area.end - entry.area.base
        try:
            view = mmap.mmap(descriptors[entry.descriptor], size, mmap.MAP_SHARED, mmap.PROT_READ, offset=entry.offset)
        except (OSError, ValueError):
            return None
        blocks.append((entry.area.base, memoryview(view)))
    return BufferMemory(blocks) if blocks else None


def _keeps_its_size(descriptor: int) -> bool:
    """Whether nobody can cut the file off: to read behind its end would end this process."""
    try:
        return bool(fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK)
    except OSError:
        return False


Reader = Callable[[Asker, Sequence[int]], dict[int, bytes]]


def _read_many(client: Asker, frames: Sequence[int]) -> dict[int, bytes]:
    pages: dict[int, bytes] = {}
    for start in range(0, len(frames), kvmi.MAX_READ_PAGES):
        some = client.ask(requests.read_pages(frames[start : start + kvmi.MAX_READ_PAGES]))
        pages.update(some)
    return pages


def _read_one(client: Asker, frames: Sequence[int]) -> dict[int, bytes]:
    pages = {}
    for frame in frames:
        try:
            pages[frame] = client.ask(requests.read_physical(frame * PAGE_SIZE, PAGE_SIZE))
        except CommandFailed as error:
            if error.code != kvmi.Error.ENOENT:
                raise
    return pages


class RemoteMemory:
    """Memory read by commands."""

    def __init__(self, client: Asker, areas: Sequence[Range], read: Reader) -> None:
        self._client = client
        self._areas = areas
        self._read = read

    def read(self, address: int, size: int) -> bytes:
        """As `Memory.read()`."""
        first, last = address // PAGE_SIZE, (address + size - 1) // PAGE_SIZE
        frames = range(first, last + 1)
        if first < 0 or not any(area.base <= address and address + size <= area.end for area in self._areas):
            raise Unreadable(address)
        pages = self._read(self._client, frames)
        try:
            data = b"".join([pages[frame] for frame in frames])
        except KeyError as error:
            raise Unreadable(error.args[0] * PAGE_SIZE) from None
        start = address & PAGE_MASK
        return data[start : start + size]

    def ranges(self) -> Sequence[Range]:
        """As `Memory.ranges()`."""
        return self._areas
