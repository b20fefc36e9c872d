"""What runs of a vCPU: its control block, its shared mapping, the thread and the core under it.

Answers to Linux 6.1 `virt/kvm/kvm_main.c` (`vcpu_load()`, `vcpu_put()`). `VcpuRequests` is how other threads reach it, `Vcpu` adds the
parts that a guest sees, and the ioctls.
"""

from __future__ import annotations

import errno
import mmap
import threading
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, NoReturn, Self

from softkvm import silicon
from softkvm.host import static_call
from softkvm.host.sched import Cpu
from softkvm.host.task import TIF_NEED_RESCHED, TIF_SIGPENDING, Task
from softkvm.kvm import events, tsc, virtual_time, watch
from softkvm.kvm.dirty_ring import DirtyRing
from softkvm.kvm.guest_debug import DebugRegisters
from softkvm.kvm.mmu import Fault
from softkvm.kvm.smm import SmmState
from softkvm.kvm.vcpu_requests import OUTSIDE_GUEST_MODE, VcpuRequests
from softkvm.kvm.vendor import INTERCEPTS
from softkvm.silicon.control import Intercept, State
from softkvm.uapi import kvm as uapi

if TYPE_CHECKING:
    from softkvm.kvm.mmu import Mmu
    from softkvm.kvm.vm import Vm

MMAP_SIZE = 3 * 4096
"""kvm_run, PIO data, coalesced ring: one page each."""
NO_INTERRUPT = -1
_NOT_ARMED = -1
_RING_OFFSET = uapi.KVM_DIRTY_LOG_PAGE_OFFSET * mmap.PAGESIZE


class OnCore(NamedTuple):
    """A stay on a core, for the account of what the core counts: what it had counted before, and what the vCPU brought from other cores."""

    core: silicon.Core | None
    before: dict[str, int]
    brought: dict[str, int]

    def counters(self) -> dict[str, int]:
        """What was counted for the vCPU until now."""
        if self.core is None:
            return self.brought
        now = self.core.counters()
        names = now | self.brought  # a core names some counters only once they count
        return {name: now.get(name, 0) - self.before.get(name, 0) + self.brought.get(name, 0) for name in names}


