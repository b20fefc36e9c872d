"""Debian's perf in an unmodified guest, and softkvm's own profile of the same from outside."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytestmark = [pytest.mark.guest, pytest.mark.slow]

HERE = Path(__file__).parent
SOFTKVM = [sys.executable, "-m", "softkvm.cli"]
SUITE = Path(os.environ.get("KVM_UNIT_TESTS", "/nonexistent"))
ITERATIONS = 1_000_000

Edges = Counter[tuple[str, str]]


def compiled(source: str, target: Path, *flags: str) -> Path:
    """A test program, built by this machine's compiler."""
    subprocess.run(["gcc", *flags, "-o", target, HERE / source], check=True)
    return target


def in_guest(command: str, *options: str) -> subprocess.CompletedProcess[str]:
    """A shell command in a guest with Debian's perf."""
    arguments = [*SOFTKVM, "run", "--timeout", "800", "--with", "linux-perf", *options, "--", "sh", "-c", command]
    return subprocess.run(arguments, capture_output=True, text=True, check=False)


def shares(edges: Edges) -> dict[tuple[str, str], float]:
    """Each edge's share in percent."""
    total = sum(edges.values())
    return {edge: 100 * count / total for edge, count in edges.items()}


def inside(program: Path) -> Edges:
    """`perf record -b` in the guest, and its branches by the functions of the program and the C library. In virtual time, so that the same
    samples are taken in every run."""
    script = (
        "cd /tmp && perf record -b -c 30011 -o p.data /root/profiled >&2 && perf script -i p.data -F brstacksym | tr ' ' '\\n'"
        " | cut -d/ -f1,2 | sed 's/+0x[0-9a-f]*//g' | sort | uniq -c"
    )
    result = in_guest(script, "--deterministic", "1", "--with", str(program))
    assert result.returncode == 0, result.stderr
    edges: Edges = Counter()
    for count, source, target in re.findall(r"(\d+) ([^/\s]+)/([^/\s]+)$", result.stdout, re.MULTILINE):
        edges[plt(source), plt(target)] += int(count)
    return of_the_program(edges)


