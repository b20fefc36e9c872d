"""A machine of one core without a hypervisor, for tests of the engine."""

from __future__ import annotations

from softkvm import _engine
from softkvm.silicon import control

RAM_SIZE = 1 << 20
CODE = 0x1000
HOST_INTERRUPT = (1, 0x60)
"""Exit reasons of a host interrupt, by vendor."""


class Machine:
    """1 MB of RAM and one core in real mode, with RIP at `CODE`."""

    def __init__(self, model: str) -> None:
        self.memory = _engine.Memory(RAM_SIZE)
        self.ram = memoryview(self.memory)
        self.npt = _engine.NestedPageTable()
        self.npt.map(0, RAM_SIZE, self.memory, 0, 7)
        self.core = _engine.Core(_engine.Model(model), 0)
        self.block = _engine.ControlBlock()
        self.view = control.ControlBlock.from_buffer(self.block)
        state = self.view.state
        for segment in state.segments:
            segment.access_rights, segment.limit = 0x93, 0xFFFF
        state.segments[control.SegmentRegister.CS].access_rights = 0x9B
        state.segments[control.SegmentRegister.TR].access_rights = 0x8B
        state.segments[control.SegmentRegister.LDTR].access_rights = 0x82
        state.rip, state.rflags, state.cr0, state.gdtr.limit, state.idtr.limit = CODE, 2, 0x10, 0xFFFF, 0xFFFF
        self.view.control.tsc_multiplier = 1 << 48

    def load(self, code: bytes) -> None:
        """Puts `code` where RIP is."""
        self.ram[CODE : CODE + len(code)] = code

    def enter(self) -> int:
        """Runs until an exit; returns its reason."""
        return self.core.enter(self.block, self.npt)

    def run(self) -> int:
        """Runs until an exit that is not a host interrupt, of which the core has periodic ones."""
        while (reason := self.enter()) in HOST_INTERRUPT:
            pass
        return reason
