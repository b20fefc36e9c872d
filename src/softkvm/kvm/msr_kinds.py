"""Kinds of MSR: what most of them have in common, so that the table (`msr_table.py`) can say in one line what each is.

Answers to SDM vol. 4, APM vol. 2 appendix A, and Linux 6.1 `arch/x86/kvm/x86.c` (`kvm_{get,set}_msr_common()`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from softkvm.kvm import cpuid, mtrr
from softkvm.kvm import msr_index as n
from softkvm.silicon.control import SegmentRegister
from softkvm.uapi.kvm import KVM_MSR_EXIT_REASON_INVAL, KVM_MSR_EXIT_REASON_UNKNOWN

if TYPE_CHECKING:
    from softkvm.kvm.cpuid import Feature
    from softkvm.kvm.types import Vcpu

_U64 = (1 << 64) - 1
_CR4_LA57 = 1 << 12


class MsrError(Exception):
    """The MSR does not exist, or refuses the value: #GP(0) for the guest, the end of the array for KVM_{GET,SET}_MSRS."""

    reason = KVM_MSR_EXIT_REASON_INVAL
    """What KVM_EXIT_X86_{RD,WR}MSR tells user space, if it wants to know."""

    def __init__(self, index: int) -> None:
        super().__init__(f"MSR {index:#x}")
        self.index = index


class UnknownMsr(MsrError):
    """KVM has no such MSR."""

    reason = KVM_MSR_EXIT_REASON_UNKNOWN


class Handler(NamedTuple):
    """How one MSR is read and written; both raise MsrError, and get whether user space asks (`host_initiated`)."""

    get: Callable[[Vcpu, int, bool], int]
    set: Callable[[Vcpu, int, int, bool], None]


Check = Callable[["Vcpu", int, int, bool], bool]
"""Whether a write of (vcpu, index, value, host_initiated) is allowed."""


def anything(_vcpu: Vcpu, _index: int, _value: int, _host: bool) -> bool:
    """Check: no value is wrong."""
    return True


def from_host(_vcpu: Vcpu, _index: int, _value: int, host: bool) -> bool:
    """Check: only user space writes it."""
    return host


def refuse(_vcpu: Vcpu, index: int, _value: int, _host: bool) -> None:
    """A write that is #GP: the MSR is read-only."""
    raise MsrError(index)


def ignore(_vcpu: Vcpu, _index: int, _value: int, _host: bool) -> None:
    """A write that silicon takes and KVM has no use for."""


def unreadable(_vcpu: Vcpu, index: int, _host: bool) -> int:
    """A read that is #GP: the MSR is write-only."""
    raise MsrError(index)


def require(condition: bool, index: int) -> None:
    """MsrError unless `condition` holds."""
    if not condition:
        raise MsrError(index)


def constant(value: int, write: Callable[[Vcpu, int, int, bool], None] = refuse) -> Handler:
    """Always reads as `value`; a write is refused, or does what `write` does."""
    return Handler(lambda _vcpu, _index, _host: value, write)


def stored(check: Check = anything, feature: Feature | None = None) -> Handler:
    """A value in `MsrState.values`; the guest needs `feature`, if one is named."""

    def read(vcpu: Vcpu, index: int, host: bool) -> int:
        require(host or feature is None or vcpu.cpuid.has(feature), index)
        return vcpu.msrs.values.get(index, 0)

    def write(vcpu: Vcpu, index: int, value: int, host: bool) -> None:
        require(host or feature is None or vcpu.cpuid.has(feature), index)
        require(check(vcpu, index, value, host), index)
        vcpu.msrs.values[index] = value

    return Handler(read, write)


def resident(name: str, check: Check = anything, features: tuple[Feature, ...] = ()) -> Handler:
    """A field of `State`; the guest needs one of `features`, if any are named."""

    def offered(vcpu: Vcpu, host: bool) -> bool:
        return host or not features or any(vcpu.cpuid.has(feature) for feature in features)

    def read(vcpu: Vcpu, index: int, host: bool) -> int:
        require(offered(vcpu, host), index)
        return int(getattr(vcpu.state, name))

    def write(vcpu: Vcpu, index: int, value: int, host: bool) -> None:
        require(offered(vcpu, host) and check(vcpu, index, value, host), index)
        setattr(vcpu.state, name, value)

    return Handler(read, write)