def outside(program: Path) -> Edges:
    """Every branch of the program, by the engine's log."""
    arguments = ["trace", "branches", "--ring", "user", "--process", "profiled", "--json", "--timeout", "800", "--with", str(program)]
    result = subprocess.run([*SOFTKVM, *arguments, "--", "/root/profiled"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    edges: Edges = Counter()
    for edge in json.loads(result.stdout):
        edges[plt(edge["source"]), plt(edge["target"])] += edge["count"]
    return of_the_program(edges)


RARE = 0.5
"""Percent of the edges below which one may be missing among some hundred samples."""
TEXT = {"main", "foo", "bar", "qux", "random@plt", "random", "random_r"}
"""The functions that the program's loop runs; the linker made `random@plt`."""


def of_the_program(edges: Edges) -> Edges:
    """The edges that begin or end in the program's loop."""
    return Counter({edge: count for edge, count in edges.items() if TEXT.intersection(edge)})


def plt(name: str) -> str:
    """perf calls the procedure linkage table `_init`, as that is the last symbol before it; we name the file."""
    return "random@plt" if name in ("_init", "[profiled]") else name


def test_the_table_of_the_cover_letter(tmp_path: Path) -> None:
    program = compiled("profiled.c", tmp_path / "profiled", "-O1")
    sampled, logged = shares(inside(program)), shares(outside(program))
    # No sample need have met what happens seldom, such as an interrupt, or once, such as the way into main.
    often = {edge for edge, share in logged.items() if share >= RARE}
    assert often <= sampled.keys()
    assert {edge for edge in sampled if TEXT.issuperset(edge)} <= logged.keys()
    assert len(often) >= 15
    for edge in sampled.keys() | logged.keys():
        assert abs(sampled.get(edge, 0) - logged.get(edge, 0)) <= 2, edge


def test_guest_counts_are_exact(tmp_path: Path) -> None:
    program = compiled("counted.S", tmp_path / "counted", "-nostdlib", "-static")
    result = in_guest("perf stat -x, -e instructions:u,branches:u /root/counted", "--with", str(program))
    counts = {name: int(count) for count, name in re.findall(r"^(\d+),,(\w+):u,", result.stderr, re.MULTILINE)}
    assert counts == {"instructions": 2 * ITERATIONS + 4, "branches": ITERATIONS + 1}


PERF = """
cd /tmp
perf stat -x, -e '{instructions:u,branches:u}' /root/counted
perf stat -x, -e branches:u,r01c4:u,r02c4:u,r08c4:u,r20c4:u,r10c4:u /root/profiled
perf record -q -j any,u -c 50021 -o user.data /root/profiled
echo user: $(perf script -i user.data -F brstack | wc -w) kernel: $(perf script -i user.data -F brstack | tr ' ' '\\n' | grep -c 0xf)
perf record -q -j any_call,k -c 20011 -o calls.data find /sys/devices -name none
perf script -i calls.data -F brstack | tr ' ' '\\n' | grep 0x | cut -d/ -f1,2 | sort -u | head -n 200 >calls
echo calls: $(wc -l <calls) of user code: $(grep -vc 0xf <calls)
"""


def test_perf_in_the_guest(tmp_path: Path) -> None:
    counted, profiled = (
        compiled("counted.S", tmp_path / "counted", "-nostdlib", "-static"),
        compiled("profiled.c", tmp_path / "profiled", "-O1"),
    )
    # Six events that take turns on four counters are estimates: virtual time alone gives each the same share of the work in every run.
    result = in_guest(PERF, "--deterministic", "1", "--with", str(counted), "--with", str(profiled))
    counts = [(name, int(count), float(share)) for count, name, share in re.findall(r"^(\d+),,([\w:]+),\d+,([\d.]+)", result.stderr, re.M)]
    assert counts[:2] == [("instructions:u", 2 * ITERATIONS + 4, 100.0), ("branches:u", ITERATIONS + 1, 100.0)]
    several = {name: count for name, count, _ in counts[2:]}
    assert all(share < 100 for _, _, share in counts[2:]), "six events on four counters"
    assert abs(several["branches:u"] - several["r20c4:u"] - several["r10c4:u"]) < several["branches:u"] / 5
    user = re.search(r"user: (\d+) kernel: (\d+)", result.stdout)
    assert user is not None, result.stdout
    assert int(user[1]) > 300
    assert int(user[2]) == 0
    calls = re.search(r"calls: (\d+) of user code: (\d+)", result.stdout)
    assert calls is not None, result.stdout
    assert int(calls[1]) > 50
    assert int(calls[2]) == 0


TOP = """
cd /tmp
(while :; do /root/profiled; done) >/dev/null 2>&1 &
load=$!
mkfifo keys
sleep 1000 >keys &
perf top --stdio -c 100003 -d 1 <keys >top &
top=$!
until grep -q 'profiled.*qux' top; do sleep 0.5; done
kill $top $load
grep -o 'profiled.*qux' top | head -n 1
"""


def test_perf_top_shows_what_the_guest_is_busy_with(tmp_path: Path) -> None:
    result = in_guest(TOP, "--with", str(compiled("profiled.c", tmp_path / "profiled", "-O1")))
    assert re.search(r"profiled +\[\.\] qux", result.stdout), result.stdout + result.stderr


def test_perf_record_goes_on_in_a_second_machine(tmp_path: Path) -> None:
    program, path = compiled("profiled.c", tmp_path / "profiled", "-O1"), tmp_path / "snapshot"
    work = "until [ -e switch ]; do /root/profiled; echo ro''und; done; for n in 1 2 3; do ./later; done"
    command = [*SOFTKVM, "run", "--name", "recording", "--with", "linux-perf", "--with", str(program)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdin is not None
        assert first.stdout is not None
        first.stdin.write(f'cd /tmp; cp /root/profiled later; perf record -b -c 100003 -o p.data sh -c "{work}" &\n')
        first.stdin.flush()
        rounds = 0
        while rounds < 3:
            line = first.stdout.readline()
            assert line, "the guest has ended"
            rounds += "round" in line
        subprocess.run([*SOFTKVM, "snapshot", "recording", str(path)], capture_output=True, check=True)
        first.kill()
    samples = "$(perf script -i p.data -F comm,brstacksym | grep -c 'later.*foo')"
    questions = f"touch switch; wait; echo in the last rounds: {samples}; poweroff -f\n"
    second = subprocess.run([*SOFTKVM, "run", "--restore", str(path), "--timeout", "600"], input=questions, capture_output=True, text=True)
    found = re.search(r"in the last rounds: (\d+)", second.stdout)
    assert found is not None, second.stdout
    assert int(found[1]) > 20, "samples with branch records, of what ran in the second machine alone"


def test_the_log_has_every_branch(tmp_path: Path) -> None:
    program = compiled("counted.S", tmp_path / "counted", "-nostdlib", "-static")
    arguments = ["trace", "branches", "--ring", "user", "--process", "counted", "--json", "--timeout", "600", "--with", str(program)]
    result = subprocess.run([*SOFTKVM, *arguments, "--", "/root/counted"], capture_output=True, text=True, check=False)
    counts = {(edge["source"], edge["target"]): edge["count"] for edge in json.loads(result.stdout)}
    assert counts["[counted]", "[counted]"] == ITERATIONS - 1
    assert counts["[counted]", "entry_SYSCALL_64"] == 1


def test_debians_perf_reads_what_we_record(tmp_path: Path) -> None:
    program, path = compiled("profiled.c", tmp_path / "profiled", "-O1"), tmp_path / "out.data"
    arguments = ["perf", "record", "-b", "-c", "20011", "-o", str(path), "--timeout", "600", "--with", str(program)]
    subprocess.run([*SOFTKVM, *arguments, "--", "/root/profiled"], capture_output=True, check=True)
    symbols: list[str | Path] = ["--kallsyms", f"{path}.kallsyms", "--symfs", f"{path}.symfs", "-i", path]
    columns = ["-F", "overhead,comm,symbol_from,symbol_to"]
    report = subprocess.run([*debians_perf(tmp_path), "report", "--stdio", *symbols, *columns], capture_output=True, text=True, check=False)
    assert report.returncode == 0, report.stderr
    found = {(source, target) for source, target in re.findall(r"profiled +\[\.\] (\w+) +\[\.\] (\w+)", report.stdout)}
    assert {("main", "foo"), ("foo", "qux"), ("qux", "foo"), ("main", "bar"), ("bar", "qux"), ("random", "random_r")} <= found


def debians_perf(folder: Path) -> list[str | Path]:
    """The command that runs Debian's perf on this machine, unpacked into `folder`."""
    perf = folder / "perf"
    perf.mkdir()
    subprocess.run(["cpio", "-idmu", "--quiet"], input=_package().read_bytes(), cwd=perf, check=True)
    libraries = f"{perf}/lib/x86_64-linux-gnu:{perf}/usr/lib/x86_64-linux-gnu"
    return [perf / "lib/x86_64-linux-gnu/ld-linux-x86-64.so.2", "--library-path", libraries, perf / "usr/bin/perf"]


def _package() -> Path:
    from softkvm.cli import guest

    guest.prepare("cloud", extras=["linux-perf"])
    return guest.Cache(guest.default_directory()).path("package-linux-perf.cpio")


def test_the_flame_graph_names_programs_and_kernel(tmp_path: Path) -> None:
    program, picture, folded = compiled("profiled.c", tmp_path / "profiled", "-O1"), tmp_path / "f.svg", tmp_path / "f.txt"
    arguments = ["perf", "flame", "-c", "5003", "-o", str(picture), "--folded", str(folded), "--timeout", "600", "--with", str(program)]
    subprocess.run([*SOFTKVM, *arguments, "--", "/root/profiled"], capture_output=True, check=True)
    stacks = folded.read_text()
    assert re.search(r"^profiled;.*main;foo;qux \d+$", stacks, re.MULTILINE)
    assert re.search(r"entry_SYSCALL_64_after_hwframe_\[k\];do_syscall_64_\[k\];", stacks)
    assert picture.read_text().startswith("<svg")


@pytest.mark.skipif(not (SUITE / "x86/pmu.flat").exists(), reason="KVM_UNIT_TESTS names no built kvm-unit-tests")
@pytest.mark.parametrize(
    ("name", "options"),
    [("pmu", ["-cpu", "max", "-icount", "shift=0"]), ("pmu_lbr", ["-cpu", "host,migratable=no"]), ("pmu_pebs", ["-cpu", "host"])],
)
def test_kvm_unit_tests(name: str, options: list[str]) -> None:
    qemu = [sys.executable, "-c", "import sys; from softkvm.cli.qemu import main; sys.exit(main())", "-serial", "stdio"]
    devices = ["-device", "isa-debug-exit,iobase=0xf4,iosize=0x4", "-device", "pc-testdev", "-kernel", str(SUITE / f"x86/{name}.flat")]
    result = subprocess.run([*qemu, *options, *devices], capture_output=True, text=True, check=False)
    assert "SUMMARY" in result.stdout
    assert "FAIL" not in result.stdout
    assert result.returncode in (1, 77)  # what run_tests.sh takes for a pass and for a skip
