"""The two machines and the host, each with the program of programs/main.c at the other end of a pipe.

Both machines get the same kernel, initial RAM disk, command line, memory and number of CPUs. They run side by side and are asked in turn,
so that whatever else the host does slows both; the one that is not asked waits for its serial line and sleeps. Times are taken twice: by
the guest's clock, and as the CPU time that the host's kernel has charged to the machine's process.
"""

from __future__ import annotations

import os
import re
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import click
import msgspec

from benchmarks.guest.cases import Setup
from benchmarks.guest.results import Sample
from softkvm.cli import guest
from softkvm.cli.guest import cpio
from softkvm.vmm.monitor import Monitor
from softkvm.vmm.stats import Stats

Counters = Mapping[str, int]

QEMU = "qemu-system-x86_64"
PROGRAMS = Path(__file__).parent / "programs"
FILES = Path(__file__).parent / "files"
"""What commands of the guest work on, copied into it."""
COMMAND_LINE = "console=ttyS0 panic=-1 quiet loglevel=1"
FOLDER = "/root"
NAME = f"benchmark-{os.getpid()}"
"""Of softkvm's control socket."""
PATIENCE = 900.0
"""Seconds for one answer."""

_POWER_OFF = "#!/bin/busybox sh\n/bin/busybox poweroff -f\n"
_WORK = f"""#!/bin/busybox sh
export PATH=/usr/bin:/bin HOME={FOLDER}
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /tmp
cd {FOLDER}
ln -s /bin/busybox busybox
{FOLDER}/benchmark
poweroff -f
"""
_RESULT = re.compile(rb"@result (\d+) (\d+) (\d+) ([0-9a-f]{16})\r?")
"""Operations that were timed, operations in all, nanoseconds, checksum."""
_FAILED = re.compile(rb"@failed (.*)")


def require_qemu() -> None:
    """Have QEMU on the PATH: as root, Debian's package is installed; otherwise one sentence says what is missing."""
    if shutil.which(QEMU):
        return
    remedy = "apt-get install --no-install-recommends -y qemu-system-x86"
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise click.ClickException(f"the comparison needs {QEMU}; install it with: sudo {remedy}")
    for command in ("apt-get update -q", remedy):
        subprocess.run(command.split(), check=True, stdout=subprocess.DEVNULL)


def compile_program(folder: Path) -> Path:
    """The static program of all cases, built into `folder`; click.ClickException if there is no compiler."""
    program = folder / "benchmark"
    # A loop that happens to lie across two pages is another one to a translator, so short functions start where they fit into one.
    command: list[str | Path] = ["gcc", "-static", "-O2", "-fno-tree-vectorize", "-falign-functions=1024"]
    command += ["-Wall", "-Wextra", "-Werror", "-o", program]
    command += sorted(PROGRAMS.glob("*.c"))
    try:
        subprocess.run(command, check=True)
    except FileNotFoundError:
        raise click.ClickException("the guest program needs a C compiler; install it with: sudo apt-get install gcc libc6-dev") from None
    return program


def initrd(setup: Setup, program: Path | None, target: Path) -> guest.Guest:
    """Write the initial RAM disk of a setup to `target`: with the program, or one that powers off at once; the guest that it is for."""
    image = guest.prepare("cloud", extras=_packages(setup))
    assert isinstance(image.initrd, bytes)
    entries = [cpio.file("/init", (_WORK if program else _POWER_OFF).encode(), 0o755)]
    if program is not None:
        entries.append(cpio.file(f"{FOLDER}/benchmark", program.read_bytes(), 0o755))
        for path in sorted(FILES.rglob("*")):
            name = f"{FOLDER}/{path.relative_to(FILES)}"
            entries.append(cpio.directory(name) if path.is_dir() else cpio.file(name, path.read_bytes()))
    target.write_bytes(image.initrd + cpio.archive(entries))
    return guest.Guest(image.kernel, target, image.title, announces_shell=False)


def _packages(setup: Setup) -> list[str]:
    """Names of Debian packages, of the kernel's version where they depend on it."""
    if not setup.packages:
        return []
    release = guest.prepare("cloud").title.split()[0].removeprefix("linux-image-")
    return [name.format(release=release, version=release.removesuffix("-cloud-amd64")) for name in setup.packages]


def host_files(folder: Path) -> None:
    """The files that the guest has beside the program, for the program on the host."""
    with guest.Provider(guest.Cache(guest.default_directory()), lambda _: None) as provider:
        busybox = folder / "busybox"
        busybox.write_bytes(provider.busybox())
        busybox.chmod(0o755)


def qemu_command(image: guest.Guest, setup: Setup) -> list[str]:
    """QEMU's TCG on a q35 with all features that it can emulate."""
    command = [QEMU, "-machine", "q35", "-accel", "tcg", "-cpu", "max", "-m", setup.memory, "-smp", str(setup.cpus)]
    command += ["-kernel", str(image.kernel), "-initrd", str(image.initrd), "-append", COMMAND_LINE, "-no-reboot"]
    return [*command, "-nodefaults", "-display", "none", "-serial", "stdio", "-monitor", "none"]


