"""The control socket of a running VM: `Monitor` serves it, `Monitor.connect()` reaches it, `commands.offer()` puts a machine behind it."""

from softkvm.vmm.monitor.client import TIMEOUT, Connection, MonitorError
from softkvm.vmm.monitor.names import running
from softkvm.vmm.monitor.server import Monitor
from softkvm.vmm.monitor.wire import CommandError, Descriptors, NoArguments

__all__ = ["TIMEOUT", "CommandError", "Connection", "Descriptors", "Monitor", "MonitorError", "NoArguments", "running"]
