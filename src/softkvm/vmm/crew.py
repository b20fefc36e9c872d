"""The vCPU threads: one per vCPU, parked until the machine runs, together again before a run ends.

A vCPU leaves KVM_RUN for a pause as Linux 6.1 `Documentation/virt/kvm/api.rst` prescribes: `immediate_exit` closes the race with a vCPU
that is about to enter, and a signal (`Vcpu.kick`) gets out the one that is inside. In a machine whose runs repeat the threads take turns:
what one does, in KVM_RUN and out of it, it does while the others wait.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from softkvm.uapi import kvm as uapi


class Vcpu(Protocol):
    """The part of `kvm.Vcpu` that a thread needs."""

    @property
    def kvm_run(self) -> uapi.Run:
        """Page 0 of the mapping."""
        ...

    def run(self) -> None:
        """KVM_RUN."""
        ...

    def kick(self) -> None:
        """Make KVM_RUN return EINTR."""
        ...


class Actions(Protocol):
    """What happens to one vCPU outside KVM_RUN; called on its thread."""

    def handle(self) -> None:
        """KVM_RUN returned with an exit."""
        ...

    def refused(self, error: OSError) -> None:
        """KVM_RUN failed; the run must end."""
        ...

    def failed(self, error: BaseException) -> None:
        """One of the others raised; the run must end."""
        ...


class Turns(Protocol):
    """The part of `kvm.Turns` that the threads need."""

    def begin(self) -> None:
        """All vCPUs are about to run."""
        ...

    def taking(self, guest: Any, /) -> AbstractContextManager[None]:
        """In the block, which begins in its turn, the calling thread runs a vCPU."""
        ...


class Crew:
    """Runs all vCPUs between `resume()` and `pause()`."""

    def __init__(self, vcpus: Sequence[Vcpu], actions: Sequence[Actions], turns: Turns | None = None) -> None:
        """`actions[n]` goes with `vcpus[n]`; with `turns` one runs at a time."""
        self._turns = turns
        self._vcpus = vcpus
        self._actions = actions
        self._condition = threading.Condition()
        self._running = False
        self._closed = False
        self._turn = 0  # counts calls of resume(): a thread owes one visit to the guest for each, however short
        self._busy = 0
        self._threads: list[threading.Thread] = []

    def current(self) -> int:
        """Number of the vCPU whose thread calls; 0 for any other thread."""
        thread = threading.current_thread()
        return self._threads.index(thread) if thread in self._threads else 0

    def resume(self) -> None:
        """Let all vCPUs run; RuntimeError after `close()`."""
        with self._condition:
            self._wait_parked()
            if self._closed:
                raise RuntimeError("the machine is closed")
            for vcpu in self._vcpus:
                vcpu.kvm_run.immediate_exit = 0
            self._running = True
            if self._turns is not None:
                self._turns.begin()
            self._turn += 1
            self._busy = len(self._vcpus)
            if not self._threads:
                self._start_threads()
            self._condition.notify_all()

    def halt(self) -> None:
        """Tell all vCPUs to park, without waiting for them: callable on a vCPU's own thread."""
        self._running = False
        for vcpu in self._vcpus:
            vcpu.kvm_run.immediate_exit = 1
            vcpu.kick()

    def pause(self) -> None:
        """Park all vCPUs; none is in KVM_RUN or in an action when the call returns."""
        self.halt()
        with self._condition:
            self._wait_parked()

    def settle(self) -> None:
        """Let KVM finish what each parked vCPU left it for, such as the IN whose value waits in kvm_run: then its registers are whole.

        KVM_RUN with `immediate_exit` does that and no more (api.rst, 4.10); an access in several pieces comes back for each.
        """
        for vcpu, actions in zip(self._vcpus, self._actions, strict=True):
            vcpu.kvm_run.immediate_exit = 1
            self._finish(vcpu, actions)

    def _finish(self, vcpu: Vcpu, actions: Actions) -> None:
        while True:
            try:
                vcpu.run()
            except OSError as error:
                if error.errno not in (errno.EINTR, errno.EAGAIN):
                    actions.refused(error)
                return
            actions.handle()

    def parks(self, timeout: float) -> bool:
        """Tell all vCPUs to park; whether they have done so within `timeout` seconds."""
        self.halt()
        with self._condition:
            return self._condition.wait_for(lambda: self._busy == 0, timeout)

    def close(self) -> None:
        """Park all vCPUs and end their threads; nothing happens the second time."""
        self.pause()
        with self._condition:
            self._closed = True
            self._condition.notify_all()
        for thread in self._threads:
            thread.join()

    def _start_threads(self) -> None:
        self._threads = [
            threading.Thread(target=self._live, args=(vcpu, actions), name=f"softkvm-vcpu{index}", daemon=True)
            for index, (vcpu, actions) in enumerate(zip(self._vcpus, self._actions, strict=True))
        ]
        for thread in self._threads:
            thread.start()

    def _wait_parked(self) -> None:
        self._condition.wait_for(lambda: self._busy == 0)

    def _live(self, vcpu: Vcpu, actions: Actions) -> None:
        turn = 1
        while not self._closed:
            try:
                with nullcontext() if self._turns is None else self._turns.taking(vcpu):
                    self._run_guest(vcpu, actions)
            except BaseException as error:  # carried to the thread that waits for the end of the run, which raises it again
                actions.failed(error)
            with self._condition:
                self._busy -= 1
                self._condition.notify_all()
                while not self._closed and self._turn == turn:
                    self._condition.wait()
                turn += 1

    def _run_guest(self, vcpu: Vcpu, actions: Actions) -> None:
        while self._running:
            try:
                vcpu.run()
            except OSError as error:
                if error.errno not in (errno.EINTR, errno.EAGAIN):
                    actions.refused(error)
            else:
                actions.handle()
