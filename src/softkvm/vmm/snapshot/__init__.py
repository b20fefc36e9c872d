"""Snapshots of a machine: a file from which another machine goes on.

The file has one typed record with the state of everything but memory, and the pages of memory that are not all zero. KVM's part of the
state is what its ioctls give, in the ABI's own structures; devices have their own records (`vmm/state.py`).

Clocks go on while a snapshot lies on a disk, as if the machine had been suspended: kvmclock, TSCs, RTC and PM timer are as far ahead as the
wall clock is. What counts down (APIC timers, PIT) goes on from where it stood.
"""

from softkvm.vmm.snapshot.file import SnapshotFile, write
from softkvm.vmm.snapshot.machine import Parts, restore, save
from softkvm.vmm.snapshot.records import MachineState

__all__ = ["MachineState", "Parts", "SnapshotFile", "restore", "save", "write"]
