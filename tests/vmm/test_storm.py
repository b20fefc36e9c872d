"""Storms: guests that read and write ports and device memory at random, against the whole board and KVM's own chips.

A storm may end the guest in any way that a guest can end, and nothing else may happen. Its machine is deterministic, so a seed repeats it;
`SOFTKVM_STORM_CASES` sets how many seeds run (`make fuzz`), and those that once did harm stay in `KEPT`.
"""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from softkvm.host.turns import Random
from softkvm.vmm import Machine, Stop, StopReason, layout
from tests.vmm.boot import images

KEPT: tuple[int, ...] = ()
CASES = int(os.environ.get("SOFTKVM_STORM_CASES", "40"))
CODE_SIZE = 3400
"""Bytes of a storm: some 270 accesses, as many as the image has room for."""
MEMORY_LIMIT_KIB = 256 << 10
"""How much a storm may add to what the process needs."""

_PORTS = (
    *(place.base for place in layout.SERIAL_PORTS),
    *(place.base for place in (layout.RTC, layout.FW_CFG, layout.PM1A_EVENT, layout.PM1A_CONTROL, layout.PM_TIMER)),
    *(place.base for place in (layout.PCI_CONFIG_ADDRESS, layout.PCI_CONFIG_ADDRESS, layout.PCI_CONFIG_DATA, layout.TEST_LINES)),
    *(0x20, 0xA0, 0x4D0, 0x40, 0x60, 0x70),  # KVM's PICs, their edge registers, PIT, port 61h
)
_ENDS = range(layout.DEBUG_EXIT.base, layout.DEBUG_EXIT.base + 4)
"""Ports that end the guest at once; they are left to chance."""
_LAPIC, _IOAPIC = 0xFEE0_0000, 0xFEC0_0000
_MEMORY = (_LAPIC, _LAPIC, _IOAPIC, layout.PCI_ECAM.base, 0xFED0_0000, 0xC000_0000)

_OUT = {1: "ee", 2: "66ef", 4: "ef"}
_IN = {1: "ec", 2: "66ed", 4: "ed"}
_STORE = {1: "8803", 2: "668903", 4: "8903", 8: "488903"}
_LOAD = {1: "8a03", 2: "668b03", 4: "8b03", 8: "488b03"}
_STRING = {1: ("6c", "6e"), 2: ("666d", "666f"), 4: ("6d", "6f")}
_BUFFER = 0x3_0000


def _imm32(opcode: str, value: int) -> bytes:
    return bytes.fromhex(opcode) + (value & 0xFFFF_FFFF).to_bytes(4, "little")


def _port_access(random: Random) -> bytes:
    port = _PORTS[random.next() % len(_PORTS)] + random.next() % 4 if random.next() % 4 else random.next() & 0xFFFF
    if port in _ENDS or (port | 1) == layout.KEYBOARD_CONTROLLER.base | 1:
        port = layout.RTC.base
    size = 1 << random.next() % 3
    code = _imm32("ba", port) + _imm32("b8", random.next())  # mov edx, port; mov eax, value
    kind = random.next() % 8
    if kind == 0:
        direction = random.next() % 2
        pointer = _imm32("be" if direction else "bf", _BUFFER)  # esi or edi
        return code + pointer + _imm32("b9", random.next() % 40) + b"\xf3" + bytes.fromhex(_STRING[size][direction])
    return code + bytes.fromhex((_OUT if kind % 2 else _IN)[size])


def _memory_access(random: Random) -> bytes:
    address = _MEMORY[random.next() % len(_MEMORY)] + (random.next() & (0xFFF if random.next() % 4 else 0xF_FFFF))
    size = 1 << random.next() % 4
    code = _imm32("bb", address) + _imm32("b8", random.next())  # mov ebx, address; mov eax, value
    return code + bytes.fromhex((_STORE if random.next() % 2 else _LOAD)[size])


def storm(seed: int) -> bytes:
    """A program of accesses that ends at the debug-exit port."""
    random = Random(seed)
    code = b"\xfa"  # cli
    while len(code) < CODE_SIZE:
        code += _port_access(random) if random.next() % 3 else _memory_access(random)
    return code + bytes.fromhex("b000e6f4 fa f4 ebfd")  # mov al, 0; out 0xF4, al; and if that did not end it, HLT for ever


def run(vm: Machine) -> Stop:
    """To the end of the storm, or to a sleep from which nothing wakes it."""
    for _ in range(20):
        stop = vm.run(timeout=1)
        if stop.reason is not StopReason.TIMEOUT or vm._suspend.asleep:
            break
    return stop


@pytest.mark.parametrize("cpu", ["cascadelake", "epyc"])
def test_storms_do_no_harm(cpu: str, tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in (*KEPT, *range(CASES)):
        path = tmp_path / "storm"
        path.write_bytes(images.program(storm(seed)))
        with Machine(path, memory="16M", cpu=cpu, cpus=1 + seed % 2, deterministic=seed, test_device=bool(seed % 3)) as vm:
            stop = run(vm)
            asleep = stop.reason is StopReason.TIMEOUT and vm._suspend.asleep
            assert asleep or stop.reason not in (StopReason.INTERNAL_ERROR, StopReason.TIMEOUT), f"storm {seed}: {stop}"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEMORY_LIMIT_KIB
