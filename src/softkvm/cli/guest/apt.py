"""Debian packages without root: apt with a private state directory, and single files out of a package.

Source of truth: apt.conf(5), apt-get(8), apt-cache(8) and dpkg-deb(1) of Debian 12. apt uses this machine's package sources and keys, so
mirrors and proxies that the administrator set up are obeyed and every package is checked against its signed index.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from softkvm.cli.errors import GuestUnavailable

_TOOLS = ("apt-get", "apt-cache", "dpkg-deb")
_HINT = "`softkvm run --selftest` needs neither network nor apt"
_TRANSIENT = re.compile(r"Hash Sum mismatch|unexpected size|\b50[0234]\b|timed out|Connection (failed|reset|refused)|Undetermined Error")
"""What apt says of a mirror that is being updated or has too much to do, after its own attempts."""
_UNKNOWN = re.compile(r"Unable to locate package (\S+)")
_PAUSES = (2.0, 10.0)
"""In seconds, before the second and the third attempt at such a mirror."""

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Package:
    """A binary package that the package index offers."""

    name: str
    version: str
    depends: tuple[str, ...]


class Apt:
    """One private apt state, refreshed when it is made; `session` makes and removes it."""

    def __init__(self, state: Path, progress: Progress) -> None:
        self._state = state
        self._progress = progress
        for folder in ("lists/partial", "cache/archives/partial"):
            (state / folder).mkdir(parents=True)
        # An empty status file: nothing counts as installed, so the machine's own packages cannot change what is resolved.
        (state / "status").touch()
        self._progress("reading Debian's package index")
        self._run("apt-get", "update")

    def show(self, name: str) -> Package:
        """The newest version of the package `name`."""
        return _parse_stanza(name, self._run("apt-cache", "--no-all-versions", "show", name))

    def read(self, package: Package, member: re.Pattern[str]) -> tuple[str, bytes]:
        """Download `package`; the path and content of the first file in it whose path (`./boot/...`) matches `member`."""
        self._progress(f"fetching {package.name} {package.version}")
        with tempfile.TemporaryDirectory(dir=self._state) as folder:
            self._run("apt-get", "download", f"{package.name}={package.version}", directory=folder)
            (archive,) = Path(folder).glob("*.deb")
            return read_member(archive, member)

    def archives(self, names: Sequence[str]) -> Iterator[tuple[Package, bytes]]:
        """Download the newest versions of packages, all at once; each with its files as a tar archive."""
        self._progress(f"fetching {', '.join(names)}")
        with tempfile.TemporaryDirectory(dir=self._state) as folder:
            self._run("apt-get", "download", *names, directory=folder)
            for archive in sorted(Path(folder).glob("*.deb")):
                package = _parse_stanza(archive.name.split("_", 1)[0], _dpkg_deb("--field", archive).decode())
                yield package, _dpkg_deb("--fsys-tarfile", archive)

    def _run(self, tool: str, *arguments: str, directory: str | None = None) -> str:
        options = {
            "Dir::State": self._state,
            "Dir::State::lists": self._state / "lists",
            "Dir::State::status": self._state / "status",
            "Dir::Cache": self._state / "cache",
            "Dir::Log": self._state,
            # Started by root, apt would hand the download to the user _apt, who may not enter a private directory.
            "APT::Sandbox::User": "root",
            "APT::Update::Error-Mode": "any",
        }
        flags = [flag for key, value in options.items() for flag in ("-o", f"{key}={value}")]
        for pause in (*_PAUSES, None):
            result = subprocess.run(
                [tool, "-q", *flags, *arguments],
                cwd=directory,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                env={**os.environ, "LC_ALL": "C"},
                check=False,
            )
            if result.returncode == 0:
                break
            if unknown := _UNKNOWN.search(result.stderr):
                raise _not_offered(unknown[1])
            if pause is None or not _TRANSIENT.search(result.stderr):
                raise GuestUnavailable(f"{tool} {arguments[0]} failed ({_first_error(result.stderr)}); {_HINT}")
            self._progress(f"{_first_error(result.stderr)}; another attempt in {pause:.0f} seconds")
            time.sleep(pause)
        return result.stdout


@contextmanager
def session(progress: Progress) -> Iterator[Apt]:
    """A refreshed private apt; its files are gone afterwards. Raises GuestUnavailable where there is no apt or no network."""
    if missing := [tool for tool in _TOOLS if shutil.which(tool) is None]:
        raise GuestUnavailable(f"Debian's packages are fetched by {missing[0]}, which this machine lacks; {_HINT}")
    with tempfile.TemporaryDirectory(prefix="softkvm-apt-") as state:
        yield Apt(Path(state), progress)


def _dpkg_deb(action: str, archive: Path) -> bytes:
    """What dpkg-deb prints of a package file."""
    return subprocess.run(["dpkg-deb", action, archive], capture_output=True, check=True).stdout


def read_member(archive: Path, member: re.Pattern[str]) -> tuple[str, bytes]:
    """The path and content of the first regular file of the package file `archive` whose path matches `member`."""
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", archive], stdout=subprocess.PIPE) as process:
        try:
            with tarfile.open(fileobj=process.stdout, mode="r|") as tar:
                for info in tar:
                    if info.isreg() and member.fullmatch(info.name):
                        return info.name, cast(IO[bytes], tar.extractfile(info)).read()
        finally:
            process.kill()  # the wanted file is often the first of hundreds of megabytes
    raise GuestUnavailable(f"the package {archive.name} holds no file {member.pattern}")


def _parse_stanza(name: str, text: str) -> Package:
    fields = dict(re.findall(r"^([A-Za-z-]+): (.*)$", text, re.MULTILINE))
    if "Version" not in fields:
        raise _not_offered(name)
    names = (re.split(r"[ (|:]", dependency.strip(), maxsplit=1)[0] for dependency in fields.get("Depends", "").split(","))
    return Package(name, fields["Version"], tuple(filter(None, names)))


def _not_offered(package: str) -> GuestUnavailable:
    return GuestUnavailable(f"this machine's apt sources do not offer the package {package}; softkvm's default guest is Debian's")


def _first_error(text: str) -> str:
    """The first of apt's error lines, shortened to what a sentence can carry."""
    lines = text.splitlines() or ["no message"]
    errors = [line.removeprefix("E: ") for line in lines if line.startswith("E: ")] or lines
    return errors[0].strip().rstrip(".")[:200]
