"""The module parameters of `kvm`, `kvm_intel` and `kvm_amd`: how this KVM is to use the silicon that it finds.

Answers to `module_param()` of Linux 6.1 `arch/x86/kvm/{x86.c,svm/svm.c}` and `virt/kvm/kvm_main.c`, and to `kernel/params.c` for the
values. What a parameter asks for and what the silicon can do are two things: `Vm` takes both together, as `svm_hardware_setup()` does.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

_BOOL = {"1": True, "y": True, "on": True, "0": False, "n": False, "off": False}
_DIGITS = 10


@dataclass(frozen=True, slots=True)
class Parameters:
    """Module parameters, at their defaults unless given."""

    nrips: bool = True
    """kvm_amd.nrips: step over an instruction by the next RIP that the silicon saves, rather than by decoding it."""
    enable_pmu: bool = True
    """kvm.enable_pmu: guests may have performance counters."""
    force_emulation_prefix: bool = True
    """kvm.force_emulation_prefix: an instruction behind the bytes of `ud2` and "kvm" goes to KVM's emulator. Linux has it off."""

    enable_apicv: bool = True
    """kvm_intel.enable_apicv, kvm_amd.avic: let the silicon virtualize x2APICs."""
    tsc_scaling: bool = True
    """kvm_amd.tsc_scaling: give vCPUs other TSC rates than the host's by the silicon's ratio; here on Intel's silicon too."""
    kvmclock_periodic_sync: bool = True
    """kvm.kvmclock_periodic_sync: refresh all kvmclock pages every five minutes."""
    halt_poll_ns: int = 200_000
    """kvm.halt_poll_ns: longest time that a vCPU in HLT is polled for before its thread sleeps; 0 is never."""
    halt_poll_ns_grow: int = 2
    """kvm.halt_poll_ns_grow: how many times as long after a halt that was short, but longer than it was polled for; 0 is no longer."""
    halt_poll_ns_grow_start: int = 10_000
    """kvm.halt_poll_ns_grow_start: the least time."""
    halt_poll_ns_shrink: int = 0
    """kvm.halt_poll_ns_shrink: how many times as short after a long halt; 0 is not at all."""

    @classmethod
    def parse(cls, settings: Iterable[str]) -> Parameters:
        """Parameters from texts such as `nrips=0`, the last of a name counting; ValueError, one sentence, for what is none."""
        defaults = {field.name: field.default for field in fields(cls)}
        chosen: dict[str, Any] = {}
        for setting in settings:
            name, _, text = setting.partition("=")
            if name not in defaults:
                raise ValueError(f"KVM has no parameter {name!r}; it has {', '.join(sorted(defaults))}")
            chosen[name] = _switch(name, text) if isinstance(defaults[name], bool) else _unsigned(name, text)
        return cls(**chosen)


def _switch(name: str, text: str) -> bool:
    value = _BOOL.get(text.lower())
    if value is None:
        raise ValueError(f"the KVM parameter {name} is 0 or 1, not {text!r}")
    return value


def _unsigned(name: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= _DIGITS and int(text) < 1 << 32):
        raise ValueError(f"the KVM parameter {name} is a number below 2^32, not {text!r}")
    return int(text)
