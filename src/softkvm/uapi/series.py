"""ABI of posted patch series that Linux has taken in another form or not at all, so that no kernel header has it.

"KVM_{GET,SET}_TSC_OFFSET", v2, 21 Jul 2020 (kvm@vger 20200721201814.2340705). What Linux 5.16 took in its place is in `uapi/kvm.py`:
KVM_VCPU_TSC_CTRL.

"Guest LBR Enabling", v8, 6 Aug 2019 (kvm@vger): KVM_CAP_X86_GUEST_LBR. Linux 5.12 took PERF_CAPABILITIES in its place.
"""

from ctypes import Structure

from softkvm.uapi.layout import U32, layout

KVM_GET_TSC_OFFSET = 0x8008_AEC5
KVM_SET_TSC_OFFSET = 0x4008_AEC6
KVM_CAP_TSC_OFFSET = 185
"""Upstream the number became KVM_CAP_SMALLER_MAXPHYADDR, which is true of this KVM as well."""
KVM_CAP_X86_GUEST_LBR = 174
"""Upstream the number became KVM_CAP_ARM_IRQ_LINE_LAYOUT_2, which x86 does not have."""


@layout
class LbrStack(Structure):
    """`struct x86_perf_lbr_stack`: the number of last branch records and their MSRs; `info` 0 if there are none of those."""

    nr: U32
    tos: U32
    from_: U32
    to: U32
    info: U32
