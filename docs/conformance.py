"""Runs kvm-unit-tests with softkvm in QEMU's place and writes docs/conformance.md: `make conformance KVM_UNIT_TESTS=DIRECTORY`.

DIRECTORY is a checkout of the suite, configured for x86_64 and built; nothing of it is part of softkvm. Configurations and time-outs are
the suite's own (`x86/unittests.cfg`), and so is the judgement (`run_tests.sh`).
"""

from __future__ import annotations

import datetime
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parent / "conformance.md"
VCPUS = "8"
"""More than the largest configuration asks for; without it the scripts would stop at the host's number of CPUs."""

_RESULT = re.compile(r"^(?:\x1b\[\d+m)?(PASS|FAIL|SKIP)(?:\x1b\[0m)? (\S+) ?(.*)$")

REASONS = {
    "asyncpf": "KVM does not offer asynchronous page faults (feature bits 4, 10 and 14)",
    "cet": "the CPU models have no control-flow enforcement",
    "ept|ept-mbec|vmx.*": "nested VMX is not implemented",
    "svm.*": "nested SVM is not implemented",
    "hyperv_.*": "KVM does not offer Hyper-V's enlightenments",
    "intel_iommu": "the machine has no IOMMU and no split interrupt controllers",
    "pmu": "the suite runs it with KVM alone (`accel = kvm`); it passes with `softkvm-qemu -icount shift=0`, where cycles and TSC agree",
    "pmu_lbr|pmu_pebs": "the suite runs it with KVM alone (`accel = kvm`); by itself it passes, and pmu_pebs skips as there is no PEBS",
    "s3": "the machine has no suspend to RAM",
    "tsx-ctrl": "the CPU models have no transactional memory",
    "vmware_backdoors": "the suite runs it with KVM alone (`accel = kvm`); there is no VMware port",
    "access-reduced-maxphyaddr|.*_reduced_maxphyaddr": "the suite asks the host's kvm_intel module for allow_smaller_maxphyaddr",
    "sieve": "240 million TLB misses need a minute of processor time, and did not get it within the time-out",
    "x2apic|xapic": "230,000 rounds of NMIs between two spinning vCPUs need two processors for the time of the test, and did not get them",
}
"""Why a configuration does not pass, by a pattern for its name; a configuration without a reason here is told by its own last words."""


Result = tuple[str, str, str]
"""Verdict, configuration, last words."""


def main() -> int:
    """Run the suite named by KVM_UNIT_TESTS and write the page; the number of failures is no error, a suite that cannot run is."""
    suite = Path(os.environ.get("KVM_UNIT_TESTS", ""))
    if not os.environ.get("KVM_UNIT_TESTS") or not (suite / "run_tests.sh").is_file() or not (suite / "config.mak").is_file():
        print("KVM_UNIT_TESTS must name a kvm-unit-tests checkout that was configured for x86_64 and built", file=sys.stderr)
        return 1
    qemu = shutil.which("softkvm-qemu", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if qemu is None:
        print("softkvm-qemu is not installed: `make build` does it", file=sys.stderr)
        return 1
    environment = os.environ | {"ACCEL": "tcg", "QEMU": qemu, "MAX_SMP": VCPUS}
    found = subprocess.run(["./run_tests.sh", *sys.argv[1:]], cwd=suite, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    version = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=suite, stdout=subprocess.PIPE, text=True, check=False)
    PAGE.write_text(page(results(found.stdout), version.stdout.strip() or "of unknown version", datetime.date.today()))
    print(PAGE.read_text())
    return 0


def results(output: str) -> list[Result]:
    """What the suite printed about each configuration."""
    return [(match[1], match[2], match[3]) for line in output.splitlines() if (match := _RESULT.match(line))]


def page(results: list[Result], version: str, date: datetime.date) -> str:
    """The text of docs/conformance.md for (verdict, configuration, last words) of every configuration."""
    passed = [name for verdict, name, _ in results if verdict == "PASS"]
    rest = [(verdict, name, words.strip("() ")) for verdict, name, words in results if verdict != "PASS"]
    lines = [
        "# Conformance",
        "",
        f"kvm-unit-tests {version}, unmodified, built for x86-64, on {date}: **{len(passed)} of {len(results)} configurations pass**",
        "(QEMU 7.2 TCG: 29 of 87).",
        "",
        "Repeat it with `make conformance KVM_UNIT_TESTS=DIRECTORY`, which runs the suite in a built checkout with `softkvm-qemu` in",
        "QEMU's place and writes this page (`docs/conformance.py`).",
        "",
        "## Pass",
        "",
        ", ".join(f"`{name}`" for name in passed),
        "",
        "## Do not pass",
        "",
        "| configuration | verdict of the suite | reason |",
        "|---|---|---|",
        *(f"| `{name}` | {verdict.lower()} | {reason(name, words)} |" for verdict, name, words in rest),
    ]
    return "\n".join(lines) + "\n"


def reason(name: str, words: str) -> str:
    """Why the configuration `name` does not pass."""
    if words == "i386 only":
        return "a 32-bit program, which an x86-64 build leaves out"
    if words == "test marked as manual run only":
        return "the suite leaves it to manual runs"
    known = next((text for pattern, text in REASONS.items() if re.fullmatch(pattern, name)), None)
    return known if known is not None else words


if __name__ == "__main__":
    sys.exit(main())
