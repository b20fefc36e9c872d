"""Where the sockets of running VMs are: one per VM, NAME.sock, in a directory that belongs to this person alone.

The directory is `$XDG_RUNTIME_DIR/softkvm` (XDG Base Directory Specification), or `/tmp/softkvm-UID` where the session has none. A VMM that
was killed leaves its socket behind; whoever comes next finds that nobody listens and removes it.
"""

from __future__ import annotations

import fcntl
import os
import re
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from softkvm.vmm.errors import ConfigError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
_SUFFIX = ".sock"
_LONGEST_PATH = 107
"""sun_path of unix(7), without its final zero."""
_BACKLOG = 64


def directory() -> Path:
    """The directory, made if need be; ConfigError if it cannot be, or belongs to somebody else."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    path = Path(runtime, "softkvm") if runtime else Path(f"/tmp/softkvm-{os.getuid()}")
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        status = path.lstat()
    except OSError as error:
        raise ConfigError(f"the directory {path} for control sockets cannot be used: {error.strerror}") from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise ConfigError(f"{path} is not a directory of yours alone, so control sockets cannot be there")
    return path


def path_of(name: str) -> Path:
    """The socket of the VM `name`; ConfigError for what is no name."""
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{name!r} is not a name for a VM: letters, digits and ._- (at most 64), a letter or digit first")
    path = directory() / (name + _SUFFIX)
    if len(os.fsencode(path)) > _LONGEST_PATH:
        raise ConfigError(f"{path} is too long for the path of a socket")
    return path


@contextmanager
def _locked() -> Iterator[Path]:
    """The directory, with nobody else adding or removing sockets."""
    path = directory()
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield path
    finally:
        os.close(descriptor)


def listen(name: str) -> socket.socket:
    """A socket that listens as VM `name`; ConfigError if a VM of that name runs or the socket cannot be made."""
    path = path_of(name)
    with _locked():
        if _is_alive(path):
            raise ConfigError(f"a VM named {name} is running already")
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(os.fspath(path))
            listener.listen(_BACKLOG)
        except OSError as error:
            listener.close()
            raise ConfigError(f"the control socket {path} cannot be made: {error.strerror}") from error
    return listener


def release(name: str, listener: socket.socket) -> None:
    """Close a socket that `listen(name)` gave, and take its name away."""
    path = path_of(name)
    with _locked():
        listener.close()
        _is_alive(path)


def running() -> list[str]:
    """Names of the VMs that run, sorted; what dead ones left behind is removed."""
    with _locked() as path:
        sockets = [entry for entry in path.glob("*" + _SUFFIX) if _NAME.fullmatch(entry.name.removesuffix(_SUFFIX))]
        return sorted(entry.name.removesuffix(_SUFFIX) for entry in sockets if _is_alive(entry))


def _is_alive(path: Path) -> bool:
    """Whether somebody listens at `path`; if nobody does, there is no such file afterwards."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(os.fspath(path))
        except BlockingIOError:  # its backlog is full
            return True
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return False
        except OSError:  # nothing there, or no socket of a VM
            return False
    return True
