"""The mainboard: every chip outside KVM, its addresses, its interrupt line, and what it can do to the whole machine."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from softkvm.host.clock import Clock
from softkvm.vmm import layout
from softkvm.vmm.bus import Bus
from softkvm.vmm.devices.acpi_pm import AcpiPm
from softkvm.vmm.devices.debug_exit import DebugExit
from softkvm.vmm.devices.fw_cfg import FwCfg
from softkvm.vmm.devices.reset import KeyboardReset, ResetControl
from softkvm.vmm.devices.rtc import Rtc, memory_sizes
from softkvm.vmm.devices.serial import Serial
from softkvm.vmm.devices.test_device import TestDevice
from softkvm.vmm.irq import Lines
from softkvm.vmm.pci import HostBridge
from softkvm.vmm.state import Stateful
from softkvm.vmm.timers import Timers


class Chassis(NamedTuple):
    """What the board can ask of the machine that it is in."""

    power_off: Callable[[], None]
    reset: Callable[[], None]
    debug_exit: Callable[[int], None]
    """Takes the exit status."""
    suspend: Callable[[], None]
    """Memory and clocks go on, all else stops."""
    wake_up: Callable[[], None]
    """What ends a sleep has happened, whether or not there is one."""


class Board:
    """The chips and the two buses; `lock` serialises everything that touches them."""

    def __init__(
        self,
        chassis: Chassis,
        drive: Callable[[int, int], object],
        clock: Clock,
        ram: tuple[int, int],
        cpus: int,
        transmit: Sequence[Callable[[bytes], object]],
    ) -> None:
        """`drive(gsi, level)` is KVM_IRQ_LINE; `ram` = bytes below and above 4 GB; `transmit` takes the output of each UART."""
        self.lock = threading.RLock()
        self.timers = Timers(clock, self.lock)
        self.ports = Bus()
        self.memory = Bus()
        self.lines = Lines(drive)
        sci, alarm = self.lines.connect(layout.IRQ_SCI.gsi), self.lines.connect(layout.IRQ_RTC.gsi)
        self.pm = AcpiPm(sci, self.timers, chassis.power_off, chassis.suspend, chassis.wake_up)
        self.rtc = Rtc(alarm, self.timers, clock.realtime_ns(), memory_sizes(*ram), self.pm.rtc_alarm)
        self.serial = [Serial(self.lines.connect(line.gsi), sink) for line, sink in zip(layout.SERIAL_LINES, transmit, strict=True)]
        self.fw_cfg = FwCfg(sum(ram), cpus)
        self.test_device: TestDevice | None = None
        self.reset = ResetControl(chassis.reset)
        self.pci = HostBridge(self.ports, self.memory, narrow=self.reset)
        self._claim(chassis)

    def _claim(self, chassis: Chassis) -> None:
        for place, uart in zip(layout.SERIAL_PORTS, self.serial, strict=True):
            self.ports.claim(place, uart)
        self.ports.claim(layout.RTC, self.rtc)
        self.ports.claim(layout.FW_CFG, self.fw_cfg, width=2)
        self.ports.claim(layout.PM1A_EVENT, self.pm.event, width=2)
        self.ports.claim(layout.PM1A_CONTROL, self.pm.control, width=2)
        self.ports.claim(layout.PM_TIMER, self.pm.timer, width=4)
        self.ports.claim(layout.KEYBOARD_CONTROLLER, KeyboardReset(chassis.reset))
        self.ports.claim(layout.DEBUG_EXIT, DebugExit(chassis.debug_exit), width=4)
        self.ports.claim(layout.PCI_CONFIG_ADDRESS, self.pci.address_port, width=4)
        self.ports.claim(layout.PCI_CONFIG_DATA, self.pci.data_port, width=4)
        self.memory.claim(layout.PCI_ECAM, self.pci.ecam, width=4)

    def plug_in_test_device(self, flush_page: Callable[[int], None]) -> None:
        """Add the device that test suites use to provoke exits; `flush_page(address)` makes KVM forget where a page of RAM is."""
        device = TestDevice([self.lines.connect(gsi) for gsi in range(layout.IOAPIC_PINS)], flush_page)
        self.test_device = device
        self.ports.claim(layout.TEST_IOPORT, device.ioport, width=4)
        self.ports.claim(layout.TEST_FLUSH, device.flush, width=4)
        self.ports.claim(layout.TEST_LINES, device.lines)
        self.memory.claim(layout.TEST_MEMORY, device.memory, width=8)

    def stateful(self) -> dict[str, Stateful[Any]]:
        """Every device that has state, by a name that stays the same."""
        devices: dict[str, Stateful[Any]] = {"pm": self.pm, "rtc": self.rtc, "reset": self.reset, "pci": self.pci, "fw_cfg": self.fw_cfg}
        if self.test_device is not None:
            devices["test"] = self.test_device
        devices |= {f"serial{index}": uart for index, uart in enumerate(self.serial)}
        devices |= {f"pci.{function >> 3:02x}.{function & 7}": device for function, device in self.pci.functions().items()}
        return devices
