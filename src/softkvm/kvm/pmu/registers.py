"""A guest's registers as perf wants them, when a counter has interrupted it. Answers to Linux 6.1 `struct pt_regs`, `perf_guest_cbs`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from softkvm.kvm import regs

if TYPE_CHECKING:
    from softkvm.kvm.vcpu import Vcpu

_PAGE = 4096
_U64 = (1 << 64) - 1


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
    def frame_pointer(self) -> int:
        """RBP."""
        return int(self._vcpu.state.gpr[regs.RBP])

    def read(self, address: int, size: int) -> bytes | None:
        """Memory of the guest as its paging has it now; None where there is none."""
        data = b""
        while size > 0:
            piece = min(size, _PAGE - address % _PAGE)
            gpa = self._vcpu.translate_gva(address, 0)
            if gpa is None:
                return None
            try:
                data += self._vcpu.vm.memory.read(gpa, piece)
            except OSError:
                return None
            address, size = address + piece & _U64, size - piece
        return data
