"""A vCPU that halts, or waits for its start-up IPI: halt polling, sleep, and what ends them.

Answers to Linux 6.1 `kvm_vcpu_halt()`, `kvm_vcpu_block()`, `grow_halt_poll_ns()` and `shrink_halt_poll_ns()` in `virt/kvm/kvm_main.c`,
`vcpu_block()` and `kvm_arch_vcpu_runnable()` in `arch/x86/kvm/x86.c`, and to `Documentation/virt/kvm/halt-polling.rst`. To wake a thread
takes long, so a vCPU that halts first waits awake. For how long adapts itself to the guest: halts that end soon make it longer, long ones
end it.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from softkvm.host import entry, trace
from softkvm.host.clock import KHZ_NSEC
from softkvm.host.task import Task
from softkvm.kvm import events, reset
from softkvm.kvm.irqchip import irq
from softkvm.kvm.params import Parameters
from softkvm.kvm.request import REQ_INTROSPECTION, REQ_NMI, REQ_SMI
from softkvm.uapi import kvm as uapi

if TYPE_CHECKING:
    from softkvm.kvm.vcpu import Vcpu

RUNNABLE, HALTED, UNINITIALIZED = uapi.KVM_MP_STATE_RUNNABLE, uapi.KVM_MP_STATE_HALTED, uapi.KVM_MP_STATE_UNINITIALIZED
_WORK = entry.XFER_TO_GUEST_MODE_WORK


def block(vcpu: Vcpu, task: Task) -> int:
    """A vCPU that is halted or waits for a SIPI: wait until there is an event for it, or work for its thread."""
    if vcpu.requests & REQ_INTROSPECTION and vcpu.introspection is not None:
        vcpu.clear_request(REQ_INTROSPECTION)
        return vcpu.introspection.service()
    if vcpu.mp_state == HALTED:
        halt(vcpu, task)
    elif not runnable(vcpu):
        wait(vcpu, task)
    if _has_work(vcpu, task) and not runnable(vcpu):
        return 1
    reset.accept_events(vcpu)
    if vcpu.mp_state == HALTED:
        if vcpu.lapic is not None:
            vcpu.lapic.pv_unhalted = False
        vcpu.mp_state = RUNNABLE
    return 1


def halt(vcpu: Vcpu, task: Task) -> None:
    """`kvm_vcpu_halt()`: poll, then sleep, and learn from how long it took. Nothing is learned where there is nothing to wait for.

    The core may have polled before the HLT exited (`_let_core_poll()`); then that was the poll.
    """
    waited = _polled_on_core(vcpu)
    vcpu.wakeup.clear()
    vcpu.blocked = True
    if waited:
        entry.interrupt(task, vcpu.clock.run_expired)
    if _over(vcpu, task):
        vcpu.blocked = False
        if waited:
            _count_poll(vcpu, waited, True)
        return
    clock, polls, longest = vcpu.clock, vcpu.msrs.host_polls, max_poll_ns(vcpu)
    vcpu.halt_poll_ns = min(vcpu.halt_poll_ns, longest)
    ended = clock.monotonic_ns()
    started = ended - waited
    over = False
    if waited:
        _count_poll(vcpu, waited, False)
    elif polls and vcpu.halt_poll_ns:
        over, ended = _poll(vcpu, task, started)
        _count_poll(vcpu, ended - started, over)
    if not over:
        awake_until = ended
        wait(vcpu, task)
        ended = clock.monotonic_ns()
        vcpu.stats["halt_wait_ns"] += ended - awake_until
    if polls:
        _adapt(vcpu, ended - started, longest)
    _let_core_poll(vcpu, vcpu.halt_poll_ns if polls else 0)
    if trace.kvm_vcpu_wakeup.enabled:
        trace.kvm_vcpu_wakeup(ended - started, not over, True)


def _polled_on_core(vcpu: Vcpu) -> int:
    """For how long (ns) the core has polled before the HLT exited; 0 if it has not."""
    lapic = vcpu.lapic
    if lapic is None or lapic.apicv is None:
        return 0
    return lapic.apicv.take_halt_waited() * KHZ_NSEC // vcpu.clock.tsc_khz


def _let_core_poll(vcpu: Vcpu, ns: int) -> None:
    """Have the core itself poll the next HLT for so long: an interrupt that is posted meanwhile needs no exit. A core without the guest's
    APIC does not."""
    vcpu.control.halt_window = ns * vcpu.clock.tsc_khz // KHZ_NSEC


def max_poll_ns(vcpu: Vcpu) -> int:
    """`kvm_vcpu_max_halt_poll_ns()`; nothing where guests take turns on the only processor that there is."""
    vm = vcpu.vm
    if vm.turns is not None:
        return 0
    return vm.parameters.halt_poll_ns if vm.max_halt_poll_ns is None else vm.max_halt_poll_ns


def _count_poll(vcpu: Vcpu, polled: int, successful: bool) -> None:
    stats = vcpu.stats
    stats["halt_attempted_poll"] += 1
    if successful:
        stats["halt_successful_poll"] += 1
        stats["halt_poll_success_ns"] += polled
    else:
        stats["halt_poll_fail_ns"] += polled


def _adapt(vcpu: Vcpu, halted: int, longest: int) -> None:
    """Choose how long to poll the next time, `longest` ns at most, after a halt of `halted` ns."""
    polled, parameters = vcpu.halt_poll_ns, vcpu.vm.parameters
    if not longest:
        vcpu.halt_poll_ns = 0
    elif halted > polled:
        if polled and halted > longest:
            vcpu.halt_poll_ns = _shrink(polled, parameters)
        elif polled < longest and halted < longest:
            vcpu.halt_poll_ns = _grow(polled, parameters)


def _grow(polled: int, parameters: Parameters) -> int:
    grow = parameters.halt_poll_ns_grow
    return max(polled * grow, parameters.halt_poll_ns_grow_start) if grow else polled


def _shrink(polled: int, parameters: Parameters) -> int:
    shrink = parameters.halt_poll_ns_shrink
    shorter = polled // shrink if shrink else 0
    return shorter if shorter >= parameters.halt_poll_ns_grow_start else 0


def _poll(vcpu: Vcpu, task: Task, now: int) -> tuple[bool, int]:
    """Wait awake for the time that the vCPU is polled, or until others want the processor; whether the halt is over, and the time (ns)."""
    clock, wakeup, until = vcpu.clock, vcpu.wakeup, now + vcpu.halt_poll_ns
    try:
        while True:
            expiry = clock.first_expiry
            woken = wakeup.poll((until if expiry is None else max(min(until, expiry), now)) - now)
            now = clock.monotonic_ns()
            wakeup.clear()
            if expiry is not None and expiry <= now:
                entry.interrupt(task, clock.run_expired)
            over = _over(vcpu, task)
            if over or not woken or now >= until:
                return over, now
    finally:
        vcpu.blocked = False


def wait(vcpu: Vcpu, task: Task) -> None:
    """`kvm_vcpu_block()`: sleep until `runnable()`, work for the thread, or a wake-up; the VM's timers go on. Signals of Python get
    through."""
    clock, wakeup, timekeeper = vcpu.clock, vcpu.wakeup, vcpu.vm.timekeeper
    vcpu.blocked = True
    try:
        while True:
            wakeup.clear()
            entry.interrupt(task, clock.run_expired)
            if _over(vcpu, task):
                break
            vcpu.vm.scheduler.sleep(vcpu)
            expiry = clock.first_expiry
            mine = expiry if expiry is not None and timekeeper.claims(vcpu, expiry) else None
            entry.idle(task, partial(wakeup.wait, None if mine is None else max(0, mine - clock.monotonic_ns()) / 1e9))
    finally:
        vcpu.blocked = False
        timekeeper.leave(vcpu)
        vcpu.account_steal_time()
    vcpu.load()


def _over(vcpu: Vcpu, task: Task) -> bool:
    """`kvm_vcpu_check_block()`: whether there is a reason not to wait any longer."""
    return runnable(vcpu) or _has_work(vcpu, task)


def _has_work(vcpu: Vcpu, task: Task) -> bool:
    """Whether the thread must do something else."""
    return bool(task.flags & _WORK or (vcpu.requests & REQ_INTROSPECTION and vcpu.mp_state != UNINITIALIZED))


def runnable(vcpu: Vcpu) -> bool:
    """`kvm_arch_vcpu_runnable()`: whether the vCPU has reason to leave its wait."""
    if vcpu.mp_state == RUNNABLE:
        return True
    lapic = vcpu.lapic
    if lapic is not None and (lapic.pending_init or lapic.sipi_vector is not None):
        return True
    if vcpu.mp_state != HALTED:
        return False
    if (vcpu.requests & REQ_SMI or vcpu.smm.pending) and not vcpu.smm.active:
        return True
    queue = vcpu.events
    if queue.exception_pending or (lapic is not None and lapic.pv_unhalted):
        return True
    if (vcpu.requests & REQ_NMI or queue.nmi_pending) and events.nmi_allowed(vcpu):
        return True
    return events.interrupt_allowed(vcpu) and irq.has_interrupt(vcpu)
