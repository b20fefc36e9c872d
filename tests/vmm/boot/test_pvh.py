"""PVH images: which they are, what is loaded where, and what the kernel is told."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softkvm.uapi import kvm as uapi
from softkvm.vmm import ConfigError, layout
from softkvm.vmm.boot import protocol, pvh
from softkvm.vmm.boot.protocol import LinuxKernel
from softkvm.vmm.boot.pvh import PvhKernel
from softkvm.vmm.layout import MIB
from softkvm.vmm.memory import GuestMemory
from tests.vmm.boot import images
from tests.vmm.doubles import HostBlock

RAM = 64 * MIB
ENTRY = 16 * MIB + 8


def load(data: bytes, initrd: bytes | None = None, line: bytes = b"quiet") -> tuple[PvhKernel, GuestMemory]:
    kernel, memory = pvh.parse(data, Path("vmlinux"), RAM), GuestMemory(RAM, HostBlock)
    kernel.load(memory, initrd, line, 1)
    return kernel, memory


def test_the_note_decides(tmp_path: Path) -> None:
    path = tmp_path / "vmlinux"
    path.write_bytes(images.pvh())
    assert isinstance(protocol.read(path, RAM), PvhKernel)
    path.write_bytes(images.vmlinux())
    assert isinstance(protocol.read(path, RAM), LinuxKernel)


@pytest.mark.parametrize(
    ("note", "entry"),
    [
        (images.phys32_entry(ENTRY), ENTRY),
        (images.phys32_entry(1, b"GNU\0", 3) + images.phys32_entry(ENTRY), ENTRY),
        (images.phys32_entry(1, kind=17), None),
        (images.phys32_entry(1, b"Xenia\0"), None),
        (images.phys32_entry(ENTRY)[:-1], None),
        (b"", None),
        (b"\xff" * 64, None),
    ],
)
def test_which_notes_name_an_entry(note: bytes, entry: int | None) -> None:
    assert pvh.find_entry(images.pvh(note)) == entry


@given(st.binary(max_size=300), st.integers(0, 200))
def test_any_bytes_are_no_entry_or_one(noise: bytes, at: int) -> None:
    image = bytearray(images.pvh())
    image[at : at + len(noise)] = noise
    pvh.find_entry(bytes(image))
    pvh.find_entry(b"\x7fELF\x02" + noise)


def test_kernel_starts_in_flat_protected_mode() -> None:
    kernel, _ = load(images.pvh())
    sregs = uapi.Sregs()
    regs = kernel.enter(sregs)
    assert (regs.rip, regs.rbx, regs.rflags) == (ENTRY, layout.PVH_INFO.base, 2)
    assert (sregs.cr0 & 0x80000001, sregs.cr4, sregs.efer) == (1, 0, 0)
    assert (sregs.cs.db, sregs.cs.l, sregs.cs.limit, sregs.ds.limit, sregs.tr.limit) == (1, 0, 0xFFFFFFFF, 0xFFFFFFFF, 0x67)


def test_what_ebx_points_to() -> None:
    _, memory = load(images.pvh(), initrd=b"module", line=b"console=hvc0")
    view = memory.view(layout.PVH_INFO.base, layout.PVH_INFO.size)
    magic, version, flags, modules, modules_at, line_at, rsdp, map_at, entries, reserved = struct.unpack_from("<4I4Q2I", view)
    assert (magic, version, flags, modules, reserved) == (0x336EC578, 1, 0, 1, 0)
    assert bytes(memory.view(rsdp, 8)) == b"RSD PTR "
    assert bytes(memory.view(line_at, 13)) == b"console=hvc0\0"
    address, size, line, _ = struct.unpack("<4Q", memory.view(modules_at, 32))
    assert (bytes(memory.view(address, size)), line) == (b"module", 0)
    ram = [struct.unpack("<QQII", memory.view(map_at + 24 * index, 24)) for index in range(entries)]
    assert (0, layout.EBDA.base, 1, 0) in ram
    assert (MIB, RAM - MIB, 1, 0) in ram


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (images.pvh(entry=4), "none of its segments"),
        (images.pvh(machine=40), "not an x86-64 kernel"),
        (images.pvh(memsz=1 << 30), "needs 1040 MB"),
    ],
)
def test_images_that_cannot_be_started(data: bytes, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        pvh.parse(data, Path("vmlinux"), RAM)


def test_what_does_not_fit_is_refused() -> None:
    for initrd, line, words in ((bytes(RAM), b"", "does not fit"), (None, b"x" * 4096, "command line has")):
        with pytest.raises(ConfigError, match=words):
            load(images.pvh(), initrd, line)
