"""Processes and threads: from the lists that everybody reads, and from the places where a hidden one still shows.

Source of truth: Linux 6.1 `include/linux/sched.h`, `include/linux/pid.h`, `fs/proc/array.c` (the letters of the states),
`kernel/sched/sched.h`, `mm/slab.h`. A scheduler cannot run what it does not know, and memory that holds a task is a slab's: who unlinks a
task from the list of tasks, and even from the table of PIDs, is still found there.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum

import msgspec

from softkvm.vmi.errors import Corrupt, UnknownName, Unreadable, VmiError
from softkvm.vmi.linux import slab
from softkvm.vmi.linux.kernel import Kernel
from softkvm.vmi.linux.objects import Struct

_PF_KTHREAD = 0x0020_0000
_TASK_REPORT = 0x7F
_TASK_DEAD = 0x80
_TASK_NEW = 0x800
_TASK_IDLE = 0x402
_STATES = "RSDTtXZP"
_MOST_THREADS = 1 << 16
_LONGEST_ARGUMENTS = 4096


class View(Enum):
    """A place where a task can be seen."""

    TASKS = "task list"
    PIDS = "pid table"
    SCHEDULER = "run queues"
    CPUS = "CR3"
    MEMORY = "slab"


class Process(msgspec.Struct, frozen=True):
    """A process, that is the leader of a thread group."""

    pid: int
    ppid: int
    uid: int
    state: str
    """The letter that ps(1) shows."""
    threads: int
    name: str
    arguments: tuple[str, ...]
    """The command line; empty for a kernel thread."""
    kernel: bool
    """Whether it is a kernel thread."""
    pgd: int
    """Guest-physical address of the top page table; 0 for a kernel thread."""
    start_time: int
    """Nanoseconds after the boot."""
    address: int
    """Of its `task_struct`."""
    hidden_from: tuple[View, ...] = ()
    """Where it ought to be seen, and is not."""


def all_tasks(kernel: Kernel) -> Iterator[Struct]:
    """The `task_struct` of every process on the list of tasks, without the idle tasks."""
    init = kernel.struct("task_struct", kernel.symbols["init_task"])
    return kernel.walk(init.at("tasks"), "task_struct", "tasks")


def threads(kernel: Kernel, leader: Struct) -> list[Struct]:
    """The `task_struct` of every thread of a process, the leader's first."""
    signal = leader.follow("signal")
    if signal is None:
        return [leader]
    found = kernel.walk(signal.at("thread_head"), "task_struct", "thread_node")
    return [thread for thread, _ in zip(found, range(_MOST_THREADS), strict=False)]


def find(kernel: Kernel, pid: int) -> Struct:
    """The process with this PID in the first PID namespace, hidden or not; UnknownName if there is none."""
    for task in seen(kernel):
        if task.number("pid") == pid:
            return task
    raise UnknownName(f"this guest has no process {pid}")


def describe(kernel: Kernel, task: Struct, hidden_from: tuple[View, ...] = ()) -> Process:
    """What a person wants to know about a process."""
    parent, memory, cred = task.follow("real_parent"), task.follow("mm"), task.follow("cred")
    return Process(
        pid=task.number("pid"),
        ppid=parent.number("tgid") if parent is not None else 0,
        uid=cred.number("uid.val") if cred is not None else 0,
        state=state_letter(task.number("__state") | task.number("exit_state")),
        threads=_count_threads(task),
        name=task.text("comm"),
        arguments=arguments(kernel, memory) if memory is not None else (),
        kernel=bool(task.number("flags") & _PF_KTHREAD),
        pgd=kernel.physical(memory.number("pgd")) if memory is not None else 0,
        start_time=task.number("start_time"),
        address=task.address,
        hidden_from=hidden_from,
    )


def _count_threads(task: Struct) -> int:
    signal = task.follow("signal")
    return signal.number("nr_threads") if signal is not None else 0


def state_letter(state: int) -> str:
    """The letter of `task_state_to_char()`."""
    if state & _TASK_IDLE == _TASK_IDLE:
        return "I"
    reported = state & _TASK_REPORT
    return _STATES[reported.bit_length()]


