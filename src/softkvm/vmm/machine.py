"""The machine: a VM of KVM, a board around it, a kernel in its memory, and one call that runs it.

`with Machine(kernel="vmlinuz", initrd="initrd.img") as vm: vm.run(until="login:", timeout=60)`. It uses KVM as any VMM does: through the
methods that stand for its ioctls (Linux 6.1 `Documentation/virt/kvm/api.rst`).
"""

from __future__ import annotations

import enum
import errno
import re
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType

import msgspec

from softkvm import kvm
from softkvm.host.clock import NSEC_PER_SEC, Clock, VirtualClock
from softkvm.uapi import kvm as uapi
from softkvm.vmm import config, cpuid, layout
from softkvm.vmm.board import Board, Chassis
from softkvm.vmm.boot import Bootable
from softkvm.vmm.boot import cpu as boot_cpu
from softkvm.vmm.boot import read as read_image
from softkvm.vmm.config import Config, SerialBackend
from softkvm.vmm.console import DEFAULT_LIMIT, Console
from softkvm.vmm.crew import Crew
from softkvm.vmm.errors import ConfigError
from softkvm.vmm.exits import ExitHandler
from softkvm.vmm.gil import short_switch_interval
from softkvm.vmm.irq import default_routing
from softkvm.vmm.memory import GuestMemory, split
from softkvm.vmm.stats import Repetition, Stats, collect
from softkvm.vmm.stop import Stop, StopReason

CONSOLE_PORT = 0
_AFTER_A_PANIC = frozenset({StopReason.RESET, StopReason.TRIPLE_FAULT})

Text = str | bytes | re.Pattern[str] | re.Pattern[bytes]


class RunState(enum.Enum):
    """What the vCPUs do."""

    RUNNING = "running"
    PAUSED = "paused"
    STOPPED = "stopped"
    """Nobody is inside `Machine.run()`."""


class Status(msgspec.Struct, frozen=True):
    """A machine at a glance."""

    state: RunState
    cpu: str
    """The model with the features that were switched."""
    cpus: int
    memory: int
    """Bytes of RAM."""


class _Failure(Exception):
    """Carries an exception and its vCPU from the thread where it was raised to the one that called `run()`."""

    def __init__(self, vcpu: int, error: BaseException) -> None:
        super().__init__(vcpu, error)
        self.vcpu = vcpu
        self.error = error


