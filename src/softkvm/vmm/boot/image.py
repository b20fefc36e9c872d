"""A kernel image, whatever its format: where it wants to be, what belongs there, where it is entered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from softkvm.vmm.errors import ConfigError

_ELF_MAGIC = b"\x7fELF"


class Piece(NamedTuple):
    """Bytes for a guest-physical address."""

    address: int
    data: bytes | memoryview


@dataclass(frozen=True)
class Kernel:
    """A kernel that starts by the Linux 64-bit boot protocol."""

    pieces: Sequence[Piece]
    entry: int
    """Guest-physical address of the 64-bit entry point."""
    start: int
    """First byte that the kernel uses before it knows the memory map."""
    end: int
    """First byte after that."""
    setup_header: bytes
    """`struct setup_header` of the image, for the zero page."""
    initrd_limit: int
    """The initrd must end at or below this address."""
    command_line_limit: int
    """Longest command line in bytes, without its terminator."""


def read_file(path: Path) -> bytes:
    """The content of an image file; ConfigError if it cannot be read."""
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise ConfigError(f"there is no kernel file {path}") from error
    except OSError as error:
        raise ConfigError(f"the kernel file {path} cannot be read: {error.strerror}") from error


def read_kernel(path: Path, ram_end: int) -> Kernel:
    """Read a bzImage or an ELF vmlinux for a machine whose low RAM ends at `ram_end`; ConfigError says what is wrong with it."""
    return parse_kernel(read_file(path), path, ram_end)


def parse_kernel(data: bytes, path: Path, ram_end: int) -> Kernel:
    """`read_kernel` for a file that was read already."""
    from softkvm.vmm.boot import bzimage, vmlinux

    if data.startswith(_ELF_MAGIC):
        return vmlinux.parse(data, path, ram_end)
    return bzimage.parse(data, path, ram_end)
