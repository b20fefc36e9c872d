"""The initramfs of the default guest: Debian's static busybox, our own `/init`, and the command to run, if there is one.

The archives are built in memory at each start (two megabytes, a few milliseconds), so the cache can never hold an `/init` of an older
softkvm. A command travels as a second archive behind the first one: the kernel unpacks both into the same root.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from importlib import resources

from softkvm.cli.guest import cpio

COMMAND_PATH = "/run/softkvm/command"

_DIRECTORIES = ("/bin", "/dev", "/etc", "/proc", "/root", "/run", "/run/softkvm", "/sys")
_PASSWD = b"root::0:0:root:/root:/bin/sh\n"
# BusyBox would ask init to end the machine, and process 1 is a script; a machine that is halted would stand there for ever.
_PROFILE = rb"""PS1='softkvm:\w\$ '
poweroff() { busybox poweroff -f; }
halt() { busybox poweroff -f; }
reboot() { busybox reboot -f; }
export ENV=/etc/profile
"""
_CONSOLE = (5, 1)
_NULL = (1, 3)


def build(busybox: bytes) -> bytes:
    """The base archive around the `busybox` binary."""
    init = resources.files("softkvm.cli.guest").joinpath("init.sh").read_bytes()
    entries = [cpio.directory(path) for path in _DIRECTORIES]
    entries += [
        cpio.file("/init", init, 0o755),
        cpio.file("/bin/busybox", busybox, 0o755),
        cpio.symlink("/bin/sh", "busybox"),
        cpio.file("/etc/passwd", _PASSWD),
        cpio.file("/etc/profile", _PROFILE),
        # Process 1 gets its first three descriptors from this node, before it has mounted devtmpfs.
        cpio.character_device("/dev/console", *_CONSOLE),
        cpio.character_device("/dev/null", *_NULL, permissions=0o666),
    ]
    return cpio.archive(entries)


def command_archive(command: Sequence[str]) -> bytes:
    """The archive that makes the guest run `command` (a program and its arguments) in place of a shell."""
    words = " ".join(shlex.quote(word) for word in command)
    return cpio.archive([cpio.file(COMMAND_PATH, os.fsencode(words) + b"\n")])
