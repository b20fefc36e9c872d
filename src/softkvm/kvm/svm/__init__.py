"""The AMD module: exits by SVM exit code. Answers to APM vol. 2, ch. 15 and Linux 6.1 `arch/x86/kvm/svm/svm.c`."""

from softkvm.kvm.pmu.amd import INSTRUCTIONS as pmu_instructions
from softkvm.kvm.pmu.amd import refresh as refresh_pmu
from softkvm.kvm.svm.exits import exit_memory_fault, exit_names, handle_unknown, handlers, next_rip

__all__ = ["exit_memory_fault", "exit_names", "handle_unknown", "handlers", "next_rip", "pmu_instructions", "refresh_pmu"]
