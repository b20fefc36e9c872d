"""docs/introspection.md, command by command, with a real guest and a real rootkit."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import msgspec
import pytest

from softkvm.cli import guest
from softkvm.cli.guest import cpio
from softkvm.vmi.tools.lock import Attempt
from tests.guests import packages
from tests.guests.vmi.test_rootkit import GETPID, ROOTKIT

pytestmark = [pytest.mark.guest, pytest.mark.slow]

TUTORIAL = Path(__file__).parents[3] / "docs/introspection.md"
COMMANDS = [
    line for block in re.findall(r"^```sh\n(.*?)^```", TUTORIAL.read_text(), re.MULTILINE | re.DOTALL) for line in block.splitlines()
]
RUN = "softkvm run --name web -c 2"


class Guest:
    """The guest of the tutorial: a process that runs it, whose console is a pipe."""

    def __init__(self, folder: Path) -> None:
        image = guest.prepare("cloud")
        assert isinstance(image.initrd, bytes)
        rootkit = packages.module(ROOTKIT, folder)
        (folder / "initrd").write_bytes(image.initrd + cpio.archive([cpio.file("/rootkit.ko", rootkit, 0o644)]))
        (folder / "bin").mkdir()
        wrapper = folder / "bin/softkvm"
        wrapper.write_text(f'#!/bin/sh\nexec {sys.executable} -m softkvm.cli "$@"\n')
        wrapper.chmod(0o755)
        (folder / "symbols").mkdir()
        source = Path(__file__).parents[3] / "src"
        path = f"{folder}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.folder, self.console = folder, folder / "console"
        self.environment = {**os.environ, "PATH": path, "PYTHONPATH": str(source), "XDG_CACHE_HOME": str(folder / "cache")}
        self.environment["SOFTKVM_CACHE"] = str(guest.default_directory())

    def start(self) -> subprocess.Popen[bytes]:
        """`softkvm run`, up to the shell."""
        output = self.console.open("wb")
        command = f"exec {RUN} -i {self.folder}/initrd"
        process = subprocess.Popen(command, shell=True, env=self.environment, stdin=subprocess.PIPE, stdout=output, cwd=self.folder)
        output.close()
        self.wait_for("# ", process)
        return process

    def wait_for(self, text: str, process: subprocess.Popen[bytes]) -> str:
        """What the console shows, as soon as `text` is in it."""
        while text not in (shown := self.console.read_text(errors="replace")):
            assert process.poll() is None, shown
            time.sleep(0.05)
        return shown

    def run(self, command: str) -> subprocess.CompletedProcess[str]:
        """A command of the tutorial."""
        return subprocess.run(command, shell=True, env=self.environment, cwd=self.folder, capture_output=True, text=True, check=False)


@pytest.fixture
def tutorial(tmp_path: Path) -> Guest:
    """Where the commands run."""
    pytest.importorskip("volatility3")
    return Guest(tmp_path)


def type_in(process: subprocess.Popen[bytes], line: str) -> None:
    """Type a line at the guest's console."""
    console: IO[bytes] | None = process.stdin
    assert console is not None
    console.write(line.encode() + b"\n")
    console.flush()


def lock_and_attack(tutorial: Guest, vm: subprocess.Popen[bytes], command: str) -> None:
    """Run the lock while the rootkit is loaded, and end it then: nobody knows how long a busy host takes for that."""
    table = re.search(r"0x[0-9a-f]+", tutorial.run("echo 'print(sym(\"sys_call_table\"))' | softkvm vmi shell --name web").stdout)
    assert table is not None
    type_in(vm, "sleep 1000 & echo victim $!")
    shown = tutorial.wait_for("victim", vm)
    while not (victim := re.search(r"victim (\d+)", shown)):
        shown = tutorial.wait_for("victim", vm)
    command, _, redirection = command.partition(" --timeout 20")
    with subprocess.Popen(
        f"exec {command}{redirection}", shell=True, env=tutorial.environment, cwd=tutorial.folder, stderr=subprocess.PIPE, text=True
    ) as lock:
        assert lock.stderr is not None
        assert "kernel locked" in lock.stderr.readline()
        type_in(vm, f"insmod /rootkit.ko pid={victim[1]} table={table[0]} number={GETPID}")
        tutorial.wait_for("rootkit: done", vm)
        lock.terminate()
        assert lock.wait() == 0
    lines = (tutorial.folder / "attempts.jsonl").read_text().splitlines()
    attempts = [msgspec.json.decode(line, type=Attempt) for line in lines]
    (stopped,) = (attempt for attempt in attempts if attempt.what == "read-only data")
    assert stopped.where == f"sys_call_table+{8 * GETPID:#x}"
    assert stopped.stopped


def test_every_command_of_the_tutorial(tutorial: Guest) -> None:
    assert COMMANDS[0] == RUN
    vm = tutorial.start()
    try:
        attacked = False
        for command in COMMANDS[1:]:
            if "lock-kernel" in command:
                lock_and_attack(tutorial, vm, command)
                attacked = True
                continue
            result = tutorial.run(command)
            found = attacked and re.search(r"vmi (check|ps) --name", command)
            assert result.returncode == (1 if found else 0), f"{command}\n{result.stdout}\n{result.stderr}"
            assert result.stdout or "--timeout" in command or "dump" in command, command
            assert not found or "hidden" in result.stdout.lower()
        assert attacked
    finally:
        vm.kill()
        vm.communicate()
