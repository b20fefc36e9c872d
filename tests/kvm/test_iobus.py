"""`softkvm.kvm.iobus`: who answers an address."""

from __future__ import annotations

import pytest

from softkvm.kvm.iobus import MAX_DEVICES
from tests.kvm.fakes import FakeVm


class Register:
    """A device that takes accesses of one size."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.value = 0

    def read(self, address: int, size: int) -> int | None:
        return self.value if size == self.size else None

    def write(self, address: int, size: int, value: int) -> bool:
        if size == self.size:
            self.value = value
        return size == self.size


@pytest.mark.parametrize("length", [4, 0x1000])
def test_the_first_device_that_takes_the_access_answers(length: int) -> None:
    bus = FakeVm(irqchip=False).mmio_bus
    byte, dword = Register(1), Register(4)
    bus.register(0x1000, length, byte)
    bus.register(0x1000, length, dword)
    assert bus.write(0x1000, 4, 7)
    assert bus.write(0x1000, 1, 5)
    assert (bus.read(0x1000, 1), bus.read(0x1000, 4), bus.read(0x1000, 2)) == (5, 7, None)
    assert not bus.write(0x1000 + length, 1, 0)
    assert bus.read(0xFFF, 1) is None
    bus.unregister(byte)
    assert bus.read(0x1000, 1) is None
    assert bus.read(0x1000, 4) == 7


def test_the_bus_is_bounded() -> None:
    bus = FakeVm(irqchip=False).pio_bus
    for port in range(MAX_DEVICES):
        bus.register(port, 1, Register(1))
    with pytest.raises(OSError, match=r"\[Errno 28\]"):
        bus.register(0x8000, 1, Register(1))
