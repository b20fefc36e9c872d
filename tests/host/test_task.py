"""Tasks: flags of any thread, work of their own."""

from __future__ import annotations

import threading
from functools import partial

from softkvm.host import task
from softkvm.host.task import TIF_NOTIFY_RESUME, TIF_SIGPENDING, Task


def test_setting_a_flag_kicks_the_task_out_of_its_guest() -> None:
    task, kicks = Task(), []

    class Guest:
        def notice_flags(self) -> None:
            kicks.append(task.flags)

        def schedule(self) -> None: ...

    task.guest = Guest()
    task.set_flag(TIF_SIGPENDING)
    assert kicks == [TIF_SIGPENDING]


def test_clearing_tells_whether_the_flag_was_set() -> None:
    mine = Task()
    mine.set_flag(TIF_SIGPENDING)
    assert (mine.clear_flag(TIF_SIGPENDING), mine.clear_flag(TIF_SIGPENDING)) == (True, False)


def test_works_run_in_order_and_once() -> None:
    mine = Task()
    done: list[int] = []
    for number in range(3):
        mine.add_work(partial(done.append, number))
    assert mine.flags == TIF_NOTIFY_RESUME
    mine.run_works()
    mine.run_works()
    assert (done, mine.flags) == ([0, 1, 2], 0)


def test_every_thread_is_a_task() -> None:
    others: list[Task] = []
    thread = threading.Thread(target=lambda: others.append(task.current()))
    thread.start()
    thread.join()
    assert task.current() is task.current()
    assert others[0] is not task.current()
