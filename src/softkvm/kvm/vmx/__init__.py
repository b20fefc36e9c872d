"""The Intel module: exits by VMX basic exit reason. Answers to SDM vol. 3, ch. 25-28 and Linux 6.1 `arch/x86/kvm/vmx/vmx.c`."""

from softkvm.kvm.vmx.exits import exit_interrupt, exit_memory_fault, handle_exit, handlers, memory_fault, next_rip

__all__ = ["exit_interrupt", "exit_memory_fault", "handle_exit", "handlers", "memory_fault", "next_rip"]
