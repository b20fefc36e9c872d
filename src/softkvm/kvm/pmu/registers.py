"""A guest's registers as perf wants them, when a counter has interrupted it. Answers to Linux 6.1 `struct pt_regs`, `perf_guest_cbs`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from softkvm.kvm import regs

if TYPE_CHECKING:
    from softkvm.kvm.vcpu import Vcpu


class GuestRegisters:
    """What the guest was doing at the exit."""

    __slots__ = ("_vcpu",)

    def __init__(self, vcpu: Vcpu) -> None:
        """Read when asked for, so an interrupt that nobody samples costs nothing."""
        self._vcpu = vcpu

    @property
    def ip(self) -> int:
        """Linear address of the next instruction."""
        state = self._vcpu.state
        return int(state.rip) if regs.is_64_bit_mode(self._vcpu) else int(state.segments[regs.CS].base + state.rip) & 0xFFFF_FFFF

    @property
    def user_mode(self) -> bool:
        """Whether CPL is not 0."""
        return regs.cpl(self._vcpu) != 0

    @property
    def cr3(self) -> int:
        """The address space."""
        return int(self._vcpu.state.cr3)

    @property
    def stack_pointer(self) -> int:
        """RSP."""
        return int(self._vcpu.state.gpr[regs.RSP])

    @property
    def frame_pointer(self) -> int:
        """RBP."""
        return int(self._vcpu.state.gpr[regs.RBP])
