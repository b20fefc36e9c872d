"""Volatility 3 and drgn, unmodified, on our dumps with our symbols: they see what `softkvm vmi` sees, and what the guest says itself."""

from __future__ import annotations

import csv
import gzip
import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from softkvm.vmi import dump
from softkvm.vmi.linux import files, isf, log, maps, tasks
from softkvm.vmi.linux.modules import Module
from softkvm.vmi.linux.modules import modules as list_modules
from softkvm.vmi.linux.syscalls import SyscallTable
from softkvm.vmi.linux.tasks import Process
from softkvm.vmi.target import Target
from tests.guests import packages
from tests.guests.vmi.live import LiveGuest, live_guest

pytestmark = [pytest.mark.guest, pytest.mark.slow]

MODULES = ("drivers/net/dummy", "drivers/block/loop")


@dataclass
class Evidence:
    """A guest, and what was taken from it in one moment."""

    live: LiveGuest
    core: Path
    lime: Path
    symbols: Path
    processes: list[Process]
    modules: list[Module]
    calls: list[str]
    guest_ps: list[tuple[int, str]]


@pytest.fixture(scope="module")
def evidence(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Evidence]:
    """A guest with modules and processes, dumped."""
    folder = tmp_path_factory.mktemp("evidence")
    (folder / "symbols").mkdir()
    found = {f"/{name.rsplit('/', 1)[-1]}.ko": packages.debian_module(name) for name in MODULES}
    with live_guest(found, cpus=2, memory="256M") as live:
        live.shell("insmod /dummy.ko; insmod /loop.ko")
        live.background("sleep 1000")
        live.background("sleep 2000 < /init")
        listed = re.findall(r"^\s*(\d+) \S+\s+\S+ +(.*)$", live.shell("ps -o pid,user,stat,comm"), re.MULTILINE)
        taken = live.still(lambda target: take(target, folder))
        with gzip.open(folder / "symbols/guest.json.gz", "wb", 1) as stream:
            stream.write(msgspec.json.encode(isf.build(live.target.kernel)))
        yield Evidence(live, folder / "core", folder / "lime", folder / "symbols", *taken, [(int(pid), name) for pid, name in listed])


def take(target: Target, folder: Path) -> tuple[list[Process], list[Module], list[str]]:
    """Write all dumps; processes, modules and system calls as we see them."""
    kernel, memory = target.kernel, target.client.memory
    cpus = [cpu for cpu in (target.registers(vcpu) for vcpu in range(2)) if cpu is not None]
    with (folder / "core").open("wb") as stream:
        dump.elf(stream, memory, memory.ranges(), cpus, [("VMCOREINFO", 0, kernel.vmcoreinfo())], kernel.direct_map)
    with (folder / "lime").open("wb") as stream:
        dump.lime(stream, memory, memory.ranges())
    table = SyscallTable(kernel)
    return tasks.processes(kernel), list_modules(kernel), [kernel.symbols.describe(entry) for entry in table.entries]


def volatility(evidence: Evidence, plugin: str, image: Path | None = None) -> list[dict[str, str]]:
    """What a plug-in of Volatility 3 prints, without its cache and without the network."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(evidence.symbols)}
    program = Path(sys.executable).with_name("vol")
    options = ["-q", "--offline", "-r", "csv", "-s", str(evidence.symbols), "-f", str(image or evidence.core), plugin]
    result = subprocess.run([program, *options], capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    lines = result.stdout[result.stdout.index("TreeDepth") :]
    return list(csv.DictReader(io.StringIO(lines)))


@pytest.mark.parametrize("style", ["core", "lime"])
def test_volatility_sees_the_same_processes(evidence: Evidence, style: str) -> None:
    pytest.importorskip("volatility3")
    rows = volatility(evidence, "linux.pslist", getattr(evidence, style))
    seen = {(int(row["PID"]), int(row["PPID"]), row["COMM"]) for row in rows}
    assert seen == {(process.pid, process.ppid, process.name) for process in evidence.processes}


def test_volatility_sees_the_same_modules(evidence: Evidence) -> None:
    pytest.importorskip("volatility3")
    rows = volatility(evidence, "linux.lsmod")
    assert {row["Module Name"] for row in rows} == {module.name for module in evidence.modules} == {"dummy", "loop"}


def test_volatility_sees_the_same_system_call_table(evidence: Evidence) -> None:
    pytest.importorskip("volatility3")
    rows = [row for row in volatility(evidence, "linux.malware.check_syscall") if row["Table Name"] == "64bit"]
    assert len(rows) > 300
    ours = evidence.calls[: len(rows)]
    assert [row["Handler Symbol"] for row in rows if "ni_syscall" not in row["Handler Symbol"]] == [
        name for name in ours if "ni_syscall" not in name
    ]


def test_volatility_finds_no_injected_code(evidence: Evidence) -> None:
    pytest.importorskip("volatility3")
    assert volatility(evidence, "linux.malware.malfind") == []


def test_drgn_opens_the_core(evidence: Evidence) -> None:
    drgn = pytest.importorskip("drgn")
    kallsyms = pytest.importorskip("drgn.helpers.linux.kallsyms")
    program = drgn.Program()
    program.set_core_dump(str(evidence.core))
    assert program.flags & drgn.ProgramFlags.IS_LINUX_KERNEL
    program.register_symbol_finder("guest", kallsyms.load_vmlinux_kallsyms(program), enable_index=0)
    kernel = evidence.live.target.kernel
    for name in ("linux_banner", "init_task", "sys_call_table"):
        assert program.symbol(name).address == kernel.symbols[name]
    assert program.read(kernel.symbols["linux_banner"], 64).decode().startswith("Linux version 6.1.")
    offset = kernel.struct("task_struct", 0).at("comm")
    assert program.read(kernel.symbols["init_task"] + offset, 10) == b"swapper/0\0"


def test_we_see_what_the_guest_sees(evidence: Evidence) -> None:
    ours = {process.pid: process for process in evidence.processes}
    for pid, name in evidence.guest_ps:
        if name != "ps":
            assert name.startswith(ours[pid].name)  # a kworker's has what it works on behind it
    assert [process.arguments for process in evidence.processes if process.name == "sleep"] == [("sleep", "1000"), ("sleep", "2000")]
    assert not any(process.hidden_from for process in evidence.processes)


def test_maps_files_and_log_are_those_of_proc(evidence: Evidence) -> None:
    live = evidence.live
    pid = next(process.pid for process in evidence.processes if process.arguments == ("sleep", "2000"))
    areas = live.still(lambda target: maps.maps(target.kernel, tasks.find(target.kernel, pid)))
    theirs = [line.split(None, 5) for line in live.shell(f"cat /proc/{pid}/maps").splitlines()]
    assert [(f"{area.start:08x}-{area.end:08x}", area.rights, area.name) for area in areas] == [
        (words[0], words[1], words[5].strip() if len(words) > 5 else "") for words in theirs
    ]
    opened = live.still(lambda target: list(files.files(target.kernel, tasks.find(target.kernel, pid))))
    links = dict(re.findall(r"(\d+) -> (\S+)", live.shell(f"ls -l /proc/{pid}/fd")))
    assert {str(file.descriptor): file.path for file in opened} == links
    theirs_so_far = [re.sub(r"^\[ *[\d.]+\] ", "", line) for line in live.shell("dmesg").splitlines()]
    messages = [message.text for message in live.still(lambda target: list(log.messages(target.kernel)))]
    assert theirs_so_far == messages[: len(theirs_so_far)]
