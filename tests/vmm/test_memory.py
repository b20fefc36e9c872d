"""Guest RAM's hash: what is in it counts, and not which pages the host happened to provide."""

from __future__ import annotations

from softkvm.vmm.layout import RAM_BELOW_4G
from softkvm.vmm.memory import GuestMemory
from tests.vmm.doubles import HostBlock


def digest(*writes: tuple[int, bytes]) -> str:
    memory = GuestMemory(1 << 20, HostBlock)
    for offset, data in writes:
        memory.write(RAM_BELOW_4G.base + offset, data)
    return memory.digest()


def test_the_hash_is_of_contents() -> None:
    assert digest((0x5000, b"x")) == digest((0x5000, b"y"), (0x5000, b"x"))
    assert digest((0x5000, b"x")) != digest((0x5001, b"x"))
    assert digest((0x5000, b"x")) != digest((0x6000, b"x"))


def test_pages_of_zeroes_are_as_good_as_none() -> None:
    assert digest((0x5000, b"x"), (0x9000, bytes(4096)), (0xFF000, bytes(1))) == digest((0x5000, b"x"))
