"""`uapi/kvm.py` against the headers of Debian's linux-libc-dev: every constant, size and offset, by a compiled C program."""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path
from typing import get_args

import pytest

from softkvm.uapi import kvm

HEADER = Path("/usr/include/linux/kvm.h")

C_NAMES = {
    "EventException": None,
    "EventInterrupt": None,
    "EventNmi": None,
    "EventSmi": None,
    "EventTripleFault": None,
    "RunDebug": "debug_exit_arch",
}
"""Structures whose C name is not their own name in lower case; None = the C structure has no name."""

C_PATHS = {
    ("Irqchip", "dummy"): "chip.dummy",
    ("Irqchip", "pic"): "chip.pic",
    ("Irqchip", "ioapic"): "chip.ioapic",
    ("IrqRoutingEntry", "irqchip"): "u.irqchip",
    ("IrqRoutingEntry", "msi"): "u.msi",
    ("GuestDebug", "debugreg"): "arch.debugreg",
    ("Run", "regs"): "s.regs",
}
"""Fields inside a union that the C header names and `uapi` leaves anonymous."""


def c_name(cls: type[ctypes.Structure]) -> str | None:
    if cls.__name__ in C_NAMES:
        return C_NAMES[cls.__name__]
    if cls.__name__.startswith("Run") and cls is not kvm.Run:
        return None
    words = re.findall(r"[A-Z][a-z]*\d*", cls.__name__)
    return "_".join(words).lower().replace("pit_state_2", "pit_state2")


STRUCTURES = {
    name: cls
    for cls in vars(kvm).values()
    if isinstance(cls, type) and issubclass(cls, ctypes.Structure) and cls is not ctypes.Structure and (name := c_name(cls))
}
CONSTANTS = {name: value for name, value in vars(kvm).items() if re.match(r"KVM_|MSR_KVM_", name) and isinstance(value, int)}


def expected() -> dict[str, int]:
    """C expression -> the value that `uapi` gives it."""
    values = {f"{name}": value for name, value in CONSTANTS.items()}
    for name, cls in STRUCTURES.items():
        values[f"sizeof(struct kvm_{name})"] = ctypes.sizeof(cls)
        fields = [field for field in cls.__annotations__ if not field.startswith("_")]
        for field in fields:
            path = C_PATHS.get((cls.__name__, field), field)
            values[f"offsetof(struct kvm_{name}, {path})"] = getattr(cls, field).offset
    for arm, annotation in kvm.Run.__annotations__.items():
        arm_type = get_args(annotation)[0] if get_args(annotation) else None
        if isinstance(arm_type, type) and issubclass(arm_type, ctypes.Structure) and arm != "regs":
            path = "debug.arch" if arm == "debug" else arm
            for field in arm_type.__annotations__:
                values[f"offsetof(struct kvm_run, {path}.{field})"] = kvm.Run.hw.offset + getattr(arm_type, field).offset
    return values


@pytest.mark.skipif(shutil.which("cc") is None or not HEADER.exists(), reason="needs cc and linux-libc-dev")
def test_numbers_sizes_and_offsets_are_those_of_the_kernel_headers(tmp_path: Path) -> None:
    values = expected()
    printed = "\n".join(f'printf("%llu\\n", (unsigned long long)({expression}));' for expression in values)
    source = tmp_path / "abi.c"
    source.write_text(
        "#include <stddef.h>\n#include <stdio.h>\n#include <linux/kvm.h>\n#include <linux/kvm_para.h>\nint main(void) {\n"
        + printed
        + "\nreturn 0; }\n"
    )
    program = tmp_path / "abi"
    subprocess.run(["cc", "-w", "-o", program, source], check=True)
    output = subprocess.run([program], check=True, capture_output=True, text=True).stdout.split()
    measured = dict(zip(values, map(int, output), strict=True))
    assert {key: (values[key], measured[key]) for key in values if values[key] != measured[key]} == {}


def test_the_comparison_covers_the_abi() -> None:
    assert len(STRUCTURES) > 35
    assert len(CONSTANTS) > 200
    assert "vcpu_events" in STRUCTURES
    assert "userspace_memory_region" in STRUCTURES


def test_union_arms_overlap() -> None:
    run = kvm.Run()
    run.io.port = 0x3F8
    assert run.mmio.phys_addr & 0xFFFF0000 == 0x3F8 << 16
    assert kvm.Run.regs.offset == 304
