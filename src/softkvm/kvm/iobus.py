"""The buses of in-kernel devices: which device answers a port or a guest-physical address.

Answers to `kvm_io_bus_*` of Linux 6.1 `virt/kvm/kvm_main.c`. Several devices may claim one address (an ioeventfd inside a coalesced
zone): each is asked in the order of registration until one takes the access; what none takes goes to user space.
"""

from __future__ import annotations

import errno
from threading import RLock
from typing import Protocol

MAX_DEVICES = 1000
"""KVM's NR_IOBUS_DEVS."""

_SMALL_RANGE = 0x100
"""Ranges up to this size are entered address by address, so that finding a device is one dictionary look-up."""


class Device(Protocol):
    """An in-kernel device on a bus; sizes in bytes, values little-endian integers."""

    def read(self, address: int, size: int) -> int | None:
        """The value, or None if the device does not take this access."""

    def write(self, address: int, size: int, value: int) -> bool:
        """False if the device does not take this access."""


class IoBus:
    """Port or guest-physical space of in-kernel devices. Readers need no lock: registration replaces, never edits, what they look at."""

    def __init__(self, lock: RLock) -> None:
        """An empty bus whose registrations take `lock`."""
        self._lock = lock
        self._devices: list[tuple[int, int, Device]] = []
        self._at: dict[int, tuple[Device, ...]] = {}
        self._large: tuple[tuple[int, int, Device], ...] = ()

    def register(self, base: int, length: int, device: Device) -> None:
        """Let `device` answer `length` bytes from `base`; OSError(ENOSPC) when the bus is full."""
        with self._lock:
            if len(self._devices) >= MAX_DEVICES:
                raise OSError(errno.ENOSPC, "too many devices on the bus")
            self._devices.append((base, length, device))
            if length > _SMALL_RANGE:
                self._large += ((base, base + length, device),)
                return
            for address in range(base, base + length):
                self._at[address] = (*self._at.get(address, ()), device)

    def unregister(self, device: Device) -> None:
        """Take `device` off the bus; nothing happens if it is not there."""
        with self._lock:
            for base, length, found in [entry for entry in self._devices if entry[2] is device]:
                self._devices.remove((base, length, found))
                for address in range(base, base + length) if length <= _SMALL_RANGE else ():
                    left = tuple(other for other in self._at[address] if other is not device)
                    if left:
                        self._at[address] = left
                    else:
                        del self._at[address]
            self._large = tuple(entry for entry in self._large if entry[2] is not device)

    def read(self, address: int, size: int) -> int | None:
        """Read from the device at `address`; None if no device takes the access."""
        for device in self._at.get(address, ()):
            if (value := device.read(address, size)) is not None:
                return value
        if self._large:
            for base, end, device in self._large:
                if base <= address < end and (value := device.read(address, size)) is not None:
                    return value
        return None

    def write(self, address: int, size: int, value: int) -> bool:
        """Write to the device at `address`; False if no device takes the access."""
        for device in self._at.get(address, ()):
            if device.write(address, size, value):
                return True
        if self._large:
            return any(device.write(address, size, value) for base, end, device in self._large if base <= address < end)
        return False
