"""Debian packages, and programs of one's own, for the default guest: their files, and the shared libraries that those need.

A package brings its own files; of the packages that it depends on come the shared libraries that its programs name (ELF `DT_NEEDED`,
System V ABI ch. 5), and the dynamic linker. Interpreters and data of other packages stay out: a guest with perf has 30 MB more, not 300.
"""

from __future__ import annotations

import io
import re
import stat
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from softkvm.cli.errors import CliError
from softkvm.cli.guest import cpio
from softkvm.cli.guest.apt import Apt, Package

_DOCUMENTATION = re.compile(r"/usr/share/(doc|man|lintian|bug|locale)/.*|/usr/lib/[^/]*/gconv/.*")
_LIBRARY = re.compile(r"(/usr)?/lib/x86_64-linux-gnu/[^/]*\.so[^/]*|/lib64/ld-linux-x86-64\.so\.2")

_PROGRAMS = frozenset({"perl", "python3", "debconf", "dpkg"})
"""Packages that others depend on for something else than a library."""


class Bundle:
    """Files for a guest by their absolute path, with a parent directory for each."""

    def __init__(self) -> None:
        """Nothing yet."""
        self._entries: dict[str, cpio.Entry] = {}
        self._names: set[str] = set()
        self._needed: set[str] = set()

    def add(self, entry: cpio.Entry) -> None:
        """A file; the first one of a path counts."""
        for parent in reversed(PurePosixPath(entry.path).parents):
            if str(parent) != "/":
                self._entries.setdefault(str(parent), cpio.directory(str(parent)))
        if entry.path not in self._entries:
            self._entries[entry.path] = entry
            self._names.add(PurePosixPath(entry.path).name)
            if stat.S_ISREG(entry.mode) and entry.data.startswith(b"\x7fELF"):
                self._needed |= needed(entry.data)

    def missing_libraries(self) -> set[str]:
        """Names of shared libraries that a program of the bundle needs and nobody has brought."""
        return self._needed - self._names

    def archive(self) -> bytes:
        """The cpio archive."""
        return cpio.archive(sorted(self._entries.values(), key=lambda entry: entry.path))


def needed(program: bytes) -> set[str]:
    """Names of the libraries that an ELF file is linked with, its dynamic linker included; nothing for what is no sound ELF file."""
    # Here, because a guest without packages starts sooner without them.
    from elftools.common.exceptions import ELFError
    from elftools.elf.dynamic import DynamicSegment
    from elftools.elf.elffile import ELFFile
    from elftools.elf.segments import InterpSegment

    try:
        elf = ELFFile(io.BytesIO(program))
        if elf.elfclass != 64:
            return set()  # a helper for 32-bit programs, of which the guest has none
        names: set[str] = set()
        for segment in elf.iter_segments():
            if isinstance(segment, InterpSegment):
                names.add(PurePosixPath(segment.get_interp_name()).name)
            elif isinstance(segment, DynamicSegment):
                names |= {str(vars(tag)["needed"]) for tag in segment.iter_tags("DT_NEEDED")}
    except (ELFError, ValueError, UnicodeDecodeError):
        return set()
    return names


def add_package(bundle: Bundle, apt: Apt, name: str) -> Package:
    """The files of the package `name` but its documentation, and the libraries that they need; which package it was."""
    ((package, archive),) = apt.archives([name])
    for entry in _entries(archive):
        if not _DOCUMENTATION.fullmatch(entry.path):
            bundle.add(entry)
    _add_libraries(bundle, apt, package.depends)
    return package


def add_program(bundle: Bundle, path: Path) -> None:
    """A file of this machine, as /root/NAME."""
    try:
        data, mode = path.read_bytes(), path.stat().st_mode
    except OSError as error:
        raise CliError(f"{path} cannot be read: {error.strerror}") from error
    bundle.add(cpio.file(f"/root/{path.name}", data, stat.S_IMODE(mode)))


def _add_libraries(bundle: Bundle, apt: Apt, depends: Iterable[str]) -> None:
    """Libraries out of the packages `depends`, of those that these depend on, and so on, until every name is there."""
    offered: dict[str, list[cpio.Entry]] = {}
    level, seen = [*depends], set[str]()
    while True:
        while found := bundle.missing_libraries() & offered.keys():
            for name in found:
                _add_library(bundle, offered, name)
        missing, level = bundle.missing_libraries(), [name for name in dict.fromkeys(level) if name not in seen | _PROGRAMS]
        if not missing:
            return
        if not level:
            raise CliError(f"the guest would lack the shared library {min(missing)}")
        seen.update(level)
        below: list[str] = []
        for package, archive in apt.archives(level):
            below += package.depends
            for entry in _entries(archive):
                if _LIBRARY.fullmatch(entry.path):
                    offered.setdefault(PurePosixPath(entry.path).name, []).append(entry)
        level = below


def _add_library(bundle: Bundle, offered: dict[str, list[cpio.Entry]], name: str) -> None:
    """All that has this name (the dynamic linker is in two places), and what symbolic links lead to."""
    for entry in offered.pop(name, ()):
        bundle.add(entry)
        if stat.S_ISLNK(entry.mode):
            _add_library(bundle, offered, PurePosixPath(entry.data.decode()).name)


def _entries(archive: bytes) -> Iterator[cpio.Entry]:
    """The regular files and symbolic links of a package's tar archive."""
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:") as tar:
        for info in tar:
            path = "/" + info.name.removeprefix("./").rstrip("/")
            if info.issym():
                yield cpio.symlink(path, info.linkname)
            elif info.isreg() and (content := tar.extractfile(info)) is not None:
                yield cpio.file(path, content.read(), info.mode)
