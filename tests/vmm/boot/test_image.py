"""Kernel files: what is accepted, what is refused and in which words."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from softkvm.vmm.boot import Kernel, read_kernel
from softkvm.vmm.errors import ConfigError
from softkvm.vmm.layout import MIB
from tests.vmm.boot import images

RAM = 512 * MIB
DEBIAN = Path(os.environ.get("SOFTKVM_TEST_KERNEL", "/nonexistent"))


def read(tmp_path: Path, data: bytes, ram: int = RAM) -> Kernel:
    path = tmp_path / "vmlinuz"
    path.write_bytes(data)
    return read_kernel(path, ram)


def refused(tmp_path: Path, data: bytes, ram: int = RAM) -> str:
    with pytest.raises(ConfigError) as info:
        read(tmp_path, data, ram)
    message = str(info.value)
    assert "\n" not in message
    return message


def test_bzimage_goes_to_its_preferred_address(tmp_path: Path) -> None:
    kernel = read(tmp_path, images.bzimage())
    assert (kernel.start, kernel.end, kernel.entry) == (16 * MIB, 24 * MIB, 16 * MIB + 0x200)
    (piece,) = kernel.pieces
    assert piece.address == 16 * MIB
    assert bytes(piece.data) == bytes(range(256)) * 16
    assert kernel.setup_header == images.bzimage()[0x1F1:0x26C]
    assert kernel.initrd_limit == 0x80000000
    assert kernel.command_line_limit == 2047


def test_relocatable_kernel_moves_down_in_small_memory(tmp_path: Path) -> None:
    assert read(tmp_path, images.bzimage(), 16 * MIB).start == 2 * MIB


def test_zero_setup_sectors_mean_four(tmp_path: Path) -> None:
    data = images.bzimage(setup_sects=0)
    kernel = read(tmp_path, data + bytes(5 * 512))
    assert bytes(kernel.pieces[0].data) == (data + bytes(5 * 512))[2560 : 2560 + images.PAYLOAD]


def test_trailing_bytes_such_as_a_signature_are_not_loaded(tmp_path: Path) -> None:
    assert len(read(tmp_path, images.bzimage() + b"signature").pieces[0].data) == images.PAYLOAD


@pytest.mark.parametrize(
    "data", [b"", b"MZ", b"#!/bin/sh\n" * 100, bytes(5000), images.bzimage(boot_flag=0), images.bzimage(header=b"hdrs")]
)
def test_other_files_are_not_a_kernel(tmp_path: Path, data: bytes) -> None:
    assert "is not a Linux kernel" in refused(tmp_path, data)


@pytest.mark.parametrize("kept", [0x264, 1024, 1024 + images.PAYLOAD - 1])
def test_truncated_kernel(tmp_path: Path, kept: int) -> None:
    assert "truncated" in refused(tmp_path, images.bzimage()[:kept])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": 0x0204}, "boot protocol 2.04"),
        ({"xloadflags": 0}, "no 64-bit entry point"),
        ({"loadflags": 0}, "no 64-bit entry point"),
        ({"syssize": 1}, "damaged"),
        ({"kernel_alignment": 0}, "damaged"),
        ({"kernel_alignment": 3}, "damaged"),
        ({"pref_address": 0}, "damaged"),
    ],
)
def test_kernels_that_cannot_be_started(tmp_path: Path, changes: dict[str, int], words: str) -> None:
    assert words in refused(tmp_path, images.bzimage(**changes))


def test_kernel_that_does_not_fit_names_the_memory_it_needs(tmp_path: Path) -> None:
    assert "needs 24 MB" in refused(tmp_path, images.bzimage(relocatable_kernel=0), 16 * MIB)
    assert "needs 10 MB" in refused(tmp_path, images.bzimage(), 8 * MIB)
    assert "too small" in refused(tmp_path, images.bzimage(pref_address=1 << 63, init_size=0xFFFFFFFF), RAM)


def test_kernel_whose_header_understates_its_memory_still_must_fit(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="too small"):
        read(tmp_path, images.bzimage(init_size=0, relocatable_kernel=0), 16 * MIB + images.PAYLOAD - 1)


def test_missing_file_and_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no kernel file"):
        read_kernel(tmp_path / "none", RAM)
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        read_kernel(tmp_path, RAM)


def test_vmlinux_is_entered_at_its_elf_entry(tmp_path: Path) -> None:
    kernel = read(tmp_path, images.vmlinux())
    assert (kernel.entry, kernel.start, kernel.end) == (16 * MIB, 16 * MIB, 20 * MIB)
    assert bytes(kernel.pieces[0].data) == bytes(range(256))
    assert kernel.setup_header[0x11:0x15] == b"HdrS"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (images.vmlinux()[:32], "damaged ELF"),
        (images.vmlinux(machine=40), "not an x86-64 kernel"),
        (images.vmlinux(kind=3), "not an x86-64 kernel"),
        (images.vmlinux(filesz=257), "truncated"),
        (images.vmlinux(memsz=255), "damaged"),
        (images.vmlinux(entry=0), "damaged"),
        (images.vmlinux(address=0x1000), "below 1 MB"),
        (images.vmlinux(memsz=1 << 30), "needs 1040 MB"),
    ],
)
def test_bad_vmlinux(tmp_path: Path, data: bytes, words: str) -> None:
    assert words in refused(tmp_path, data)


@pytest.mark.skipif(not DEBIAN.exists(), reason="SOFTKVM_TEST_KERNEL names no kernel")
def test_debian_kernel_is_accepted() -> None:
    kernel = read_kernel(DEBIAN, RAM)
    assert kernel.start == 16 * MIB
    assert kernel.end <= RAM
