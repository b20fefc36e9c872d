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

from elftools.common.exceptions import ELFError
from elftools.elf.dynamic import DynamicSegment
from elftools.elf.elffile import ELFFile
from elftools.elf.segments import InterpSegment

from softkvm.cli.errors import CliError
from softkvm.cli.guest import cpio
from softkvm.cli.guest.apt import Apt, Package

_DOCUMENTATION = re.compile(r"/usr/share/(doc|man|lintian|bug|locale)/.*|/usr/lib/[^/]*/gconv/.*")
_LIBRARY = re.compile(r".*/(lib[^/]*\.so[^/]*|ld-linux[^/]*)")


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
    try:
        elf = ELFFile(io.BytesIO(program))
        names: set[str] = set()
        for segment in elf.iter_segments():
            if isinstance(segment, InterpSegment):
                names.add(PurePosixPath(segment.get_interp_name()).name)
            elif isinstance(segment, DynamicSegment):
                names |= {str(vars(tag)["needed"]) for tag in segment.iter_tags("DT_NEEDED")}
    except (ELFError, ValueError, UnicodeDecodeError):
        return set()
    return names


def add_package(bundle: Bundle, apt: Apt, package: Package) -> None:
    """The package's own files but its documentation, and the libraries that they need."""
    for entry in _entries(apt.archive(package)):
        if not _DOCUMENTATION.fullmatch(entry.path):
            bundle.add(entry)
    _add_libraries(bundle, apt, package.depends)


def add_program(bundle: Bundle, path: Path) -> None:
    """A file of this machine, as /root/NAME."""
    try:
        data, mode = path.read_bytes(), path.stat().st_mode
    except OSError as error:
        raise CliError(f"{path} cannot be read: {error.strerror}") from error
    bundle.add(cpio.file(f"/root/{path.name}", data, stat.S_IMODE(mode)))


def _add_libraries(bundle: Bundle, apt: Apt, depends: Iterable[str]) -> None:
    """Ask one library package after the other, those that depend on each other last, until every name is there."""
    waiting, seen = [name for name in depends if name.startswith("lib")], set[str]()
    while waiting and bundle.missing_libraries():
        name = waiting.pop(0)
        if name in seen:
            continue
        seen.add(name)
        package = apt.show(name)
        for entry in _entries(apt.archive(package)):
            if _LIBRARY.fullmatch(entry.path):
                bundle.add(entry)
        waiting += [dependency for dependency in package.depends if dependency.startswith("lib")]
    if absent := bundle.missing_libraries():
        raise CliError(f"the guest would lack the shared library {min(absent)}")


def _entries(archive: bytes) -> Iterator[cpio.Entry]:
    """The regular files and symbolic links of a package's tar archive."""
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:") as tar:
        for info in tar:
            path = "/" + info.name.removeprefix("./").rstrip("/")
            if info.issym():
                yield cpio.symlink(path, info.linkname)
            elif info.isreg() and (content := tar.extractfile(info)) is not None:
                yield cpio.file(path, content.read(), info.mode)
