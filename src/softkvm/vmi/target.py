"""A guest that a tool is attached to: the channel to it, and the kernel that runs in it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path

from softkvm.vmi import requests
from softkvm.vmi.client import Client
from softkvm.vmi.errors import CommandFailed, KernelNotFound, NoAnswer, Unreadable
from softkvm.vmi.events import VcpuEvent
from softkvm.vmi.linux import kernel as linux
from softkvm.vmi.linux.kernel import Kernel
from softkvm.vmi.linux.objects import Struct
from softkvm.vmi.memory import PageCache
from softkvm.vmi.paging import CR4_LA57
from softkvm.vmi.requests import Registers

_KERNEL_HALF = 1 << 63
_LSTAR = 0xC000_0082
_TURN = 0.25
"""Seconds between two looks at a guest that boots."""
_PATIENCE = 5.0
"""Seconds for a vCPU to give its registers; one that its VMM does not run never does."""


class Target:
    """The client and the kernel, found when it is asked for."""

    def __init__(self, client: Client, cache: Path | None = None) -> None:
        """`cache` is a directory for decoded symbols."""
        self.client = client
        self._cache = cache

    def registers(self, vcpu: int) -> Registers | None:
        """The registers of a vCPU, with the MSRs of system calls; None if it does not run."""
        try:
            return self.client.ask(requests.registers(vcpu, SYSCALL_MSRS), _PATIENCE)
        except (NoAnswer, CommandFailed):
            return None

    @cached_property
    def kernel(self) -> Kernel:
        """The kernel; KernelNotFound if there is none, or not yet."""
        registers = self.registers(0)
        if registers is None:
            return linux.find(self.client.memory, cache=self._cache)
        return linux.find(self.client.memory, registers.sregs.cr3, la57=bool(registers.sregs.cr4 & CR4_LA57), cache=self._cache)

    def wait_for_kernel(self, timeout: float) -> None:
        """Return when there is a kernel that has booted; KernelNotFound after `timeout` seconds without one. No event may be enabled."""
        deadline = time.monotonic() + timeout
        while not self._has_booted():
            if time.monotonic() > deadline:
                raise KernelNotFound(f"no kernel has booted in {timeout:g} seconds")
            self.client.next_event(_TURN)
            self.forget()

    def _has_booted(self) -> bool:
        registers = self.registers(0)
        if registers is None or not registers.msrs.get(_LSTAR, 0) & _KERNEL_HALF:
            return False
        with suppress(KernelNotFound, Unreadable):
            return self.kernel.is_booted
        return False

    def forget(self) -> None:
        """The guest has run: what was read before may be old."""
        if isinstance(self.client.memory, PageCache):
            self.client.memory.forget()
        if "kernel" in self.__dict__:
            self.kernel.forget()

    @contextmanager
    def still(self) -> Iterator[None]:
        """The guest stands still in the block, and what is read there is of one moment."""
        with self.client.paused():
            self.forget()
            yield

    def cr3s(self) -> tuple[int, ...]:
        """The address spaces that the vCPUs are in."""
        found = (self.registers(vcpu) for vcpu in range(self.client.vcpus))
        return tuple(registers.sregs.cr3 for registers in found if registers is not None)

    def task(self, event: VcpuEvent) -> Struct | None:
        """The task that an event's vCPU was in; None if that cannot be said, as on the first instructions of an interrupt."""
        base = event.sregs.gs.base if event.sregs.gs.base & _KERNEL_HALF else event.msrs.shadow_gs
        if not base & _KERNEL_HALF:
            return None
        with suppress(Unreadable):
            kernel = self.kernel
            variable = "pcpu_hot" if "pcpu_hot" in kernel.symbols else "current_task"
            address = kernel.number(base + kernel.symbols[variable] & (1 << 64) - 1)
            task = kernel.struct("task_struct", address)
            task.number("pid")
            return task
        return None


SYSCALL_MSRS = (0xC000_0081, 0xC000_0082, 0xC000_0083, 0xC000_0084, 0x174, 0x175, 0x176)
"""STAR, LSTAR, CSTAR, FMASK, and the three of SYSENTER."""
