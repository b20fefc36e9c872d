"""The host's perf: events on the counters and the branch stack of its cores, for KVM's vPMU and for whoever watches guests from outside.

Answers to Linux 6.1 `kernel/events/core.c` and `arch/x86/events/`, and for events without a counter to "Guest LBR Enabling" (v8, Wang,
August 2019, patches 7 to 11).
"""
