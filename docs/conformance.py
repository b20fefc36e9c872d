"""Runs kvm-unit-tests with softkvm in QEMU's place and writes docs/conformance.md: `make conformance KVM_UNIT_TESTS=DIRECTORY`.

DIRECTORY is a checkout of the suite, configured for x86_64 and built; KVM_UNIT_TESTS_I386 may name one that was configured with
`--arch=i386`, for the configurations that are 32-bit programs. Nothing of the suite is part of softkvm. Configurations and time-outs are
its own (`x86/unittests.cfg`), and so is the judgement (`run_tests.sh`).

softkvm is a KVM, so the suite runs with ACCEL=kvm. Its scripts look for that KVM on the host that they run on: a node /dev/kvm, parameters
of the kernel's modules. They run in a mount namespace of their own, where the host is the one that softkvm's guests have.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from softkvm.kvm.params import Parameters

PAGE = Path(__file__).parent / "conformance.md"
VCPUS = "8"
"""More than the largest configuration asks for; without it the scripts would stop at the host's number of CPUs."""
I386_ONLY = "i386 only"
"""The suite's words for a program that a build for x86-64 leaves out."""
TIERS = ("interpreter", "translator")

_RESULT = re.compile(r"^(?:\x1b\[\d+m)?(PASS|FAIL|SKIP)(?:\x1b\[0m)? (\S+) ?(.*)$")
_DEVICES = ("null", "zero", "full", "random", "urandom", "tty")

REASONS = {
    "asyncpf": "KVM does not offer asynchronous page faults: guest memory is never swapped out without its knowledge",
    "cet": "the CPU models have no control-flow enforcement",
    "ept|ept-mbec|vmx.*": "nested VMX is not implemented",
    "svm.*": "nested SVM is not implemented",
    "hyperv_.*": "KVM does not offer Hyper-V's enlightenments",
    "intel_iommu": "the machine has no IOMMU",
    "pmu_pebs": "the silicon has no PEBS",
    "tsx-ctrl": "the CPU models have no transactional memory",
    "vmware_backdoors": "KVM has no VMware backdoor",
    "access-reduced-maxphyaddr|.*_reduced_maxphyaddr": "KVM has no allow_smaller_maxphyaddr: guests have the silicon's physical addresses",
}
"""Why a configuration does not pass, by a pattern for its name; a configuration without a reason here is told by its own last words."""


Result = tuple[str, str, str]
"""Verdict, configuration, last words."""


def main() -> int:
    """Run the suite and write the page; the number of failures is no error, a suite that cannot run is."""
    parser = argparse.ArgumentParser(description="Runs kvm-unit-tests and writes docs/conformance.md.")
    parser.add_argument("--tiers", action="store_true", help="run what passes once more with each tier")
    arguments = parser.parse_args()
    try:
        suite = _suite("KVM_UNIT_TESTS")
        suite_i386 = _suite("KVM_UNIT_TESTS_I386") if os.environ.get("KVM_UNIT_TESTS_I386") else None
        found = run(suite, suite_i386)
        passed = [name for verdict, name, _ in found if verdict == "PASS"]
        tiers = {tier: run(suite, suite_i386, passed, tier) for tier in TIERS} if arguments.tiers else {}
    except OSError as error:
        print(error, file=sys.stderr)
        return 1
    PAGE.write_text(page(found, _version(suite), datetime.date.today(), tiers))
    print(PAGE.read_text())
    return 0


def _suite(variable: str) -> Path:
    suite = Path(os.environ.get(variable, ""))
    if not os.environ.get(variable) or not (suite / "run_tests.sh").is_file() or not (suite / "config.mak").is_file():
        raise FileNotFoundError(f"{variable} must name a directory where kvm-unit-tests was configured and built")
    return suite


def _version(suite: Path) -> str:
    """The suite's commit, which its build notes."""
    head = suite / "build-head"
    return head.read_text().strip()[:8] or "of unknown version" if head.is_file() else "of unknown version"


# --- Running the suite -------------------------------------------------------------------------------------------------------------


def run(suite: Path, suite_i386: Path | None, names: list[str] | None = None, tier: str | None = None) -> list[Result]:
    """Results of the configurations `names`, or of all, on the default tier or on `tier`; OSError if the suite cannot run."""
    found = _run_tests(suite, names or [], tier)
    missing = [name for _, name, words in found if words == f"({I386_ONLY})"]
    if suite_i386 is not None and missing:
        others = {name: result for result in _run_tests(suite_i386, missing, tier) if (name := result[1]) in missing}
        found = [others.get(result[1], result) for result in found]
    return [result for result in found if names is None or result[1] in names]


