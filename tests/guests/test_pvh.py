"""Debian's kernel as the ELF file that is inside its bzImage: started through its PVH entry."""

from __future__ import annotations

import struct
from pathlib import Path

import lz4.block
import pytest

from softkvm.cli import guest
from softkvm.testing import GuestRun
from softkvm.vmm.boot import pvh
from tests.guests.test_boot import COMPLAINT

pytestmark = pytest.mark.guest

_SETUP_SECTS, _PAYLOAD = 0x1F1, 0x248
_BLOCK = 8 << 20  # what a block of LZ4's legacy format decompresses to, at most


def vmlinux(image: bytes) -> bytes:
    """The payload of a bzImage, whose compressor is LZ4 (Linux 6.1 `Documentation/x86/boot.rst`, payload_offset)."""
    offset, length = struct.unpack_from("<II", image, _PAYLOAD)
    start = (image[_SETUP_SECTS] + 1) * 512 + offset
    payload, at, kernel = image[start : start + length - 4], 4, b""
    while at < len(payload):
        (size,) = struct.unpack_from("<I", payload, at)
        kernel += lz4.block.decompress(payload[at + 4 : at + 4 + size], uncompressed_size=_BLOCK)
        at += 4 + size
    return kernel


def test_debians_kernel_boots_by_pvh(guest_run: GuestRun, tmp_path: Path) -> None:
    path = tmp_path / "vmlinux"
    path.write_bytes(vmlinux(Path(guest.prepare("cloud").kernel).read_bytes()))
    assert pvh.find_entry(path.read_bytes()) is not None
    result = guest_run("sh", "-c", "nproc; dmesg", options=("-k", str(path), "-c", "2"))
    assert result.status == 0, result
    assert result.stdout.startswith("2\n")
    assert "0x00000000000fffff] reserved" in result.stdout, "PVH's own entry in the memory map"
    assert [line for line in result.stdout.splitlines() if COMPLAINT.search(line)] == []
