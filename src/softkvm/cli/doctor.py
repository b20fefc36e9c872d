"""`softkvm doctor`: every requirement in one row, with what was found and, where something is missing, the remedy.

A check tries the thing itself rather than looking for its traces: it loads the engine, makes guest memory, writes to the cache.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from enum import Enum
from pathlib import Path

import msgspec

from softkvm.cli import report
from softkvm.cli.errors import CacheError
from softkvm.cli.guest import KERNELS, Cache, Provider, default_directory

_MINIMUM_PYTHON = (3, 11)
_DEFAULT_GUEST_MEMORY = 512 << 20
_CACHE_NEEDS = 64 << 20  # a kernel package while it is being fetched


class State(Enum):
    """The result of one check; only MISSING makes softkvm unusable."""

    OK = "ok"
    OPTIONAL = "optional"
    MISSING = "missing"


class Finding(msgspec.Struct, frozen=True):
    """One requirement: its name, state, what was found, and what to do about it (empty if nothing)."""

    requirement: str
    state: State
    found: str
    remedy: str = ""


def examine() -> list[Finding]:
    """Run all checks, in the order in which a person would fix them."""
    return [check() for check in _CHECKS]


def _python() -> Finding:
    found = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < _MINIMUM_PYTHON:
        return Finding("Python", State.MISSING, found, "Use Python 3.11 or later.")
    return Finding("Python", State.OK, found)


def _engine() -> Finding:
    versions = report.versions()
    if (reason := versions.get("engine")) is not None:
        return Finding("engine", State.MISSING, reason, "Build it with `make build`.")
    found = {k.removeprefix("engine."): v for k, v in versions.items() if k.startswith("engine.")}
    return Finding("engine", State.OK, ", ".join(f"{k} {v}" for k, v in found.items() if k != "translator"))


def _translator() -> Finding:
    """Whether hot guest code becomes host code; without that, guests run in the interpreter."""
    found = report.versions().get("engine.translator", "none: there is no engine")
    if found.startswith("none"):
        remedy = "Guests are interpreted, several times slower: the translator needs an x86-64 host and executable memory."
        return Finding("translator", State.OPTIONAL, found, remedy)
    return Finding("translator", State.OK, f"host code for {found}")


def _guest_memory() -> Finding:
    try:
        os.close(os.memfd_create("softkvm-doctor"))
    except OSError as error:
        return Finding("shared memory", State.MISSING, f"memfd_create: {error.strerror}", "Allow memfd_create in this sandbox.")
    pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    found = f"{pages >> 20} MiB free"
    if pages < _DEFAULT_GUEST_MEMORY:
        return Finding("shared memory", State.OPTIONAL, found, "Give guests less memory: `softkvm run -m 256M`.")
    return Finding("shared memory", State.OK, found)


def _cache() -> Finding:
    directory = default_directory()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=directory):
            free = shutil.disk_usage(directory).free
    except OSError as error:
        return Finding("cache", State.MISSING, f"{directory}: {error.strerror}", "Set SOFTKVM_CACHE to a directory that can be written.")
    if free < _CACHE_NEEDS:
        return Finding("cache", State.OPTIONAL, f"{directory}, {free >> 20} MiB free", "Free 64 MiB or set SOFTKVM_CACHE.")
    return Finding("cache", State.OK, str(directory))


def _guests() -> Finding:
    names = [f"vmlinuz-{flavour}" for flavour in KERNELS] + ["busybox"]
    with Provider(Cache(default_directory()), lambda _: None) as provider:
        try:
            found = "; ".join(provider.describe(name) for name in names)
        except CacheError as error:
            return Finding("guests", State.OPTIONAL, "not readable", str(error).capitalize() + ".")
    if "not cached" not in found:
        return Finding("guests", State.OK, found)
    return Finding("guests", State.OPTIONAL, found, "The first `softkvm run` fetches what it needs.")


def _apt() -> Finding:
    missing = [tool for tool in ("apt-get", "apt-cache", "dpkg-deb") if shutil.which(tool) is None]
    if missing:
        return Finding("apt", State.OPTIONAL, f"no {missing[0]}", "Use your own `-k KERNEL -i INITRD`, or `softkvm run --selftest`.")
    folder = Path("/etc/apt/sources.list.d")  # what has another ending is nothing to apt
    sources = [*Path("/etc/apt").glob("sources.list"), *folder.glob("*.list"), *folder.glob("*.sources")]
    return Finding("apt", State.OK, ", ".join(source.name for source in sources))


_CHECKS: tuple[Callable[[], Finding], ...] = (_python, _engine, _translator, _guest_memory, _cache, _apt, _guests)
