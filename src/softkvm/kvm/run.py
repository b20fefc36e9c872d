"""KVM_RUN: the loop that enters the guest, handles its exits, and returns to user space; `halt.py` waits in HLT.

Answers to Linux 6.1 `arch/x86/kvm/x86.c`: `kvm_arch_vcpu_ioctl_run()`, `vcpu_run()`, `vcpu_enter_guest()`; and to
`Documentation/virt/kvm/api.rst` for `struct kvm_run`. Results: 1 = run on, 0 = to user space with an exit reason, negative = -errno.
"""

from __future__ import annotations

import errno
import signal
import struct
from typing import TYPE_CHECKING

from softkvm.host import entry
from softkvm.host.task import Task
from softkvm.kvm import emulate, events, halt, kvmclock, msr_bitmap, regs, reset
from softkvm.kvm.halt import RUNNABLE, UNINITIALIZED
from softkvm.kvm.irqchip import irq
from softkvm.kvm.request import (
    REQ_APICV,
    REQ_CLOCK,
    REQ_DIRTY_RING_FULL,
    REQ_EVENT,
    REQ_EXIT,
    REQ_INTROSPECTION,
    REQ_IOAPIC_EOI_EXIT,
    REQ_MSR_FILTER,
    REQ_NMI,
    REQ_PERF,
    REQ_PMI,
    REQ_PMU,
    REQ_SMI,
    REQ_TLB_FLUSH,
    REQ_TRIPLE_FAULT,
)
from softkvm.kvm.vcpu_requests import IN_GUEST_MODE, OUTSIDE_GUEST_MODE
from softkvm.silicon import EMULATE_FIRST, EMULATE_ONE
from softkvm.uapi import kvm as uapi
from softkvm.uapi.layout import offset_of

if TYPE_CHECKING:
    from softkvm.kvm.vcpu import Vcpu

_WORK = entry.XFER_TO_GUEST_MODE_WORK
_EVENT_VALID = events.EVENT_VALID

# Where kvm_run has what every KVM_RUN reads and writes: bytes, and 64-bit words.
_REQUEST_INTERRUPT_WINDOW = offset_of(uapi.Run, "request_interrupt_window")
_IMMEDIATE_EXIT = offset_of(uapi.Run, "immediate_exit")
_SAVED, _save = offset_of(uapi.Run, "ready_for_interrupt_injection"), struct.Struct("<BBHQQ").pack_into
_VALID_REGS, _DIRTY_REGS = offset_of(uapi.Run, "kvm_valid_regs") // 8, offset_of(uapi.Run, "kvm_dirty_regs") // 8


def ioctl_run(vcpu: Vcpu, task: Task) -> int:
    """The whole of KVM_RUN: 0 or -errno, with `kvm_run` refreshed either way."""
    mask = vcpu.signal_mask
    saved = signal.pthread_sigmask(signal.SIG_SETMASK, mask) if mask is not None else None
    if vcpu.cpu is None:
        vcpu.load()
    vcpu.attach(task)
    try:
        return _run(vcpu, task)
    finally:
        _save_to_user(vcpu)
        vcpu.detach()
        if vcpu.vm.timekeeper.vacant:
            vcpu.vm.timekeeper.hand_over()
        if vcpu.introspection is not None:
            vcpu.introspection.run_jobs()
        if saved is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, saved)


def _run(vcpu: Vcpu, task: Task) -> int:
    area = vcpu.mmap_area
    if vcpu.mp_state == UNINITIALIZED:
        return _wait_for_sipi(vcpu, task)
    words = vcpu.mmap_words
    if words[_VALID_REGS] | (dirty := words[_DIRTY_REGS]):
        if (words[_VALID_REGS] | dirty) & ~uapi.KVM_SYNC_X86_VALID_FIELDS:
            return -errno.EINVAL
        _take_dirty_regs(vcpu, dirty)
    if vcpu.lapic is None:
        if area[_REQUEST_INTERRUPT_WINDOW]:
            vcpu.make_request(REQ_EVENT)
        if not regs.set_cr8(vcpu, vcpu.kvm_run.cr8):
            return -errno.EINVAL
    finish = vcpu.complete_userspace_io
    if finish is not None:
        vcpu.complete_userspace_io = None
        if (result := finish(vcpu)) <= 0:
            return result
    if area[_IMMEDIATE_EXIT]:
        while vcpu.half_done:
            if (result := enter_guest(vcpu, task)) <= 0:
                return result
        if vcpu.requests & REQ_PMI:  # no ioctl tells of it
            vcpu.clear_request(REQ_PMI)
            vcpu.pmu.deliver_pmi()
        return -errno.EINTR
    return vcpu_run(vcpu, task)


