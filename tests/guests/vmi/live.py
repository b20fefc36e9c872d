"""A running guest with a tool attached to it, for the tests of `softkvm.vmi`."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any, TypeVar

from softkvm.cli import guest
from softkvm.cli.guest import cpio, default_directory
from softkvm.vmi.client import Client
from softkvm.vmi.target import Target
from softkvm.vmi.tools.dispatch import Dispatcher
from softkvm.vmm import Machine, StopReason

T = TypeVar("T")
R = TypeVar("R")
_PATIENCE = 600
_QUIET = "loglevel=3"
"""Only an oops may get in between what commands print."""


class LiveGuest:
    """A machine at its shell; the tool has its own thread, and the machine runs while the tool works."""

    def __init__(self, machine: Machine, client: Client) -> None:
        self.machine = machine
        self._commands = 0
        self.target = Target(client, default_directory() / "vmi")

    def shell(self, command: str) -> str:
        """What a command prints in the guest's shell."""
        self._commands += 1
        begin, end = f"begin {self._commands}\n", f"end {self._commands}\n"
        self.machine.send(f"echo be''gin {self._commands}; {command}; echo en''d {self._commands}\n")
        stop = self.machine.run(until=re.compile(rf"\bend {self._commands}\r?\n"), timeout=_PATIENCE)
        assert stop.reason is StopReason.UNTIL, self.machine.text[-2000:]
        shown = self.machine.text.replace("\r", "")
        return shown[shown.rindex(begin) + len(begin) : shown.rindex(end)]

    def background(self, program: str) -> int:
        """Start a program of busybox in the background; its PID, as soon as it is that program and no longer the shell."""
        name = program.split()[0]
        return int(self.shell(f'{program} & until [ "$(cat /proc/$!/comm)" = {name} ]; do :; done; echo $!').split()[-1])

    def look(self, function: Callable[[Target], T]) -> T:
        """The result of a function that looks into the guest while it runs."""
        with ThreadPoolExecutor(1) as pool:
            future: Future[T] = pool.submit(function, self.target)
            future.add_done_callback(lambda _: self.machine.stop())
            self.machine.run(timeout=_PATIENCE)
            return future.result(0)

    def still(self, function: Callable[[Target], T]) -> T:
        """`look()` while the guest stands still."""

        def look(target: Target) -> T:
            with target.still():
                return function(target)

        return self.look(look)

    @contextmanager
    def watched(self, dispatcher: Dispatcher[R]) -> Iterator[list[R]]:
        """The records of a dispatcher whose events are answered in the block, complete behind it."""
        records: list[R] = []
        thread = threading.Thread(target=lambda: records.extend(dispatcher.records()))
        thread.start()
        try:
            assert dispatcher.wait_until_armed(_PATIENCE)
            yield records
        finally:
            dispatcher.stop()
            thread.join(_PATIENCE)


@contextmanager
def live_guest(files: Mapping[str, bytes], *, boot: bool = True, **options: Any) -> Iterator[LiveGuest]:
    """Debian's cloud kernel with busybox, and `files` by path; at the shell unless `boot` is false."""
    image = guest.prepare("cloud")
    assert isinstance(image.initrd, bytes)
    folders = sorted({str(folder) for path in files for folder in PurePosixPath(path).parents if str(folder) not in "/bin"})
    entries = [cpio.directory(folder) for folder in folders] + [cpio.file(path, data, 0o755) for path, data in files.items()]
    initrd = image.initrd + cpio.archive(entries) if entries else image.initrd
    with Machine(kernel=image.kernel, initrd=initrd, append=_QUIET, **options) as machine:
        if boot:
            assert machine.run(until="# ", timeout=_PATIENCE).reason is StopReason.UNTIL
        with Client(machine.introspect()) as client:
            yield LiveGuest(machine, client)
