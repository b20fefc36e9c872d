"""Packages and programs for the default guest: what they need comes with them, and nothing else."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from softkvm.cli.errors import CliError
from softkvm.cli.guest import packages
from softkvm.cli.guest.apt import Package

SHELL = Path("/bin/sh")


def tar(files: dict[str, bytes], links: dict[str, str] | None = None) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo("." + name)
            info.size, info.mode = len(content), 0o755
            archive.addfile(info, io.BytesIO(content))
        for name, target in (links or {}).items():
            info = tarfile.TarInfo("." + name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            archive.addfile(info)
    return buffer.getvalue()


class Apt:
    """An index of packages that are here."""

    def __init__(self, contents: dict[str, tuple[tuple[str, ...], bytes]]) -> None:
        self.contents = contents
        self.fetched: list[str] = []

    def archives(self, names: Sequence[str]) -> Iterator[tuple[Package, bytes]]:
        for name in names:
            self.fetched.append(name)
            depends, archive = self.contents[name]
            yield Package(name, "1", depends), archive


def libraries() -> dict[str, bytes]:
    """The libraries that this machine's shell is linked with, as a package has them."""
    names = packages.needed(SHELL.read_bytes())
    return {f"/lib/x86_64-linux-gnu/{name}": Path(f"/lib/x86_64-linux-gnu/{name}").resolve().read_bytes() for name in names}


def test_a_package_brings_the_libraries_that_it_needs() -> None:
    linker = "/lib64/ld-linux-x86-64.so.2"
    archive = tar({"/usr/bin/tool": SHELL.read_bytes(), "/usr/share/doc/tool/README": b""})
    unused = {"/usr/bin/ldd": b"", "/lib/x86_64-linux-gnu/libunused.so.1": b""}
    libc = tar({**libraries(), **unused}, {linker: "/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2"})
    apt = Apt({"tool": (("libc6", "perl"), archive), "libc6": ((), libc)})
    bundle = packages.Bundle()
    packages.add_package(bundle, cast(Any, apt), "tool")
    content = bundle.archive()
    for path in (b"usr/bin/tool", b"lib/x86_64-linux-gnu/libc.so.6", b"lib64/ld-linux-x86-64.so.2"):
        assert path + b"\0" in content
    for path in (b"README", b"ldd", b"libunused"):
        assert path not in content
    assert apt.fetched == ["tool", "libc6"]


def test_a_library_that_nobody_has_is_one_sentence() -> None:
    apt = Apt({"tool": ((), tar({"/usr/bin/tool": SHELL.read_bytes()}))})
    with pytest.raises(CliError, match="would lack the shared library"):
        packages.add_package(packages.Bundle(), cast(Any, apt), "tool")


def test_a_program_that_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(CliError, match="cannot be read"):
        packages.add_program(packages.Bundle(), tmp_path / "none")


@pytest.mark.parametrize("content", [b"", b"#!/bin/sh\n", b"\x7fELF", b"\x7fELF" + bytes(60), b"\x7fELF\x02\x01\x01" + b"\xff" * 100])
def test_what_is_no_program_needs_nothing(content: bytes) -> None:
    assert packages.needed(content) == set()
