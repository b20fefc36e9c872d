"""What of an Intel core's performance monitoring KVM offers to guests: leaf 0Ah and PERF_CAPABILITIES.

Answers to Linux 6.1 `kvm_init_pmu_capability()`, `__do_cpuid_func()` and `vmx_get_perf_capabilities()`. At most version 2 is offered.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from softkvm.host.perf.intel import FULL_WIDTH_WRITE, LBR_FORMAT, PERF_CAPABILITIES

if TYPE_CHECKING:
    from softkvm.kvm.types import Model

MAX_GENERIC, MAX_FIXED, MAX_VERSION = 8, 3, 2
_LEAF = 0xA
_ANYTHREAD_DEPRECATED = 1 << 15


def supported_leaf(model: Model) -> tuple[int, int, int, int]:
    """Leaf 0Ah of KVM_GET_SUPPORTED_CPUID: of the silicon's, what the virtual PMU can give."""
    eax, ebx, _, edx = model.cpuid(_LEAF, 0)
    version = min(eax & 0xFF, MAX_VERSION)
    if not version:
        return (0, 0, 0, 0)
    generic, fixed = min(eax >> 8 & 0xFF, MAX_GENERIC), min(edx & 0x1F, MAX_FIXED)
    eax = eax & 0xFFFF_0000 | generic << 8 | version
    return (eax, ebx, 0, (edx & 0x1FE0 | fixed if version > 1 else 0) | _ANYTHREAD_DEPRECATED)


def supported_capabilities(model: Model) -> int:
    """`vmx_get_perf_capabilities()`: of the silicon's PERF_CAPABILITIES, what can be given."""
    return model.msrs().get(PERF_CAPABILITIES, 0) & (FULL_WIDTH_WRITE | LBR_FORMAT) if supported_leaf(model)[0] else 0
