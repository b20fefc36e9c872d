"""The virtual PMU: a guest's performance counters, each of them a perf event of the host.

Answers to Linux 6.1 `arch/x86/kvm/pmu.c`, `vmx/pmu_intel.c` and `svm/pmu.c`. A counter of the guest that is on becomes a pinned event of
the vCPU that excludes the host; what it counts, the silicon counts. Instructions that KVM has done in the guest's place it adds itself.
"""
