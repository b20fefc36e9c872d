"""Boots the default guest and puts its screen into README.md, between the two marks: `make readme-screen`."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from softkvm.cli import guest
from softkvm.vmm import Machine, StopReason

README = Path(__file__).parents[1] / "README.md"
SCREEN = re.compile(r"(<!-- screen: .*? -->\n```console\n).*?(```\n<!-- end of screen -->)", re.DOTALL)
PROMPT = re.compile(r"^softkvm:\S*# ", re.MULTILINE)
COMMANDS = (
    "uname -a",
    "cat /sys/devices/system/clocksource/clocksource0/current_clocksource",
    "grep -m1 'model name' /proc/cpuinfo",
    "poweroff",
)
TERMINAL = "TERM=vt100 SOFTKVM_ROWS=50 SOFTKVM_COLUMNS=132"  # what makes the guest's /init offer a shell that echoes
HEAD, TAIL = 14, 12  # lines of the kernel's log that are shown


def boot() -> list[str]:
    """The lines of a session at the guest's console."""
    image = guest.prepare("cloud")
    with Machine(kernel=image.kernel, initrd=image.initrd, append=TERMINAL) as vm:
        for command in COMMANDS:
            if vm.run(until=PROMPT, timeout=300).reason is not StopReason.UNTIL:
                sys.exit("the guest did not come to its prompt")
            vm.send(f"{command}\n")
        vm.run(timeout=60)
        text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", bytes(vm.output).decode(errors="replace"))
    return [line.rstrip() for line in text.replace("\r", "").splitlines()]


def main() -> None:
    """Write the screen."""
    lines = boot()
    shell = next(number for number, line in enumerate(lines) if PROMPT.match(line))
    shown = [*lines[:HEAD], "[...]", *lines[max(HEAD, shell - TAIL) :]]
    screen = "$ softkvm run\n" + "\n".join(shown) + "\n"
    text, count = SCREEN.subn(lambda match: match[1] + screen + match[2], README.read_text())
    if count != 1:
        sys.exit("README.md has lost its marks")
    README.write_text(text)


if __name__ == "__main__":
    main()