def _wait_for_sipi(vcpu: Vcpu, task: Task) -> int:
    """An application processor before its first start-up IPI: EAGAIN when woken, EINTR for a signal."""
    if vcpu.kvm_run.immediate_exit:
        return -errno.EINTR
    halt.wait(vcpu, task)
    reset.accept_events(vcpu)
    return entry.xfer_to_guest_mode(task, vcpu) or -errno.EAGAIN


def _take_dirty_regs(vcpu: Vcpu, dirty: int) -> None:
    """Registers that user space changed in the mapping; OSError(EINVAL) as the ioctls that they stand for."""
    shared = vcpu.kvm_run
    shared.kvm_dirty_regs = 0
    if dirty & uapi.KVM_SYNC_X86_REGS:
        regs.set_regs(vcpu, uapi.Regs.from_buffer_copy(shared.regs.regs))
    if dirty & uapi.KVM_SYNC_X86_SREGS:
        regs.set_sregs(vcpu, uapi.Sregs.from_buffer_copy(shared.regs.sregs))
    if dirty & uapi.KVM_SYNC_X86_EVENTS:
        regs.set_vcpu_events(vcpu, uapi.VcpuEvents.from_buffer_copy(shared.regs.events))


def _save_to_user(vcpu: Vcpu) -> None:
    """`post_kvm_run_save()` and `store_regs()`: what user space sees in the mapping after every return."""
    area, lapic = vcpu.mmap_area, vcpu.lapic
    cr8 = vcpu.state.cr8 if lapic is None else lapic.cr8
    ready = vcpu.vm.irqchip is not None or _ready_for_injection(vcpu)
    _save(area, _SAVED, ready, vcpu.state.rflags >> 9 & 1, vcpu.smm.active, cr8, vcpu.apic_base)
    if valid := vcpu.mmap_words[_VALID_REGS]:
        _store_regs(vcpu, valid)


def _store_regs(vcpu: Vcpu, valid: int) -> None:
    shared = vcpu.kvm_run
    if valid & uapi.KVM_SYNC_X86_REGS:
        shared.regs.regs = regs.get_regs(vcpu)
    if valid & uapi.KVM_SYNC_X86_SREGS:
        shared.regs.sregs = regs.get_sregs(vcpu)
    if valid & uapi.KVM_SYNC_X86_EVENTS:
        shared.regs.events = regs.get_vcpu_events(vcpu)


def vcpu_run(vcpu: Vcpu, task: Task) -> int:
    """Run the guest until user space must act."""
    user_pic, area = vcpu.vm.irqchip is None, vcpu.mmap_area
    while True:
        result = enter_guest(vcpu, task) if vcpu.mp_state == RUNNABLE else halt.block(vcpu, task)
        if result <= 0:
            return result
        if user_pic and area[_REQUEST_INTERRUPT_WINDOW] and _ready_for_injection(vcpu):
            vcpu.stats["request_irq_exits"] += 1
            return vcpu.exit_to_user(uapi.KVM_EXIT_IRQ_WINDOW_OPEN)
        if task.flags & _WORK and not vcpu.half_done and (result := entry.xfer_to_guest_mode(task, vcpu)):
            return result


def enter_guest(vcpu: Vcpu, task: Task) -> int:
    """One VM entry and the handling of its exit."""
    if vcpu.requests and not vcpu.half_done and (result := _service_requests(vcpu)) <= 0:
        return result
    expiry = vcpu.clock.first_expiry
    if expiry != vcpu.armed:
        vcpu.arm_timer(expiry)
    vcpu.mode = IN_GUEST_MODE
    if vcpu.requests or task.flags & _WORK or vcpu.half_done:  # who set them now saw us in guest mode, or we see them here
        if not vcpu.half_done:
            vcpu.mode = OUTSIDE_GUEST_MODE
            _cancel_injection(vcpu)
            return 1
        _continue_instruction(vcpu, task)
    reason = vcpu.enter()
    vcpu.mode = OUTSIDE_GUEST_MODE
    if vcpu.flush_requested:
        vcpu.control.tlb_control = 0
        vcpu.flush_requested = False
    if vcpu.half_done:
        emulate.after_exit(vcpu, reason)
    if vcpu.events.at_silicon or vcpu.exit.vectoring & _EVENT_VALID:
        events.complete(vcpu)
    handler = vcpu.handlers.get(reason)
    if handler is None:
        return _unknown_exit(vcpu, reason)
    vcpu.exit_counts[reason] += 1
    return handler(vcpu)


