"""The archive writer, judged by the kernel's format description and by cpio(1) where it is installed."""

import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from softkvm.cli.guest import cpio


def test_header_is_110_bytes_of_hexadecimal_fields() -> None:
    record = cpio.archive([cpio.file("/etc/motd", b"hello", 0o600)])
    fields = [int(record[6 + 8 * i : 14 + 8 * i], 16) for i in range(13)]
    assert record[:6] == b"070701"
    assert fields == [1, stat.S_IFREG | 0o600, 0, 0, 1, 0, 5, 0, 0, 0, 0, len("etc/motd") + 1, 0]
    assert record[110:119] == b"etc/motd\0"


def test_names_and_contents_are_padded_to_four_bytes() -> None:
    one = cpio.archive([cpio.file("/a", b"x")])
    assert one[110:116] == b"a\0" + b"x\0\0\0"
    assert len(one) % 4 == 0


def test_archive_ends_with_the_trailer() -> None:
    assert cpio.archive([])[110:121] == b"TRAILER!!!\0"


def test_device_numbers_are_in_the_header() -> None:
    record = cpio.archive([cpio.character_device("/dev/console", 5, 1)])
    assert int(record[6 + 72 : 6 + 80], 16) == 5
    assert int(record[6 + 80 : 6 + 88], 16) == 1


def test_equal_input_gives_equal_bytes() -> None:
    entries = [cpio.directory("/bin"), cpio.symlink("/bin/sh", "busybox")]
    assert cpio.archive(entries) == cpio.archive(entries)


@pytest.mark.skipif(shutil.which("cpio") is None, reason="cpio is not installed")
def test_cpio_reads_the_archive(tmp_path: Path) -> None:
    data = cpio.archive([cpio.directory("/d"), cpio.file("/d/f", b"content"), cpio.symlink("/d/l", "f")])
    subprocess.run(["cpio", "-id", "--quiet"], input=data, cwd=tmp_path, check=True)
    assert (tmp_path / "d/l").read_bytes() == b"content"
