"""One introspected vCPU: its jobs, its pauses, and the wait for the tool's answer to an event.

Answers to `kvmi_handle_request()`, `kvmi_run_jobs()`, `kvmi_send_event()` and `kvmi_wait_for_reply()` of "VM introspection" v9, patches
47-57 and 66. Commands to a vCPU are jobs, done in order by its own thread: before it enters the guest, or while it waits for an answer;
and, as there is nothing here that only a processor could do, by the tool's thread while the vCPU is not in KVM_RUN.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from ctypes import Structure
from typing import TYPE_CHECKING

from softkvm.kvm import events, regs
from softkvm.kvm.introspection.failures import Broken
from softkvm.kvm.request import REQ_EVENT, REQ_INTROSPECTION
from softkvm.silicon.control import Intercept
from softkvm.uapi import kvm as uapi
from softkvm.uapi import kvmi
from softkvm.uapi.kvmi import Action, Event, Reply

if TYPE_CHECKING:
    from softkvm.kvm.introspection.session import Channel, Session
    from softkvm.kvm.vcpu import Vcpu

MAX_JOBS = 1024
"""Commands that may wait for one vCPU; a peer that sends more without reading answers is closed."""
_LEAVING = 0.01
"""Seconds that a vCPU may take between the end of KVM_RUN's work and its return."""
_HAS_ERROR_CODE = frozenset({8, 10, 11, 12, 13, 14, 17, 21})

Job = Callable[[], None]


