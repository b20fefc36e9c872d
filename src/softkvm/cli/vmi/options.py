"""Options that the commands of `softkvm vmi` share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar

import click

from softkvm.cli.errors import CliError

F = TypeVar("F", bound=Callable[..., Any])

_DIALECT = "v9"
as_json = click.option("--json", is_flag=True, help="Print JSON.")
timeout = click.option("--timeout", "seconds", type=click.FloatRange(0), metavar="SECONDS", help="End after this time.")


@dataclass(frozen=True)
class Where:
    """Which guest: the VM `name`, or the only one that runs; or whoever connects to the socket `listen`."""

    name: str | None
    listen: str | None
    dialect: str
    key: str | None


def guest(command: F) -> F:
    """The options that say which guest; the command gets a `Where`."""

    @click.option("-n", "--name", metavar="NAME", help="The VM, if several run (see `softkvm list`).")
    @click.option("--listen", metavar="SOCKET", help="Wait on this UNIX socket, or on vsock:PORT, for a VMM to connect.")
    @click.option("--dialect", type=click.Choice(["v9", "libkvmi", "v12"]), help=f"With --listen: which KVMI.  [default: {_DIALECT}]")
    @click.option("--key", metavar="FILE", help="With --listen: file with the secret that the VMM asks for.")
    @wraps(command)
    def parse(name: str | None, listen: str | None, dialect: str | None, key: str | None, **rest: Any) -> Any:
        if name is not None and listen is not None:
            raise CliError("`--name` is a VM that runs, and `--listen` waits for one, so they exclude each other")
        if listen is None and (dialect is not None or key is not None):
            raise CliError("`--dialect` and `--key` are for a VMM that connects to the socket of `--listen`")
        return command(where=Where(name, listen, dialect or _DIALECT, key), **rest)

    return parse  # type: ignore[return-value]
