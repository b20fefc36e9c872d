"""Events that KVM itself puts into the guest: exceptions, NMIs and interrupts, queued, injected, cut short and injected again.

Answers to Linux 6.1 `kvm_multiple_exception()` and `kvm_check_and_inject_events()` in `arch/x86/kvm/x86.c`, SDM vol. 3, 6.15 (double
faults) and 25.8.3 (event injection). What the guest's own instructions raise is delivered by the silicon and does not come here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from softkvm.host import trace
from softkvm.kvm.irqchip import irq
from softkvm.kvm.request import REQ_EVENT, REQ_TRIPLE_FAULT
from softkvm.silicon.control import Intercept
from softkvm.uapi.kvm import KVM_GUESTDBG_BLOCKIRQ as _BLOCKIRQ

if TYPE_CHECKING:
    from softkvm.kvm.vcpu import Vcpu

DE, DB, NMI, BP, OF, UD, DF, TS, NP, SS, GP, PF, MC = 0, 1, 2, 3, 4, 6, 8, 10, 11, 12, 13, 14, 18

EVENT_VALID = 1 << 31
HAS_ERROR = 1 << 11
_TYPE_INTERRUPT, TYPE_NMI, _TYPE_EXCEPTION, _TYPE_SOFT_INTERRUPT, _TYPE_SOFT_EXCEPTION = 0 << 8, 2 << 8, 3 << 8, 4 << 8, 6 << 8
TYPE_MASK = 7 << 8
INTERRUPT_WINDOW = 1 << Intercept.INTERRUPT_WINDOW
NMI_WINDOW = 1 << Intercept.NMI_WINDOW
WINDOWS = INTERRUPT_WINDOW | NMI_WINDOW

RFLAGS_TF, RFLAGS_IF, RFLAGS_RF = 1 << 8, 1 << 9, 1 << 16
SHADOW = 3
"""`State.interruptibility`: blocking by STI or by MOV SS."""
BLOCKED_BY_NMI = 1 << 3
DR6_BS = 1 << 14
DR6_FIXED = 0xFFFF_0FF0
DR7_GD = 1 << 13

_CONTRIBUTORY = frozenset((DE, TS, NP, SS, GP))
_NO_RF = frozenset((DB, BP, OF, DF, MC))
"""Exceptions that are not faults: RF is not set in the RFLAGS that they push (#DB decides by itself)."""


class EventQueue:
    """`struct kvm_queued_exception`, `kvm_queued_interrupt` and the NMI counters of one vCPU.

    Pending = raised, not yet at the guest. Injected = given to the silicon; still so after an exit only if the delivery was cut short.
    """

    __slots__ = (
        "at_silicon",
        "error_code",
        "exception_injected",
        "exception_pending",
        "has_error",
        "instruction_length",
        "interrupt_injected",
        "interrupt_nr",
        "interrupt_soft",
        "nmi_injected",
        "nmi_pending",
        "payload",
        "soft_return",
        "vector",
    )

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget everything (reset)."""
        self.at_silicon = False
        """An event went into `Control.event` for the next entry."""
        self.exception_pending = self.exception_injected = False
        self.vector = 0
        self.has_error = False
        self.error_code = 0
        self.payload: int | None = None
        self.interrupt_injected = self.interrupt_soft = False
        self.interrupt_nr = 0
        self.nmi_injected = False
        self.nmi_pending = 0
        self.instruction_length = 0
        """VMX: of the instruction of a soft event."""
        self.soft_return: tuple[int, int] | None = None
        """SVM: where the instruction of a soft event that KVM has injected begins and ends."""

    def clear_exception(self) -> None:
        """Drop the queued exception."""
        self.exception_pending = self.exception_injected = False
        self.payload = None

    def queue_interrupt(self, vector: int, soft: bool) -> None:
        """An interrupt that has been acknowledged and must reach the guest before anything else."""
        self.interrupt_injected, self.interrupt_nr, self.interrupt_soft = True, vector, soft

    @property
    def reinjection(self) -> bool:
        """Whether an event is half way into the guest (`kvm_event_needs_reinjection()`)."""
        return self.exception_injected or self.interrupt_injected or self.nmi_injected


def queue_exception(vcpu: Vcpu, vector: int, error_code: int | None = None, payload: int | None = None) -> None:
    """Raise an exception in the guest; with one already on its way, the rules for double and triple faults apply."""
    queue = vcpu.events
    vcpu.make_request(REQ_EVENT)
    if queue.exception_pending or queue.exception_injected:
        first = queue.vector
        if first == DF:
            queue.clear_exception()
            vcpu.make_request(REQ_TRIPLE_FAULT)
            return
        if (first in _CONTRIBUTORY and vector in _CONTRIBUTORY) or (first == PF and (vector == PF or vector in _CONTRIBUTORY)):
            vector, error_code, payload = DF, 0, None
    queue.exception_pending, queue.exception_injected = True, False
    queue.vector, queue.payload = vector, payload
    queue.has_error, queue.error_code = error_code is not None and vcpu.state.cr0 & 1 != 0, error_code or 0


def inject_gp(vcpu: Vcpu) -> None:
    """#GP(0)."""
    queue_exception(vcpu, GP, 0)


def inject_ud(vcpu: Vcpu) -> None:
    """#UD."""
    queue_exception(vcpu, UD)


def inject_page_fault(vcpu: Vcpu, linear_address: int, error_code: int) -> None:
    """#PF at a linear address; CR2 is written when the fault is delivered."""
    queue_exception(vcpu, PF, error_code, linear_address)


def interrupt_allowed(vcpu: Vcpu) -> bool:
    """Whether the guest would take an external interrupt now."""
    state = vcpu.state
    return bool(state.rflags & RFLAGS_IF) and not state.interruptibility & SHADOW


def nmi_allowed(vcpu: Vcpu) -> bool:
    """Whether the guest would take an NMI now."""
    return not vcpu.state.interruptibility & (SHADOW | BLOCKED_BY_NMI)


def process_nmi(vcpu: Vcpu) -> None:
    """At most two NMIs wait, or one while another one is being handled (`process_nmi()`)."""
    queue = vcpu.events
    blocked = vcpu.state.interruptibility & BLOCKED_BY_NMI or queue.nmi_injected
    queue.nmi_pending = min(queue.nmi_pending + vcpu.take_nmis(), 1 if blocked else 2)


def inject_pending(vcpu: Vcpu, user_window: bool) -> None:
    """Give the silicon the most urgent event, and ask for windows for those that must wait.

    Order: what was cut short, then a new exception, SMI, NMI, interrupt. `user_window`: user space wants to know when it can inject one.
    """
    queue = vcpu.events
    free = not _reinject(vcpu, queue)
    if free and queue.exception_pending:
        _inject_new_exception(vcpu, queue)
        free = False
    if vcpu.guest_debug & _BLOCKIRQ:
        vcpu.set_windows(0)
        return
    if vcpu.smm.pending:
        if not free:
            vcpu.exit_soon()
        elif vcpu.enter_smm():
            free = False
    windows = 0
    if queue.nmi_pending:
        if free and nmi_allowed(vcpu):
            queue.nmi_pending -= 1
            queue.nmi_injected = True
            _give(vcpu, EVENT_VALID | TYPE_NMI | NMI)
            free = False
        if queue.nmi_pending:
            windows = NMI_WINDOW
    if irq.has_injectable(vcpu):
        if free and interrupt_allowed(vcpu) and (vector := irq.get_interrupt(vcpu)) >= 0:
            queue.queue_interrupt(vector, False)
            _inject_interrupt(vcpu, queue, reinjected=False)
        if irq.has_injectable(vcpu):
            windows |= INTERRUPT_WINDOW
    if user_window:
        windows |= INTERRUPT_WINDOW
    vcpu.set_windows(windows)


def _reinject(vcpu: Vcpu, queue: EventQueue) -> bool:
    if queue.exception_injected:
        _inject_exception(vcpu, queue, reinjected=True)
    elif queue.exception_pending:
        return False
    elif queue.nmi_injected:
        _give(vcpu, EVENT_VALID | TYPE_NMI | NMI)
    elif queue.interrupt_injected:
        _inject_interrupt(vcpu, queue, reinjected=True)
    else:
        return False
    return True


def _give(vcpu: Vcpu, event: int) -> None:
    vcpu.control.event = event
    vcpu.events.at_silicon = True


def _inject_new_exception(vcpu: Vcpu, queue: EventQueue) -> None:
    state, own = vcpu.state, vcpu.debug_registers
    if queue.vector not in _NO_RF:
        state.rflags |= RFLAGS_RF
    if queue.payload is not None:
        if queue.vector == PF:
            state.cr2 = queue.payload
        elif queue.vector == DB:
            own.dr6 = own.dr6 & ~0xF | queue.payload
        queue.payload = None
    if queue.vector == DB:
        own.dr7 &= ~DR7_GD
    queue.exception_pending, queue.exception_injected = False, True
    _inject_exception(vcpu, queue, reinjected=False)


def _inject_exception(vcpu: Vcpu, queue: EventQueue, reinjected: bool) -> None:
    soft = queue.vector in (BP, OF)
    if soft and not vcpu.vendor.prepare_soft_event(vcpu, queue.vector):
        queue.clear_exception()  # the guest executes the instruction again
        return
    event = EVENT_VALID | (vcpu.vendor.soft_exception_type if soft else _TYPE_EXCEPTION) | queue.vector
    if queue.has_error:
        event |= HAS_ERROR
        vcpu.control.event_error = queue.error_code
    _give(vcpu, event)
    if trace.kvm_inj_exception.enabled:
        trace.kvm_inj_exception(queue.vector, queue.has_error, queue.error_code, reinjected)


def _inject_interrupt(vcpu: Vcpu, queue: EventQueue, reinjected: bool) -> None:
    soft = queue.interrupt_soft
    if soft and not vcpu.vendor.prepare_soft_event(vcpu, queue.interrupt_nr):
        queue.interrupt_injected = False
        return
    _give(vcpu, EVENT_VALID | (_TYPE_SOFT_INTERRUPT if soft else _TYPE_INTERRUPT) | queue.interrupt_nr)
    if trace.kvm_inj_virq.enabled:
        trace.kvm_inj_virq(queue.interrupt_nr, soft, reinjected)


def complete(vcpu: Vcpu) -> None:
    """After an exit: what was injected has arrived, except the event whose delivery the exit cut short (SDM vol. 3, 25.9.3).

    A valid bit still set in the injection field means that the entry ended before the event was looked at.
    """
    queue, control = vcpu.events, vcpu.control
    queue.at_silicon = queue.nmi_injected = queue.exception_injected = queue.interrupt_injected = False
    entered = not control.event & EVENT_VALID
    event, error_code = (vcpu.exit.vectoring, vcpu.exit.vectoring_error) if entered else (control.event, control.event_error)
    control.event = 0
    if vcpu.smm.pending:
        vcpu.make_request(REQ_EVENT)
    if not event & EVENT_VALID:
        queue.soft_return = None
        return
    if is_soft(event):
        vcpu.vendor.soft_event_cut_short(vcpu, entered)
    _requeue(vcpu, queue, event, error_code)


def is_soft(event: int) -> bool:
    """Whether an instruction asked for the event: INT n, or INT3 and INTO, which on SVM have the type of exceptions."""
    kind = event & TYPE_MASK
    return kind in (_TYPE_SOFT_INTERRUPT, _TYPE_SOFT_EXCEPTION) or (kind == _TYPE_EXCEPTION and event & 0xFF in (BP, OF))


def _requeue(vcpu: Vcpu, queue: EventQueue, event: int, error_code: int) -> None:
    """Inject the event again at the next entry, unless an exception has come up that goes first."""
    vcpu.make_request(REQ_EVENT)
    vector, kind = event & 0xFF, event & TYPE_MASK
    if kind == TYPE_NMI:
        queue.nmi_injected = True
        vcpu.state.interruptibility &= ~BLOCKED_BY_NMI  # the injection sets it again
    elif kind in (_TYPE_EXCEPTION, _TYPE_SOFT_EXCEPTION):
        if not queue.exception_pending:
            queue.exception_injected, queue.vector, queue.payload = True, vector, None
            queue.has_error, queue.error_code = bool(event & HAS_ERROR), error_code
    else:
        queue.queue_interrupt(vector, kind == _TYPE_SOFT_INTERRUPT)
