"""The machine: a VM of KVM, a board around it, a kernel in its memory, and one call that runs it.

`with Machine(kernel="vmlinuz", initrd="initrd.img") as vm: vm.run(until="login:", timeout=60)`. It uses KVM as any VMM does: through the
methods that stand for its ioctls (Linux 6.1 `Documentation/virt/kvm/api.rst`).
"""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType

import msgspec

from softkvm import kvm
from softkvm.host.clock import NSEC_PER_SEC, Clock, VirtualClock
from softkvm.vmm import assembly, config, layout, snapshot
from softkvm.vmm.board import Board, Chassis
from softkvm.vmm.config import Hardware, SerialBackend, Surroundings
from softkvm.vmm.console import DEFAULT_LIMIT, Console
from softkvm.vmm.crew import Crew
from softkvm.vmm.errors import ConfigError, StateError
from softkvm.vmm.exits import ExitHandler
from softkvm.vmm.gil import short_switch_interval
from softkvm.vmm.introspection import Introspection
from softkvm.vmm.memory import split
from softkvm.vmm.origin import KernelOrigin, Origin, SnapshotOrigin
from softkvm.vmm.outcome import Failure, Outcome
from softkvm.vmm.snapshot import Parts, SnapshotFile
from softkvm.vmm.stats import Repetition, Stats, collect
from softkvm.vmm.status import RunState, Status
from softkvm.vmm.stop import Stop, StopReason
from softkvm.vmm.suspend import Suspend

CONSOLE_PORT = 0
_TOOLS_PATIENCE, _LOOKS = 0.1, 10
"""Seconds between two looks, and how many: a host that stood still meanwhile has cost the tool one of them."""
_AFTER_A_PANIC = frozenset({StopReason.RESET, StopReason.TRIPLE_FAULT})

