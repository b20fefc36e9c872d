"""KVM: the kernel virtual machine of Linux 6.1, as Python objects with one method per ioctl.

`System` is /dev/kvm, `Vm` and `Vcpu` are the files that its ioctls return; `ioctl.dispatch()` is the binary door to the same methods.
"""

from softkvm.kvm.ioctl import dispatch
from softkvm.kvm.system import System
from softkvm.kvm.vcpu import Vcpu
from softkvm.kvm.vm import Vm

__all__ = ["System", "Vcpu", "Vm", "dispatch"]
