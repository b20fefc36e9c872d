"""What the two vendors' modules (`vmx.py`, `svm.py`) and the handlers that they call say to each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from softkvm.kvm.vcpu import Vcpu
    from softkvm.kvm.vendor import Handler

Hooked = Callable[..., int]
"""An exit handler that gets, as `plain`, the one in whose place it is."""


class Hook(NamedTuple):
    """The handlers of `exits.py`, which know no vendor."""

    page: Callable[[Vcpu, int, int, int, bool, Handler], int]
    """GPA, GVA (INVALID_GPA if unknown), access, whether the page walker made it."""
    write_cr: Callable[[Vcpu, int, int, Handler], int]
    """Number, value."""
    write_msr: Callable[[Vcpu, Handler], int]
    xsetbv: Callable[[Vcpu, Handler], int]
    descriptor: Callable[[Vcpu, int, bool, Handler], int]
    """`kvmi.Descriptor`, whether it is a load."""
    breakpoint: Callable[[Vcpu, int, Handler], int]
    """Length of the instruction."""
    hypercall: Callable[[Vcpu, Handler], int]
    step: Callable[[Vcpu, Handler], int]


class Facts(Protocol):
    """A vendor's module."""

    @property
    def undisturbed(self) -> frozenset[int]:
        """Exit reasons that do not disturb single-stepping: its own, page violations, and what is the host's business alone."""

    def hooks(self, hook: Hook) -> Mapping[int, Hooked]:
        """Exit reason -> handler."""
