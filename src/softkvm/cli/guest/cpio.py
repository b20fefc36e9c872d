"""Writer of cpio archives in the "new ASCII" format, the format of an initramfs.

Source of truth: Linux 6.1, Documentation/driver-api/early-userspace/buffer-format.rst, and init/initramfs.c, which reads it. Several
archives may follow each other in one initrd; later files are added to earlier ones.
"""

from __future__ import annotations

import stat
from dataclasses import dataclass

_MAGIC = "070701"
_TRAILER = "TRAILER!!!"
_ALIGNMENT = 4


@dataclass(frozen=True)
class Entry:
    """One file of an archive.

    `mode` holds the file type and the permissions as in `st_mode`; `data` is the content of a file or the target of a symbolic link;
    `device` is the (major, minor) number of a device node.
    """

    path: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def file(path: str, data: bytes, permissions: int = 0o644) -> Entry:
    """A regular file."""
    return Entry(path, stat.S_IFREG | permissions, data)


def directory(path: str, permissions: int = 0o755) -> Entry:
    """A directory; the kernel does not create missing parents, so every one needs an entry."""
    return Entry(path, stat.S_IFDIR | permissions)


def symlink(path: str, target: str) -> Entry:
    """A symbolic link at `path` to `target`."""
    return Entry(path, stat.S_IFLNK | 0o777, target.encode())


def character_device(path: str, major: int, minor: int, permissions: int = 0o600) -> Entry:
    """A character device node."""
    return Entry(path, stat.S_IFCHR | permissions, device=(major, minor))


def archive(entries: list[Entry]) -> bytes:
    """The archive of `entries`, in order, owned by root, with all time stamps zero so that equal input gives equal bytes."""
    parts = [_record(number, entry) for number, entry in enumerate(entries, start=1)]
    parts.append(_record(0, Entry(_TRAILER, 0)))
    return b"".join(parts)


def _record(inode: int, entry: Entry) -> bytes:
    name = entry.path.lstrip("/").encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    fields = (inode, entry.mode, 0, 0, links, 0, len(entry.data), 0, 0, *entry.device, len(name), 0)
    header = (_MAGIC + "".join(f"{field:08X}" for field in fields)).encode()
    return _padded(header + name) + _padded(entry.data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % _ALIGNMENT)
