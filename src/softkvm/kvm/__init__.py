"""KVM: the kernel virtual machine of Linux 6.1, as Python objects with one method per ioctl.

`System` is /dev/kvm, `Vm` and `Vcpu` are the files that its ioctls return; `ioctl.dispatch()` is the binary door to the same methods.
`Model` names the silicon underneath, `Parameters` are the module parameters, and `allocate_memory()` gives RAM that memslots can name by
its address. `Process` is who opens /dev/kvm: filters, audit log and tracer are upon it. `TscStatus` is what is to be seen of a VM's clocks.
`Turns` is a host whose runs repeat.
"""

from softkvm.host.process import Process
from softkvm.host.turns import Turns
from softkvm.kvm.introspection.direct_channel import DirectChannel, DirectEvent
from softkvm.kvm.introspection.direct_channel import Handler as IntrospectionHandler
from softkvm.kvm.ioctl import dispatch
from softkvm.kvm.kvmclock import TimeInfo
from softkvm.kvm.params import Parameters
from softkvm.kvm.system import System
from softkvm.kvm.tsc_status import TscStatus, VcpuTscStatus
from softkvm.kvm.vcpu import Vcpu
from softkvm.kvm.vm import Vm
from softkvm.silicon import Model
from softkvm.silicon import allocate as allocate_memory

__all__ = [
    "DirectChannel",
    "DirectEvent",
    "IntrospectionHandler",
    "Model",
    "Parameters",
    "Process",
    "System",
    "TimeInfo",
    "TscStatus",
    "Turns",
    "Vcpu",
    "VcpuTscStatus",
    "Vm",
    "allocate_memory",
    "dispatch",
]
