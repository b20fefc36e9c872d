"""Debian's packages for the tests: fetched through apt once, unpacked beside the guest cache, never installed."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from softkvm.cli import guest
from softkvm.cli.guest import apt
from softkvm.cli.guest.cache import write_atomically


def kernel_version() -> tuple[str, str]:
    """Release (as `uname -r`) and package version of the cached cloud kernel."""
    record = guest.Cache(guest.default_directory()).record("vmlinuz-cloud")
    assert record is not None
    return record.package.removeprefix("linux-image-"), record.version


def unpacked(*packages: str) -> Path:
    """A directory with the contents of packages, each `NAME` or `NAME=VERSION`; fetched the first time."""
    root = guest.default_directory() / "tests" / "_".join(packages).replace("=", "-").replace("/", "-")
    with guest.Cache(root.parent).lock():
        if not root.exists():
            with tempfile.TemporaryDirectory(dir=root.parent) as folder:
                _fetch(Path(folder) / "root", packages)
                os.rename(Path(folder) / "root", root)
    return root


def _fetch(folder: Path, packages: tuple[str, ...]) -> None:
    with apt.session(lambda _: None) as session:
        for _, files in session.archives(packages):
            with tarfile.open(fileobj=io.BytesIO(files)) as archive:
                archive.extractall(folder, filter="tar")


def module(source: Path, output: Path) -> bytes:
    """A kernel module for the cached cloud kernel, compiled from one C file in the directory `output`."""
    release, version = kernel_version()
    common = release.rsplit("-", 2)[0] + "-common"
    headers = unpacked(f"linux-headers-{release}={version}", f"linux-headers-{common}={version}", f"linux-kbuild-6.1={version}")
    tree = headers / "usr/src" / f"linux-headers-{release}"
    # Other processes read it meanwhile.
    write_atomically(tree / "Makefile", f"include {headers}/usr/src/linux-headers-{common}/Makefile\n".encode())
    shutil.copy(source, output)
    (output / "Makefile").write_text(f"obj-m := {source.stem}.o\n")
    command = ["make", "-s", "CC=gcc", "-C", str(tree), f"M={output}", "modules"]
    subprocess.run(command, check=True, capture_output=True)
    return (output / f"{source.stem}.ko").read_bytes()


def debian_module(name: str) -> bytes:
    """One of Debian's own modules, such as `drivers/net/dummy`."""
    release, version = kernel_version()
    image = unpacked(f"linux-image-{release}={version}")
    return (image / "lib/modules" / release / "kernel" / f"{name}.ko").read_bytes()
