"""PCI: the host bridge with both ways into configuration space, and the base of PCI devices.

Source of truth: PCI Local Bus specification 3.0, chapter 6 (type 0 header, BARs, capabilities) and 3.2.2.3 (configuration mechanism 1);
PCI Express base specification, 7.2.2 (ECAM: bus, device, function and register are bits 27:20, 19:15, 14:12 and 11:0 of the address).
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from softkvm.vmm.bus import Bus, Device
from softkvm.vmm.layout import Range
from softkvm.vmm.state import Record

CONFIG_SIZE = 4096
CONVENTIONAL_SIZE = 256
SLOTS = 32
FUNCTIONS = 8

# Type 0 header
VENDOR_ID, DEVICE_ID, COMMAND, STATUS, REVISION, CLASS = 0x00, 0x02, 0x04, 0x06, 0x08, 0x09
HEADER_TYPE, BARS, SUBSYSTEM_VENDOR_ID, SUBSYSTEM_ID = 0x0E, 0x10, 0x2C, 0x2E
CAPABILITIES, INTERRUPT_LINE, INTERRUPT_PIN, FIRST_CAPABILITY = 0x34, 0x3C, 0x3D, 0x40
BAR_COUNT = 6

COMMAND_IO = 1 << 0
COMMAND_MEMORY = 1 << 1
COMMAND_BUS_MASTER = 1 << 2
COMMAND_INTX_DISABLE = 1 << 10
COMMAND_WRITABLE = COMMAND_IO | COMMAND_MEMORY | COMMAND_BUS_MASTER | COMMAND_INTX_DISABLE
STATUS_CAPABILITIES = 1 << 4

BAR_IO = 1 << 0
BAR_64 = 2 << 1
BAR_PREFETCHABLE = 1 << 3

CLASS_HOST_BRIDGE = 0x060000

_ADDRESS_ENABLE = 1 << 31
_ADDRESS_KEPT = _ADDRESS_ENABLE | 0x00FFFFFC


class PciState(Record, frozen=True, kw_only=True):
    """Configuration space of a function; BAR mappings follow from it."""

    version: Literal[1] = 1
    config: Annotated[bytes, Meta(min_length=CONFIG_SIZE, max_length=CONFIG_SIZE)]


class _Bar:
    """A base address register: where a block of registers may be mapped, and where it is mapped now."""

    def __init__(self, index: int, size: int, flags: int, device: Device, width: int) -> None:
        self.index = index
        self.size = size
        self.flags = flags
        self.device = device
        self.width = width
        self.mapped: int | None = None

    @property
    def io(self) -> bool:
        return bool(self.flags & BAR_IO)

    @property
    def bits(self) -> int:
        return 64 if not self.io and self.flags & BAR_64 else 32


class PciDevice:
    """One function: configuration space with a write mask, BARs that follow the guest, capabilities.

    Subclasses describe themselves in the constructor through `add_bar()` and `add_capability()`.
    """

    def __init__(
        self, vendor: int, device: int, class_code: int, *, subsystem: tuple[int, int] = (0, 0), revision: int = 0, pin: int = 0
    ) -> None:
        """`class_code` is the 24-bit class; `subsystem` is (vendor, id); `pin` 1..4 is INTA..INTD, 0 = no interrupt pin."""
        self._config = bytearray(CONFIG_SIZE)
        self._writable = bytearray(CONFIG_SIZE)
        self._bars: list[_Bar] = []
        self._next_capability = FIRST_CAPABILITY
        self._last_pointer = CAPABILITIES
        self._buses: tuple[Bus, Bus] | None = None
        self.pin = pin
        for offset, size, value in (
            (VENDOR_ID, 2, vendor),
            (DEVICE_ID, 2, device),
            (REVISION, 1, revision),
            (CLASS, 3, class_code),
            (SUBSYSTEM_VENDOR_ID, 2, subsystem[0]),
            (SUBSYSTEM_ID, 2, subsystem[1]),
            (INTERRUPT_PIN, 1, pin),
        ):
            self._store(offset, size, value)
        self._allow(COMMAND, 2, COMMAND_WRITABLE)
        self._allow(INTERRUPT_LINE, 1, 0xFF)

    # For subclasses

    def add_bar(self, index: int, size: int, device: Device, *, flags: int = 0, width: int = 8) -> None:
        """Let `device` answer BAR `index` of `size` bytes (a power of two, 16 or more; I/O: 4 or more); `flags` are `BAR_*`."""
        if size & (size - 1) or size < (4 if flags & BAR_IO else 16):
            raise ValueError(f"a BAR cannot have {size} bytes")
        bar = _Bar(index, size, flags, device, width)
        self._bars.append(bar)
        self._store(BARS + 4 * index, 4, flags)
        self._allow(BARS + 4 * index, bar.bits // 8, -size & ((1 << bar.bits) - 1))

    def add_capability(self, identifier: int, body: bytes, writable: bytes = b"") -> int:
        """Append a capability whose `body` follows its two header bytes; returns its offset. `writable` masks the body's writable bits."""
        offset = self._next_capability
        end = offset + 2 + len(body)
        if end > CONVENTIONAL_SIZE:
            raise ValueError("the capabilities do not fit into 256 bytes")
        self._config[self._last_pointer] = offset
        self._config[offset : offset + 2] = bytes((identifier, 0))
        self._config[offset + 2 : end] = body
        self._writable[offset + 2 : offset + 2 + len(writable)] = writable
        self._last_pointer = offset + 1
        self._next_capability = (end + 3) & ~3
        self._store(STATUS, 2, self.config(STATUS, 2) | STATUS_CAPABILITIES)
        return offset

    def config_written(self, offset: int, size: int) -> None:
        """Called after the guest wrote configuration space; a subclass may act on it."""

    # For the host bridge

    def attach(self, ports: Bus, memory: Bus) -> None:
        """Give the function the buses that its BARs are mapped on."""
        self._buses = (ports, memory)

    def config(self, offset: int, size: int) -> int:
        """Read configuration space."""
        return int.from_bytes(self._config[offset : offset + size], "little")

    def write_config(self, offset: int, size: int, value: int) -> None:
        """Write the writable bits of configuration space."""
        for position in range(offset, offset + size):
            mask = self._writable[position]
            self._config[position] = self._config[position] & ~mask | value & 0xFF & mask
            value >>= 8
        if offset < BARS + 4 * BAR_COUNT and offset + size > COMMAND:
            self._map_bars()
        self.config_written(offset, size)

    def bar_address(self, index: int) -> int | None:
        """Where BAR `index` is mapped, or None."""
        return next((bar.mapped for bar in self._bars if bar.index == index), None)

    def _map_bars(self) -> None:
        if self._buses is None:
            return
        command = self.config(COMMAND, 2)
        for bar in self._bars:
            bus = self._buses[0 if bar.io else 1]
            wanted = self._wanted(bar, command)
            if wanted == bar.mapped:
                continue
            if bar.mapped is not None:
                bus.release(bar.mapped)
                bar.mapped = None
            place = None if wanted is None else Range(wanted, bar.size, "BAR")
            if place is not None and bus.free(place):  # where something else is, that one goes on answering
                bus.claim(place, bar.device, bar.width)
                bar.mapped = place.base

    def _wanted(self, bar: _Bar, command: int) -> int | None:
        """Where the guest wants the BAR; None while decoding is off, or it is parked at zero or at the end of the address space."""
        if not command & (COMMAND_IO if bar.io else COMMAND_MEMORY):
            return None
        base = self.config(BARS + 4 * bar.index, bar.bits // 8) & -bar.size
        limit = 1 << (16 if bar.io else bar.bits)
        return base if base > 0 and base + bar.size < limit else None

    def _store(self, offset: int, size: int, value: int) -> None:
        self._config[offset : offset + size] = value.to_bytes(size, "little")

    def _allow(self, offset: int, size: int, mask: int) -> None:
        self._writable[offset : offset + size] = mask.to_bytes(size, "little")

    # State

    def save(self) -> PciState:
        """The whole state."""
        return PciState(config=bytes(self._config))

    def restore(self, state: PciState) -> None:
        """Take over a saved state and map the BARs as it says."""
        self._config[:] = state.config
        self._map_bars()


class HostBridgeState(Record, frozen=True, kw_only=True):
    """The configuration address register."""

    version: Literal[1] = 1
    address: Annotated[int, Meta(ge=0, le=0xFFFFFFFF)]


class HostBridge:
    """Bus 0 and the registers through which the CPU reaches configuration space.

    Function 00:00.0 is the bridge itself (the ids are those of the generic PCI Express host bridge of QEMU's PCI id list).
    """

    def __init__(self, ports: Bus, memory: Bus, narrow: Device) -> None:
        """`ports` and `memory` take the BARs; `narrow` is the byte-wide device inside the address register, at 0xCF9."""
        self._buses = (ports, memory)
        self._functions: dict[int, PciDevice] = {}
        self.address_port = ConfigAddress(narrow)
        self.data_port = ConfigData(self)
        self.ecam = Ecam(self)
        self.add(0, PciDevice(0x1B36, 0x0008, CLASS_HOST_BRIDGE))

    def add(self, slot: int, device: PciDevice, function: int = 0) -> None:
        """Plug `device` in; ValueError if the place is taken."""
        key = slot << 3 | function
        if not 0 <= slot < SLOTS or not 0 <= function < FUNCTIONS or key in self._functions:
            raise ValueError(f"PCI slot {slot}, function {function} is not free")
        self._functions[key] = device
        device.attach(*self._buses)

    def functions(self) -> dict[int, PciDevice]:
        """All functions by slot << 3 | function."""
        return dict(self._functions)

    def read_config(self, function: int, offset: int, size: int) -> int:
        """Read from the function at bus << 8 | slot << 3 | function; all ones if there is none."""
        device = self._functions.get(function)
        return (1 << 8 * size) - 1 if device is None else device.config(offset, size)

    def write_config(self, function: int, offset: int, size: int, value: int) -> None:
        """Write to a function; nothing happens if there is none."""
        device = self._functions.get(function)
        if device is not None:
            device.write_config(offset, size, value)

    def save(self) -> HostBridgeState:
        """The bridge's own state; functions save themselves."""
        return HostBridgeState(address=self.address_port.value)

    def restore(self, state: HostBridgeState) -> None:
        """Take over a saved state."""
        self.address_port.value = state.address & _ADDRESS_KEPT


class ConfigAddress:
    """Port 0xCF8: the address register, reached by doublewords only; narrower accesses belong to the device at 0xCF9."""

    def __init__(self, narrow: Device) -> None:
        self._narrow = narrow
        self.value = 0

    def read(self, offset: int, size: int) -> int:
        """The address, or the byte of the device inside."""
        if size == 4:
            return self.value
        return self._narrow.read(0, 1) if (offset, size) == (1, 1) else (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """Choose bus, function and register."""
        if size == 4:
            self.value = value & _ADDRESS_KEPT
        elif (offset, size) == (1, 1):
            self._narrow.write(0, 1, value)


class ConfigData:
    """Port 0xCFC: the register that 0xCF8 chose."""

    def __init__(self, bridge: HostBridge) -> None:
        self._bridge = bridge

    def read(self, offset: int, size: int) -> int:
        """Read configuration space; all ones while the address register is not enabled."""
        address = self._bridge.address_port.value
        if not address & _ADDRESS_ENABLE:
            return (1 << 8 * size) - 1
        return self._bridge.read_config(address >> 8 & 0xFFFF, (address & 0xFC) + offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        """Write configuration space."""
        address = self._bridge.address_port.value
        if address & _ADDRESS_ENABLE:
            self._bridge.write_config(address >> 8 & 0xFFFF, (address & 0xFC) + offset, size, value)


class Ecam:
    """The whole configuration space in memory."""

    def __init__(self, bridge: HostBridge) -> None:
        self._bridge = bridge

    def read(self, offset: int, size: int) -> int:
        """Read configuration space."""
        return self._bridge.read_config(offset >> 12, offset & 0xFFF, size)

    def write(self, offset: int, size: int, value: int) -> None:
        """Write configuration space."""
        self._bridge.write_config(offset >> 12, offset & 0xFFF, size, value)