def softkvm_command(image: guest.Guest, setup: Setup, tier: str | None, folder: Path) -> list[str]:
    """softkvm under the name NAME with its default CPU model; `-p` brings what `softkvm run` does not set by itself.

    Python's bytecode is kept in `folder` as an installation keeps it, whatever the environment says.
    """
    command = ["env", "-u", "PYTHONDONTWRITEBYTECODE", f"PYTHONPYCACHEPREFIX={folder / 'bytecode'}", sys.executable, "-m", "softkvm.cli"]
    command += ["run", "--name", NAME, "-m", setup.memory, "-c", str(setup.cpus), "-k", str(image.kernel)]
    command += ["-i", str(image.initrd), "-p", "quiet loglevel=1"]
    return [*command, *(["--tier", tier] if tier else [])]


def whole_run(command: Sequence[str]) -> Sample:
    """One run of a machine to its end: wall time and peak memory of the process; click.ClickException if it fails."""
    started = time.perf_counter()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
        nanoseconds = (time.perf_counter() - started) * 1e9
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            log.seek(0)
            raise click.ClickException(f"{command[0]} ended with {process.returncode}: {log.read().decode(errors='replace')[-2000:]}")
    return Sample(nanoseconds, (usage.ru_utime + usage.ru_stime) * 1e9, "", usage.ru_maxrss / 1024, {})


def counters() -> Counters:
    """What softkvm has counted since its start, by name; MonitorError if it does not run."""
    with Monitor.connect(NAME, PATIENCE) as connection:
        stats = msgspec.convert(connection.execute("query-stats"), Stats)
    return {"instructions": stats.instructions, **stats.engine, **{f"exit {name}": count for name, count in stats.exits.items()}}


@contextmanager
def serving(name: str, command: Sequence[str | Path], folder: Path | None = None, count: Callable[[], Counters] = dict) -> Iterator[Server]:
    """Start `command`, in `folder` if it looks for files, until its program is ready for requests.

    `name` is for messages; `count` reads what the machine counts.
    """
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log) as process,
    ):
        try:
            yield Server(name, process, log, count)
            process.communicate(b"end\n", timeout=PATIENCE)
        except BaseException:
            process.kill()
            raise


class Server:
    """The program of a machine or of the host, ready for requests."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], log: BinaryIO, count: Callable[[], Counters]) -> None:
        """Wait for the program that `process` is or boots; `log` has what it says of itself, `count` reads what it counts."""
        self._name = name
        self._process = process
        self._log = log
        self._count = count
        self._received = b""
        self._wait_for(re.compile(rb"@ready"))

    def ask(self, request: str) -> Sample:
        """Have one case run; click.ClickException if it cannot."""
        self._reset_peak()
        counted, before = self._count(), self._cpu_time()
        self._send(request)
        match = self._wait_for(_RESULT)
        used, timed, done = self._cpu_time() - before, int(match[1]), int(match[2])
        events = {name: (value - counted.get(name, 0)) / done for name, value in self._count().items()}
        return Sample(int(match[3]) / timed, used / done, match[4].decode(), self._peak(), events)

    def _send(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode() + b"\n")
        self._process.stdin.flush()

    def _wait_for(self, pattern: re.Pattern[bytes]) -> re.Match[bytes]:
        """The next line that fits."""
        assert self._process.stdout is not None
        deadline = time.monotonic() + PATIENCE
        while True:
            *lines, self._received = self._received.split(b"\n")
            for number, line in enumerate(lines):
                if match := pattern.search(line):
                    self._received = b"\n".join([*lines[number + 1 :], self._received])
                    return match
                if failure := _FAILED.search(line):
                    raise click.ClickException(f"{self._name}: {failure[1].decode(errors='replace')}")
            ready, _, _ = select.select([self._process.stdout], [], [], max(0, deadline - time.monotonic()))
            piece = os.read(self._process.stdout.fileno(), 65536) if ready else b""
            if not piece:
                self._log.seek(0)
                why = "ended" if ready else "does not answer"
                raise click.ClickException(f"{self._name} {why}: {self._log.read().decode(errors='replace')[-2000:]}")
            self._received += piece

    def _cpu_time(self) -> int:
        """Nanoseconds that all threads of the process have run: clock_getcpuclockid(3) makes the clock's number in this way."""
        return time.clock_gettime_ns(~self._process.pid << 3 | 2)

    def _reset_peak(self) -> None:
        """proc(5): 5 sets the peak resident size to the present one."""
        Path(f"/proc/{self._process.pid}/clear_refs").write_text("5")

    def _peak(self) -> float:
        """MiB."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        match = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
        assert match, "a process that runs has a peak of its resident size"
        return int(match[1]) / 1024
