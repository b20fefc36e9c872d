"""`softkvm vmi`: a running guest, looked at from outside. The commands; what they do is beside them, imported when one is called."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from softkvm.cli.vmi.options import as_json, guest, timeout

if TYPE_CHECKING:
    from softkvm.cli.vmi.options import Where


@click.group(short_help="Look into a running guest.", context_settings={"max_content_width": 110})
def vmi() -> None:
    """Look into a running Linux guest, from outside: no agent, no symbols, no debug package; the guest cannot tell.

    The guest is a running VM of yours (`softkvm list`), or with --listen whatever VMM connects to a socket: softkvm's
    `run --introspection SOCKET`, or any other that speaks KVMI.
    """


@vmi.command(short_help="List processes, hidden ones too.")
@guest
@as_json
def ps(where: Where, json: bool) -> int:
    """List processes. The list of tasks is compared with the table of PIDs, the run queues, the address spaces of the CPUs, and the memory
    that tasks are made of; whoever is missing from the first two is marked, and the exit status is 1."""
    from softkvm.cli.vmi import look

    return look.processes(where, json, as_tree=False)


@vmi.command(short_help="Show processes as a tree.")
@guest
@as_json
def tree(where: Where, json: bool) -> int:
    """List processes behind their parents."""
    from softkvm.cli.vmi import look

    return look.processes(where, json, as_tree=True)


@vmi.command("modules", short_help="List modules, hidden ones too.")
@guest
@as_json
def list_modules(where: Where, json: bool) -> int:
    """List loaded modules; one that is missing from the list, sysfs or the address tree is marked, and the exit status is 1."""
    from softkvm.cli.vmi import look

    return look.loaded_modules(where, json)


@vmi.command(short_help="Print the kernel's log.")
@guest
@as_json
def dmesg(where: Where, json: bool) -> int:
    """Print the kernel's log out of its memory."""
    from softkvm.cli.vmi import look

    return look.dmesg(where, json)


@vmi.command(short_help="Show what a process has mapped.")
@click.argument("pid", type=int)
@guest
@as_json
def maps(where: Where, pid: int, json: bool) -> int:
    """Show the memory map of process PID, as /proc/PID/maps has it."""
    from softkvm.cli.vmi import look

    return look.memory_map(where, pid, json)


@vmi.command(short_help="Show the open files of a process.")
@click.argument("pid", type=int)
@guest
@as_json
def files(where: Where, pid: int, json: bool) -> int:
    """Show the open files of process PID."""
    from softkvm.cli.vmi import look

    return look.open_files(where, pid, json)


@vmi.command(short_help="Check the kernel's integrity.")
@guest
@as_json
def check(where: Where, json: bool) -> int:
    """Look for everything that rootkits bend: system call table, interrupt gates, entry MSRs, the beginning of functions, executable
    memory, hidden modules and processes, stolen credentials. The exit status is 1 if something is found."""
    from softkvm.cli.vmi import look

    return look.check(where, json)


@vmi.command(short_help="Trace system calls.")
@click.option("-p", "--pid", "pids", multiple=True, type=int, metavar="PID", help="Only of this process (several times).")
@click.option("-f", "--follow", is_flag=True, help="With --pid: of its children too.")
@timeout
@guest
@as_json
def syscalls(where: Where, seconds: float | None, json: bool, pids: tuple[int, ...], follow: bool) -> int:
    """Print system calls with arguments and results until Ctrl-C, as strace does, but nothing is attached to any process."""
    from softkvm.cli.vmi import streams

    return streams.syscalls(where, seconds, json, pids, follow)


@vmi.command("exec", short_help="Alarms: programs, modules, credentials.")
@timeout
@guest
@as_json
def alarms(where: Where, seconds: float | None, json: bool) -> int:
    """Report programs that are executed, modules that are loaded, and processes whose credentials change, until Ctrl-C."""
    from softkvm.cli.vmi import streams

    return streams.alarms(where, seconds, json)


@vmi.command(short_help="Report accesses to memory.")
@click.argument("address")
@click.option("-s", "--size", type=click.IntRange(1, 4096), default=8, metavar="BYTES", help="How much memory.")
@click.option("-a", "--access", type=click.Choice(["r", "w", "x", "rw"]), default="w", help="What to report.")
@timeout
@guest
@as_json
def watch(where: Where, seconds: float | None, json: bool, address: str, size: int, access: str) -> int:
    """Report who accesses kernel memory at ADDRESS (a number, a symbol, or SYMBOL+OFFSET) until Ctrl-C."""
    from softkvm.cli.vmi import streams

    return streams.watch(where, seconds, json, address, size, access)


@vmi.command("break", short_help="Report calls of a function.")
@click.argument("symbol")
@timeout
@guest
@as_json
def break_at(where: Where, seconds: float | None, json: bool, symbol: str) -> int:
    """Report who comes to SYMBOL (or SYMBOL+OFFSET, or an address), with a function's arguments, until Ctrl-C. The guest does not stop."""
    from softkvm.cli.vmi import streams

    return streams.break_at(where, seconds, json, symbol)


@vmi.command(short_help="Keep the kernel from being changed.")
@click.option("-v", "--verbose", is_flag=True, help="Report legal patches too.")
@timeout
@guest
@as_json
def lock_kernel(where: Where, seconds: float | None, json: bool, verbose: bool) -> int:
    """Lock the kernel's and modules' code, read-only data, IDT, GDT, syscall MSRs and protection bits, at once or when the boot is over.

    A write to what is locked does not happen, and is reported with process and instruction; the guest goes on. What the kernel patches
    itself (jump labels, static calls, ftrace, modules that are loaded) is let through. Locked until Ctrl-C.
    """
    from softkvm.cli.vmi import streams

    return streams.lock_kernel(where, seconds, json, verbose)


@vmi.command(short_help="Write the guest's memory to a file.")
@click.argument("file")
@click.option("--format", "style", type=click.Choice(["elf", "lime"]), default="elf", help="ELF core (crash, drgn, Volatility) or LiME.")
@click.option("--symbols", metavar="ISF", help="Also write the symbols that Volatility 3 wants, such as symbols/guest.json.")
@guest
@as_json
def dump(where: Where, file: str, style: str, symbols: str | None, json: bool) -> int:
    """Write the guest's memory to FILE while the guest stands still."""
    from softkvm.cli.vmi import dumping

    return dumping.dump(where, file, style, symbols, json)


@vmi.command(short_help="Python with the guest's kernel.")
@guest
def shell(where: Where) -> int:
    """Open a Python shell with the guest's kernel at hand: processes, symbols, structures, memory."""
    from softkvm.cli.vmi import interactive

    return interactive.shell(where)