def of_intel(handler: Handler) -> Handler:
    """An MSR that AMD CPUs do not have."""

    def read(vcpu: Vcpu, index: int, host: bool) -> int:
        require(vcpu.model.vendor == "intel", index)
        return handler.get(vcpu, index, host)

    def write(vcpu: Vcpu, index: int, value: int, host: bool) -> None:
        require(vcpu.model.vendor == "intel", index)
        handler.set(vcpu, index, value, host)

    return Handler(read, write)


def paravirtual(handler: Handler, bit: int) -> Handler:
    """An MSR of the KVM feature `bit`, which need not be offered unless user space enforces that."""
    feature = cpuid.Feature(cpuid.HYPERVISOR_FEATURES, 0, cpuid.EAX, bit)

    def read(vcpu: Vcpu, index: int, host: bool) -> int:
        require(not vcpu.msrs.enforce_pv_features or vcpu.cpuid.has(feature), index)
        return handler.get(vcpu, index, host)

    def write(vcpu: Vcpu, index: int, value: int, host: bool) -> None:
        require(not vcpu.msrs.enforce_pv_features or vcpu.cpuid.has(feature), index)
        handler.set(vcpu, index, value, host)

    return Handler(read, write)


def sysenter_pointer(name: str) -> Handler:
    """Made canonical rather than refused: AMD CPUs take any value, and the silicon of an Intel model must not see a bad one."""

    def write(vcpu: Vcpu, _index: int, value: int, _host: bool) -> None:
        width = linear_address_bits(vcpu)
        sign = value & 1 << width - 1
        setattr(vcpu.state, name, (value & (1 << width) - 1) - (sign << 1) & _U64)

    return Handler(lambda vcpu, _index, _host: int(getattr(vcpu.state, name)), write)


def segment_base(segment: SegmentRegister) -> Handler:
    """The base of FS or GS."""

    def write(vcpu: Vcpu, index: int, value: int, host: bool) -> None:
        require(canonical(vcpu, index, value, host), index)
        vcpu.state.segments[segment].base = value

    return Handler(lambda vcpu, _index, _host: int(vcpu.state.segments[segment].base), write)


# --- Checks ------------------------------------------------------------------------------------------------------------------------


def linear_address_bits(vcpu: Vcpu) -> int:
    """Width of a linear address: 57 with CR4.LA57."""
    return 57 if vcpu.state.cr4 & _CR4_LA57 else 48


def canonical(vcpu: Vcpu, _index: int, value: int, _host: bool) -> bool:
    """Check: a canonical address."""
    sign = linear_address_bits(vcpu) - 1
    return value >> sign in (0, _U64 >> sign)


def memory_type(vcpu: Vcpu, index: int, value: int, _host: bool) -> bool:
    """Check: what the MTRR or PAT takes."""
    return mtrr.is_valid(index, value, vcpu.cpuid.physical_address_bits)


def spec_ctrl(vcpu: Vcpu, _index: int, value: int, _host: bool) -> bool:
    """Check: IBRS, STIBP, SSBD, and BHI_DIS_S where CPUID has it."""
    optional = n.SPEC_CTRL_BHI_DIS_S if vcpu.cpuid.has(cpuid.BHI_CTRL) else 0
    return not value & ~(n.SPEC_CTRL_IBRS | n.SPEC_CTRL_STIBP | n.SPEC_CTRL_SSBD | optional)


def lockable(vcpu: Vcpu, index: int, value: int, host: bool) -> bool:
    """Check: FEATURE_CONTROL, of which only the lock bit exists here."""
    locked = vcpu.msrs.values.get(index, 0) & n.FEATURE_CONTROL_LOCKED
    return not value & ~n.FEATURE_CONTROL_LOCKED and (host or not locked)


def no_cpuid_fault(_vcpu: Vcpu, _index: int, value: int, _host: bool) -> bool:
    """Check: no CPUID faulting, which PLATFORM_INFO does not offer."""
    return value == 0


def only_enable(_vcpu: Vcpu, _index: int, value: int, _host: bool) -> bool:
    """Check: bit 0 alone."""
    return not value >> 1


def decode_config(_vcpu: Vcpu, _index: int, value: int, host: bool) -> bool:
    """Check: LFENCE stays serialising; user space may take that away."""
    return value == n.DE_CFG_LFENCE_SERIALIZE or (host and value == 0)
