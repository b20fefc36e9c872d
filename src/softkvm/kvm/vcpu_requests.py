"""How other threads reach a vCPU: requests, kicks, wake-ups and signals.

Answers to Linux 6.1 `kvm_make_request()`, `kvm_vcpu_kick()` and `kvm_vcpu_wake_up()` of `virt/kvm/kvm_main.c` and to
`Documentation/virt/kvm/vcpu-requests.rst`.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from typing import TYPE_CHECKING

from softkvm.host.task import TIF_SIGPENDING, Task, current
from softkvm.kvm.ioctl import KvmFile
from softkvm.kvm.request import REQ_NMI, REQ_TRIPLE_FAULT
from softkvm.uapi import kvm as uapi

if TYPE_CHECKING:
    from softkvm.host.sched import Cpu, Wakeup

OUTSIDE_GUEST_MODE, IN_GUEST_MODE = 0, 1


class VcpuRequests(KvmFile):
    """The part of a vCPU that is for any thread."""

    wakeup: Wakeup
    """What its thread sleeps on in HLT."""
    kvm_run: uapi.Run
    stats: Counter[str]

    def init_requests(self) -> None:
        """Nothing is asked for yet."""
        self.mode = OUTSIDE_GUEST_MODE
        self.requests = 0
        self._nmis_queued = 0
        self._request_lock = threading.Lock()
        self.blocked = False
        self.task: Task | None = None
        self._signalled = False
        self.cpu: Cpu | None = None
        """The core that the vCPU is on."""

    def make_request(self, request: int) -> None:
        """Ask for the work of REQ_* before the next VM entry, and make the vCPU notice."""
        with self._request_lock:
            self.requests |= request
        if self.blocked:
            self.wakeup.set()
        elif self.mode:
            self.kick_guest()

    def note_request(self, request: int) -> None:
        """As `make_request()` where the vCPU's thread will look by itself: nobody is kicked."""
        with self._request_lock:
            self.requests |= request

    def keep_out(self, request: int) -> None:
        """Make `request`, and end a stay in guest mode; a sleeper sleeps on (KVM_REQUEST_NO_WAKEUP)."""
        self.note_request(request)
        self.kick_guest()

    def await_exit(self) -> None:
        """Return when the vCPU is out of guest mode, of which `keep_out()` has told it (KVM_REQUEST_WAIT). Nobody waits for himself."""
        while self.mode and self.task is not current():
            time.sleep(0)  # it needs the interpreter to come out

    def queue_nmi(self) -> None:
        """An NMI has arrived (`kvm_inject_nmi()`): they are counted, as two may wait."""
        with self._request_lock:
            self._nmis_queued += 1
        self.make_request(REQ_NMI)

    def take_nmis(self) -> int:
        """How many NMIs have arrived since the last call."""
        with self._request_lock:
            count, self._nmis_queued = self._nmis_queued, 0
        return count

    def take_requests(self) -> int:
        """All requests, which are cleared."""
        with self._request_lock:
            requests, self.requests = self.requests, 0
        return requests

    def clear_request(self, request: int) -> None:
        """Forget a request."""
        with self._request_lock:
            self.requests &= ~request

    def set_triple_fault(self, pending: bool) -> None:
        """Raise or withdraw a triple fault."""
        with self._request_lock:
            self.requests = self.requests | REQ_TRIPLE_FAULT if pending else self.requests & ~REQ_TRIPLE_FAULT

    def wake(self) -> None:
        """End a wait in HLT, so that the vCPU looks whether it can run."""
        self.wakeup.set()

    def kick_guest(self) -> None:
        """Leave guest mode, if in it (`kvm_vcpu_kick()`); KVM_RUN goes on."""
        cpu = self.cpu
        if self.mode and cpu is not None:
            cpu.core.kick()

    def kick(self) -> None:
        """Send the vCPU's thread a signal: the KVM_RUN in progress, or the next one, fails with EINTR and KVM_EXIT_INTR."""
        self._signalled = True
        task = self.task
        if task is not None:
            task.set_flag(TIF_SIGPENDING)

    def notice_flags(self) -> None:
        """The thread's flags have changed: look at them soon."""
        self.wakeup.set()
        self.kick_guest()

    def handle_signal_exit(self) -> None:
        """A signal ends KVM_RUN."""
        self._signalled = False
        self.kvm_run.exit_reason = uapi.KVM_EXIT_INTR
        self.stats["signal_exits"] += 1
