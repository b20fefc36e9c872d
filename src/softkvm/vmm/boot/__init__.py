"""Getting a kernel started: image formats, the Linux 64-bit boot protocol, and the state of the boot CPU at its entry."""

from softkvm.vmm.boot.image import Kernel, read_kernel

__all__ = ["Kernel", "read_kernel"]
