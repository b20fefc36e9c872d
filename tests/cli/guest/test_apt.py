"""The apt session, against stand-ins for apt's programs and a real package made by dpkg-deb."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from softkvm.cli.errors import GuestUnavailable
from softkvm.cli.guest import apt

STANZA = "Package: linux-image-cloud-amd64\nVersion: 6.1.2-1\nDepends: linux-image-6.1.0-2-cloud-amd64 (= 6.1.2-1), foo | bar\n"

needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="dpkg-deb is not installed")


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH that holds nothing but programs that succeed silently; tests replace them."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("apt-get", "apt-cache", "dpkg-deb"):
        program(folder / name, "exit 0")
    monkeypatch.setenv("PATH", str(folder))
    return folder


def program(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    root = tmp_path / "package"
    (root / "DEBIAN").mkdir(parents=True)
    (root / "DEBIAN/control").write_text("Package: x\nVersion: 1\nArchitecture: all\nMaintainer: m <m@example.org>\nDescription: x\n")
    (root / "boot").mkdir()
    (root / "boot/config-1").write_bytes(b"config")
    (root / "boot/vmlinuz-1").write_bytes(b"kernel")
    subprocess.run(["dpkg-deb", "--root-owner-group", "-b", root, tmp_path / "x.deb"], check=True, capture_output=True)
    return tmp_path / "x.deb"


def test_show_gives_version_and_dependencies(tools: Path) -> None:
    program(tools / "apt-cache", f"printf '{STANZA}'".replace("\n", "\\n"))
    with apt.session(lambda _: None) as session:
        found = session.show("linux-image-cloud-amd64")
    assert found == apt.Package("linux-image-cloud-amd64", "6.1.2-1", ("linux-image-6.1.0-2-cloud-amd64", "foo"))


def test_unknown_package_is_one_sentence(tools: Path) -> None:
    with apt.session(lambda _: None) as session, pytest.raises(GuestUnavailable, match="do not offer the package nothing"):
        session.show("nothing")
    program(tools / "apt-get", "case $* in *download*) echo 'E: Unable to locate package nothing' >&2; exit 100;; esac")
    with apt.session(lambda _: None) as session, pytest.raises(GuestUnavailable, match="do not offer the package nothing"):
        list(session.archives(["nothing"]))


def test_no_network_is_one_sentence_with_the_selftest_hint(tools: Path) -> None:
    program(tools / "apt-get", "echo 'W: x' >&2; echo \"E: Temporary failure resolving 'deb.debian.org'\" >&2; exit 100")
    with pytest.raises(GuestUnavailable, match=r"Temporary failure resolving.*--selftest"), apt.session(lambda _: None):
        pass


def test_a_mirror_in_the_middle_of_an_update_is_asked_again(tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apt, "_PAUSES", (0.0, 0.0))
    asked = tmp_path / "asked"
    script = f"echo >>{asked}; while read -r line; do count=x$count; done <{asked}; "
    mismatch = 'echo "E: Failed to fetch http://deb.debian.org/x  Hash Sum mismatch" >&2; exit 100'
    program(tools / "apt-get", f"{script} [ $count = xxx ] || {{ {mismatch}; }}")
    with apt.session(lambda _: None):
        assert asked.read_text() == "\n" * 3
    program(tools / "apt-get", mismatch)
    with pytest.raises(GuestUnavailable, match="Hash Sum mismatch"), apt.session(lambda _: None):
        pass


def test_no_apt_is_one_sentence_with_the_selftest_hint(tools: Path) -> None:
    (tools / "apt-get").unlink()
    with pytest.raises(GuestUnavailable, match=r"apt-get, which this machine lacks.*--selftest"), apt.session(lambda _: None):
        pass


def test_session_leaves_no_files(tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    with apt.session(lambda _: None):
        assert list(scratch.iterdir())
    assert list(scratch.iterdir()) == []


@needs_dpkg
def test_member_is_read_out_of_a_package(package: Path) -> None:
    assert apt.read_member(package, re.compile(r"\./boot/vmlinuz-.*")) == ("./boot/vmlinuz-1", b"kernel")


@needs_dpkg
def test_missing_member_is_one_sentence(package: Path) -> None:
    with pytest.raises(GuestUnavailable, match=r"x\.deb holds no file"):
        apt.read_member(package, re.compile("nothing"))
