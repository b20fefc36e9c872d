"""The AMD module: exits by SVM exit code. Answers to APM vol. 2, ch. 15 and Linux 6.1 `arch/x86/kvm/svm/svm.c`."""

from softkvm.kvm.svm.exits import exit_interrupt, exit_memory_fault, handle_exit, handlers, memory_fault, next_rip

__all__ = ["exit_interrupt", "exit_memory_fault", "handle_exit", "handlers", "memory_fault", "next_rip"]
