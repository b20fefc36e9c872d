"""A core with nothing but performance monitoring: registers as `silicon/pmu.py` tells them, and counters that a test turns."""

from __future__ import annotations

from softkvm.host.perf.intel import FIXED, FIXED_CTR0, FULL_WIDTH_PMC0, GLOBAL_OVF_CTRL, GLOBAL_STATUS, GLOBAL_STATUS_SET

MASK = (1 << 48) - 1


class Core:
    """Registers in a dictionary."""

    def __init__(self, amd: bool = False) -> None:
        self.amd = amd
        self.msrs: dict[int, int] = {}

    def pmu_read(self, index: int) -> int:
        return self.msrs.get(index, 0)

    def pmu_write(self, index: int, value: int) -> None:
        if index == GLOBAL_OVF_CTRL:
            self.msrs[GLOBAL_STATUS] = self.pmu_read(GLOBAL_STATUS) & ~value
        elif index == GLOBAL_STATUS_SET:
            self.msrs[GLOBAL_STATUS] = self.pmu_read(GLOBAL_STATUS) | value
        else:
            self.msrs[index] = value

    def count(self, idx: int, by: int) -> None:
        """The counter counts; a wrap sets its status."""
        if self.amd:
            msr = 0xC001_0201 + 2 * idx
            self.msrs[msr] = self.pmu_read(msr) + by & MASK
            return
        msr = FIXED_CTR0 + idx - FIXED if idx >= FIXED else FULL_WIDTH_PMC0 + idx
        value = self.pmu_read(msr) + by
        if value > MASK:
            self.msrs[GLOBAL_STATUS] = self.pmu_read(GLOBAL_STATUS) | 1 << idx
        self.msrs[msr] = value & MASK


class Model:
    """Cascade Lake as perf looks at it: version 4, four general counters and three fixed ones, branch records of format 5."""

    vendor = "intel"

    def cpuid(self, leaf: int, subleaf: int) -> tuple[int, int, int, int]:
        return (0x0730_0404, 0, 0, 0x603) if leaf == 0xA else (0, 0, 0, 0)

    def msrs(self) -> dict[int, int]:
        return {0x345: 0x3005}


class Registers:
    """A guest at an address."""

    ip, user_mode, cr3, stack_pointer, frame_pointer = 0x1000, False, 0, 0, 0