class Machine:
    """A PC with a Linux kernel ready to start; a context manager, to be closed."""

    def __init__(
        self,
        kernel: str | Path | None = None,
        initrd: str | Path | bytes | None = None,
        append: str = "",
        memory: str | int = config.DEFAULT_MEMORY,
        cpu: str = config.DEFAULT_CPU,
        serial: Mapping[int, SerialBackend] | None = None,
        *,
        cpus: int = 1,
        kvm_parameters: Iterable[str] = (),
        output_limit: int = DEFAULT_LIMIT,
        clock: Clock | None = None,
        test_device: bool = False,
        process: kvm.Process | None = None,
        cores: int | None = None,
        deterministic: int | None = None,
        tier: str = config.DEFAULT_TIER,
    ) -> None:
        """Build the machine and load the kernel; nothing runs yet.

        `kernel` is a bzImage, an ELF vmlinux or a multiboot image, `initrd` a file or its bytes (multiboot: the module); `append` is
        the command line, for Linux behind `console=ttyS0` unless it names a console; `memory` is bytes or text such as `512M`; `cpu`
        is a model with switched features such as `epyc,-avx2`; `serial` gives each port number its listener; `output_limit` bytes of
        the console are kept; `clock` is the time that guest and devices live by, the host's if none is given; `test_device` adds the
        registers of `devices/test_device.py`; `kvm_parameters` are KVM's module parameters, such as `nrips=0`; `process` is who calls
        KVM (ioctl filters, audit log, tracer), a new one if none is given; `cores` is how many the host has for all vCPUs together, as
        many as they want if none is given. `deterministic` is a seed: the vCPUs then run by turns in virtual time, and every run with the
        same seed and input is the same (`kvm.Turns`), as long as input comes between runs or from a listener of `serial`. `tier` is how
        guest code runs: by the `interpreter`, as host code of the `translator`, or as host code where it is hot (`auto`); what the guest
        sees is the same. ConfigError for anything that cannot be.
        """
        settings = config.check(kernel, initrd, append, memory, cpu, cpus, serial, kvm_parameters, deterministic, tier)
        if deterministic is not None and (clock is not None or cores is not None):
            raise ConfigError("a deterministic machine has a clock and a processor of its own")
        self.process = process if process is not None else kvm.Process()
        self._console = Console(output_limit)
        self._settings = settings
        self._running = threading.Lock()
        self._gate = threading.RLock()  # held while vCPUs are let go or parked
        self._inside_run = self._paused = False
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._outcome: Stop | _Failure | None = None
        self._stop_wanted = False
        self._final: Stop | None = None
        self._seconds = 0.0
        self._closed = False
        with ExitStack() as resources:
            if settings.seed is not None:
                clock = VirtualClock()
            elif clock is None:
                clock = Clock()
            system = _open_kvm(settings, self.process, cores, clock)
            self._turns, self._started_ns = system.turns, clock.monotonic_ns()
            self._build(system, settings, resources, clock, test_device)
            self._resources = resources.pop_all()

    def _build(self, system: kvm.System, settings: Config, resources: ExitStack, clock: Clock, test_device: bool) -> None:
        self._memory = guest = _allocate(settings.memory)
        resources.callback(guest.close)
        image = read_image(settings.kernel, guest.low_end)
        image.load(guest, settings.initrd, settings.command_line, settings.cpus)
        self._vm = vm = resources.enter_context(system.create_vm(clock=clock))
        _set_up_vm(vm, guest)
        self._vcpus: list[kvm.Vcpu] = []
        for index in range(settings.cpus):
            self._vcpus.append(_make_vcpu(system, vm, index, settings, image))
            resources.callback(self._vcpus[index].close)
        self._board = self._make_board(settings, vm, clock)
        if test_device:
            self._board.plug_in_test_device(partial(_forget_page, vm, guest))
        self._handlers = [
            ExitHandler(vcpu, self._board, partial(self._end, index), partial(self._fail, index)) for index, vcpu in enumerate(self._vcpus)
        ]
        self._crew = Crew(self._vcpus, self._handlers, self._turns)
        resources.callback(self._crew.close)

    def _make_board(self, settings: Config, vm: kvm.Vm, clock: Clock) -> Board:
        sinks: list[SerialBackend] = [settings.serial.get(port, _discard) for port in range(len(layout.SERIAL_PORTS))]
        sinks[CONSOLE_PORT] = partial(self._print, sinks[CONSOLE_PORT])
        chassis = Chassis(
            power_off=lambda: self._end(self._crew.current(), StopReason.POWER_OFF, "the guest turned the machine off"),
            reset=lambda: self._end(self._crew.current(), StopReason.RESET, "the guest reset the machine"),
            debug_exit=lambda status: self._end(self._crew.current(), StopReason.EXIT, f"the guest exited with status {status}", status),
        )
        return Board(chassis, vm.irq_line, clock, split(settings.memory), settings.cpus, sinks)

    # Running

    def run(self, until: Text | None = None, timeout: float | None = None) -> Stop:
        """Run the guest until it ends, the console shows `until`, `timeout` seconds are over, or `stop()` is called.

        `until` is text or a pattern, looked for in the output after the text that the last such call found; a match of more than
        `console.WINDOW` bytes is not found. A guest that has ended for good gives its last Stop again. What a serial listener raises comes
        out of here with the guest's position as a note, and so does KeyboardInterrupt. All vCPUs stand still when the call is over.
        RuntimeError if the machine is running already or closed.
        """
        if not self._running.acquire(blocking=False):
            raise RuntimeError("the machine is running already")
        try:
            if self._closed:
                raise RuntimeError("the machine is closed")
            if self._final is None:
                stop = self._run(until, timeout)
                self._final = stop if stop.reason.final else None
                return stop
            return self._final
        finally:
            self._running.release()

    def _run(self, until: Text | None, timeout: float | None) -> Stop:
        with self._lock:
            self._outcome = Stop(StopReason.INTERRUPTED, 0, 0, "stopped before the run") if self._stop_wanted else None
            self._ended.clear()
        if (found := self._console.expect(until)) is not None:
            self._end(0, StopReason.UNTIL, found)
        if self._outcome is None:
            self._let_run(timeout)
        with self._lock:
            self._stop_wanted = False
            outcome = self._outcome or Stop(StopReason.TIMEOUT, 0, 0, f"{timeout} seconds are over")
        position = self._vcpus[outcome.vcpu].get_regs().rip
        if isinstance(outcome, _Failure):
            outcome.error.add_note(f"the guest was at {position:#x} on vCPU {outcome.vcpu}")
            raise outcome.error
        return Stop(outcome.reason, outcome.vcpu, position, outcome.detail, outcome.status)

    def _let_run(self, timeout: float | None) -> None:
        started = time.monotonic()
        with short_switch_interval():
            try:
                with self._gate:
                    self._inside_run = True
                    if not self._paused:
                        self._crew.resume()
                self._ended.wait(timeout)
            finally:
                with self._gate:
                    self._inside_run = False
                    self._crew.pause()
                self._seconds += time.monotonic() - started

    def pause(self) -> None:
        """Park all vCPUs, in this run and in those to come, until `resume()`; none runs when the call is over. Time goes on for the guest.

        For any thread but a vCPU's own, on which serial listeners are called; a listener that blocks keeps the caller waiting.
        """
        with self._gate:
            self._paused = True
            self._crew.pause()

    def resume(self) -> None:
        """Take back `pause()`; a guest with kvmclock is told that it was stopped, so that its watchdogs stay quiet."""
        with self._gate:
            if self._paused:
                for vcpu in self._vcpus:
                    _tell_of_pause(vcpu)
                self._paused = False
                if self._inside_run:
                    self._crew.resume()

    def status(self) -> Status:
        """What the machine is and does now."""
        settings = self._settings
        state = RunState.STOPPED if not self._inside_run else RunState.PAUSED if self._paused else RunState.RUNNING
        cpu = ",".join([settings.cpu, *(f"{'+' if on else '-'}{name}" for name, on in settings.features.items())])
        return Status(state, cpu, settings.cpus, settings.memory)

    def stop(self) -> None:
        """End the run in progress, or the next one if there is none, with INTERRUPTED; callable from any thread."""
        self._stop_wanted = True
        self._end(0, StopReason.INTERRUPTED, "stopped by the caller")

    def _end(self, vcpu: int, reason: StopReason, detail: str, status: int | None = None) -> None:
        if self._console.panic is not None and reason in _AFTER_A_PANIC:
            reason, detail = StopReason.PANIC, self._console.panic
        self._conclude(Stop(reason, vcpu, 0, detail, status))

    def _fail(self, vcpu: int, error: BaseException) -> None:
        self._conclude(_Failure(vcpu, error))

    def _conclude(self, outcome: Stop | _Failure) -> None:
        """The first outcome of a run wins, and every vCPU is told to park before another run can begin."""
        with self._lock:
            if self._outcome is None:
                self._outcome = outcome
                self._crew.halt()
                self._ended.set()

    # Console and counters

    def _print(self, listener: SerialBackend, data: bytes) -> None:
        found = self._console.feed(data)
        listener(data)
        if found is not None:
            self._end(self._crew.current(), StopReason.UNTIL, found)
        elif self._console.halted and self._console.panic is not None:
            self._end(self._crew.current(), StopReason.PANIC, self._console.panic)

    def send(self, data: bytes | str, port: int = CONSOLE_PORT) -> None:
        """Type `data` (text as UTF-8) into a serial port; it waits there until the guest reads it. Callable from any thread."""
        if port not in range(len(layout.SERIAL_PORTS)):
            raise ValueError(f"there is no serial port {port}")
        with self._board.lock:
            self._board.serial[port].receive(data.encode() if isinstance(data, str) else data)

    def press_power_button(self) -> None:
        """Ask the guest to shut down."""
        with self._board.lock:
            self._board.pm.press_power_button()

    @property
    def output(self) -> bytes:
        """What the guest has printed on ttyS0, as far as it is kept."""
        return self._console.data

    @property
    def text(self) -> str:
        """`output` as text; what is not UTF-8 is replaced."""
        return self.output.decode(errors="replace")

    def stats(self) -> Stats:
        """The counters now, and of a deterministic machine the marks of its run."""
        stats = collect(self._seconds, self._vcpus, self._handlers)
        if self._turns is None:
            return stats
        passed = (self._turns.clock.monotonic_ns() - self._started_ns) / NSEC_PER_SEC
        marks = Repetition(self._turns.seed, stats.instructions, passed, self._vm.exit_trace.digest(), self._memory.digest())
        return msgspec.structs.replace(stats, repetition=marks)

    def tsc_status(self) -> kvm.TscStatus:
        """TSC offsets, master clock and kvmclock now."""
        return self._vm.tsc_status()

    # The end

    def close(self) -> None:
        """Stop the guest and give everything back; nothing happens the second time."""
        self.stop()
        with self._running:
            self._closed = True
            self._resources.close()

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()


