"""`softkvm-qemu`: stands in for `qemu-system-x86_64` where a test suite starts guests through QEMU's command line.

It takes the options that the scripts of kvm-unit-tests use (`x86/run`, `x86/unittests.cfg`) and answers their probes; names and behaviour
as in QEMU's documentation (qemu(1), "Invocation"). What softkvm cannot provide is refused in one sentence with status 1, or, where QEMU
itself only warns, as for CPU features, warned about.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from softkvm.cli import status
from softkvm.cli.options import TIERS

PROGRAM = "softkvm-qemu"
FAILURE = 1
STDOUT = 1
_VERSION = "QEMU emulator version 7.2.0 (its command line, spoken by softkvm)"
"""The words that scripts look for, with the version whose options are taken."""
_DEBUG_EXIT = ("isa-debug-exit", {"iobase": "0xf4", "iosize": "0x4"})
_MOST_CPUS = 64
"""What `Machine` takes."""
_DEVICES = {"isa-debug-exit": "ISA", "pc-testdev": "ISA"}


class UsageError(Exception):
    """An option that does not exist, lacks its value, or asks for what softkvm has not; the message is one sentence."""


@dataclass
class Invocation:
    """What the options ask for."""

    kernel: str | None = None
    initrd: str | None = None
    append: str = ""
    memory: str = "128M"
    cpus: int = 1
    cpu: str = "qemu64"
    serial: str = "null"
    test_device: bool = False
    tier: str | None = None
    """How guest code runs, if that was said."""
    virtual_time: bool = False
    """Guest time follows its instructions, as with QEMU's `-icount`."""
    answer: str | None = None
    """What to print in place of running a guest."""
    warnings: list[str] = field(default_factory=list)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the guest that the command line `arguments` (default: the process's own) describes; the exit status as QEMU's."""
    try:
        invocation = parse(sys.argv[1:] if arguments is None else arguments)
        if invocation.answer is not None:
            os.write(STDOUT, f"{invocation.answer}\n".encode())
            return 0
        if invocation.kernel is None:
            raise UsageError("no -kernel was given, and the machine has no firmware and no disk to boot from")
        if not os.path.exists(invocation.kernel):
            raise UsageError(f"could not open kernel file {invocation.kernel!r}: No such file or directory")
    except BrokenPipeError:
        return status.BROKEN_PIPE
    except UsageError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return FAILURE
    from softkvm.cli import qemu_run  # half a second, which a probe does not need

    return qemu_run.run(invocation)


def parse(arguments: Sequence[str]) -> Invocation:
    """The meaning of a QEMU command line; UsageError for the first thing in it that is not understood."""
    invocation = Invocation()
    words = iter(arguments)
    for word in words:
        option = word.removeprefix("-").removeprefix("-") if word.startswith("-") else None
        if option in _FLAGS:
            continue
        if option in ("help", "h", "version"):
            invocation.answer = _VERSION if option == "version" else f"{_VERSION}\nusage: {PROGRAM} -kernel FILE [options]"
            return invocation
        if option not in _OPTIONS:
            raise UsageError(f"{word}: invalid option")
        value = next(words, None)
        if value is None:
            raise UsageError(f"{word}: requires an argument")
        _OPTIONS[option](invocation, value)
    return invocation


def _properties(text: str) -> tuple[str, dict[str, str]]:
    """The first word of `a,b=c,d` and its properties; one without a value is `on`."""
    first, *rest = text.split(",")
    return first, {name: value or "on" for name, _, value in (item.partition("=") for item in rest)}


def _device(invocation: Invocation, text: str) -> None:
    name, properties = _properties(text)
    if name in ("?", "help"):
        invocation.answer = "\n".join(f'name "{known}", bus {bus}' for known, bus in _DEVICES.items())
    elif name == "pc-testdev":
        invocation.test_device = True
    elif name == _DEBUG_EXIT[0]:
        if properties != _DEBUG_EXIT[1]:
            raise UsageError(f"-device {text}: the machine has its debug exit at ports 0xf4 to 0xf7")
    else:
        raise UsageError(f"-device {text}: {name!r} is not a valid device model name")


def _smp(invocation: Invocation, text: str) -> None:
    first, properties = _properties(text)
    number = properties.get("cpus", first.removeprefix("cpus="))
    if not number.isdecimal() or not int(number):
        raise UsageError(f"-smp {text}: {number!r} is not a number of CPUs")
    if int(number) > _MOST_CPUS:
        # The scripts of kvm-unit-tests look for these words and take the last one as the limit.
        raise UsageError(f"number of SMP CPUs requested ({number}) exceeds the maximum of the machine ({_MOST_CPUS})")
    invocation.cpus = int(number)


def _machine(invocation: Invocation, text: str) -> None:
    first, properties = _properties(text if "=" in text.split(",")[0] else text + ",")
    properties.update([tuple(first.split("=", 1))] if "=" in first else [])  # type: ignore[list-item]  # two words each
    if "accel" in properties:
        _accelerator(invocation, f"-machine {text}", properties["accel"], properties)
    if properties.get("kernel-irqchip", "on") != "on":
        raise UsageError(f"-machine {text}: the interrupt controllers are KVM's")
    if properties.get("vmport", "off") != "off":
        raise UsageError(f"-machine {text}: the machine has no VMware port")
    if properties.get("pit", "on") == "off":
        invocation.warnings.append("the timer cannot be left out: pit=off has no effect")


def _accel(invocation: Invocation, text: str) -> None:
    name, properties = _properties(text)
    _accelerator(invocation, f"-accel {text}", name, properties)


def _accelerator(invocation: Invocation, option: str, name: str, properties: dict[str, str]) -> None:
    """Either name means softkvm; its own property is `tier`."""
    if name not in ("tcg", "kvm"):
        raise UsageError(f"{option}: invalid accelerator {name}")
    invocation.tier = properties.get("tier", invocation.tier)
    if invocation.tier not in (None, *TIERS):
        raise UsageError(f"{option}: the tiers are {', '.join(TIERS)}")


def _serial(invocation: Invocation, text: str) -> None:
    if text not in ("stdio", "null", "none"):
        raise UsageError(f"-serial {text}: only stdio and null are supported")
    invocation.serial = text


def _icount(invocation: Invocation, text: str) -> None:
    if not text.startswith("shift="):
        raise UsageError(f"-icount {text}: shift=N is all there is to choose")
    invocation.virtual_time = True


def _set(name: str) -> Callable[[Invocation, str], None]:
    return lambda invocation, text: setattr(invocation, name, text)


def _only(option: str, *allowed: str) -> Callable[[Invocation, str], None]:
    """An option whose other values softkvm does not have, and whose allowed ones describe what it does anyway."""

    def check(_: Invocation, text: str) -> None:
        if text not in allowed:
            raise UsageError(f"-{option} {text}: only {', '.join(allowed)} is supported")

    return check


_FLAGS = frozenset({"no-reboot", "nodefaults", "nographic", "enable-kvm", "no-user-config"})
"""Options without a value: what they ask for is what the machine is like."""

_OPTIONS: dict[str | None, Callable[[Invocation, str], None]] = {
    "kernel": _set("kernel"),
    "initrd": _set("initrd"),
    "append": _set("append"),
    "m": _set("memory"),
    "cpu": _set("cpu"),
    "smp": _smp,
    "device": _device,
    "machine": _machine,
    "M": _machine,
    "accel": _accel,
    "serial": _serial,
    "icount": _icount,
    "display": _only("display", "none"),
    "vnc": _only("vnc", "none"),
    "global": _only("global", "kvm-pit.lost_tick_policy=discard"),
    "overcommit": _only("overcommit", "cpu-pm=on", "cpu-pm=off"),
}
