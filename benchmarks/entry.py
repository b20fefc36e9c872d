"""What the entry code costs while nobody watches: exits with all hooks off, against the same code without any hook in it.

The bare path is made from the sources: modules of `softkvm.kvm` are loaded with every `if trace.point.enabled:` taken out, and ioctls call
their methods without crossing `host/entry.py`. Both are measured alike, in processes of their own that take turns, and in CPU time, which
other work on the machine disturbs less than wall time.
"""

from __future__ import annotations

import ast
import importlib.abc
import importlib.machinery
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import CodeType
from typing import Any

import click

GOAL = 1.05  # hooks off : bare


class WithoutHooks(ast.NodeTransformer):
    """Takes out what a tracepoint that is off still costs: its test."""

    def visit_If(self, node: ast.If) -> ast.AST | None:
        self.generic_visit(node)
        test = node.test
        is_hook = isinstance(test, ast.Attribute) and test.attr == "enabled" and ast.unparse(test.value).startswith("trace.")
        return ast.Pass() if is_hook and not node.orelse else node


class BareLoader(importlib.machinery.SourceFileLoader):
    """Compiles a module without its hooks."""

    def get_code(self, fullname: str) -> CodeType:
        tree = WithoutHooks().visit(ast.parse(self.get_data(self.path)))
        return compile(ast.fix_missing_locations(tree), self.path, "exec")


class BareFinder(importlib.abc.MetaPathFinder):
    """Finds the modules of `softkvm.kvm` for the `BareLoader`."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if not name.startswith("softkvm.kvm"):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.origin is not None:
            spec.loader = BareLoader(name, spec.origin)
        return spec


def cross_nothing(task: Any, file: Any, nr: int, command: int, args: tuple[Any, ...], handler: Callable[..., Any]) -> Any:
    """What an ioctl would be without entry code."""
    return handler(file, *args)


def measure(bare: bool, exits: int, cpu: str) -> dict[str, float]:
    """Microseconds for each kind of exit, in this process."""
    if bare:
        sys.meta_path.insert(0, BareFinder())
    from benchmarks.exits import KINDS, guest
    from softkvm.host import entry

    if bare:
        entry.syscall_bare = cross_nothing
    results = {}
    for name, body in KINDS.items():
        base, kernel = guest(body, 1), guest(body, exits + 1)
        results[name] = (seconds(kernel, cpu) - seconds(base, cpu)) / exits * 1e6
    return results


def seconds(kernel: bytes, cpu: str) -> float:
    """CPU time of a run."""
    from softkvm.vmm import Machine, StopReason

    with tempfile.NamedTemporaryFile() as file:
        file.write(kernel)
        file.flush()
        with Machine(kernel=file.name, memory="16M", cpu=cpu) as machine:
            started = time.process_time()
            stop = machine.run(timeout=120)
            spent = time.process_time() - started
    if stop.reason is not StopReason.EXIT:
        raise click.ClickException(f"the guest ended by {stop.reason.value}: {stop.detail}")
    return spent


def in_a_process_of_its_own(bare: bool, exits: int, cpu: str) -> dict[str, float]:
    """`measure()` elsewhere, so that neither way profits from the other."""
    command = [sys.executable, "-m", "benchmarks.entry", "--exits", str(exits), "--cpu", cpu, "--only", "bare" if bare else "off"]
    output = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
    result: dict[str, float] = json.loads(output)
    return result


@click.command()
@click.option("-n", "--rounds", default=7, show_default=True, help="Runs of each kind.")
@click.option("--exits", default=30_000, show_default=True, help="Exits in each run.")
@click.option("--cpu", default="cascadelake", show_default=True, help="CPU model.")
@click.option("--only", type=click.Choice(["off", "bare"]), help="Measure one way in this process and print JSON.", hidden=True)
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write the samples to this file.")
def main(rounds: int, exits: int, cpu: str, only: str | None, path: Path | None) -> None:
    """Compare the exit path with hooks off with the bare one."""
    if only is not None:
        click.echo(json.dumps(measure(only == "bare", exits, cpu)))
        return
    from benchmarks.report import machine_facts, publish

    ways: dict[str, list[dict[str, float]]] = {"off": [], "bare": []}
    for _ in range(rounds):
        for way, samples in ways.items():
            samples.append(in_a_process_of_its_own(way == "bare", exits, cpu))
    rows = []
    for kind in ways["off"][0]:
        off, bare = ([sample[kind] for sample in ways[way]] for way in ("off", "bare"))
        ratios = min(off) / min(bare), statistics.median(off) / statistics.median(bare)
        rows.append((kind, f"{min(off):.3f}", f"{min(bare):.3f}", *(f"{ratio:.3f}" for ratio in ratios)))
    columns = ("exit", "hooks off, best µs", "bare, best µs", f"ratio (goal {GOAL:g})", "ratio of medians")
    publish(f"The entry code with all hooks off, on {cpu}, {rounds} x {exits}", columns, rows, machine_facts(), ways, path)


if __name__ == "__main__":
    main()
