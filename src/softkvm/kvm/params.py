"""The module parameters of `kvm`, `kvm_intel` and `kvm_amd`: how this KVM is to use the silicon that it finds.

Answers to `module_param()` of Linux 6.1 `arch/x86/kvm/{x86.c,svm/svm.c}` and to `kernel/params.c` for the values. What a parameter asks
for and what the silicon can do are two things: `Vm` takes both together, as `svm_hardware_setup()` does.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

_BOOL = {"1": True, "y": True, "on": True, "0": False, "n": False, "off": False}


@dataclass(frozen=True, slots=True)
class Parameters:
    """Module parameters, at their defaults unless given."""

    nrips: bool = True
    """kvm_amd.nrips: step over an instruction by the next RIP that the silicon saves, rather than by decoding it."""
    enable_pmu: bool = True
    """kvm.enable_pmu: guests may have performance counters."""
    force_emulation_prefix: bool = True
    """kvm.force_emulation_prefix: an instruction behind the bytes of `ud2` and "kvm" goes to KVM's emulator. Linux has it off."""

    tsc_scaling: bool = True
    """kvm_amd.tsc_scaling: give vCPUs other TSC rates than the host's by the silicon's ratio; here on Intel's silicon too."""
    kvmclock_periodic_sync: bool = True
    """kvm.kvmclock_periodic_sync: refresh all kvmclock pages every five minutes."""

    @classmethod
    def parse(cls, settings: Iterable[str]) -> Parameters:
        """Parameters from texts such as `nrips=0`, the last of a name counting; ValueError, one sentence, for what is none."""
        names = {field.name for field in fields(cls)}
        chosen: dict[str, bool] = {}
        for setting in settings:
            name, _, text = setting.partition("=")
            value = _BOOL.get(text.lower())
            if name not in names:
                raise ValueError(f"KVM has no parameter {name!r}; it has {', '.join(sorted(names))}")
            if value is None:
                raise ValueError(f"the KVM parameter {name} is 0 or 1, not {text!r}")
            chosen[name] = value
        return cls(**chosen)