def _tell_of_pause(vcpu: kvm.Vcpu) -> None:
    try:
        vcpu.kvmclock_ctrl()
    except OSError as error:
        if error.errno != errno.EINVAL:  # it has no kvmclock
            raise


def _discard(data: bytes) -> None:
    """The listener of a serial port that nobody listens to."""


def _open_kvm(settings: Config, process: kvm.Process, cores: int | None, clock: Clock) -> kvm.System:
    virtual = clock if isinstance(clock, VirtualClock) and settings.seed is not None else None
    try:
        model = kvm.Model(settings.cpu, dict(settings.features), None if virtual is None else virtual.tsc_khz, settings.tier)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    turns = None if virtual is None or settings.seed is None else kvm.Turns(model, virtual, settings.seed)
    return kvm.System(model, settings.parameters, process, cores, turns)


def _allocate(size: int) -> GuestMemory:
    try:
        return GuestMemory(size, kvm.allocate_memory)
    except OSError as error:
        raise ConfigError(f"this host cannot provide {size // layout.MIB} MB of memory: {error.strerror}") from error


def _set_up_vm(vm: kvm.Vm, guest: GuestMemory) -> None:
    vm.set_identity_map_addr(layout.KVM_IDENTITY_MAP.base)
    vm.set_tss_addr(layout.KVM_TSS.base)
    for slot in guest.slots():
        vm.set_user_memory_region(slot)
    vm.create_irqchip()
    vm.create_pit2(uapi.PitConfig(flags=uapi.KVM_PIT_SPEAKER_DUMMY))
    vm.set_gsi_routing(list(default_routing()))