def _continue_instruction(vcpu: Vcpu, task: Task) -> None:
    """An instruction is half done: it goes first, and the guest runs on behind it only if nothing waits."""
    waiting = vcpu.requests or task.flags & _WORK or vcpu.mmap_area[_IMMEDIATE_EXIT]
    vcpu.control.emulate = EMULATE_ONE if waiting else EMULATE_FIRST


def _unknown_exit(vcpu: Vcpu, reason: int) -> int:
    """A failed entry, or KVM's own surprise."""
    vcpu.exit_counts[reason] = vcpu.exit_counts.get(reason, 0) + 1
    return vcpu.vendor.handle_unknown(vcpu, reason)


def _cancel_injection(vcpu: Vcpu) -> None:
    """The entry did not happen: the event goes back into the queue."""
    if vcpu.events.at_silicon:
        events.complete(vcpu)


def _service_requests(vcpu: Vcpu) -> int:
    """Do what other threads and KVM itself have asked for before this entry."""
    if vcpu.requests & REQ_EXIT and (exit_reason := _exit_request(vcpu)) is not None:
        return vcpu.exit_to_user(exit_reason)
    requests = vcpu.take_requests()
    if requests & REQ_INTROSPECTION and vcpu.introspection is not None:
        if requests != REQ_INTROSPECTION:
            vcpu.make_request(requests & ~REQ_INTROSPECTION)  # what the tool sees and does comes before
        return vcpu.introspection.service()
    if requests & REQ_MSR_FILTER:
        msr_bitmap.filter_changed(vcpu)
    if requests & REQ_APICV and vcpu.lapic is not None:
        vcpu.lapic.update_virtual(not vcpu.guest_debug and vcpu.introspection is None)
        vcpu.lapic.scan_ioapic()
    if requests & REQ_CLOCK:
        kvmclock.service(vcpu, requests)
    if requests & REQ_TLB_FLUSH:
        vcpu.control.tlb_control = 1
        vcpu.flush_requested = True
    if requests & REQ_PERF:
        requests |= _service_perf(vcpu, requests)
    if requests & REQ_NMI:
        events.process_nmi(vcpu)
    if requests & REQ_SMI:
        vcpu.smm.pending = True
    if requests & (REQ_EVENT | REQ_NMI | REQ_SMI):
        reset.accept_events(vcpu)
        if vcpu.mp_state != RUNNABLE or (vcpu.introspection is not None and vcpu.introspection.singlestep):
            return 1
        events.inject_pending(vcpu, _wants_window(vcpu))
    return 1


def _service_perf(vcpu: Vcpu, requests: int) -> int:
    """The virtual PMU's requests; what its interrupt asks for is served with them."""
    if requests & REQ_PMU:
        vcpu.pmu.handle_event()
    if requests & REQ_PMI:
        vcpu.pmu.deliver_pmi()
    return vcpu.take_requests()


def _exit_request(vcpu: Vcpu) -> int | None:
    """The exit to user space that a request asks for, which is then done; the other requests wait."""
    if vcpu.requests & REQ_TRIPLE_FAULT:
        vcpu.clear_request(REQ_TRIPLE_FAULT)
        return uapi.KVM_EXIT_SHUTDOWN
    if vcpu.requests & REQ_IOAPIC_EOI_EXIT:
        vcpu.clear_request(REQ_IOAPIC_EOI_EXIT)
        vcpu.kvm_run.eoi.vector = vcpu.pending_ioapic_eoi
        return uapi.KVM_EXIT_IOAPIC_EOI
    ring = vcpu.dirty_ring
    if ring is not None and ring.soft_full:  # and stays so until user space has reset some of it
        return uapi.KVM_EXIT_DIRTY_RING_FULL
    vcpu.clear_request(REQ_DIRTY_RING_FULL)
    return None


def _accepts_user_interrupt(vcpu: Vcpu) -> bool:
    """`kvm_cpu_accept_dm_intr()`: user space may queue an interrupt."""
    return not irq.has_extint(vcpu) and (vcpu.lapic is None or vcpu.lapic.accepts_pic)


def _wants_window(vcpu: Vcpu) -> bool:
    return bool(vcpu.vm.irqchip is None and vcpu.kvm_run.request_interrupt_window) and _accepts_user_interrupt(vcpu)


def _ready_for_injection(vcpu: Vcpu) -> bool:
    """`kvm_vcpu_ready_for_interrupt_injection()`."""
    queue = vcpu.events
    busy = vcpu.half_done or queue.reinjection or queue.exception_pending
    return not busy and events.interrupt_allowed(vcpu) and _accepts_user_interrupt(vcpu)
