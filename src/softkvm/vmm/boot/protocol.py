"""The boot protocols: what an image file is decides how it is started."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from softkvm.uapi import kvm as uapi
from softkvm.vmm.boot import cpu, linux, multiboot, pvh
from softkvm.vmm.boot.image import Kernel, parse_kernel, read_file
from softkvm.vmm.memory import GuestMemory


class Bootable(Protocol):
    """An image that a machine can start."""

    def load(self, memory: GuestMemory, initrd: bytes | None, command_line: bytes, cpus: int) -> None:
        """Put everything into memory that the image finds there at its entry; ConfigError if it does not fit."""
        ...

    def enter(self, sregs: uapi.Sregs) -> uapi.Regs:
        """Change the reset values in `sregs` to those at the entry; the general registers there."""
        ...


@dataclass(frozen=True)
class LinuxKernel:
    """A kernel that starts by the Linux 64-bit boot protocol."""

    kernel: Kernel

    def load(self, memory: GuestMemory, initrd: bytes | None, command_line: bytes, cpus: int) -> None:
        """As `Bootable`; a command line that names no console gets the first serial port."""
        linux.load(memory, self.kernel, initrd, linux.with_console(command_line), cpus)

    def enter(self, sregs: uapi.Sregs) -> uapi.Regs:
        """As `Bootable`."""
        cpu.enter_long_mode(sregs)
        return cpu.entry_registers(self.kernel.entry)


def read(path: Path, ram_end: int) -> Bootable:
    """Read an image for a machine whose low RAM ends at `ram_end`; ConfigError.

    It is started by multiboot if it has that header, by PVH if it has that note, otherwise as Linux.
    """
    data = read_file(path)
    if multiboot.find_header(data) is not None:
        return multiboot.parse(data, path, ram_end)
    if pvh.find_entry(data) is not None:
        return pvh.parse(data, path, ram_end)
    return LinuxKernel(parse_kernel(data, path, ram_end))
