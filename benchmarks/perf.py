"""What performance monitoring costs: a guest program without it, with last branch records on, and under `perf record -b`.

`python -m benchmarks.perf` runs one program in the default guest, each way in one boot, and compares its times by the guest's own clock.
The first line, with everything off, is the yardstick. What the PMU costs the engine while it is off, `benchmarks/mips.rs` tells of two
builds.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import report

_PROGRAM = """
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
volatile unsigned sink;
__attribute__((noinline)) static void work(unsigned v) { if (v & 1) sink += 3; if (v & 2) sink ^= v; }
int main(void)
{
	struct timespec a, b;
	clock_gettime(CLOCK_MONOTONIC, &a);
	for (long n = 0; n < 3000000; n++)
		work(random());
	clock_gettime(CLOCK_MONOTONIC, &b);
	fprintf(stderr, "took %ld us\\n", (b.tv_sec - a.tv_sec) * 1000000 + (b.tv_nsec - a.tv_nsec) / 1000);
	return 0;
}
"""

_WAYS = {
    "nothing on": "/root/work",
    "counters on": "perf stat -e instructions:u,branches:u /root/work",
    "records on, one sample": "perf record -b -c 2000000000 -o /tmp/p /root/work",
    "perf record -b, every 1,000,003 cycles": "perf record -b -c 1000003 -o /tmp/p /root/work",
    "perf record -b, default rate": "perf record -b -o /tmp/p /root/work",
}
_LIMIT = 1200


def main() -> int:
    """Print the table; 1 if a way did not run."""
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder) / "work.c", Path(folder) / "work"
        source.write_text(_PROGRAM)
        subprocess.run(["gcc", "-O1", "-o", program, source], check=True)
        commands = "; ".join(_WAYS.values())
        arguments = ["run", "--timeout", str(_LIMIT), "--with", "linux-perf", "--with", str(program), "--", "sh", "-c", commands]
        result = subprocess.run([sys.executable, "-m", "softkvm.cli", *arguments], capture_output=True, text=True, check=False)
    times = [int(text) for text in re.findall(r"took (\d+) us", result.stderr)]
    if len(times) != len(_WAYS):
        print(result.stderr, file=sys.stderr)
        return 1
    rows = [(way, f"{time / 1e6:.2f} s", f"{time / times[0]:.2f}x") for way, time in zip(_WAYS, times, strict=True)]
    data = dict(zip(_WAYS, times, strict=True))
    report.publish("Performance monitoring", ("way", "time", "of nothing on"), rows, report.machine_facts(), data, None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
