"""Load balancing among the real processors, where the operating system below us does not know who waits for whom.

Answers to Linux 6.1 `kvm_vcpu_on_spin()` (`virt/kvm/kvm_main.c`) and `active_load_balance_cpu_stop()` (`kernel/sched/fair.c`). Two vCPUs
that hand work to each other without sleeping are two busy threads to the host, which may leave them on one processor for seconds; then each
hand-over takes a time slice.
"""

from __future__ import annotations

import os


def step_aside(processor: int) -> None:
    """Leave `processor` to a thread on it that the caller waits for: go to another one, or yield where there is no other.

    The thread may run everywhere again when the call returns.
    """
    allowed = os.sched_getaffinity(0)
    others = allowed - {processor}
    if not others:
        os.sched_yield()
        return
    os.sched_setaffinity(0, others)
    os.sched_setaffinity(0, allowed)