class VcpuIntrospection:
    """The introspection side of a vCPU. `post()`, `pause()` and `release()` are for any thread, the rest for the vCPU's."""

    def __init__(self, session: Session, vcpu: Vcpu, index: int) -> None:
        """Nothing is enabled; `index` is the vCPU's number in the order of creation."""
        self.session = session
        self.vcpu = vcpu
        self.index = index
        self.enabled: frozenset[Event] = frozenset()
        self.control_registers: frozenset[int] = frozenset()
        self.msrs: frozenset[int] = frozenset()
        self.msrs_taken: set[int] = set()
        """Those of them that KVM would let the guest write without an exit."""
        self.intercepts_breakpoints = False
        """Whether the tool has the guest's INT3; one who debugs in user space and the tool exclude each other."""
        self.singlestep = False
        self.exception: kvmi.InjectException | None = None
        """Waits to be injected."""
        self.trap_pending = False
        """What was injected has not been told yet."""
        self.registers: uapi.Regs | None = None
        """What the tool wants in the registers when it has answered."""
        self.waiting: Event | None = None
        """The event whose answer is awaited."""
        self.awaited = 0
        self.reply: Reply | None = None
        self._jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._pauses = 0

    # --- Any thread -----------------------------------------------------------------------------------------------------------------

    def post(self, job: Job) -> None:
        """Have a command done; Broken if too many wait."""
        if self._jobs.qsize() >= MAX_JOBS:
            raise Broken(f"more than {MAX_JOBS} commands wait for vCPU {self.index}")
        self.must_do(job)

    def must_do(self, job: Job) -> None:
        """Have something done behind all that waits."""
        self._jobs.put(job)
        if self.waiting is None:
            self.vcpu.make_request(REQ_INTROSPECTION)
            self._run_for_parked()

    def _run_for_parked(self) -> None:
        """The vCPU is not in KVM_RUN: do its jobs here. One that is about to return or to enter sees them itself."""
        vcpu = self.vcpu
        while vcpu.task is None and not self._jobs.empty():
            if vcpu.ioctl_lock.acquire(timeout=_LEAVING):
                try:
                    self.run_jobs()
                finally:
                    vcpu.ioctl_lock.release()

    @property
    def is_idle(self) -> bool:
        """Whether no command waits."""
        return self._jobs.empty()

    def pause(self) -> bool:
        """Have one PAUSE_VCPU event sent; False if too many are owed."""
        with self.session.lock:
            if self._pauses > kvmi.MAX_PENDING_PAUSES:
                return False
            self._pauses += 1
        self.vcpu.make_request(REQ_INTROSPECTION)
        return True

    def wait_until_out(self) -> None:
        """Returns when the vCPU, which was asked to, has left the guest."""
        while self.vcpu.mode:
            time.sleep(_LEAVING / 100)

    def release(self) -> None:
        """The tool is gone: the vCPU waits for nothing and owes nothing."""
        with self.session.lock:
            self._pauses = 0
        self._jobs.put(self._forget)
        self.vcpu.make_request(REQ_INTROSPECTION)
        self._run_for_parked()

    def _forget(self) -> None:
        self.exception, self.trap_pending = None, False
        self.set_singlestep(False)

    # --- The vCPU's thread ----------------------------------------------------------------------------------------------------------

    def run_jobs(self) -> None:
        """Do what waits."""
        while not self._jobs.empty():
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:  # the tool's thread, which found the vCPU parked, was faster
                return
            job()

    def service(self) -> int:
        """The work of REQ_INTROSPECTION, as an exit handler: the event that was injected, jobs, then a pause."""
        if (result := self._inject()) is not None:
            return result
        self.run_jobs()
        while self._take_pause():
            reply = self.ask(Event.PAUSE_VCPU)
            if reply.action is Action.CRASH:
                return self.crash()
            self.run_jobs()
        return 1

    def _take_pause(self) -> bool:
        with self.session.lock:
            due = self._pauses > 0
            self._pauses -= due
            return due

    def ask(self, event: Event, data: Structure | None = None) -> Reply:
        """Send an event and wait for the answer, doing the tool's commands meanwhile; CONTINUE as if nobody had asked if it is lost."""
        session = self.session
        channel = session.channel
        if channel is None:
            return self._default(data)
        self.reply, self.awaited, self.waiting = None, session.next_seq(), event
        try:
            reply = channel.deliver(self, event, self.awaited, data) or self._wait(channel, event)
        except Broken as error:
            session.lose(channel, str(error))
            reply = None
        finally:
            self.waiting, self.awaited = None, 0
            if not self._jobs.empty():  # who posted them while we waited did not ask for the vCPU's attention
                self.vcpu.make_request(REQ_INTROSPECTION)
        if reply is None:
            self.registers = None
            return self._default(data)
        if self.registers is not None:
            self._apply_registers(self.registers)
        return reply

    def _wait(self, channel: Channel, event: Event) -> Reply | None:
        """For an answer that does not come at once, None if the channel goes; Broken when it was due.

        A paused vCPU waits as long as its tool likes.
        """
        session = self.session
        deadline = None if event is Event.PAUSE_VCPU or not session.reply_timeout else time.monotonic() + session.reply_timeout
        while self.reply is None and session.channel is channel:
            if self._jobs.empty():
                channel.wait(self, deadline)
            self.run_jobs()
        return self.reply

    @staticmethod
    def _default(data: Structure | None) -> Reply:
        return Reply(Action.CONTINUE, getattr(data, "new_value", 0))

    def wait_for_job(self, deadline: float | None) -> None:
        """Do the next job that somebody posts; Broken behind the deadline, by which the answer to an event was due."""
        try:
            job = self._jobs.get(timeout=None if deadline is None else max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            raise Broken(f"no answer to an event of vCPU {self.index} in time") from None
        job()

    def _apply_registers(self, new: uapi.Regs) -> None:
        """What VCPU_SET_REGISTERS left; an exception that waits to be injected is kept."""
        self.registers = None
        pending = self.vcpu.events.exception_pending
        regs.set_regs(self.vcpu, new)
        self.vcpu.events.exception_pending = pending

    def take(self, seq: int, reply: Reply) -> None:
        """The answer to the event `seq`: a job, so that commands before it are done before. Broken if it was answered already."""
        if seq != self.awaited or self.reply is not None:
            raise Broken(f"event {seq} was answered twice")
        self.reply = reply

    def crash(self) -> int:
        """The tool wants the VM dead: it leaves for user space as a guest that has crashed."""
        run = self.vcpu.kvm_run
        run.system_event.type, run.system_event.ndata = uapi.KVM_SYSTEM_EVENT_CRASH, 0
        return self.vcpu.exit_to_user(uapi.KVM_EXIT_SYSTEM_EVENT)

    # --- Injection ------------------------------------------------------------------------------------------------------------------

    def want_exception(self, exception: kvmi.InjectException) -> None:
        """VCPU_INJECT_EXCEPTION."""
        self.exception = exception
        self.vcpu.make_request(REQ_INTROSPECTION)

    def _inject(self) -> int | None:
        """Queue the tool's exception, unless another event is on its way, and tell the tool which one the guest gets."""
        wanted = self.exception
        if wanted is None or self.singlestep:
            return None
        self.exception, self.trap_pending = None, True
        queued, vcpu = self.vcpu.events, self.vcpu
        if not (queued.reinjection or queued.exception_pending):
            error = wanted.error_code if wanted.nr in _HAS_ERROR_CODE else None
            events.queue_exception(vcpu, wanted.nr, error, wanted.address if wanted.nr == events.PF else None)
        reply = self.ask(Event.TRAP, self._injected())
        self.trap_pending = False
        return self.crash() if reply.action is Action.CRASH else None

    def _injected(self) -> kvmi.EventTrap:
        queued = self.vcpu.events
        if queued.exception_pending or queued.exception_injected:
            address = queued.payload if queued.vector == events.PF and queued.payload is not None else self.vcpu.state.cr2
            return kvmi.EventTrap(nr=queued.vector, error_code=queued.error_code if queued.has_error else 0, address=address)
        nr = events.NMI if queued.nmi_injected else queued.interrupt_nr
        return kvmi.EventTrap(nr=nr, address=self.vcpu.state.cr2)

    def set_singlestep(self, on: bool) -> None:
        """Stop behind every instruction; interrupts and exceptions wait until it is off."""
        if on != self.singlestep:
            self.singlestep = on
            self.vcpu.set_intercept(Intercept.MONITOR_TRAP, on)
            self.vcpu.make_request(REQ_EVENT)
            self.vcpu.update_static_calls()