class VcpuCore(VcpuRequests):
    """The running half of a vCPU. `kick()`, `kick_guest()`, `wake()` and `make_request()` are for any thread, the rest for its own."""

    unknown_ioctl = errno.EINVAL
    fd_class = "vcpu"
    ioctl_lock: threading.RLock

    def __init__(self, vm: Vm, vcpu_id: int) -> None:
        """A vCPU that has not run yet, its control block all zero."""
        super().__init__(vm.process)
        self.ioctl_lock = threading.RLock()
        self.vm = vm
        self.vm_id = vm.vm_id
        self.vcpu_id = vcpu_id
        self.clock = vm.clock
        self.vendor = vm.vendor
        self.handlers, self.next_rip = vm.vendor.handlers, vm.vendor.next_rip
        self.saves_next_rip = vm.parameters.nrips and "nrip-save" in vm.model.features
        """Whether `Exit.next_rip` counts: the silicon saves it, and the module parameter lets KVM use it."""
        self._init_shared_state()
        self._init_concurrency()
        static_call.register(self)

    def _init_shared_state(self) -> None:
        """The control block, the mapping, and views of both for the paths that are taken at every exit."""
        vmcb = silicon.Vmcb()
        self._hardware = vmcb.hardware
        self.block = vmcb.view
        self.msrs_passed_through: set[tuple[int, bool]] = set()
        """(index, write) of the MSRs that KVM lets the guest use by itself, as far as no filter is in the way."""
        self.control, self.exit, self.state, self.gpr = vmcb.control, vmcb.exit, vmcb.state, vmcb.gpr
        self.block_memory = vmcb.memory
        self._mapping = mmap.mmap(-1, MMAP_SIZE)
        self.mmap_area = memoryview(self._mapping)
        """What mmap(2) of the vCPU maps: page 0 `kvm_run`, page 1 PIO data, page 2 the coalesced ring."""
        self.mmap_words = self.mmap_area.cast("Q")
        self.kvm_run = uapi.Run.from_buffer(self._mapping)
        self.pio_data = self.mmap_area[4096:8192]
        self.dirty_ring = DirtyRing(self, self.vm.mmu.ring_size) if self.vm.mmu.ring_size else None
        self.intercepts = INTERCEPTS
        """`Control.intercepts` without the windows."""
        self.windows = 0
        self.mmu = self.vm.mmu
        """The memory that the vCPU sees: the guest's, or in system management mode the other address space."""
        self.smm = SmmState()
        self.hardware_view = memoryview(vmcb.hardware)
        self.guest_debug = 0
        """KVM_GUESTDBG_*, 0 without a debugger in user space."""
        self.debug_registers: State | DebugRegisters = self.state
        """The guest's own: the silicon's, unless a debugger has those."""

    def _init_concurrency(self) -> None:
        """What belongs to the run loop."""
        self.init_requests()
        self.wakeup = self.vm.scheduler.wakeup(self)
        self.halt_poll_ns = 0
        """How long the next HLT is polled for."""
        self.signal_mask: frozenset[int] | None = None
        self.cpu_index = 0
        """Number of the core that the vCPU is or was on."""
        self.has_run = False
        """Whether the vCPU has been on a core, after which its CPUID and feature MSRs are fixed."""
        self._on_core = OnCore(None, {}, {})
        self._enter_lock = threading.Lock()
        self._tsc_catchup = False
        self._core_enter: Callable[[], int] = self._not_loaded
        self._guard: Callable[[Callable[[], int]], int] | None = None
        self.enter: Callable[[], int] = self._not_loaded
        """Runs the guest until it exits: the core itself, or `kvm/watch.py` around it."""
        self.armed: int | None = _NOT_ARMED
        self.flush_requested = False
        self.events = events.EventQueue()
        self.userspace_irq = NO_INTERRUPT
        self.pending_ioapic_eoi = 0
        """Vector whose end user space's IOAPIC is to hear of."""
        self.complete_userspace_io: Callable[[Self], int] | None = None
        self.pending_io: tuple[int, ...] = ()
        """What `complete_userspace_io` must know of its exit: RIP there, and what it likes."""
        self.half_done = False
        """An instruction has made device accesses and is not at its end (`kvm/emulate.py`)."""
        self.stats: Counter[str] = Counter()
        """KVM's own counters, by the names of the kernel's binary statistics (`halt_exits`, `signal_exits`, ...)."""
        self.instructions_skipped = 0
        """Instructions that KVM has retired in the guest's place; the silicon counts those that it has executed itself."""
        self.retired: Callable[[], None] | None = None
        """Called for each of them while a counter of the guest wants to know."""
        self.exit_counts: dict[int, int] = dict.fromkeys(self.handlers, 0)
        """VM exits by the vendor's exit reason."""

    # --- The run loop's view --------------------------------------------------------------------------------------------------------

    def attach(self, task: Task) -> None:
        """KVM_RUN begins in this thread: signals for the vCPU are its signals now. (`kick()` does it in the opposite order: one of the
        two sees the other.)"""
        self.task, task.guest = task, self
        if self._signalled:
            task.set_flag(TIF_SIGPENDING)

    def detach(self) -> None:
        """KVM_RUN ends, out of guest mode and of HLT even if Ctrl-C came at the wrong moment; a signal that comes from now on waits for the
        next one."""
        self.mode, self.blocked = OUTSIDE_GUEST_MODE, False
        task, self.task = self.task, None
        if task is not None:
            task.guest = None

    def load(self) -> None:
        """`vcpu_load()`: occupy a core. The vCPU keeps it after `KVM_RUN`, until `yield_core()`."""
        if self.cpu is None:
            self.vm.scheduler.load(self)

    def sched_in(self, cpu: Cpu) -> None:
        """On a core now, whose TLB holds what a stranger has left there."""
        self.control.tlb_control = 1
        self.flush_requested = True
        self._on_core = OnCore(cpu.core, cpu.core.counters(), self._on_core.counters())
        self._enter_core(cpu)
        self.armed = _NOT_ARMED
        self.has_run, self.cpu_index = True, cpu.index
        self.cpu = cpu

    def _enter_core(self, cpu: Cpu) -> None:
        core_enter = partial(cpu.core.enter, self._hardware, self.mmu.npt)
        turns = self.vm.turns
        self._enter_by(core_enter if turns is None else partial(virtual_time.enter, self, turns, core_enter))

    def use_memory(self, mmu: Mmu) -> None:
        """Enter the guest with this memory from now on."""
        self.mmu = mmu
        if self.cpu is not None:
            self._enter_core(self.cpu)

    def sched_out(self) -> None:
        """On no core any more."""
        self._on_core = OnCore(None, {}, self._on_core.counters())
        self._enter_by(self._not_loaded)
        self.cpu = None

    def yield_core(self) -> bool:
        """`vcpu_put()`, for another vCPU that needs the core or at the end; False while a thread runs this one."""
        if not self.ioctl_lock.acquire(blocking=False):
            return False
        try:
            if self.task is not None:
                return False
            self.sched_out()
        finally:
            self.ioctl_lock.release()
        return True

    def set_need_resched(self) -> None:
        """Others wait for the core, and the slice is over."""
        task = self.task
        if task is not None:
            task.set_flag(TIF_NEED_RESCHED)

    def call(self, function: Callable[[], object]) -> bool:
        """Run `function` here, if this thread has the vCPU or nobody does."""
        if not self.ioctl_lock.acquire(blocking=False):
            return False
        try:
            function()
        finally:
            self.ioctl_lock.release()
        return True

    def interrupt_guest(self, function: Callable[[], None]) -> None:
        """Let the thread that is in KVM_RUN call `function` before it next enters the guest."""
        task = self.task
        if task is not None:
            task.add_work(function)

    def schedule(self) -> None:
        """Let others have the core; returns when the vCPU is on one again."""
        self.vm.scheduler.schedule(self)

    def _enter_by(self, core_enter: Callable[[], int]) -> None:
        with self._enter_lock:
            self._core_enter = core_enter
            self._choose_enter()

    def _choose_enter(self) -> None:
        enter = self._core_enter
        if self._tsc_catchup:
            enter = partial(tsc.enter_catching_up, self, enter)
        if self._guard is not None:
            enter = partial(self._guard, enter)
        self.enter = partial(watch.enter, self, enter) if watch.wanted() else enter

    def set_tsc_catchup(self, on: bool) -> None:
        """Whether the TSC must be looked after at every exit."""
        self._tsc_catchup = on
        self.update_static_calls()

    def guard_entry(self, guard: Callable[[Callable[[], int]], int] | None) -> None:
        """Let `guard` look at something right before each entry, which it then makes; None for nothing to look at."""
        with self._enter_lock:
            self._guard = guard
            self._choose_enter()

    def update_static_calls(self) -> None:
        """A hook was turned on or off: the next entry takes the way that it wants."""
        with self._enter_lock:
            self._choose_enter()

    def killed(self) -> None:
        """The process was killed: the thread inside, if any, comes out."""
        self.kick()

    def _mmap(self, length: int, offset: int) -> memoryview:
        """The shared pages; OSError(EINVAL) for what is not within them."""
        area, start = self.mmap_area, 0
        if self.dirty_ring is not None and offset >= _RING_OFFSET:
            area, start = self.dirty_ring.area, _RING_OFFSET
        if length <= 0 or offset < 0 or offset % mmap.PAGESIZE or offset - start + length > len(area):
            raise OSError(errno.EINVAL, "no such range of the vCPU's pages")
        return area[offset - start : offset - start + length]

    def exits_by_reason(self) -> dict[str, int]:
        """VM exits so far, by the vendor's names."""
        names = self.vendor.exit_names
        return {names.get(reason, f"{reason:#x}"): count for reason, count in self.exit_counts.copy().items() if count}

    @staticmethod
    def _not_loaded() -> NoReturn:
        raise RuntimeError("the vCPU is not on a core")

    def engine_counters(self) -> dict[str, int]:
        """What the silicon has counted while this vCPU was on it, by the engine's names; for any thread, waits for the next VM exit."""
        while True:
            on_core = self._on_core
            counters = on_core.counters()
            if on_core is self._on_core:  # else the core counted for somebody else meanwhile
                return counters

    def arm_timer(self, expiry: int | None) -> None:
        """Let the core's timer end guest mode at `expiry` (ns), None for never."""
        self.armed = expiry
        if self.cpu is not None:
            self.cpu.core.set_timer(0 if expiry is None else max(1, self.clock.ns_to_tsc(expiry)))

    def core_interrupted(self) -> None:
        """An interrupt of the host's came to the core: its timer, if that is due, else a kick, which leaves the timer armed."""
        armed = self.armed
        if armed is not None and armed <= self.clock.monotonic_ns():
            self.disarm_timer()
            self.clock.run_expired()

    def disarm_timer(self) -> None:
        """Stop the core's timer until the next entry arms it again."""
        if self.cpu is not None:
            self.cpu.core.set_timer(0)
        self.armed = _NOT_ARMED

    def exit_soon(self) -> None:
        """Let the next stay in the guest end at once, behind what is injected (`kvm_vcpu_kick()` of itself)."""
        if self.cpu is not None:
            self.cpu.core.kick()

    def set_windows(self, windows: int) -> None:
        """Which interrupt and NMI windows (bits of `Control.intercepts`) to exit at."""
        if windows != self.windows:
            self.windows = windows
            self.control.intercepts = self.intercepts | windows

    def set_intercept(self, intercept: Intercept, wanted: bool) -> None:
        """Exit for one more condition, or no longer."""
        self.intercepts = self.intercepts | 1 << intercept if wanted else self.intercepts & ~(1 << intercept)
        self.control.intercepts = self.intercepts | self.windows

    def exit_to_user(self, reason: int, finish: Callable[[Self], int] | None = None) -> int:
        """Leave KVM_RUN with an exit reason; `finish` runs at the start of the next KVM_RUN, its result is that of an exit handler."""
        self.kvm_run.exit_reason = reason
        self.complete_userspace_io = finish
        return 0

    def translate_gva(self, gva: int, access: int) -> int | None:
        """Guest-virtual to guest-physical as the guest's paging has it now, on the loaded core; `access` as for `Core.translate`."""
        if self.cpu is None:
            return self._not_loaded()
        mmu = self.mmu
        while True:
            try:
                return self.cpu.core.translate(self._hardware, mmu.npt, gva, access)
            except LookupError as missing:  # the guest has not walked its table there yet
                if mmu.fault(missing.args[0], False) is not Fault.FIXED:
                    return None
