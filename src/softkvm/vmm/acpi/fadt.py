"""FADT and FACS: the fixed hardware.

Source of truth: ACPI specification 6.5, 5.2.9 and 5.2.10. The machine has no SMI command port and no general purpose events, a fixed power
button, and none of the legacy parts that `IAPC_BOOT_ARCH` can deny (keyboard controller, VGA).
"""

from __future__ import annotations

import struct

from softkvm.vmm import layout
from softkvm.vmm.devices.reset import RESET_VALUE
from softkvm.vmm.devices.rtc import CENTURY

REVISION, MINOR_REVISION = 6, 3

_SYSTEM_MEMORY, _SYSTEM_IO = 0, 1
_BYTE_ACCESS, _WORD_ACCESS, _DWORD_ACCESS = 1, 2, 3
_PROFILE_ENTERPRISE_SERVER = 4
_BOOT_ARCH_LEGACY_DEVICES, _BOOT_ARCH_NO_VGA = 1 << 0, 1 << 2
_NO_C2, _NO_C3 = 101, 1001  # latencies beyond the limits of 100 and 1000 us: the states do not exist

_WBINVD, _PROC_C1, _SLEEP_BUTTON_IS_DEVICE = 1 << 0, 1 << 2, 1 << 5
_TIMER_32_BITS, _RESET_REGISTER = 1 << 8, 1 << 10
FLAGS = _WBINVD | _PROC_C1 | _SLEEP_BUTTON_IS_DEVICE | _TIMER_32_BITS | _RESET_REGISTER


WAKING_VECTOR = 12
"""Where the FACS has the address, in real mode, of the operating system's way back from S3."""


def facs() -> bytes:
    """The firmware control structure, its waking vector left to the guest."""
    return struct.pack("<4sIIIIIQB31x", b"FACS", 64, 0, 0, 0, 0, 0, 2)


def _address(place: layout.Range | None, access: int) -> bytes:
    """A generic address structure for ports, or an empty one."""
    if place is None:
        return bytes(12)
    return struct.pack("<BBBBQ", _SYSTEM_IO, 8 * place.size, 0, access, place.base)


def body(facs_address: int, dsdt_address: int) -> bytes:
    """What follows the table header."""
    legacy = struct.pack(
        "<IIBBHIBBBBIIIIIIIIBBBBBBBBHHHHBBBBBHBI",
        facs_address,
        dsdt_address,
        0,  # reserved
        _PROFILE_ENTERPRISE_SERVER,
        layout.IRQ_SCI.gsi,
        *(0, 0, 0, 0, 0),  # SMI command port and its commands: none, the machine is in ACPI mode
        layout.PM1A_EVENT.base,
        0,  # PM1b event
        layout.PM1A_CONTROL.base,
        0,  # PM1b control
        0,  # PM2 control
        layout.PM_TIMER.base,
        *(0, 0),  # general purpose events
        layout.PM1A_EVENT.size,
        layout.PM1A_CONTROL.size,
        0,  # PM2 control length
        layout.PM_TIMER.size,
        *(0, 0, 0),  # general purpose event lengths and base
        0,  # C-state control
        _NO_C2,
        _NO_C3,
        *(0, 0),  # flush size and stride: WBINVD does it
        *(0, 0),  # duty cycle
        *(0, 0),  # RTC alarm: day, month
        CENTURY,
        _BOOT_ARCH_LEGACY_DEVICES | _BOOT_ARCH_NO_VGA,
        0,  # reserved
        FLAGS,
    )
    extended = (
        _address(layout.RESET_CONTROL, _BYTE_ACCESS),
        struct.pack("<BHB", RESET_VALUE, 0, MINOR_REVISION),
        struct.pack("<QQ", 0, dsdt_address),  # FACS stays in the 32-bit field alone
        _address(layout.PM1A_EVENT, _WORD_ACCESS),
        _address(None, 0),
        _address(layout.PM1A_CONTROL, _WORD_ACCESS),
        _address(None, 0),
        _address(None, 0),
        _address(layout.PM_TIMER, _DWORD_ACCESS),
        _address(None, 0),
        _address(None, 0),
        _address(None, 0),  # sleep control and status: for hardware-reduced machines
        _address(None, 0),
        b"SOFTKVM\0",  # hypervisor vendor identity
    )
    return legacy + b"".join(extended)
