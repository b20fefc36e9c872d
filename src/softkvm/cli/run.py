"""`softkvm run`: from options to a running machine, and from its end to an exit status."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, closing, nullcontext
from pathlib import Path
from typing import Protocol
from uuid import uuid4

import msgspec

from softkvm.cli import guest, output, report, session, status, terminal
from softkvm.cli.command import CONTROL_PORT, STDERR_PORT, STDOUT_PORT, ControlLine
from softkvm.cli.ending import Ending
from softkvm.cli.errors import CliError
from softkvm.cli.inputs import CommandInput, ConsolePipe, Input, Keyboard, Prompt
from softkvm.cli.options import RunOptions
from softkvm.cli.streams import Capture, ConsoleTail, DescriptorSink, Sink, Surrender
from softkvm.cli.watch import print_contexts, watched
from softkvm.host.process import Process
from softkvm.host.seccomp import Killed
from softkvm.vmm import ConfigError, Machine, SerialBackend, StateError, StopReason
from softkvm.vmm.introspection_peer import Peer
from softkvm.vmm.monitor import Monitor, commands

_CONSOLE_PORT = 0
_STDIN, _STDOUT, _STDERR = 0, 1, 2

# A guest that nobody watches must not wait for ever after a panic: it resets at once, and the machine stops.
_UNATTENDED = "panic=-1"


class Outcome(msgspec.Struct, frozen=True):
    """What `--json` prints; `seconds` is wall time from the machine's start to its end."""

    status: int
    reason: str
    detail: str
    seconds: float
    console: str
    stdout: str
    stderr: str
    truncated: bool
    stats: object


class Observer(Protocol):
    """Whoever watches a run from outside the guest."""

    def attach(self, machine: Machine) -> None:
        """There is a machine, which does not run yet."""

    def begin(self) -> None:
        """The guest's command starts, or without one the guest; on a vCPU's thread."""

    def end(self, machine: Machine) -> None:
        """The guest has ended."""


def run(options: RunOptions, observer: Observer | None = None) -> int:
    """Boot the guest that `options` describe and return the exit status; raises CliError and ConfigError before the guest starts."""
    options.check()
    with output.progress() as progress:
        image = _prepare(options, progress) if options.restore is None else None
    with watched(options) as process:
        try:
            return _Run(options, image, process, observer).run()
        except Killed as error:
            output.say(f"the VMM was killed: {error}")
            return status.KILLED


def _prepare(options: RunOptions, progress: Callable[[str], None]) -> guest.Guest:
    """Find kernel and initramfs; files of the person's own are looked for before anything is fetched."""
    kernel = options.kernel if options.kernel in guest.KERNELS else Path(options.kernel)
    initrd = Path(options.initrd) if options.initrd is not None else None
    if isinstance(kernel, Path) and not kernel.is_file():
        raise CliError(f"there is no kernel {kernel}; give a bzImage file or one of {', '.join(guest.KERNELS)}")
    if initrd is not None and not initrd.is_file():
        raise CliError(f"there is no initial RAM disk {initrd}")
    return guest.prepare(kernel, initrd, options.command, options.extras, progress)


def _processors(options: RunOptions) -> str:
    return f"software CPU {options.cpu}" if options.cpus == 1 else f"{options.cpus} software CPUs {options.cpu}"


def _report_bug(error: Exception) -> None:
    message = f"{type(error).__name__}: {error}"
    output.say(f"this is a bug in softkvm ({message}); please attach {report.write(message, error, {})} to a report")


