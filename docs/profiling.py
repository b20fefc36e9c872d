"""Runs the commands of docs/perf.md and puts what they print between its marks, and the table of edges into README.md as well:
`make profiling`.

The programs are those of tests/guests/test_perf.py, and so is the comparison of the guest's own profile with the log of every branch.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.guests import test_perf as proof  # noqa: E402

PAGES = (ROOT / "docs/perf.md", ROOT / "README.md")
BLOCK = re.compile(r"(<!-- profile: (\w+) -->\n```\w*\n).*?(```\n<!-- end of profile -->)", re.DOTALL)
COLOUR = re.compile(r"\x1b\[\d*m")
COLUMNS = "-F overhead,comm,dso_from,symbol_from,symbol_to"


def softkvm(*arguments: str, folder: Path, stdin: str | None = None) -> str:
    """What a command of ours prints, without the line that tells of the guest."""
    command = [sys.executable, "-m", "softkvm.cli", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, input=stdin, check=True)
    text = COLOUR.sub("", done.stdout + done.stderr)
    kept = [line.rstrip() for line in text.splitlines() if "software CPU" not in line]
    return "\n".join(kept).strip("\n") + "\n"


def shown(command: str, output: str) -> str:
    """A command as it was typed, and its output."""
    return f"$ {command}\n{output}"


def parts(text: str, head: int, *also: str) -> str:
    """The first lines of a report that are not empty, and the first ones with each of the words in `also` behind them."""
    lines = [line for line in text.splitlines() if line.strip() not in ("", "#")]
    rest = lines[head:]
    found = [line for word in also for line in [line for line in rest if word in line][:2]]
    return "\n".join([*lines[:head], "[...]", *found]) + "\n"


def counted(folder: Path) -> str:
    """Exact counts in the guest."""
    command = (
        "run",
        "--with",
        "linux-perf",
        "--with",
        "./counted",
        "--",
        "perf",
        "stat",
        "-e",
        "instructions:u,branches:u",
        "/root/counted",
    )
    return shown("softkvm " + " ".join(command), softkvm(*command, folder=folder))


def inside(folder: Path) -> str:
    """A profile of branches in the guest."""
    record, report = "perf record -b -c 30011 -o p /root/profiled", f"perf report --stdio -i p {COLUMNS}"
    command = ("run", "--with", "linux-perf", "--with", "./profiled", "--", "sh", "-c", f"cd /tmp; {record} 2>&1; {report} 2>/dev/null")
    lines = softkvm(*command, folder=folder).splitlines()
    captured = [line for line in lines if "Captured" in line]
    report_lines = [line for line in lines if "# Samples:" in line or "Overhead" in line or "%" in line]
    typed = ["$ softkvm run --with linux-perf --with ./profiled", f"softkvm:/tmp# {record}", *captured, f"softkvm:/tmp# {report}"]
    return "\n".join([*typed, *report_lines[:7]]) + "\n[...]\n"


def stat(folder: Path) -> str:
    """Counts from outside."""
    return shown("softkvm perf stat -- true", softkvm("perf", "stat", "--", "true", folder=folder))


def outside(folder: Path) -> str:
    """A profile of branches from outside, read by Debian's perf."""
    command = ("perf", "record", "-b", "-c", "20011", "--with", "./profiled", "-o", "out.data", "--", "/root/profiled")
    recorded = softkvm(*command, folder=folder)
    report = f"report --stdio -i out.data --kallsyms out.data.kallsyms --symfs out.data.symfs {COLUMNS}"
    read = subprocess.run([*proof.debians_perf(folder), *report.split()], cwd=folder, capture_output=True, text=True, check=True)
    lines = "\n".join(line.rstrip() for line in read.stdout.splitlines() if not line.startswith("#"))
    return shown("softkvm " + " ".join(command), recorded) + shown(f"perf {report}", parts(lines, 5, "[kernel.kallsyms]"))


def flame(folder: Path) -> str:
    """A flame graph, of which the text form is shown."""
    command = "perf flame -c 20011 --folded stacks.txt -o flame.svg -- ls -lR /sys/devices"
    softkvm(*command.split(), folder=folder)
    search = "grep -o 'do_syscall_64.*vfs_.*' stacks.txt | head -n 2 | cut -c-110"
    found = subprocess.run(search, cwd=folder, shell=True, capture_output=True, text=True, check=True)
    return shown(f"softkvm {command}", "") + shown(search, found.stdout)


def edges(folder: Path) -> str:
    """The table of the series' cover letter, from inside and from outside."""
    logged = proof.outside(folder / "profiled")
    sampled, all_shares = proof.shares(proof.inside(folder / "profiled")), proof.shares(logged)
    lines = [
        "                            perf record -b   softkvm trace branches",
        "  source      target          in the guest   outside, every branch",
    ]
    often = [edge for edge in sorted(logged, key=lambda edge: -sampled.get(edge, 0)) if all_shares[edge] >= proof.RARE]
    rows = [f"  {a:10s}  {b:10s} {sampled.get((a, b), 0):9.2f}% {all_shares[a, b]:16.2f}% {logged[a, b]:9,d}" for a, b in often]
    return "\n".join([*lines, *rows]) + "\n"


MAKERS: dict[str, Callable[[Path], str]] = {
    "counted": counted,
    "inside": inside,
    "stat": stat,
    "outside": outside,
    "flame": flame,
    "edges": edges,
}


def main() -> None:
    """Writes both pages, or the blocks of them that the arguments name."""
    wanted = sys.argv[1:] or list(MAKERS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        proof.compiled("counted.S", folder / "counted", "-nostdlib", "-static")
        proof.compiled("profiled.c", folder / "profiled", "-O1")
        made = {block: MAKERS[block](folder) for block in wanted}
    for page in PAGES:
        page.write_text(BLOCK.sub(lambda match: match[1] + made[match[2]] + match[3] if match[2] in made else match[0], page.read_text()))


if __name__ == "__main__":
    main()
