"""The NMI of the counters: which CPU it came to, and what it interrupted.

Answers to Linux 6.1 `perf_event_nmi_handler()` in `arch/x86/events/core.c` and `struct perf_guest_info_callbacks`: KVM says whose guest an
NMI came out of before it lets the host handle it (`kvm_before_interrupt()`).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from softkvm.host import nmi
from softkvm.host.perf.core import CpuPerf
from softkvm.host.perf.event import Registers


class _Interrupted(threading.local):
    cpu: CpuPerf | None = None
    registers: Registers | None = None


_interrupted = _Interrupted()


@contextmanager
def interrupted(cpu: CpuPerf, registers: Registers) -> Iterator[None]:
    """NMIs of this thread have come out of a guest on `cpu`, whose registers these are."""
    _interrupted.cpu, _interrupted.registers = cpu, registers
    try:
        yield
    finally:
        _interrupted.cpu = _interrupted.registers = None


def perf_event_nmi_handler() -> bool:
    """Whether the NMI was a counter's."""
    cpu, registers = _interrupted.cpu, _interrupted.registers
    return cpu is not None and registers is not None and cpu.handle_nmi(registers)


nmi.register_nmi_handler(perf_event_nmi_handler)
