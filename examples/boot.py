"""Boot Debian's cloud kernel, ask it two things, and power it off."""

from __future__ import annotations

from softkvm.cli import guest
from softkvm.vmm import Machine


def main() -> None:
    """Print what the guest answers, and how it ended."""
    image = guest.prepare("cloud", progress=print)
    with Machine(kernel=image.kernel, initrd=image.initrd, memory="256M", append="quiet") as vm:
        vm.run(until="# ", timeout=120)
        vm.send("uname -r; nproc; poweroff\n")
        stop = vm.run(timeout=120)
        print(bytes(vm.output).decode(errors="replace"))
        print(f"The guest ended by {stop.reason.value} after {vm.stats().seconds:.1f} seconds.")


if __name__ == "__main__":
    main()
