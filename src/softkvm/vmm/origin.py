"""Where a machine's first state comes from: a kernel image that boots, or a snapshot that goes on."""

from __future__ import annotations

from typing import Protocol

from softkvm.vmm import snapshot
from softkvm.vmm.boot import read as read_image
from softkvm.vmm.config import Config
from softkvm.vmm.memory import GuestMemory
from softkvm.vmm.snapshot import Parts, SnapshotFile


class Origin(Protocol):
    """Fills a machine that was just built."""

    def load(self, memory: GuestMemory) -> None:
        """Fill guest memory, which is all zero."""

    def start(self, parts: Parts) -> None:
        """Give vCPUs and devices, which are as after reset, their first state."""


class KernelOrigin:
    """A kernel to be booted on the first vCPU."""

    def __init__(self, settings: Config) -> None:
        """The kernel that `settings` names."""
        self._settings = settings

    def load(self, memory: GuestMemory) -> None:
        """As `Origin`; ConfigError for an image that cannot be started."""
        settings = self._settings
        self._image = read_image(settings.kernel, memory.low_end)
        self._image.load(memory, settings.initrd, settings.command_line, settings.cpus)

    def start(self, parts: Parts) -> None:
        """As `Origin`."""
        boot_vcpu = parts.vcpus[0]
        sregs = boot_vcpu.get_sregs()
        registers = self._image.enter(sregs)
        boot_vcpu.set_sregs(sregs)
        boot_vcpu.set_regs(registers)


class SnapshotOrigin:
    """A machine that was saved."""

    def __init__(self, saved: SnapshotFile) -> None:
        """`saved` stays open until the machine is built."""
        self._saved = saved

    def load(self, memory: GuestMemory) -> None:
        """As `Origin`; StateError for a damaged file."""
        self._saved.load(memory)

    def start(self, parts: Parts) -> None:
        """As `Origin`; StateError for a state that cannot be."""
        snapshot.restore(self._saved.state, parts)
