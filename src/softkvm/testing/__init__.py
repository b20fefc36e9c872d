"""For the tests of others: boot guests from pytest.

The plugin (`plugin.py`) is registered when softkvm is installed and gives the fixtures `vm_factory` and `guest_run`.
"""

from softkvm.testing.plugin import GuestResult, GuestRun, VmFactory

__all__ = ["GuestResult", "GuestRun", "VmFactory"]