Text = str | bytes | re.Pattern[str] | re.Pattern[bytes]


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
        tsc_khz: int | None = None,
        tier: str = config.DEFAULT_TIER,
    ) -> None:
        """Build the machine and load the kernel; nothing runs yet.

        `kernel` is a bzImage, an ELF file (PVH, vmlinux) or a multiboot image, `initrd` a file or its bytes (PVH and multiboot: the
        module); `append` is the command line, for Linux behind `console=ttyS0` unless it names a console; `memory` is bytes or text such
        as `512M`; `cpu` is a model with switched features such as `epyc,-avx2`; `serial` gives each port number its listener;
        `output_limit` bytes of the console are kept; `clock` is the time that guest and devices live by, the host's if none is given;
        `test_device` adds the registers of `devices/test_device.py`; `kvm_parameters` are KVM's module parameters, such as `nrips=0`;
        `process` is who calls KVM (ioctl filters, audit log, tracer), a new one if none is given; `cores` is how many the host has for all
        vCPUs together, as many as they want if none is given; `tsc_khz` is the rate of the guest's TSCs, the host's if none is given.
        `deterministic` is a seed: the vCPUs then run by turns in virtual time, and every run with the same seed and input is the same
        (`kvm.Turns`), as long as input comes between runs or from a listener of `serial`. `tier` is how guest code runs: by the
        `interpreter`, as host code of the `translator`, or as host code where it is hot (`auto`); what the guest sees is the same.
        ConfigError for anything that cannot be.
        """
        settings = config.check(kernel, initrd, append, memory, cpu, cpus, serial, kvm_parameters, deterministic, tsc_khz)
        if deterministic is not None and (clock is not None or cores is not None):
            raise ConfigError("a deterministic machine has a clock and a processor of its own")
        if clock is None:
            clock = Clock() if deterministic is None else VirtualClock()
        process = process if process is not None else kvm.Process()
        around = Surroundings(settings.serial, output_limit, clock, process, cores, deterministic, tsc_khz, tier)
        self._set_up(settings, KernelOrigin(settings), around, test_device)

    @classmethod
    def restore(
        cls,
        path: str | Path,
        serial: Mapping[int, SerialBackend] | None = None,
        *,
        output_limit: int = DEFAULT_LIMIT,
        clock: Clock | None = None,
        process: kvm.Process | None = None,
        cores: int | None = None,
    ) -> Machine:
        """A machine that goes on where `save()` left another one; nothing runs yet.

        Hardware and guest are the saved machine's, the rest is as for a new one. The guest's clocks are ahead by the time since then.
        StateError, one sentence, for a file that is no snapshot, is damaged, or is of hardware that this softkvm does not have.
        """
        with SnapshotFile(Path(path)) as saved:
            machine = cls.__new__(cls)
            clock = clock if clock is not None else Clock()
            process = process if process is not None else kvm.Process()
            around = Surroundings(config.check_serial(serial), output_limit, clock, process, cores)
            machine._set_up(saved.state.hardware.check(), SnapshotOrigin(saved), around, "test" in saved.state.devices)
            return machine

    def _set_up(self, settings: Hardware, origin: Origin, around: Surroundings, test_device: bool) -> None:
        self.process = around.process
        self._console = Console(around.output_limit)
        self._settings = settings
        self._running = threading.Lock()
        self._gate = threading.RLock()  # held while vCPUs are let go or parked
        self._inside_run = self._paused = False
        self._outcome = Outcome(lambda: self._crew.halt())
        self._final: Stop | None = None
        self._seconds = 0.0
        self._closed = False
        with ExitStack() as resources:
            system = assembly.open_kvm(settings, around.process, around.cores, around.clock, around.seed, around.tier)
            self._turns, self._started_ns = system.turns, around.clock.monotonic_ns()
            self._build(system, settings, origin, around, resources, test_device)
            self._resources = resources.pop_all()

    def _build(
        self, system: kvm.System, settings: Hardware, origin: Origin, around: Surroundings, resources: ExitStack, test_device: bool
    ) -> None:
        self._memory = guest = assembly.allocate(settings.memory)
        resources.callback(guest.close)
        origin.load(guest)
        self._vm = vm = resources.enter_context(system.create_vm(clock=around.clock))
        assembly.set_up_vm(vm, guest, around.tsc_khz)
        self._vcpus: list[kvm.Vcpu] = []
        for index in range(settings.cpus):
            self._vcpus.append(assembly.make_vcpu(system, vm, index, settings))
            resources.callback(self._vcpus[index].close)
        self._board = self._make_board(settings, around, vm)
        if test_device:
            self._board.plug_in_test_device(partial(assembly.forget_page, vm, guest))
        self._handlers = [
            ExitHandler(vcpu, self._board, partial(self._end, index), partial(self._fail, index)) for index, vcpu in enumerate(self._vcpus)
        ]
        self._crew = Crew(self._vcpus, self._handlers, self._turns)
        self.introspection = Introspection(vm)
        """The tool that looks into the guest, if there is one."""
        resources.callback(self.introspection.end)
        resources.callback(self._crew.close)
        self._parts = Parts(system, vm, self._vcpus, self._board, around.clock)
        with self._board.lock:
            self._suspend = Suspend(self._parts, guest, around.clock, self._outcome.notify)
            origin.start(self._parts)

    def _make_board(self, settings: Hardware, around: Surroundings, vm: kvm.Vm) -> Board:
        sinks: list[SerialBackend] = [around.serial.get(port, _discard) for port in range(len(layout.SERIAL_PORTS))]
        sinks[CONSOLE_PORT] = partial(self._print, sinks[CONSOLE_PORT])
        chassis = Chassis(
            power_off=lambda: self._end(self._crew.current(), StopReason.POWER_OFF, "the guest turned the machine off"),
            reset=lambda: self._end(self._crew.current(), StopReason.RESET, "the guest reset the machine"),
            debug_exit=lambda status: self._end(self._crew.current(), StopReason.EXIT, f"the guest exited with status {status}", status),
            suspend=lambda: self._suspend.begin(),
            wake_up=lambda: self._suspend.wake_up(),
        )
        return Board(chassis, vm.irq_line, around.clock, split(settings.memory), settings.cpus, sinks)

    @property
    def vcpus(self) -> Sequence[kvm.Vcpu]:
        """The vCPUs, for those who watch them from outside."""
        return self._vcpus

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
                if stop.reason.final:
                    self._final = stop
                    self.introspection.end()
                return stop
            return self._final
        finally:
            self._running.release()

    def _run(self, until: Text | None, timeout: float | None) -> Stop:
        self._outcome.begin()
        if (found := self._console.expect(until)) is not None:
            self._end(0, StopReason.UNTIL, found)
        if not self._outcome.look():
            self._let_run(timeout)
        outcome = self._outcome.take(timeout)
        position = self._vcpus[outcome.vcpu].get_regs().rip
        if isinstance(outcome, Failure):
            outcome.error.add_note(f"the guest was at {position:#x} on vCPU {outcome.vcpu}")
            raise outcome.error
        return Stop(outcome.reason, outcome.vcpu, position, outcome.detail, outcome.status)

    def _let_run(self, timeout: float | None) -> None:
        started = time.monotonic()
        with short_switch_interval():
            try:
                with self._gate:
                    self._inside_run = True
                    self._resume_crew()
                self._await_end(None if timeout is None else started + timeout)
            finally:
                with self._gate:
                    self._inside_run = False
                    self._park()
                self._seconds += time.monotonic() - started

    def _resume_crew(self) -> None:
        if self._inside_run and not self._paused and not self._suspend.asleep:
            self._crew.resume()

    def _await_end(self, deadline: float | None) -> None:
        """Until the run is over or time.monotonic() is `deadline`; a machine that is suspended sleeps here."""
        while (deadline is None or time.monotonic() < deadline) and not self._outcome.look():
            timeout = None if deadline is None else max(0, deadline - time.monotonic())
            if not self._suspend.asleep:
                self._outcome.changed.wait(timeout)
            elif not self._suspend.woken:
                self._suspend.wait(self._outcome.changed, timeout)
            else:
                self._wake_up()

    def _wake_up(self) -> None:
        with self._gate:
            self._park()
            self._crew.settle()
            with self._board.lock:
                has_a_way_back = self._suspend.end()
            if has_a_way_back:
                self._resume_crew()
            else:
                self._end(0, StopReason.RESET, "the guest suspended itself to RAM without a way back")

    def pause(self) -> None:
        """Park all vCPUs, in this run and in those to come, until `resume()`; none runs when the call is over. Time goes on for the guest.

        For any thread but a vCPU's own, on which serial listeners are called; a listener that blocks keeps the caller waiting.
        """
        with self._gate:
            self._paused = True
            self._park()

    def _park(self) -> None:
        """Park all vCPUs. A tool that keeps one of them waiting longer than it takes to answer is un-hooked."""
        looks = 0
        while not self._crew.parks(_TOOLS_PATIENCE):
            looks += 1
            if looks >= _LOOKS and self.introspection.holds_a_vcpu:
                self.introspection.end()

    def resume(self) -> None:
        """Take back `pause()`; a guest with kvmclock is told that it was stopped, so that its watchdogs stay quiet.

        One that has suspended itself to RAM wakes up, as by its power button.
        """
        with self._gate:
            if self._paused:
                self._paused = False
                self._let_go()
            elif self._suspend.asleep:
                self.press_power_button()

    def _let_go(self) -> None:
        """Let the vCPUs go on where they were parked within a run."""
        for vcpu in self._vcpus:
            assembly.tell_of_pause(vcpu)
        self._resume_crew()

    def status(self) -> Status:
        """What the machine is and does now."""
        settings = self._settings
        going = RunState.SUSPENDED if self._suspend.asleep else RunState.RUNNING
        state = RunState.STOPPED if not self._inside_run else RunState.PAUSED if self._paused else going
        return Status(state, settings.cpu_name, settings.cpus, settings.memory)

    def save(self, path: str | Path) -> int:
        """Write a snapshot to `path`, from which `restore()` makes a machine that goes on; its size in bytes.

        A guest that runs stands still for that time, and then runs on. For any thread but a vCPU's own. OSError if the file cannot be
        written, which then is as it was before; StateError if the guest is over.
        """
        with self._gate:
            if self._final is not None or self._closed:
                raise StateError("the guest has ended, so there is nothing to save")
            if self._turns is not None:
                raise StateError("a deterministic machine lives in a time of its own, which a snapshot could not go on with")
            if self._suspend.asleep:
                raise StateError("the guest has suspended itself to RAM, and can be saved when it is awake")
        with self.introspection.suspended(), self._gate:
            self._park()
            try:
                self._crew.settle()
                with self._board.lock:
                    state = snapshot.save(self._settings, self._parts)
                return snapshot.write(Path(path), state, self._memory)
            finally:
                self._let_go()

    def stop(self) -> None:
        """End the run in progress, or the next one if there is none, with INTERRUPTED; callable from any thread."""
        self._outcome.want_stop()
        self._end(0, StopReason.INTERRUPTED, "stopped by the caller")

    def _end(self, vcpu: int, reason: StopReason, detail: str, status: int | None = None) -> None:
        if self._console.panic is not None and reason in _AFTER_A_PANIC:
            reason, detail = StopReason.PANIC, self._console.panic
        self._outcome.conclude(Stop(reason, vcpu, 0, detail, status))

    def _fail(self, vcpu: int, error: BaseException) -> None:
        self._outcome.conclude(Failure(vcpu, error))

    # Introspection

    @property
    def max_gpa(self) -> int:
        """The highest guest-physical address with RAM."""
        return self._memory.blocks[-1].end - 1

    def introspect(self) -> socket.socket:
        """Hook an introspection tool of this process: its end of a socket pair, on which KVM speaks KVMI (v9), every command allowed.

        OSError(EEXIST) if a tool is hooked already. The tool leaves by closing the socket.
        """
        return self.introspection.connect()

    def introspect_direct(self, handler: kvm.IntrospectionHandler) -> kvm.DirectChannel:
        """Hook a tool of this process without a socket: events are calls of `handler` on the vCPU's thread, commands calls of a method.

        OSError(EEXIST) if a tool is hooked already.
        """
        return self.introspection.hook_directly(handler)

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

    def counters(self) -> Stats:
        """The counters now, from any thread, while the machine runs too."""
        return collect(self._seconds, self._vcpus, self._handlers)

    def stats(self) -> Stats:
        """The counters now, and of a deterministic machine the marks of its run."""
        stats = self.counters()
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


def _discard(data: bytes) -> None:
    """The listener of a serial port that nobody listens to."""
