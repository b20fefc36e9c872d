"""Open files of a process, and the paths of files.

Source of truth: Linux 6.1 `fs/d_path.c`, `fs/mount.h`, `include/linux/fdtable.h`. A path is walked from the file to the root of its mounts,
with a limit on its steps, because a hostile kernel can make it a circle.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from softkvm.vmi.errors import VmiError
from softkvm.vmi.linux.kernel import Kernel
from softkvm.vmi.linux.objects import Struct

_LONGEST_PATH = 512
_MOST_DESCRIPTORS = 1 << 20
_LONGEST_NAME = 255
_NUMBERED = {"pipefs": "pipe", "sockfs": "socket", "nsfs": "ns"}
_ACCESS = ("r", "w", "rw", "?")


class OpenFile(msgspec.Struct, frozen=True):
    """A descriptor of a process."""

    descriptor: int
    path: str
    mode: str
    """`r`, `w` or `rw`."""
    flags: int
    """Of open(2)."""
    position: int
    inode: int


def files(kernel: Kernel, task: Struct) -> Iterator[OpenFile]:
    """The open files of a process by descriptor."""
    table = task.follow("files")
    descriptors = table.follow("fdt") if table is not None else None
    if descriptors is None:
        return
    count = min(descriptors.number("max_fds"), _MOST_DESCRIPTORS)
    pointers = memoryview(kernel.read(descriptors.number("fd"), 8 * count)).cast("Q")
    for number, address in enumerate(pointers):
        if address:
            yield _describe(kernel, number, kernel.struct("file", address))


def _describe(kernel: Kernel, number: int, file: Struct) -> OpenFile:
    flags = file.number("f_flags")
    inode = file.follow("f_inode")
    return OpenFile(
        number, path(kernel, file), _ACCESS[flags & 3], flags, file.number("f_pos"), inode.number("i_ino") if inode is not None else 0
    )


def path(kernel: Kernel, file: Struct) -> str:
    """The path of a `struct file` in the first mount namespace, or what /proc/PID/fd shows for what has none, such as `pipe:[42]`."""
    dentry, mount = file.follow("f_path.dentry"), file.follow("f_path.mnt")
    if dentry is None or mount is None:
        return ""
    try:
        return _pseudo(kernel, dentry) or _walk(kernel, dentry, mount)
    except VmiError:
        return "?"  # it is being taken apart while we look


def dentry_name(dentry: Struct) -> str:
    """The last part of a path."""
    return dentry.text("d_name.name")[:_LONGEST_NAME]


def _pseudo(kernel: Kernel, dentry: Struct) -> str | None:
    superblock = dentry.follow("d_sb")
    kind = superblock.follow("s_type") if superblock is not None else None
    name = kind.text("name") if kind is not None else ""
    inode = dentry.follow("d_inode")
    if name in _NUMBERED and inode is not None:
        return f"{_NUMBERED[name]}:[{inode.number('i_ino')}]"
    return f"anon_inode:{dentry_name(dentry)}" if name == "anon_inodefs" else None


def _walk(kernel: Kernel, dentry: Struct, vfsmount: Struct) -> str:
    mount = vfsmount.container("mount", "mnt")
    parts: list[str] = []
    for _ in range(_LONGEST_PATH):
        root, parent = mount.number("mnt.mnt_root"), dentry.number("d_parent")
        if dentry.address == root:
            above = mount.follow("mnt_parent")
            point = mount.follow("mnt_mountpoint")
            if above is None or point is None or above.address == mount.address:
                break
            dentry, mount = point, above
        elif parent == dentry.address or not parent:
            break
        else:
            parts.append(dentry_name(dentry))
            dentry = kernel.struct("dentry", parent)
    return "/" + "/".join(reversed(parts))
