"""The Intel module: exits by VMX basic exit reason. Answers to SDM vol. 3, ch. 25-28 and Linux 6.1 `arch/x86/kvm/vmx/vmx.c`."""

from softkvm.kvm.pmu.intel import INSTRUCTIONS as pmu_instructions
from softkvm.kvm.pmu.intel import refresh as refresh_pmu
from softkvm.kvm.vmx.exits import exit_memory_fault, exit_names, handle_unknown, handlers, next_rip
from softkvm.kvm.vmx.soft_events import prepare_soft_event, soft_event_cut_short

__all__ = [
    "exit_memory_fault",
    "exit_names",
    "handle_unknown",
    "handlers",
    "next_rip",
    "pmu_instructions",
    "prepare_soft_event",
    "refresh_pmu",
    "soft_event_cut_short",
    "soft_exception_type",
]

soft_exception_type = 6 << 8
"""Interruption type of INT3 and INTO (SDM vol. 3, table 25-17)."""