def _run_tests(suite: Path, names: list[str], tier: str | None) -> list[Result]:
    qemu = shutil.which("softkvm-qemu", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if qemu is None:
        raise FileNotFoundError("softkvm-qemu is not installed: `make build` does it")
    with tempfile.TemporaryDirectory(prefix="softkvm-conformance-") as scratch:
        accelerator = "kvm" if tier is None else f"kvm,tier={tier}"
        logs = {"unittest_log_dir": f"{scratch}/logs"}
        environment = os.environ | {"ACCEL": accelerator, "QEMU": qemu, "MAX_SMP": VCPUS} | logs
        command = [*namespace(Path(scratch)), "./run_tests.sh", *names]
        suited = subprocess.run(command, cwd=suite, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    found = results(suited.stdout)
    if not found:
        raise OSError(f"run_tests.sh in {suite} judged nothing: it ended with status {suited.returncode}")
    return found


def host_files() -> dict[str, str]:
    """What the suite asks of its host's files, as softkvm's host would answer."""
    parameters = Parameters()
    return {
        "/sys/module/kvm/parameters/enable_pmu": "Y" if parameters.enable_pmu else "N",
        "/sys/module/kvm/parameters/ignore_msrs": "N",
        "/proc/sys/kernel/nmi_watchdog": "0",
        "/sys/devices/system/clocksource/clocksource0/current_clocksource": "tsc",
    }


def namespace(scratch: Path) -> list[str]:
    """The words before a command that runs it where the host looks like softkvm's; no right is needed, and nothing outside changes."""
    lines = [f"cd {shlex.quote(str(scratch))}", "mkdir dev module", "mount -t tmpfs softkvm dev", "mount -t tmpfs softkvm module"]
    for device in filter(lambda name: Path("/dev", name).exists(), _DEVICES):
        lines += [f"touch dev/{device}", f"mount --bind /dev/{device} dev/{device}"]
    lines += ["touch dev/kvm", "mount --bind /dev/null dev/kvm", "mkdir -m 1777 dev/shm", "ln -s /proc/self/fd dev/fd"]
    lines += [f"ln -s /proc/self/fd/{number} dev/{stream}" for number, stream in enumerate(("stdin", "stdout", "stderr"))]
    for number, (path, text) in enumerate(host_files().items()):
        if path.startswith("/sys/module/"):
            name = path.removeprefix("/sys/module/")
            lines += [f"mkdir -p module/{Path(name).parent}", f"echo {text} > module/{name}"]
        elif Path(path).exists():
            lines += [f"echo {text} > {number}", f"mount --bind {number} {path}"]
    lines += ["mount --bind module /sys/module", "mount --rbind dev /dev", 'cd "$OLDPWD"', 'exec "$@"']
    return ["unshare", "--user", "--map-root-user", "--mount", "sh", "-ec", "\n".join(lines), "sh"]


# --- The page ----------------------------------------------------------------------------------------------------------------------


def results(output: str) -> list[Result]:
    """What the suite printed about each configuration."""
    return [(match[1], match[2], match[3]) for line in output.splitlines() if (match := _RESULT.match(line))]


def page(results: list[Result], version: str, date: datetime.date, tiers: dict[str, list[Result]] | None = None) -> str:
    """The text of docs/conformance.md for the results of every configuration, and of what passed by tier."""
    passed = [name for verdict, name, _ in results if verdict == "PASS"]
    rest = [(verdict, name, words.strip("() ")) for verdict, name, words in results if verdict != "PASS"]
    lines = [
        "# Conformance",
        "",
        f"kvm-unit-tests {version}, unmodified, on {date}: **{len(passed)} of {len(results)} configurations pass**",
        "(QEMU 7.2 TCG: 29 of 87).",
        "",
        "Repeat it with `make conformance KVM_UNIT_TESTS=DIRECTORY KVM_UNIT_TESTS_I386=DIRECTORY`, which runs the suite in two built",
        "checkouts, for x86-64 and, where a configuration is a 32-bit program, for i386, with `softkvm-qemu` in QEMU's place, and writes",
        "this page (`docs/conformance.py`). The suite runs with `ACCEL=kvm`, its own time-outs, and in a mount namespace in which the",
        "host's files say what softkvm's host would: that there is a KVM, and the parameters of its module.",
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
    if tiers:
        lines += ["", "## Tiers", "", "What passes was run once more with each tier alone (`ARGS=--tiers`).", ""]
        lines += [f"- {tier}: {_tier(found)}" for tier, found in tiers.items()]
    return "\n".join(lines) + "\n"


def _tier(results: list[Result]) -> str:
    others = [f"`{name}` ({words.strip('() ') or verdict.lower()})" for verdict, name, words in results if verdict != "PASS"]
    return f"{len(results) - len(others)} of {len(results)} pass" + (f"; not {', '.join(others)}" if others else "")


def reason(name: str, words: str) -> str:
    """Why the configuration `name` does not pass."""
    if words == I386_ONLY:
        return "a 32-bit program, which an x86-64 build leaves out"
    if words == "test marked as manual run only":
        return "the suite leaves it to manual runs"
    known = next((text for pattern, text in REASONS.items() if re.fullmatch(pattern, name)), None)
    return known if known is not None else words


if __name__ == "__main__":
    sys.exit(main())
