"""The cases: what a guest does, what one operation of it is, and how many times as fast as TCG softkvm is meant to be.

The names of `program()` cases are those of the tables in programs/*.c.
"""

from __future__ import annotations

from dataclasses import dataclass, field

DURATION = 300
"""Milliseconds that the passes of one measurement of a program take."""


@dataclass(frozen=True)
class Setup:
    """The machine that a case needs: one boot for all cases of a setup."""

    cpus: int = 1
    memory: str = "512M"
    packages: tuple[str, ...] = ()
    """Of Debian, beside busybox; {release} and {version} stand for the kernel's, such as 6.1.0-9-cloud-amd64 and 6.1.0-9."""


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    name: str
    group: str
    goal: float
    """Least ratio of TCG's time to softkvm's."""
    operation: str
    request: str = ""
    """What the program of programs/main.c is asked; nothing: the case is the boot to power-off."""
    setup: Setup = field(default_factory=Setup)
    is_native: bool = False
    """Whether its time without a machine means something."""
    is_busy: bool = True
    """Whether it keeps one CPU busy: the host's CPU time is its time then, and does not depend on what else the host does."""


ONE = Setup()
TWO = Setup(cpus=2)
PYTHON = Setup(packages=("python3.11-minimal", "libpython3.11-minimal", "libpython3.11-stdlib"))
_HEADERS = ("linux-headers-{release}", "linux-headers-{version}-common", "linux-kbuild-6.1", "linux-compiler-gcc-12-x86")
COMPILER = Setup(memory="1G", packages=(*_HEADERS, "gcc-12", "cpp-12", "binutils-x86-64-linux-gnu", "binutils", "make"))
NEVER_SLOWER = 1.0
_COMMAND = "one run"
_MODULE = (
    "rm -rf /tmp/driver && cp -r driver /tmp && make -s -C /lib/modules/$(uname -r)/build M=/tmp/driver modules 2>/dev/null"
    " && sha256sum /tmp/driver/driver.ko"
)


def program(name: str, group: str, goal: float, operation: str, cpus: int = 1) -> Case:
    """A case of programs/*.c, in as many processes as the machine has CPUs, but for a dialogue of two processes."""
    jobs = 1 if name.startswith("pipe") else cpus
    title = name if cpus == 1 else f"{name}, {cpus} CPUs"
    return Case(
        title, group, goal, operation, f"case {name} {jobs} {DURATION}", ONE if cpus == 1 else TWO, is_native=True, is_busy=cpus == 1
    )


def command(name: str, text: str, setup: Setup = ONE, is_native: bool = False) -> Case:
    """A case that is a command of the guest's shell."""
    return Case(name, "programs", NEVER_SLOWER, _COMMAND, f"shell {text}", setup, is_native)


CASES = (
    Case("boot", "boot", 2.0, "boot to power-off"),
    Case("boot, 2 CPUs", "boot", 2.0, "boot to power-off", setup=TWO),
    program("integer", "integer", 1.5, "pass"),
    program("integer", "integer", 1.5, "pass", cpus=2),
    program("list-sort", "integer", 1.5, "pass"),
    program("matrix", "integer", 1.5, "multiply and add"),
    program("state-machine", "integer", 1.5, "character"),
    program("crc32", "integer", 1.5, "byte"),
    program("list-walk", "integer", 1.5, "node"),
    program("sort", "calls", 2.0, "element"),
    program("indirect-calls", "calls", 2.0, "call"),
    program("pointer-calls", "calls", 2.0, "call"),
    program("recursion", "calls", 2.0, "call"),
    program("byte-copy", "copies", 5.0, "byte"),
    program("word-copy", "copies", 5.0, "byte"),
    program("sse-copy", "copies", 5.0, "byte"),
    program("memcpy-64k", "copies", 5.0, "byte"),
    program("rep-movsb-64", "rep strings", 30.0, "byte"),
    program("rep-movsb-64k", "rep strings", 30.0, "byte"),
    program("rep-stosb-64k", "rep strings", 30.0, "byte"),
    program("rep-stosq-64k", "rep strings", 30.0, "byte"),
    program("scalar-double", "floating point", 5.0, "step of five bodies"),
    program("packed-double", "floating point", 15.0, "step of two points"),
    program("x87", "floating point", NEVER_SLOWER, "term"),
    program("getppid", "system", 4.0, "call"),
    program("first-touch", "system", 4.0, "page"),
    program("first-touch", "system", 4.0, "page", cpus=2),
    program("fork-exec-wait", "system", 4.0, "process"),
    program("fork-exec-wait", "system", 4.0, "process", cpus=2),
    program("pipe-round-trip", "system", 4.0, "round trip"),
    program("pipe-round-trip", "system", 4.0, "round trip", cpus=2),
    command("gzip", "./busybox gzip -c busybox", is_native=True),
    command("sha256", "./busybox sha256sum" + " busybox" * 8, is_native=True),
    command("python", "python3.11 work.py", PYTHON),
    command("module-compile", _MODULE, COMPILER),
)


def select(names: tuple[str, ...]) -> list[Case]:
    """The cases that names choose, in the table's order: a case's own name, that of a group, or the beginning of either; none is all.

    Raises ValueError for a name that chooses nothing.
    """
    for name in names:
        if not any(_is_meant(case, name) for case in CASES):
            raise ValueError(f"there is no case {name!r}; cases: {', '.join(repr(case.name) for case in CASES)}")
    return [case for case in CASES if not names or any(_is_meant(case, name) for name in names)]


def _is_meant(case: Case, name: str) -> bool:
    return case.name == name or case.group == name or case.name.startswith(f"{name}, ")
