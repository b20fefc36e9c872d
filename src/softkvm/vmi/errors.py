"""What can go wrong between a tool and the guest it looks at.

    VmiError
    ├── ChannelClosed     the other end is gone, or spoke what is not the protocol
    ├── CommandFailed     the server refused a command; carries its error code
    ├── NoAnswer          the server has not answered a command in time
    ├── Unreadable        there is no memory at an address of the guest
    ├── KernelNotFound    no Linux kernel that explains itself is in the memory
    ├── UnknownName       the kernel has no such symbol, type or member
    └── Corrupt           a data structure of the guest contradicts itself: it changes while it is read, or somebody bent it

The guest's memory is hostile: whatever it holds becomes a result or one of these, after a bounded amount of work.
"""

from __future__ import annotations


class VmiError(Exception):
    """The message is one sentence."""


class ChannelClosed(VmiError):
    """The introspection channel has ended."""


class CommandFailed(VmiError):
    """The server's answer to a command was an error; `code` is KVMI's, positive, such as `KVM_EPERM`."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class NoAnswer(VmiError):
    """A command waits for its answer too long, as one to a vCPU does while its VMM does not run it."""


class Unreadable(VmiError):
    """No memory, or no mapping, at `address`."""

    def __init__(self, address: int, kind: str = "guest-physical") -> None:
        super().__init__(f"nothing can be read at {kind} address {address:#x}")
        self.address = address


class KernelNotFound(VmiError):
    """The memory holds no kernel with kallsyms and BTF, or not yet."""


class UnknownName(VmiError):
    """A symbol, type or member that this kernel does not have."""


class Corrupt(VmiError):
    """A structure in the guest's memory cannot be what it should be."""
