"""The command tree, and the one place where an error becomes a sentence and an exit status."""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any

import click
import msgspec

from softkvm.cli import completion, output, status
from softkvm.cli.errors import CliError
from softkvm.cli.options import TIERS, RunOptions
from softkvm.cli.perf.commands import perf, trace
from softkvm.cli.vmi import vmi

_WITH_SELFTEST = frozenset({"selftest", "memory", "cpu", "timeout", "stats"})
"""Parameters of `softkvm run` that mean something to the self-test's guest."""
_HARDWARE = frozenset({"kernel", "initrd", "append", "memory", "cpus", "cpu", "kvm", "deterministic", "tsc_khz"})
"""Those that say what to build and boot."""

_GC_THRESHOLD = 20_000
"""Objects before the collector looks for cycles, of which a process that starts a guest makes few: Python's default looks at each of its
modules some hundred times."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line `arguments` (default: the process's own) and return the exit status."""
    _open_missing_streams()
    if arguments is None:
        gc.set_threshold(_GC_THRESHOLD)
    try:
        return int(cli.main(args=arguments, prog_name="softkvm", standalone_mode=False) or status.SUCCESS)
    except click.Abort:
        return status.INTERRUPTED
    except KeyboardInterrupt:
        return status.INTERRUPTED
    except BrokenPipeError:
        return status.BROKEN_PIPE
    except click.ClickException as error:
        error.show()
        return status.OWN_ERROR
    except CliError as error:
        output.say(str(error))
        return status.OWN_ERROR
    except Exception as error:  # a bug in softkvm, whatever it is: the last line of defence before a traceback
        return _bug(error)
    finally:
        if arguments is None:
            gc.freeze()  # the process ends, and with it all that is left: Python would look through that for cycles several times


