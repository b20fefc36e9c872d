"""How `softkvm vmi` reaches a guest: by the monitor of a running VM, or by a socket on which a VMM connects."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from softkvm.cli import output, vms
from softkvm.cli.errors import CliError
from softkvm.cli.guest import default_directory
from softkvm.cli.vmi.options import Where
from softkvm.uapi import kvmi
from softkvm.vmi.client import Client
from softkvm.vmi.errors import VmiError
from softkvm.vmi.target import Target

_CONNECT_TIMEOUT, _BOOT_TIMEOUT = 60.0, 300.0


@contextmanager
def attached(where: Where, *, booted: bool = True) -> Iterator[Target]:
    """The guest, until the block ends; CliError, one sentence, for whatever goes wrong with it.

    A VMM that connects to us has mostly just started: unless `booted` is false, its kernel is waited for.
    """
    try:
        with _connect(where) as client:
            target = Target(client, default_directory() / "vmi")
            if booted and where.listen is not None:
                output.say("waiting for its kernel")
                target.wait_for_kernel(_BOOT_TIMEOUT)
            yield target
    except VmiError as error:
        raise CliError(str(error)) from error


def _connect(where: Where) -> Client:
    return _listen(where) if where.listen is not None else _hook(where)


def _listen(where: Where) -> Client:
    assert where.listen is not None
    output.say(f"waiting on {where.listen} for a VM")
    try:
        key = Path(where.key).read_bytes() if where.key is not None else None
        return Client.listen(where.listen, key=key, timeout=_CONNECT_TIMEOUT, dialect=kvmi.DIALECTS[where.dialect])
    except ValueError as error:
        raise CliError(f"{where.listen} is no address to listen on; write a path, or vsock:PORT") from error
    except OSError as error:
        raise CliError(f"{error.filename or where.listen} cannot be used: {error.strerror}") from error


def _hook(where: Where) -> Client:
    """Give one end of a new socket pair to the VM, which hooks it as it would hook one that it had connected."""
    ours, theirs = socket.socketpair()
    try:
        with closing(theirs), vms.connected(where.name) as vm:
            vm.execute("introspect", {}, [theirs.fileno()])
    except BaseException:
        ours.close()
        raise
    return Client(ours)
