"""The commands of `softkvm vmi` that look at a guest once: what they show, as tables or as JSON."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import click
import msgspec

from softkvm.cli import output, status
from softkvm.cli.vmi.attach import attached
from softkvm.cli.vmi.options import Where
from softkvm.vmi.linux import files as linux_files
from softkvm.vmi.linux import log, maps, modules, tasks
from softkvm.vmi.linux.modules import Module
from softkvm.vmi.linux.tasks import Process
from softkvm.vmi.tools import check as checker
from softkvm.vmi.tools.check import Report

_SUSPICIOUS = 1
"""Exit status of a look that found something hidden or bent."""


def _json(found: object) -> None:
    click.echo(msgspec.json.encode(found))


def processes(where: Where, as_json: bool, as_tree: bool) -> int:
    """`ps` and `tree`; _SUSPICIOUS if a process is hidden."""
    with attached(where) as target, target.still():
        found = tasks.processes(target.kernel, target.cr3s())
    if as_json:
        _json(found)
    elif as_tree:
        for depth, process in _tree(found):
            click.echo(f"{'  ' * depth}{process.pid} {output.plain(_command(process))}{_hidden(process)}")
    else:
        rows = [_process_row(process) for process in found]
        output.table("Processes", ("PID", "PPID", "UID", "S", "THR", "COMMAND", ""), rows, on_stdout=True)
    return _SUSPICIOUS if any(process.hidden_from for process in found) else status.SUCCESS


def _process_row(process: Process) -> tuple[str, ...]:
    numbers = (process.pid, process.ppid, process.uid)
    return (*map(str, numbers), process.state, str(process.threads), output.plain(_command(process)), _hidden(process).strip())


def _command(process: Process) -> str:
    return " ".join(process.arguments) or f"[{process.name}]"


def _hidden(process: Process) -> str:
    return f"  HIDDEN from {', '.join(view.value for view in process.hidden_from)}" if process.hidden_from else ""


def _tree(found: Sequence[Process]) -> list[tuple[int, Process]]:
    """Processes with their depth, children behind their parents; one whose parent is not there is at the top."""
    children: defaultdict[int, list[Process]] = defaultdict(list)
    known = {process.pid for process in found}
    for process in found:
        children[process.ppid if process.ppid in known and process.ppid != process.pid else 0].append(process)
    ordered: list[tuple[int, Process]] = []
    pending = [(0, process) for process in reversed(children[0])]
    while pending:
        depth, process = pending.pop()
        ordered.append((depth, process))
        pending += [(depth + 1, child) for child in reversed(children.pop(process.pid, []))]
    return ordered


def loaded_modules(where: Where, as_json: bool) -> int:
    """`modules`; _SUSPICIOUS if one is hidden."""
    with attached(where) as target, target.still():
        found = modules.modules(target.kernel)
    if as_json:
        _json(found)
    else:
        columns = ("module", "address", "size", "used", "state", "taints", "")
        output.table("Modules", columns, [_module_row(module) for module in found], on_stdout=True)
    return _SUSPICIOUS if any(module.hidden_from for module in found) else status.SUCCESS


def _module_row(module: Module) -> tuple[str, ...]:
    hidden = f"HIDDEN from {', '.join(view.value for view in module.hidden_from)}" if module.hidden_from else ""
    numbers = (f"{module.base:#x}", str(module.size), str(module.references))
    return (output.plain(module.name), *numbers, module.state, module.taints, hidden)


def dmesg(where: Where, as_json: bool) -> int:
    """`dmesg`."""
    with attached(where) as target, target.still():
        found = list(log.messages(target.kernel))
    if as_json:
        _json(found)
    else:
        for message in found:
            click.echo(f"[{message.seconds:12.6f}] {output.plain(message.text)}")
    return status.SUCCESS


def memory_map(where: Where, pid: int, as_json: bool) -> int:
    """`maps`."""
    with attached(where) as target, target.still():
        found = maps.maps(target.kernel, tasks.find(target.kernel, pid))
    if as_json:
        _json(found)
    else:
        for area in found:
            click.echo(f"{area.start:x}-{area.end:x} {area.rights} {area.offset:08x} {area.inode:>10} {output.plain(area.name)}".rstrip())
    return status.SUCCESS


def open_files(where: Where, pid: int, as_json: bool) -> int:
    """`files`."""
    with attached(where) as target, target.still():
        found = list(linux_files.files(target.kernel, tasks.find(target.kernel, pid)))
    if as_json:
        _json(found)
    else:
        rows = [(str(f.descriptor), f.mode, f"{f.flags:#o}", str(f.position), str(f.inode), output.plain(f.path)) for f in found]
        output.table(f"Files of process {pid}", ("fd", "mode", "flags", "position", "inode", "path"), rows, on_stdout=True)
    return status.SUCCESS


def check(where: Where, as_json: bool) -> int:
    """`check`; _SUSPICIOUS if something was found."""
    with attached(where) as target:
        target.kernel  # noqa: B018 - found before the guest stands still, so that it does so for a moment only
        with target.still():
            report = checker.check(target)
    if as_json:
        _json(report)
    else:
        _show_report(report)
    return _SUSPICIOUS if report.findings else status.SUCCESS


def _show_report(report: Report) -> None:
    found = {name: sum(finding.check == name for finding in report.findings) for name in report.checked}
    rows = [(name, str(count), str(found[name]) if found[name] else "none") for name, count in report.checked.items()]
    output.table("Integrity", ("looked at", "how many", "findings"), rows, on_stdout=True)
    for finding in report.findings:
        where = f" at {finding.address:#x}" if finding.address else ""
        click.echo(output.plain(f"{finding.check}: {finding.what}{where}{f' ({finding.detail})' if finding.detail else ''}"))
