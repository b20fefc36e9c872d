"""The default guest: Debian's kernels and busybox, fetched once through apt and kept in the cache.

`prepare` is what the rest of the command line uses: names in, a kernel file and an initramfs out, with or without the network.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from softkvm.cli.guest import apt, initramfs, packages
from softkvm.cli.guest.cache import Cache, default_directory

# The meta-packages always depend on the newest kernel of their flavour.
KERNELS = {"cloud": "linux-image-cloud-amd64", "generic": "linux-image-amd64"}
_BUSYBOX = "busybox-static"
_KERNEL_MEMBER = re.compile(r"\./boot/vmlinuz-.*")
_BUSYBOX_MEMBER = re.compile(r"\./(usr/)?bin/busybox")


@dataclass(frozen=True)
class Guest:
    """What a machine boots: a kernel file, an initramfs, one line that names them, and whether its /init speaks our control protocol."""

    kernel: Path
    initrd: Path | bytes
    title: str
    announces_shell: bool


class Provider:
    """Guest files by name, out of the cache or, the first time, through apt; a context manager that owns the apt session."""

    def __init__(self, cache: Cache, progress: apt.Progress) -> None:
        self._cache = cache
        self._progress = progress
        self._session = ExitStack()
        self._apt: apt.Apt | None = None

    def __enter__(self) -> Provider:
        return self

    def __exit__(self, *_: object) -> None:
        self._session.close()

    def kernel(self, flavour: str) -> Path:
        """The kernel of `flavour`, a key of KERNELS."""
        name = f"vmlinuz-{flavour}"

        def fetch() -> None:
            source = self._apt_session()
            images = [name for name in source.show(KERNELS[flavour]).depends if name.startswith("linux-image-")]
            self._fetch(name, source.show(images[0]) if images else source.show(KERNELS[flavour]), _KERNEL_MEMBER)

        return self._cached(name, fetch)

    def busybox(self) -> bytes:
        """The static busybox binary."""
        path = self._cached("busybox", lambda: self._fetch("busybox", self._apt_session().show(_BUSYBOX), _BUSYBOX_MEMBER))
        return path.read_bytes()

    def package(self, name: str) -> bytes:
        """An archive with the Debian package `name` and the shared libraries that it needs."""
        key = f"package-{name}.cpio"

        def fetch() -> None:
            bundle = packages.Bundle()
            package = packages.add_package(bundle, self._apt_session(), name)
            self._cache.store(key, bundle.archive(), package.name, package.version, "with its libraries")

        return self._cached(key, fetch).read_bytes()

    def program(self, path: Path) -> bytes:
        """An archive with a program of this machine as /root/NAME, and the C library if it needs it."""
        bundle = packages.Bundle()
        packages.add_program(bundle, path)
        return bundle.archive() + (self.package("libc6") if bundle.missing_libraries() else b"")

    def describe(self, name: str) -> str:
        """`PACKAGE VERSION` of a cached file."""
        record = self._cache.record(name)
        return f"{record.package} {record.version}" if record else f"{name}, not cached"

    def _cached(self, name: str, fetch: Callable[[], None]) -> Path:
        """Where the file of `name` lies, after `fetch` unless this process or another one has fetched it already."""
        if self._cache.record(name) is None:
            with self._cache.lock():
                if self._cache.record(name) is None:
                    fetch()
        return self._cache.path(name)

    def _apt_session(self) -> apt.Apt:
        if self._apt is None:
            self._apt = self._session.enter_context(apt.session(self._progress))
        return self._apt

    def _fetch(self, name: str, package: apt.Package, member: re.Pattern[str]) -> None:
        path, data = self._apt_session().read(package, member)
        self._cache.store(name, data, package.name, package.version, path)


def prepare(
    kernel: str | Path,
    initrd: Path | None = None,
    command: Sequence[str] = (),
    extras: Sequence[str] = (),
    progress: apt.Progress = lambda _: None,
    cache: Cache | None = None,
) -> Guest:
    """The guest of `kernel`, a file or a key of KERNELS, with `initrd` or else softkvm's initramfs, set to run `command` if there is one.

    `extras` are names of Debian packages, and paths (with a slash) of programs, that softkvm's initramfs has besides busybox.
    Raises GuestUnavailable where a part is neither cached nor fetchable and CacheError where the cache cannot be used.
    """
    with Provider(cache or Cache(default_directory()), progress) as provider:
        path = kernel if isinstance(kernel, Path) else provider.kernel(kernel)
        titles = [kernel.name if isinstance(kernel, Path) else provider.describe(f"vmlinuz-{kernel}")]
        if initrd is not None:
            return Guest(path, initrd, ", ".join([*titles, initrd.name]), announces_shell=False)
        image = initramfs.build(provider.busybox())
        titles.append(provider.describe("busybox"))
        for extra in extras:
            image += provider.program(Path(extra)) if "/" in extra else provider.package(extra)
            titles.append(Path(extra).name if "/" in extra else provider.describe(f"package-{extra}.cpio"))
    if command:
        image += initramfs.command_archive(command)
    return Guest(path, image, ", ".join(titles), announces_shell=True)


__all__ = ["KERNELS", "Cache", "Guest", "Provider", "default_directory", "prepare"]
