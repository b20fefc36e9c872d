"""Multiboot images: what is loaded where, and what the kernel is told."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from softkvm.uapi import kvm as uapi
from softkvm.vmm import ConfigError, layout
from softkvm.vmm.boot import multiboot, protocol
from softkvm.vmm.boot.multiboot import MultibootKernel
from softkvm.vmm.layout import MIB
from softkvm.vmm.memory import GuestMemory
from tests.vmm.boot import images
from tests.vmm.doubles import HostBlock

RAM = 64 * MIB


@pytest.fixture
def memory() -> GuestMemory:
    return GuestMemory(RAM, HostBlock)


def parse(data: bytes, ram: int = RAM) -> MultibootKernel:
    return multiboot.parse(data, Path("test.flat"), ram)


def u32(memory: GuestMemory, address: int) -> int:
    value: int = struct.unpack("<I", memory.view(address, 4))[0]
    return value


def text(memory: GuestMemory, address: int) -> bytes:
    return bytes(memory.view(address, 256)).split(b"\0")[0]


def test_header_is_found_by_its_checksum_on_a_multiple_of_four() -> None:
    good = images.multiboot_header(0)
    assert multiboot.find_header(bytes(64) + good) == 0
    assert multiboot.find_header(bytes(62) + good) is None
    assert multiboot.find_header(good[:4] + bytes(8) + good) == 0
    assert multiboot.find_header(bytes(8192) + good) is None
    assert multiboot.find_header(good[:8]) is None


@pytest.mark.parametrize("bits", [32, 64])
def test_kernel_starts_in_flat_protected_mode(memory: GuestMemory, bits: int) -> None:
    kernel = parse(images.multiboot(bits=bits))
    kernel.load(memory, None, b"one two", 1)
    assert bytes(memory.view(4 * MIB, 12)) == images.multiboot_header(0)
    sregs = uapi.Sregs()
    regs = kernel.enter(sregs)
    assert (regs.rip, regs.rax, regs.rbx) == (4 * MIB + 16, 0x2BADB002, layout.MULTIBOOT_INFO.base)
    assert (sregs.cr0 & 0x80000001, sregs.efer, regs.rflags) == (1, 0, 2)
    assert (sregs.cs.db, sregs.cs.l, sregs.cs.limit, sregs.ds.limit) == (1, 0, 0xFFFFFFFF, 0xFFFFFFFF)


def test_information_describes_memory_command_line_and_module(memory: GuestMemory) -> None:
    module = bytes(range(200))
    parse(images.multiboot()).load(memory, module, b"one two", 1)
    info = layout.MULTIBOOT_INFO.base
    assert u32(memory, info) & 0x4D == 0x4D
    assert (u32(memory, info + 4), u32(memory, info + 8)) == (639, 63 * 1024)
    assert text(memory, u32(memory, info + 16)) == b"test.flat one two"
    assert u32(memory, info + 20) == 1
    start, end = struct.unpack("<II", memory.view(u32(memory, info + 24), 8))
    assert start % 4096 == 0
    assert bytes(memory.view(start, end - start)) == module
    length, address = u32(memory, info + 44), u32(memory, info + 48)
    entries = list(struct.iter_unpack("<IQQI", memory.view(address, length)))
    assert {entry[0] for entry in entries} == {20}
    assert (MIB, 63 * MIB, 1) in [entry[1:] for entry in entries]
    assert text(memory, u32(memory, info + 64)) == b"softkvm"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (images.multiboot(flags=1 << 2), "demands what is not supported"),
        (images.multiboot(flags=1 << 16), "demands what is not supported"),
        (images.multiboot(memsz=RAM), "too small for the kernel"),
        (images.multiboot(entry=0x1000), "entry point"),
        (images.multiboot()[:140], "truncated"),
        (images.multiboot_header(0), "damaged ELF"),
    ],
)
def test_images_that_cannot_start(data: bytes, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse(data)


def test_what_does_not_fit(memory: GuestMemory) -> None:
    with pytest.raises(ConfigError, match="module"):
        parse(images.multiboot()).load(memory, bytes(RAM), b"", 1)
    with pytest.raises(ConfigError, match="command line"):
        parse(images.multiboot()).load(memory, None, b"x" * 9000, 1)


def test_the_header_decides_the_protocol(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(images.multiboot())
    assert isinstance(protocol.read(path, RAM), MultibootKernel)
    path.write_bytes(images.vmlinux())
    assert isinstance(protocol.read(path, RAM), protocol.LinuxKernel)
