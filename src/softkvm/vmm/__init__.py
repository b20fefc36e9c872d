"""The machine around a VM: a PC with a Linux kernel, built on KVM's public methods alone."""

from softkvm.vmm.config import SerialBackend
from softkvm.vmm.errors import ConfigError, StateError
from softkvm.vmm.machine import Machine
from softkvm.vmm.stats import Stats
from softkvm.vmm.status import RunState, Status
from softkvm.vmm.stop import Stop, StopReason

__all__ = ["ConfigError", "Machine", "RunState", "SerialBackend", "StateError", "Stats", "Status", "Stop", "StopReason"]
