"""What runs of a vCPU: its control block, its shared mapping, the thread and the core under it, and how other threads reach it.

Answers to Linux 6.1 `virt/kvm/kvm_main.c` (`vcpu_load()`, `kvm_vcpu_kick()`, `kvm_make_request()`, `kvm_vcpu_wake_up()`) and
`Documentation/virt/kvm/vcpu-requests.rst`. `Vcpu` adds the parts that a guest sees, and the ioctls.
"""

from __future__ import annotations

import errno
import mmap
import threading
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NoReturn

from softkvm import silicon
from softkvm.host.sched import Cpu
from softkvm.host.task import TIF_SIGPENDING, Task
from softkvm.kvm import events
from softkvm.kvm.ioctl import KvmFile
from softkvm.kvm.request import REQ_NMI, REQ_TRIPLE_FAULT
from softkvm.kvm.vendor import INTERCEPTS
from softkvm.uapi import kvm as uapi

if TYPE_CHECKING:
    from softkvm.kvm.vm import Vm

MMAP_SIZE = 3 * 4096
"""kvm_run, PIO data, coalesced ring: one page each."""
NO_INTERRUPT = -1
OUTSIDE_GUEST_MODE, IN_GUEST_MODE = 0, 1
_NOT_ARMED = -1


class VcpuCore(KvmFile):
    """The running half of a vCPU. `kick()`, `kick_guest()`, `wake()` and `make_request()` are for any thread, the rest for its own."""

    unknown_ioctl = errno.EINVAL

    def __init__(self, vm: Vm, vcpu_id: int) -> None:
        """A vCPU that has not run yet, its control block all zero."""
        self.ioctl_lock = threading.RLock()
        self.vm = vm
        self.vcpu_id = vcpu_id
        self.clock = vm.clock
        self.vendor = vm.vendor
        self.handlers = vm.vendor.handlers
        self.next_expiry = vm.clock.next_expiry
        self._init_shared_state()
        self._init_concurrency()

    def _init_shared_state(self) -> None:
        """The control block, the mapping, and views of both for the paths that are taken at every exit."""
        vmcb = silicon.Vmcb()
        self._hardware = vmcb.hardware
        self.block = vmcb.view
        self.control, self.exit, self.state, self.gpr = vmcb.control, vmcb.exit, vmcb.state, vmcb.gpr
        self.accesses = self.block.access
        self._mapping = mmap.mmap(-1, MMAP_SIZE)
        self.mmap_area = memoryview(self._mapping)
        """What mmap(2) of the vCPU maps: page 0 `kvm_run`, page 1 PIO data, page 2 the coalesced ring."""
        self.kvm_run = uapi.Run.from_buffer(self._mapping)
        self.kvm_run_io = self.kvm_run.io
        self.pio_data = self.mmap_area[4096:8192]
        self.windows = 0

    def _init_concurrency(self) -> None:
        """What other threads touch, and what belongs to the run loop."""
        self.mode = OUTSIDE_GUEST_MODE
        self.requests = 0
        self._nmis_queued = 0
        self._request_lock = threading.Lock()
        self.wakeup = threading.Event()
        self.blocked = False
        self.task: Task | None = None
        self._task_lock = threading.Lock()
        self._signalled = False
        self.signal_mask: frozenset[int] | None = None
        self._cpu: Cpu | None = None
        self._last_cpu: Cpu | None = None
        self.enter: Callable[[], int] = self._not_loaded
        self.armed: int | None = _NOT_ARMED
        self.flush_requested = False
        self.events = events.EventQueue()
        self.userspace_irq = NO_INTERRUPT
        self.complete_userspace_io: Callable[[], int] | None = None
        self.stats: Counter[str] = Counter()
        """Counters by the names of the kernel's binary statistics (`halt_exits`, `signal_exits`, ...)."""
        self.exit_counts: Counter[int] = Counter()
        """VM exits by the vendor's exit reason."""

    # --- Other threads --------------------------------------------------------------------------------------------------------------

    def make_request(self, request: int) -> None:
        """Ask for the work of REQ_* before the next VM entry, and make the vCPU notice."""
        with self._request_lock:
            self.requests |= request
        if self.blocked:
            self.wakeup.set()
        elif self.mode:
            self.kick_guest()

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

    def set_triple_fault(self, pending: bool) -> None:
        """Raise or withdraw a triple fault."""
        with self._request_lock:
            self.requests = self.requests | REQ_TRIPLE_FAULT if pending else self.requests & ~REQ_TRIPLE_FAULT

    def wake(self) -> None:
        """End a wait in HLT, so that the vCPU looks whether it can run."""
        self.wakeup.set()

    def kick_guest(self) -> None:
        """Leave guest mode, if in it (`kvm_vcpu_kick()`); KVM_RUN goes on."""
        cpu = self._cpu
        if self.mode and cpu is not None:
            cpu.core.kick()

    def kick(self) -> None:
        """Send the vCPU's thread a signal: the KVM_RUN in progress, or the next one, fails with EINTR and KVM_EXIT_INTR."""
        with self._task_lock:
            if self.task is None:
                self._signalled = True
            else:
                self.task.set_flag(TIF_SIGPENDING)

    def _notice_flags(self) -> None:
        """The thread's flags have changed: look at them soon."""
        self.wakeup.set()
        self.kick_guest()

    # --- The run loop's view --------------------------------------------------------------------------------------------------------

    def attach(self, task: Task) -> None:
        """KVM_RUN begins in this thread: signals for the vCPU are its signals now."""
        with self._task_lock:
            self.task = task
            task.kick = self._notice_flags
            signalled, self._signalled = self._signalled, False
        if signalled:
            task.set_flag(TIF_SIGPENDING)

    def detach(self) -> None:
        """KVM_RUN ends; a signal that comes from now on waits for the next one."""
        with self._task_lock:
            if self.task is not None:
                self.task.kick = None
            self.task = None

    def load(self) -> None:
        """`vcpu_load()`: occupy a core."""
        self._cpu = self.vm.scheduler.load(self, self._last_cpu)

    def put(self) -> None:
        """`vcpu_put()`: give the core back."""
        cpu, self._cpu = self._cpu, None
        if cpu is not None:
            self.vm.scheduler.put(self, cpu)

    def sched_in(self, cpu: Cpu) -> None:
        """On a core now; whatever a stranger left in its TLB goes."""
        if cpu is not self._last_cpu or cpu.last is not self:
            self.control.tlb_control = 1
            self.flush_requested = True
            cpu.last = self
            self._last_cpu = cpu
            self.enter = partial(cpu.core.enter, self._hardware, self.vm.mmu.npt)
            self.armed = _NOT_ARMED

    def sched_out(self, cpu: Cpu) -> None:
        """Off the core, out of guest mode even if Ctrl-C came between an exit and its handling. The timer stays as it is: whoever runs
        here next arms it anew, and it is still right if that is this vCPU."""
        self.mode = OUTSIDE_GUEST_MODE

    @staticmethod
    def _not_loaded() -> NoReturn:
        raise RuntimeError("the vCPU is not on a core")

    @property
    def has_run(self) -> bool:
        """Whether the vCPU has been on a core, after which its CPUID and feature MSRs are fixed."""
        return self._last_cpu is not None

    @property
    def cpu_index(self) -> int:
        """Number of the core that the vCPU last ran on."""
        return self._last_cpu.index if self._last_cpu is not None else 0

    def arm_timer(self, expiry: int | None) -> None:
        """Let the core's timer end guest mode at `expiry` (ns), None for never."""
        self.armed = expiry
        if self._cpu is not None:
            self._cpu.core.set_timer(0 if expiry is None else max(1, self.clock.ns_to_tsc(expiry)))

    def disarm_timer(self) -> None:
        """Stop the core's timer until the next entry arms it again."""
        if self._cpu is not None:
            self._cpu.core.set_timer(0)
        self.armed = _NOT_ARMED

    def set_windows(self, windows: int) -> None:
        """Which interrupt and NMI windows (bits of `Control.intercepts`) to exit at."""
        if windows != self.windows:
            self.windows = windows
            self.control.intercepts = INTERCEPTS | windows

    def exit_to_user(self, reason: int, finish: Callable[[], int] | None = None) -> int:
        """Leave KVM_RUN with an exit reason; `finish` runs at the start of the next KVM_RUN, its result is that of an exit handler."""
        self.kvm_run.exit_reason = reason
        self.complete_userspace_io = finish
        return 0

    def handle_signal_exit(self) -> None:
        """A signal ends KVM_RUN."""
        self.kvm_run.exit_reason = uapi.KVM_EXIT_INTR
        self.stats["signal_exits"] += 1

    def translate_gva(self, gva: int, access: int) -> int | None:
        """Guest-virtual to guest-physical as the guest's paging has it now, on the loaded core; `access` as for `Core.translate`."""
        if self._cpu is None:
            return self._not_loaded()
        return self._cpu.core.translate(self._hardware, self.vm.mmu.npt, gva, access)
