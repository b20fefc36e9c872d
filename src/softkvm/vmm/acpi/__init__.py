"""The ACPI tables that describe the board to the guest: one file per table, `aml.py` for the byte code, `tables.py` puts them in memory."""

from softkvm.vmm.acpi.fadt import WAKING_VECTOR
from softkvm.vmm.acpi.tables import FACS_ADDRESS, Blob, build

__all__ = ["FACS_ADDRESS", "WAKING_VECTOR", "Blob", "build"]
