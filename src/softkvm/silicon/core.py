"""What hypervisor and silicon share about running a guest: private exit reasons, access rights, and the control block as an object."""

from __future__ import annotations

import ctypes
import struct

from softkvm import _engine
from softkvm.silicon import control

EMULATE_ONE, EMULATE_FIRST = 1, 2
"""`Control.emulate`: run exactly one instruction, which takes its device accesses from `ControlBlock.access`; or run on behind it."""
EXIT_EMULATED = 0x10000
"""The instruction of `EMULATE_ONE` is done."""
EXIT_ACCESS = 0x10001
"""The instruction of `Control.emulate` needs the device access in `Exit.access`."""
EXIT_BUDGET = 0x10002
"""`Control.instruction_budget` instructions have retired."""
EXIT_BREAKPOINT = 0x10006
"""The next instruction has a hidden breakpoint (`NestedPageTable.set_breakpoints`), and is not the one of `Control.emulate`."""
EXIT_MONITOR_TRAP_AMD = 0x10003
"""`Intercept.MONITOR_TRAP` on AMD silicon, which has no number of its own for it."""

RIGHT_R, RIGHT_W, RIGHT_X = 1, 2, 4
"""Rights of a nested page table entry, and access types of `Core.translate` (where 8 = by user mode)."""
RIGHT_SAME = 8
"""Of a nested page table entry: a store that leaves memory as it is does not need `RIGHT_W`."""
RIGHT_DEVICE = 16
"""In `NestedPageTable.lookup()`: no right and no memory, but a device (`map_device()`)."""
WAIVE_WALK = 8
"""In `ControlBlock.waivers`, in the place of a right: the page walker may read the page and set accessed and dirty bits."""
WAIVER_LIMIT = 64
"""Entries of `ControlBlock.waivers`."""


class Vmcb:
    """A control block in the engine's memory and its typed view, with the parts that every exit touches at hand.

    Named after AMD's, as `vmcs` would promise VMREAD: here software reads and writes the fields directly.
    """

    __slots__ = ("control", "exit", "gpr", "hardware", "memory", "state", "view")

    def __init__(self) -> None:
        self.hardware = _engine.ControlBlock()
        """What `Core.enter` takes."""
        self.view = control.ControlBlock.from_buffer(self.hardware)
        self.control = self.view.control
        self.exit = self.view.exit
        self.state = self.view.state
        self.gpr = self.view.state.gpr
        self.memory = memoryview(self.hardware)
        """Its bytes, for `DeviceAccess`."""


class DeviceAccess:
    """The device accesses of a control block, which `EXIT_ACCESS` is about: one `struct` call instead of four fields."""

    _FORMAT = struct.Struct("<QIIQ")
    _BLOCK = control.ControlBlock()
    _WANTED = ctypes.addressof(_BLOCK.exit.access) - ctypes.addressof(_BLOCK)
    _DONE = ctypes.addressof(_BLOCK.access) - ctypes.addressof(_BLOCK)
    _SIZE = ctypes.sizeof(control.Access)

    @classmethod
    def wanted(cls, memory: memoryview) -> tuple[int, int, int, int]:
        """Address, size, whether it is a write, and the data of the access that an instruction waits for."""
        return cls._FORMAT.unpack_from(memory, cls._WANTED)

    @classmethod
    def complete(cls, memory: memoryview, number: int, gpa: int, size: int, write: int, data: int) -> None:
        """Tell the silicon what access `number` of the instruction came to."""
        cls._FORMAT.pack_into(memory, cls._DONE + number * cls._SIZE, gpa, size, write, data)
