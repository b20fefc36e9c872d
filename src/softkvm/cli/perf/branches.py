"""`softkvm trace branches`: every branch that a guest takes, counted by where it comes from and where it leads.

The engine writes all transfers of control to a log (`silicon/pmu.py`), which is read after every VM exit, so nothing is sampled and nothing
lost. It is the truth that sampled profiles are held against.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import msgspec

from softkvm.cli import guest, output, run
from softkvm.cli.errors import CliError
from softkvm.cli.options import RunOptions
from softkvm.cli.perf.guest import GuestView, Process, VmMemory
from softkvm.cli.perf.record import KERNELS
from softkvm.cli.perf.symbols import Symbolizer
from softkvm.host import trace
from softkvm.kvm import Vcpu
from softkvm.silicon.pmu import BRANCH_RECORD, BranchKind
from softkvm.vmm import Machine

RINGS = {"all": 3, "kernel": 1, "user": 2}
_CAPACITY = 1 << 16
_MOST_EDGES = 1 << 20
_LAST_ADDRESS = (1 << 64) - 1
_KERNEL = 1 << 63
_PCID = 0xFFF


class Edge(msgspec.Struct, frozen=True):
    """Branches from one function to another, within a process."""

    process: str
    source: str
    target: str
    count: int


class BranchLog:
    """Logs a run's branches."""

    def __init__(self, rings: int) -> None:
        """`rings` is a value of RINGS: by where a branch comes from."""
        self._rings = rings
        self._vcpus: Sequence[Vcpu] = ()
        self._cr3: list[int] = []
        self._processes: dict[int, Process] = {}
        self._edges: Counter[tuple[int, int, int]] = Counter()
        self._on = False
        self.lost = 0
        self.view: GuestView

    def attach(self, machine: Machine) -> None:
        """Listen to VM exits; nothing is logged yet."""
        self._vcpus = machine.vcpus
        self._cr3 = [0] * len(machine.vcpus)
        self.view = GuestView(VmMemory(machine.vcpus[0].vm), guest.default_directory() / KERNELS)
        trace.kvm_exit.register(self._exited)

    def begin(self) -> None:
        """Log from each vCPU's next exit on."""
        self._on = True

    def end(self, machine: Machine) -> None:
        """Log no more."""
        trace.kvm_exit.unregister(self._exited)
        for number, vcpu in enumerate(machine.vcpus):
            if self._cr3[number]:
                vcpu.load()
                self._read(number, vcpu)

    def _exited(self, *fields: object) -> None:
        """A VM exit, in the vCPU's thread; the number of the vCPU is the event's last field."""
        number = int(str(fields[-1]))
        if not self._on or number >= len(self._vcpus):
            return
        vcpu = self._vcpus[number]
        state, cpu = vcpu.state, vcpu.cpu
        if cpu is None:
            return
        if not self._cr3[number]:
            cpu.core.branch_log_start(_CAPACITY, self._rings, 0, _LAST_ADDRESS)
            self._cr3[number] = state.cr3 & ~_PCID
        user = not state.rip >> 63
        process = self.view.process(number, state.cr3, state.rip if user else None)
        if process is not None and user:
            self._processes[state.cr3 & ~_PCID] = process
        self._read(number, vcpu)

    def _read(self, number: int, vcpu: Vcpu) -> None:
        if vcpu.cpu is None:
            return
        cr3, edges = self._cr3[number], self._edges
        for source, target, kind, _flags, _before, _after, _vector in BRANCH_RECORD.iter_unpack(vcpu.cpu.core.branch_log_read()):
            if kind == BranchKind.CR3:
                cr3 = target & ~_PCID
            elif len(edges) < _MOST_EDGES or (cr3, source, target) in edges:
                edges[cr3, source, target] += 1
            else:
                self.lost += 1
        self._cr3[number] = cr3

    def edges(self) -> list[Edge]:
        """Branches by functions, the most frequent first."""
        names = Symbolizer(self.view)
        sums: Counter[tuple[str, str, str]] = Counter()
        for (cr3, source, target), count in self._edges.items():
            process = self._processes.get(cr3)
            name = process.name if process is not None else "?"
            sums[name, _name(names, process, source), _name(names, process, target)] += count
        return [Edge(*key, count) for key, count in sums.most_common()]


def _name(names: Symbolizer, process: Process | None, address: int) -> str:
    return names.kernel(address) if address & _KERNEL else names.user(process, address)


def show(options: RunOptions, ring: str, process: str | None, most: int, json: bool) -> int:
    """Run the guest and print its branches; the run's exit status."""
    log = BranchLog(RINGS[ring])
    status = run.run(options, log)
    edges = [edge for edge in log.edges() if process in (None, edge.process)]
    if log.lost:
        output.say(f"{log.lost} branches between more places than can be kept are not counted")
    if not edges:
        raise CliError("the guest has taken no branch that was asked for")
    if json:
        output.print_json(msgspec.json.encode(edges))
    else:
        output.table("Branches", ("share", "branches", "command", "source", "target"), list(_rows(edges, most)))
    return status


def _rows(edges: Sequence[Edge], most: int) -> Iterator[tuple[str, ...]]:
    total = sum(edge.count for edge in edges)
    for edge in edges[:most]:
        yield f"{100 * edge.count / total:.2f}%", f"{edge.count:,}", edge.process, edge.source, edge.target