def _forget_page(vm: kvm.Vm, guest: GuestMemory, address: int) -> None:
    """Make the next access to a page of RAM a nested page fault again, by taking its whole memslot away for a moment."""
    for slot in guest.slots():
        if slot.guest_phys_addr <= address < slot.guest_phys_addr + slot.memory_size:
            size, slot.memory_size = slot.memory_size, 0
            vm.set_user_memory_region(slot)
            slot.memory_size = size
            vm.set_user_memory_region(slot)


def _make_vcpu(system: kvm.System, vm: kvm.Vm, index: int, settings: Config, image: Bootable) -> kvm.Vcpu:
    vcpu = vm.create_vcpu(index)
    identity = cpuid.Identity(
        apic_id=index,
        cpus=settings.cpus,
        invariant_tsc=settings.features.get("invtsc", False),
        without=frozenset(name.replace("_", "-") for name, on in settings.features.items() if not on),
    )
    vcpu.set_cpuid2(cpuid.identify(system.get_supported_cpuid(), identity))
    (misc_enable,) = vcpu.get_msrs([boot_cpu.MSR_MISC_ENABLE])
    vcpu.set_msrs(boot_cpu.msrs(misc_enable))
    lapic = vcpu.get_lapic()
    boot_cpu.wire_lapic(lapic, boot_cpu=index == 0)
    vcpu.set_lapic(lapic)
    if index == 0:
        sregs = vcpu.get_sregs()
        registers = image.enter(sregs)
        vcpu.set_sregs(sregs)
        vcpu.set_regs(registers)
    return vcpu
