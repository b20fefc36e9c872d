"""A real kernel's memory with words of its structures bent: every look ends, with a result or with an error that says so."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

from softkvm.vmi.errors import VmiError
from softkvm.vmi.linux import files, log, maps, modules, tasks
from softkvm.vmi.linux import kernel as linux
from softkvm.vmi.linux.kernel import Kernel
from softkvm.vmi.linux.objects import Struct
from softkvm.vmi.memory import BufferMemory
from tests.guests.vmi.live import live_guest

pytestmark = [pytest.mark.guest, pytest.mark.slow]

ROUNDS = 60
SEED = int(os.environ.get("HOSTILE_SEED", "1"))
WORD = (1 << 64) - 1
TASK_NEW = 0x800


@pytest.fixture(scope="module")
def ram() -> bytearray:
    """The memory of a guest at its shell."""
    with live_guest({}, memory="128M") as live:
        live.background("sleep 1000 < /init")
        area = live.target.client.memory.ranges()[0]
        return bytearray(live.still(lambda target: target.client.memory.read(area.base, area.end - area.base)))


def places(kernel: Kernel, tasks_there: list[Struct]) -> Iterator[int]:
    """Physical addresses of words that the looks depend on."""
    for task in tasks_there:
        yield from range(kernel.physical(task.address), kernel.physical(task.address) + task.type.size, 8)
        memory, opened = task.follow("mm"), task.follow("files")
        if memory is None or opened is None:
            continue
        yield from range(kernel.physical(memory.address), kernel.physical(memory.address) + 800, 8)
        for node in (memory.number("mm_mt.ma_root") & ~0xFF, memory.number("pgd"), opened.number("fdt")):
            yield from list(range(kernel.physical(node), kernel.physical(node) + 256, 8)) * 10
    for name in ("modules", "mod_tree", "prb", "init_pid_ns", "task_struct_cachep"):
        yield from list(range(kernel.physical(kernel.symbols[name]), kernel.physical(kernel.symbols[name]) + 64, 8)) * 10


def looks(kernel: Kernel, tasks_there: list[Struct]) -> list[Callable[[], object]]:
    """Everything that walks the kernel's structures."""
    found: list[Callable[[], object]] = [
        lambda: tasks.processes(kernel),
        lambda: modules.modules(kernel),
        lambda: list(log.messages(kernel)),
    ]
    for task in tasks_there[-3:]:
        found += [lambda task=task: maps.maps(kernel, task), lambda task=task: list(files.files(kernel, task))]  # type: ignore[misc]
    return found


def test_a_process_off_the_list_is_hidden_unless_fork_is_not_done_with_it(ram: bytearray) -> None:
    kernel = linux.find(BufferMemory([(0, memoryview(ram))]))
    task = list(tasks.all_tasks(kernel))[-1]
    pid, whole = task.number("pid"), bytes(ram)

    def write(address: int, value: int, size: int = 8) -> None:
        at = kernel.physical(address)
        ram[at : at + size] = value.to_bytes(size, "little")

    def hidden_from() -> tuple[tasks.View, ...]:
        kernel.forget()
        return next(process.hidden_from for process in tasks.processes(kernel) if process.pid == pid)

    assert hidden_from() == ()
    following, before = kernel.number(task.at("tasks")), kernel.number(task.at("tasks") + 8)
    write(before, following)
    write(following + 8, before)
    assert hidden_from() == (tasks.View.TASKS,)
    write(task.at("__state"), TASK_NEW, 4)
    assert hidden_from() == ()
    ram[:] = whole


def test_bent_structures_are_an_error_or_a_result(ram: bytearray) -> None:
    kernel = linux.find(BufferMemory([(0, memoryview(ram))]))
    there = list(tasks.all_tasks(kernel))
    words, pointers = list(places(kernel, there)), [task.address for task in there] + [0, 1, 2, WORD, kernel.direct_map]
    choose = random.Random(SEED)
    for _ in range(ROUNDS):
        saved = []
        for _ in range(choose.randint(1, 4)):
            address = choose.choice(words)
            saved.append((address, bytes(ram[address : address + 8])))
            bent = choose.choice([choose.getrandbits(64), choose.choice(pointers) + choose.randrange(4096), choose.choice(pointers)])
            ram[address : address + 8] = (bent & WORD).to_bytes(8, "little")
        kernel.forget()
        for look in looks(kernel, there):
            with suppress(VmiError):
                look()
        for address, content in reversed(saved):
            ram[address : address + 8] = content
    kernel.forget()
    assert [process.pid for process in tasks.processes(kernel)] == [task.number("pid") for task in there]
