"""The AMD module: exits by SVM exit code. Answers to APM vol. 2, ch. 15 and Linux 6.1 `arch/x86/kvm/svm/svm.c`."""

from softkvm.kvm.pmu.amd import INSTRUCTIONS as pmu_instructions
from softkvm.kvm.pmu.amd import refresh as refresh_pmu
from softkvm.kvm.svm.exits import exit_memory_fault, exit_names, handle_unknown, handlers, next_rip
from softkvm.kvm.svm.soft_events import prepare_soft_event, soft_event_cut_short

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

soft_exception_type = 3 << 8
"""Type of INT3 and INTO in EVENTINJ: they are exceptions like others (APM vol. 2, 15.20)."""