def _open_missing_streams() -> None:
    """Whoever starts us with a standard stream closed gets /dev/null there, not whatever file we happen to open first."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def _bug(error: Exception) -> int:
    from softkvm.cli import report

    state = dict(getattr(error, "state", {}))
    message = f"{type(error).__name__}: {error}"
    try:
        place = f"please attach {report.write(message, error, state)} to a report"
    except OSError as failure:
        place = f"no report could be written: {failure.strerror}"
    output.say(f"this is a bug in softkvm ({message}); {place}")
    return status.OWN_ERROR


@click.group(context_settings={"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 110})
def cli() -> None:
    """KVM without the hardware: unmodified guests on a software CPU."""


@cli.command(short_help="Boot a guest.", context_settings={"ignore_unknown_options": False})
@click.option("-k", "--kernel", default="cloud", metavar="FILE|cloud|generic", help="bzImage, or a flavour of Debian's kernel.")
@click.option("-i", "--initrd", metavar="FILE", help="Initial RAM disk.  [default: busybox]")
@click.option("-p", "--append", default="", metavar="TEXT", help="Kernel parameters, added to softkvm's own.", show_default=False)
@click.option("-m", "--memory", default="512M", metavar="SIZE", help="Guest memory, with K, M or G.")
@click.option("-c", "--cpus", type=int, default=1, metavar="N", help="CPUs of the guest, 1 to 64.")
@click.option("--cpu", default="cascadelake", metavar="MODEL[,-FEATURE...]", help="CPU model.", shell_complete=completion.cpus)
@click.option("--cores", type=click.IntRange(min=1), metavar="N", help="Cores of the host under all CPUs.  [default: as many as they want]")
@click.option(
    "--tier",
    type=click.Choice(TIERS),
    default="auto",
    help="How guest code runs: `auto` translates hot code.",
)
@click.option("--deterministic", type=click.IntRange(0, (1 << 64) - 1), metavar="SEED", help="Run the same way each time: see above.")
@click.option("--kvm", multiple=True, metavar="NAME=VALUE", help="Module parameter of KVM, such as nrips=0.")
@click.option(
    "--with", "extras", multiple=True, metavar="PACKAGE|./FILE", help="Give the guest a Debian package, or a program as /root/FILE."
)
@click.option("--timeout", type=float, metavar="SECONDS", help="Stop after this wall time, with exit status 124.")
@click.option("--stats", is_flag=False, flag_value="table", type=click.Choice(["table", "json"]), help="Print counters at the end.")
@click.option("--contexts", is_flag=True, help="Print how long each thread was in the guest, in KVM, in the VMM, and idle.")
@click.option("--json", is_flag=True, help="Print one JSON object about the run in place of the guest's output.")
@click.option("--trace", multiple=True, metavar="PATTERN|help", help="Record events, such as kvm_exit or 'kvm_*', as ftrace does.")
@click.option("--trace-file", metavar="FILE", help="Where events go; *.dat for trace-cmd.  [default: standard error]")
@click.option("--audit", metavar="FILE", help="Append a JSON line for every KVM call to FILE.")
@click.option("--ioctl-filter", metavar="FILE", help="Allow only the KVM calls that FILE (JSON) does.")
@click.option("--introspection", metavar="SOCKET[,OPTION=VALUE...]", help="Let the KVMI tool that listens there look inside: see above.")
@click.option("--name", metavar="NAME", help="What `softkvm list` and others call this VM.  [default: the process id]")
@click.option("--restore", metavar="FILE", help="Go on from a snapshot (`softkvm snapshot`) in place of a boot.")
@click.option("--tsc-khz", type=int, metavar="KHZ", help="Rate of the guest's TSC.  [default: the host's]", show_default=False)
@click.option("--selftest", is_flag=True, help="Check this installation with a small built-in guest.")
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="[-- CMD...]")
@click.pass_context
def run(context: click.Context, /, selftest: bool, **given: Any) -> int:
    """Boot a guest: by default Debian's cloud kernel with a busybox shell on this terminal (Ctrl-A X quits).

    With CMD, run that command in the guest instead: its input, output and exit status are passed through. Other exit statuses: 255 the
    guest panicked or triple-faulted, 124 time-out, 125 softkvm's own error, 130 Ctrl-C, 159 killed by the ioctl filter.

    With --deterministic, time is virtual, random numbers come from SEED, and so does the order in which the CPUs take turns: the same
    command line with the same input and SEED repeats the run to the last instruction, and --stats tells by which marks. The input of a
    command or a piped shell is read when the guest asks for it; what is typed on a terminal is not repeatable.

    With --introspection, the guest is open to a security tool that speaks KVMI (libkvmi, LibVMI, HVMI or `softkvm vmi`): the tool listens
    on SOCKET, a path or vsock:CID:PORT, softkvm connects, and again when the tool has left. Options: dialect=v9, libkvmi or v12 (default:
    by the tool's first message), key=SECRET which the tool must know, reply-timeout=S for its answers, reconnect=S between attempts.
    """
    options = RunOptions(**given)
    if "help" in options.trace:
        return _list_events()
    if selftest:
        from softkvm.cli import selftest as tester

        _refuse(context, context.params.keys() - _WITH_SELFTEST, "`--selftest` boots its own guest, so it excludes {}")
        return tester.run(options.memory, options.cpu, options.timeout, options.stats)
    if options.restore is not None:
        _refuse(context, _HARDWARE, "a snapshot has its own machine, so `--restore` excludes {}")
    from softkvm.cli import run as runner

    return runner.run(options)


def _list_events() -> int:
    from softkvm.host import ftrace

    output.table("Events", ("event", "fields"), ftrace.events(), on_stdout=True)
    return status.SUCCESS


def _refuse(context: click.Context, excluded: Set[str], sentence: str) -> None:
    for name in context.params:
        if name in excluded and context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT:
            raise CliError(sentence.format(name))


@cli.command("list", short_help="List running VMs.")
@click.option("--json", is_flag=True, help="Print a JSON list.")
def list_(json: bool) -> int:
    """List the VMs that you have running: name, process, state, CPUs, memory (MiB), and how long they can be reached."""
    from softkvm.cli import vms

    return vms.show(vms.find(), json)


@cli.command(short_help="Stop a VM's CPUs.")
@click.argument("name", required=False, shell_complete=completion.vms)
def pause(name: str | None) -> int:
    """Stop the CPUs of the VM NAME, or of the only one that runs, until `softkvm resume`."""
    from softkvm.cli import vms

    return vms.give("stop", name)


@cli.command(short_help="Let a paused VM run on.")
@click.argument("name", required=False, shell_complete=completion.vms)
def resume(name: str | None) -> int:
    """Let the VM NAME, or the only one that runs, go on after `softkvm pause`."""
    from softkvm.cli import vms

    return vms.give("cont", name)


@cli.command(short_help="Save a running VM to a file.")
@click.argument("name", shell_complete=completion.vms)
@click.argument("file")
@click.option("--json", is_flag=True, help="Print one JSON object.")
def snapshot(name: str, file: str, json: bool) -> int:
    """Write the state of the VM NAME and its memory to FILE, from which `softkvm run --restore FILE` goes on, here or elsewhere.

    The VM stands still meanwhile, and then runs on. When it goes on from FILE its clocks are right, as after a suspend.
    """
    from softkvm.cli import vms

    return vms.snapshot(name, file, json)


@cli.command(short_help="Show a running VM's clocks.")
@click.argument("name", required=False, shell_complete=completion.vms)
@click.option("--json", is_flag=True, help="Print one JSON object.")
def tsc(name: str | None, json: bool) -> int:
    """Show the time of the VM NAME, or of the only one that runs: TSC offsets, scaling and generations, master clock and kvmclock.

    vCPUs with equal offsets, of one generation, are in phase; while all of them are, the master clock is on, and guests trust kvmclock.
    """
    from softkvm.cli import tsc as clocks

    return clocks.show(name, json)


cli.add_command(vmi)


@cli.command(short_help="Check what softkvm needs.")
@click.option("--json", is_flag=True, help="Print a JSON list.")
def doctor(json: bool) -> int:
    """List what softkvm needs on this machine, what was found, and the remedy where something is missing (exit status 1)."""
    from softkvm.cli import doctor as checks

    findings = checks.examine()
    if json:
        click.echo(msgspec.json.encode(findings))
    else:
        rows = [(finding.requirement, finding.state.value, finding.found, finding.remedy) for finding in findings]
        output.table("softkvm doctor", ("requirement", "state", "found", "remedy"), rows, on_stdout=True)
    return int(any(finding.state is checks.State.MISSING for finding in findings))


@cli.group(short_help="Work with logs of KVM calls.")
def audit() -> None:
    """Work with the logs that `softkvm run --audit FILE` writes."""


@audit.command(short_help="Make the calls of a log again.")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--cpu", default="cascadelake", metavar="MODEL[,-FEATURE...]", help="CPU model.", shell_complete=completion.cpus)
@click.option("--kvm", multiple=True, metavar="NAME=VALUE", help="Module parameter of KVM, such as nrips=0.")
@click.option("--json", is_flag=True, help="Print a JSON object.")
def replay(file: Path, cpu: str, kvm: tuple[str, ...], json: bool) -> int:
    """Make the calls that FILE has recorded on a new KVM, and tell which of them give another result (exit status 1).

    The guest does not run: its memory is not in the log.
    """
    from softkvm.cli import replay as runner

    return runner.run(file, cpu, kvm, json)


cli.add_command(perf)
cli.add_command(trace)


@cli.command(short_help="Print the version.")
def version() -> int:
    """Print softkvm's version."""
    from softkvm.cli.report import softkvm_version

    click.echo(f"softkvm {softkvm_version()}")
    return status.SUCCESS