class _Run:
    """One run: the wiring between the guest's serial lines and our streams, and what is reported at the end."""

    def __init__(self, options: RunOptions, image: guest.Guest | None, process: Process, observer: Observer | None) -> None:
        """`image` is what to boot; None for a snapshot."""
        self._options = options
        self._process = process
        self._observer = observer
        self._begun = False
        self._image = image
        self._doorbell = session.Doorbell()
        self._surrender = Surrender()
        self._captures = [Capture() for _ in range(3)]
        self._tail = ConsoleTail(None if options.command else self._sink(_CONSOLE_PORT, _STDOUT))
        self._command_status: int | None = None
        self._output_lost = False
        self._machine: Machine | None = None
        self._input: Input | None = None
        self._prompt: Prompt | None = None

    def run(self) -> int:
        """Run the machine to its end; the exit status."""
        options = self._options
        attended = not options.command and os.isatty(_STDIN) and os.isatty(_STDOUT)
        with ExitStack() as resources:
            resources.enter_context(closing(self._doorbell))
            resources.enter_context(closing(self._surrender))
            monitor = self._make_monitor(resources)
            machine = resources.enter_context(self._make_machine(attended))
            if monitor is not None:
                commands.offer(monitor, machine)
                resources.enter_context(monitor)
            self._open_to_tool(machine, resources)
            self._machine = machine
            if self._observer is not None:
                self._observer.attach(machine)
                if not options.command:
                    self._begin()
            self._input = self._make_input(machine, attended)
            if options.deterministic is not None and not isinstance(self._input, Keyboard):
                self._prompt = Prompt(self._input, self._surrender)
                self._prompt.serve()
            output.say(self._title())
            if attended:
                output.say(terminal.HELP)
            started = time.monotonic()
            with terminal.raw(_STDIN) if attended else nullcontext():
                source = self._input if self._prompt is None else None
                stop, signal = session.run(machine, source, self._doorbell, options.timeout, self._surrender.throw)
            seconds = time.monotonic() - started
            return self._finish(machine, Ending(stop, signal, self._output_lost, self._command_status), seconds)

    def _title(self) -> str:
        options = self._options
        if self._image is None:
            return f"going on from {options.restore}"
        return f"{_processors(options)}, {options.memory} of memory; {self._image.title}"

    # Wiring

    def _make_machine(self, attended: bool) -> Machine:
        options = self._options
        control = ControlLine(self._console_is_read, self._command_wants_input, self._command_ended)
        serial: dict[int, SerialBackend] = {
            _CONSOLE_PORT: self._tail,
            STDOUT_PORT: self._sink(STDOUT_PORT, _STDOUT),
            STDERR_PORT: self._sink(STDERR_PORT, _STDERR),
            CONTROL_PORT: control.write,
        }
        try:
            if options.restore is not None:
                return Machine.restore(options.restore, serial, process=self._process, cores=options.cores)
            assert self._image is not None, "what is not restored is booted"
            return Machine(
                kernel=self._image.kernel,
                initrd=self._image.initrd,
                append=self._command_line(attended),
                memory=options.memory,
                cpu=options.cpu,
                cpus=options.cpus,
                cores=options.cores,
                tier=options.tier,
                kvm_parameters=options.kvm,
                serial=serial,
                process=self._process,
                deterministic=options.deterministic,
                tsc_khz=options.tsc_khz,
            )
        except (ConfigError, StateError) as error:
            raise CliError(str(error)) from error

    def _command_line(self, attended: bool) -> str:
        options = self._options
        parameters = [terminal.environment()] if attended else [_UNATTENDED]
        parameters += ["quiet"] if options.command else []
        parameters += [options.append] if options.append else []
        return " ".join(parameters)

    def _open_to_tool(self, machine: Machine, resources: ExitStack) -> None:
        """`--introspection`."""
        options = self._options.peer()
        if options is None:
            return
        peer = Peer(machine.introspection, options, self._options.name or f"softkvm-{os.getpid()}", uuid4(), machine.max_gpa)
        resources.callback(peer.close)
        peer.start()

    def _make_monitor(self, resources: ExitStack) -> Monitor | None:
        """The control socket, before there is a machine. A run whose name nobody chose does without one where there is no place for it."""
        try:
            monitor = Monitor(self._options.name or str(os.getpid()), _report_bug)
        except ConfigError as error:
            if self._options.name is not None:
                raise CliError(str(error)) from error
            output.say(f"no control socket: {error}")
            return None
        resources.callback(monitor.close)
        return monitor

    def _sink(self, port: int, descriptor: int) -> Sink:
        return self._captures[port] if self._options.json else DescriptorSink(descriptor, self._surrender, self._lose_output)

    def _make_input(self, machine: Machine, attended: bool) -> CommandInput | Keyboard | ConsolePipe:
        if self._options.command:
            return CommandInput(_STDIN, lambda data: machine.send(data, STDOUT_PORT))
        if attended:
            return Keyboard(_STDIN, machine.send, self._quit)
        return ConsolePipe(_STDIN, machine.send, is_ready=self._image is None or not self._image.announces_shell)

    # What the guest tells us, on the vCPU's thread

    def _console_is_read(self) -> None:
        if isinstance(self._input, ConsolePipe):
            self._input.ready()
            self._input_is_wanted()

    def _begin(self) -> None:
        if self._observer is not None and not self._begun:
            self._begun = True
            self._observer.begin()

    def _command_wants_input(self) -> None:
        self._begin()
        if isinstance(self._input, CommandInput):
            self._input.request()
            self._input_is_wanted()

    def _input_is_wanted(self) -> None:
        if self._prompt is None:
            self._doorbell.ring()
        else:
            self._prompt.serve()

    def _command_ended(self, command_status: int) -> None:
        self._command_status = command_status
        self._stop()

    def _lose_output(self) -> None:
        self._output_lost = True
        self._stop()

    def _quit(self) -> None:
        self._surrender.throw()
        self._stop()

    def _stop(self) -> None:
        if self._machine is not None:
            self._machine.stop()

    # The end

    def _finish(self, machine: Machine, ending: Ending, seconds: float) -> int:
        options = self._options
        code = ending.exit_status(bool(options.command))
        if self._observer is not None:
            self._observer.end(machine)
        self._explain(machine, ending, code)
        if options.json and self._observer is None:
            sys.stdout.write(msgspec.json.encode(self._outcome(machine, ending, code, seconds)).decode() + "\n")
        if options.stats is not None:
            output.print_stats(machine.stats(), options.stats)
        if options.contexts:
            print_contexts()
        return code

    def _outcome(self, machine: Machine, ending: Ending, code: int, seconds: float) -> Outcome:
        console, stdout, stderr = self._captures
        return Outcome(
            status=code,
            reason=ending.stop.reason.value,
            detail=ending.stop.detail,
            seconds=round(seconds, 3),
            console=self._tail.data.decode(errors="replace") if self._options.command else console.text,
            stdout=stdout.text,
            stderr=stderr.text,
            truncated=any(capture.truncated for capture in self._captures),
            stats=machine.stats(),
        )

    def _explain(self, machine: Machine, ending: Ending, code: int) -> None:
        """Say why the guest ended, unless it ended as it should."""
        stop = ending.stop
        if stop.reason is StopReason.INTERNAL_ERROR:
            path = report.write(stop.detail, None, {"stop": stop, "stats": machine.stats()})
            output.say(f"this is a bug in softkvm ({stop.detail}); please attach {path} to a report")
        elif code == status.TIMED_OUT and ending.is_guest_failure:
            output.say(f"the guest was stopped after {self._options.timeout:g} seconds, at {stop.rip:#x}")
        elif code == status.GUEST_FAILED and ending.is_guest_failure:
            if self._options.command and not self._options.json:
                os.write(_STDERR, self._tail.data)
            output.say(f"the guest ended by {stop.reason.value} at {stop.rip:#x}: {stop.detail}")