def arguments(kernel: Kernel, memory: Struct) -> tuple[str, ...]:
    """The command line of a process as it has it in its own memory; empty if that is not there."""
    start, end = memory.number("arg_start"), memory.number("arg_end")
    size = min(end - start, _LONGEST_ARGUMENTS)
    if size <= 0:
        return ()
    try:
        data = kernel.user_space(memory.number("pgd")).read_available(start, size)
    except Unreadable:
        return ()
    return tuple(word.decode(errors="replace") for word in data.rstrip(b"\0").split(b"\0")) if data else ()


# Where else a task is seen


def _pid_table(kernel: Kernel) -> Iterator[Struct]:
    namespace = kernel.struct("pid_namespace", kernel.symbols["init_pid_ns"])
    member = "pid_links"
    for _, address in kernel.xarray(namespace.at("idr.idr_rt")):
        pid = kernel.struct("pid", address)
        if first := kernel.number(pid.at("tasks")):  # tasks[PIDTYPE_PID]
            yield kernel.struct("hlist_node", first).container("task_struct", member)


def _run_queues(kernel: Kernel) -> Iterator[Struct]:
    for cpu in kernel.cpus:
        queue = kernel.struct("rq", kernel.percpu("runqueues", cpu))
        if (current := queue.follow("curr")) is not None:
            yield current
        if queue.has("cfs_tasks"):
            yield from kernel.walk(queue.at("cfs_tasks"), "task_struct", "se.group_node")


def _in_memory(kernel: Kernel) -> Iterator[Struct]:
    """Tasks whose memory is in use and that have not died: every one in the slabs of `task_struct`."""
    for address in slab.objects(kernel, kernel.symbols["task_struct_cachep"]):
        task = kernel.struct("task_struct", address)
        alive = task.number("usage.refs.counter") > 0 and not task.number("__state") & _TASK_DEAD and not task.number("exit_state")
        if alive and task.number("stack") and task.number("signal"):
            yield task


def _leader(task: Struct) -> Struct:
    leader = task.follow("group_leader")
    return task if leader is None else leader


def seen(kernel: Kernel, cr3s: tuple[int, ...] = ()) -> dict[Struct, set[View]]:
    """Every process, and the views that show it; `cr3s` are those that the vCPUs have now. Idle tasks are left out."""
    found: dict[Struct, set[View]] = {}
    for task in all_tasks(kernel):
        found.setdefault(task, set()).add(View.TASKS)
    for view, look in ((View.PIDS, _pid_table), (View.SCHEDULER, _run_queues), (View.MEMORY, _in_memory)):
        for task in look(kernel):
            leader = _leader(task)
            if leader.number("pid"):
                found.setdefault(leader, set()).add(view)
    roots = {cr3 & 0x000F_FFFF_FFFF_E000 for cr3 in cr3s}
    for task, views in found.items():
        memory = task.follow("mm")
        if memory is not None and kernel.physical(memory.number("pgd")) & ~0x1FFF in roots:
            views.add(View.CPUS)
    return found


def processes(kernel: Kernel, cr3s: tuple[int, ...] = ()) -> list[Process]:
    """All processes by PID, those among them that somebody has hidden marked as such.

    Corrupt if the guest's lists do not hold together, as may happen while it runs: then look again.
    """
    listed = []
    for task, views in seen(kernel, cr3s).items():
        missing = tuple(view for view in (View.TASKS, View.PIDS) if view not in views)
        if task.number("__state") == _TASK_NEW or (View.TASKS in views and task.number("exit_state")):
            missing = ()  # fork() has not entered it everywhere, or a zombie that is being reaped has left the table of PIDs
        listed.append(describe(kernel, task, missing))
    return sorted(listed, key=lambda process: process.pid)


def current(kernel: Kernel, cpu: int) -> Struct:
    """The task that runs on a CPU, by the kernel's own per-CPU variable."""
    if "pcpu_hot" in kernel.symbols:
        address = kernel.struct("pcpu_hot", kernel.percpu("pcpu_hot", cpu)).number("current_task")
    else:
        address = kernel.number(kernel.percpu("current_task", cpu))
    return kernel.struct("task_struct", address)


def consistent(kernel: Kernel, cr3s: tuple[int, ...] = (), attempts: int = 3) -> list[Process]:
    """`processes()` of a guest that runs meanwhile: looks again while the lists are caught in a change."""
    for _ in range(attempts - 1):
        try:
            return processes(kernel, cr3s)
        except (Corrupt, Unreadable):
            kernel.forget()
    try:
        return processes(kernel, cr3s)
    except VmiError as error:
        raise Corrupt(f"the guest's list of processes does not hold together: {error}") from error
