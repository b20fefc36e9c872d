"""The self-test guest, judged by the boot protocol and by QEMU's interpreter as a second processor."""

import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from softkvm.cli.selftest import image

QEMU = "qemu-system-x86_64"


def test_header_is_a_64_bit_bzimage() -> None:
    data = image.build()
    setup_sectors = data[0x1F1]
    assert data[0x1FE:0x200] == b"\x55\xaa"
    assert data[0x202:0x206] == b"HdrS"
    version, xloadflags = struct.unpack_from("<H", data, 0x206)[0], struct.unpack_from("<H", data, 0x236)[0]
    assert version >= 0x20C
    assert xloadflags & 1
    assert len(data) == (setup_sectors + 1) * 512 + struct.unpack_from("<I", data, 0x260)[0]


def test_header_ends_where_its_jump_says() -> None:
    data = image.build()
    assert data[0x200] == 0xEB
    assert 0x202 + data[0x201] == 0x268


def test_image_is_reproducible() -> None:
    assert image.build() == image.build()


@pytest.mark.skipif(shutil.which(QEMU) is None, reason="QEMU is not installed")
def test_qemu_runs_it_to_the_end(tmp_path: Path) -> None:
    kernel = tmp_path / "selftest"
    kernel.write_bytes(image.build())
    options = "-accel tcg -m 64 -display none -serial stdio -monitor none -nodefaults -no-reboot -device isa-debug-exit,iobase=0xf4"
    result = subprocess.run(
        [QEMU, *options.split(), "-kernel", kernel], capture_output=True, timeout=60, check=False, stdin=subprocess.DEVNULL
    )
    assert result.stdout.decode() == image.expected("AuthenticAMD")
    assert result.returncode == image.PASSED_STATUS
