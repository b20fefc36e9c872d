"""ABI of posted patch series that Linux has taken in another form or not at all, so that no kernel header has it.

"KVM_{GET,SET}_TSC_OFFSET", v2, 21 Jul 2020 (kvm@vger 20200721201814.2340705). What Linux 5.16 took in its place is in `uapi/kvm.py`:
KVM_VCPU_TSC_CTRL.
"""

KVM_GET_TSC_OFFSET = 0x8008_AEC5
KVM_SET_TSC_OFFSET = 0x4008_AEC6
KVM_CAP_TSC_OFFSET = 185
"""Upstream the number became KVM_CAP_SMALLER_MAXPHYADDR, which is true of this KVM as well."""
