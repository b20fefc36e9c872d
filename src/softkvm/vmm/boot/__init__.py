"""Getting a kernel started: image formats, boot protocols, and the state of the boot CPU at the entry."""

from softkvm.vmm.boot.image import Kernel, read_kernel
from softkvm.vmm.boot.protocol import Bootable, read

__all__ = ["Bootable", "Kernel", "read", "read_kernel"]
