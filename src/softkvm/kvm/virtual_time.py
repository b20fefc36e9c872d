"""VM entries in virtual time: the silicon's clock is set before each of them, and the host's follows it.

A vCPU whose host gives turns (`host/turns.py`) calls `enter()` in place of its core's own entry. Virtual time passes with the instructions
that retire, and with the exits that the host handles, which cost a guest time on real silicon too.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

from softkvm.host import task
from softkvm.host.turns import Random, Turns
from softkvm.kvm import exits
from softkvm.silicon import EXIT_BUDGET

if TYPE_CHECKING:
    from softkvm.kvm.vcpu import Vcpu
    from softkvm.kvm.vcpu_core import VcpuCore

CYCLES_PER_INSTRUCTION = 4
"""Of the host's TSC: with 2 GHz a guest is about as fast as it is in real time."""
CYCLES_PER_EXIT = 4000
_EXIT = struct.Struct("<IIQQ")
_REGISTERS = 18 * 8
"""Bytes of general registers, RIP and RFLAGS at the start of the guest's state."""


class ExitTrace:
    """All VM exits of a VM in one hash: who left, why, when, and with which registers."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)

    def add(self, vcpu: VcpuCore, reason: int) -> None:
        """One more exit."""
        info = vcpu.exit
        self._hash.update(_EXIT.pack(vcpu.vcpu_id, reason, info.instructions, info.tsc))
        self._hash.update(memoryview(vcpu.state).cast("B")[:_REGISTERS])

    def digest(self) -> str:
        """The hash so far."""
        return self._hash.hexdigest()


def prepare(vcpu: VcpuCore, turns: Turns) -> None:
    """Controls of a new vCPU: virtual time, and random numbers of its own from the seed."""
    vcpu.control.tsc_rate = CYCLES_PER_INSTRUCTION
    vcpu.control.random = Random(turns.seed ^ Random(vcpu.vcpu_id).next()).next()


def enter(vcpu: VcpuCore, turns: Turns, core_enter: Callable[[], int]) -> int:
    """Enter the guest by `core_enter` for what is left of its turn; the exit reason."""
    control, info, clock = vcpu.control, vcpu.exit, turns.clock
    control.virtual_tsc = clock.tsc()
    control.instruction_budget = max(turns.left, 1)
    reason = core_enter()
    turns.left -= info.instructions
    clock.set_tsc(info.tsc + CYCLES_PER_EXIT)
    vcpu.vm.exit_trace.add(vcpu, reason)
    return reason


def handle_budget(vcpu: Vcpu) -> int:
    """The turn is over: to the host it is a timer tick whose scheduler prefers somebody else."""
    task.current().set_flag(task.TIF_NEED_RESCHED)
    return exits.handle_interrupt(vcpu)


handlers = {EXIT_BUDGET: handle_budget}
EXIT_NAMES = {EXIT_BUDGET: "BUDGET"}
