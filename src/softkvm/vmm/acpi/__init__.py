"""The ACPI tables that describe the board to the guest: one file per table, `aml.py` for the byte code, `tables.py` puts them in memory."""

from softkvm.vmm.acpi.tables import Blob, build

__all__ = ["Blob", "build"]
