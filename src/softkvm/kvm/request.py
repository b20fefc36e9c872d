"""Requests to a vCPU: work that must be done before its next VM entry, set by any thread.

Answers to `KVM_REQ_*` of Linux 6.1 `arch/x86/include/asm/kvm_host.h`. Each is a bit of `Vcpu.requests`.
"""

REQ_EVENT = 1 << 0
"""Look for an event to inject."""
REQ_CLOCK_UPDATE = 1 << 1
"""Refresh this vCPU's kvmclock page."""
REQ_MASTERCLOCK_UPDATE = 1 << 2
"""Recompute the VM's master clock, then every vCPU's page."""
REQ_TLB_FLUSH = 1 << 3
"""Drop all translations at the next entry."""
REQ_TRIPLE_FAULT = 1 << 4
"""Shut down (KVM_EXIT_SHUTDOWN)."""
REQ_NMI = 1 << 5
"""A non-maskable interrupt has arrived."""
REQ_STEAL_UPDATE = 1 << 6
"""Refresh the steal-time record."""
REQ_UNHALT = 1 << 7
"""Leave HLT (`KVM_HC_KICK_CPU`)."""
REQ_MSR_FILTER = 1 << 8
"""Apply the VM's MSR filter."""
REQ_DIRTY_RING_FULL = 1 << 9
"""Let user space harvest the dirty ring."""
REQ_IOAPIC_EOI_EXIT = 1 << 10
"""Tell user space's IOAPIC of the end of an interrupt."""
REQ_SMI = 1 << 11
"""A system management interrupt has arrived."""
REQ_PMU = 1 << 12
"""Program counters of the guest anew, and release unused ones."""
REQ_PMI = 1 << 13
"""Deliver the interrupt of a counter; after REQ_PMU."""
REQ_GLOBAL_CLOCK_UPDATE = 1 << 14
"""Refresh this vCPU's kvmclock page, and a little later those of all."""
REQ_INTROSPECTION = 1 << 15
"""The introspection tool has commands for the vCPU, or wants it paused."""
REQ_APICV_UPDATE = 1 << 16
"""Let the silicon virtualize the local APIC, or take it back."""
REQ_SCAN_IOAPIC = 1 << 17
"""Other vectors than before concern an IOAPIC when they end."""
REQ_MCLOCK_INPROGRESS = 1 << 18
"""Stay out of the guest until the master clock has changed."""

REQ_APICV = REQ_APICV_UPDATE | REQ_SCAN_IOAPIC
REQ_PERF = REQ_PMU | REQ_PMI
REQ_EXIT = REQ_TRIPLE_FAULT | REQ_DIRTY_RING_FULL | REQ_IOAPIC_EOI_EXIT
"""What may lead to user space before anything else is done."""
REQ_CLOCK = REQ_CLOCK_UPDATE | REQ_MASTERCLOCK_UPDATE | REQ_GLOBAL_CLOCK_UPDATE | REQ_STEAL_UPDATE | REQ_MCLOCK_INPROGRESS
"""All that `kvmclock.service()` handles."""
