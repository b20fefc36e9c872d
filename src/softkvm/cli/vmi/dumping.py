"""`softkvm vmi dump`: the guest's memory as a file, and beside it the symbols that Volatility wants."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, cast

import click
import msgspec

from softkvm.cli import output, status
from softkvm.cli.errors import CliError
from softkvm.cli.vmi.attach import attached
from softkvm.cli.vmi.options import Where
from softkvm.vmi import dump as dumps
from softkvm.vmi.linux import isf
from softkvm.vmi.target import Target


class Dumped(msgspec.Struct, frozen=True):
    """What `--json` prints."""

    file: str
    format: str
    bytes: int
    symbols: str | None
    release: str
    build_id: str


def dump(where: Where, file: str, style: str, symbols: str | None, as_json: bool) -> int:
    """Write FILE, all of it or nothing, while the guest stands still."""
    path = Path(file)
    with attached(where) as target:
        kernel = target.kernel
        with target.still(), output.progress() as progress:
            _write(path, lambda stream: _dump(target, stream, style, progress))
        if symbols is not None:
            content = msgspec.json.encode(isf.build(kernel))
            _write(Path(symbols), lambda stream: stream.write(content))
    size = path.stat().st_size
    if as_json:
        click.echo(msgspec.json.encode(Dumped(file, style, size, symbols, kernel.release, kernel.build_id)))
    else:
        output.say(f"{path}: {size >> 20} MiB of Linux {kernel.release}")
    return status.SUCCESS


def _dump(target: Target, stream: BinaryIO, style: str, progress: Callable[[str], None]) -> None:
    memory, kernel = target.client.memory, target.kernel

    def show(done: int, total: int) -> None:
        progress(f"{done * 100 // total} %")

    if style == "lime":
        dumps.lime(stream, memory, memory.ranges(), show)
        return
    cpus = [cpu for cpu in (target.registers(vcpu) for vcpu in range(target.client.vcpus)) if cpu is not None]
    info = kernel.vmcoreinfo()
    notes = [("VMCOREINFO", 0, info)] if info else []
    dumps.elf(stream, memory, memory.ranges(), cpus, notes, kernel.direct_map, show)


def _write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Make `path` what `write` writes; whatever it was before stays if that fails."""
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}-", delete=False) as stream:
            try:
                write(cast(BinaryIO, stream))
                os.fchmod(stream.fileno(), 0o600)
                os.replace(stream.name, path)
            except BaseException:
                os.unlink(stream.name)
                raise
    except OSError as error:
        raise CliError(f"{path} cannot be written: {error.strerror}") from error
