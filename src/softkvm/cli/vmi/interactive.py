"""`softkvm vmi shell`: Python with the guest's kernel at hand."""

from __future__ import annotations

import code
from collections.abc import Callable
from typing import Any

from softkvm.cli import status
from softkvm.cli.vmi.attach import attached
from softkvm.cli.vmi.options import Where
from softkvm.vmi.linux import files, log, maps, modules, tasks
from softkvm.vmi.linux.objects import Struct
from softkvm.vmi.linux.tasks import Process
from softkvm.vmi.target import Target
from softkvm.vmi.tools import check as checker
from softkvm.vmi.tools.lock import describe

_BANNER = """{release}, {cpus} CPUs, text at {text:#x}
  vm, kernel            the client and the kernel; `with target.still():` stops the guest for a while
  ps() task(PID)        processes, and the task_struct of one
  modules() dmesg() maps(task) files(task) check()
  sym(NAME|ADDRESS)     an address, or what is there
  struct(NAME, ADDRESS) a structure; .number("a.b"), .text(), .follow(), .inside(), .at()
  show(STRUCT)          all its members
  x(ADDRESS, SIZE)      memory in hexadecimal          dis(ADDRESS, COUNT)   instructions
"""


def shell(where: Where) -> int:
    """Run until the end of input."""
    with attached(where) as target:
        banner = _BANNER.format(release=target.kernel.banner, cpus=len(target.kernel.cpus), text=target.kernel.symbols["_text"])
        code.interact(banner, local=names(target), exitmsg="")
    return status.SUCCESS


def names(target: Target) -> dict[str, Any]:
    """What is at hand in the shell."""
    kernel = target.kernel

    def fresh(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            target.forget()
            return function(*arguments)

        call.__doc__ = function.__doc__
        return call

    def ps() -> list[Process]:
        """All processes."""
        return tasks.consistent(kernel)

    def task(pid: int) -> Struct:
        """The task_struct of a process."""
        return tasks.find(kernel, pid)

    def sym(what: str | int) -> str:
        """The address of a symbol, or the symbol of an address."""
        return hex(kernel.symbols[what]) if isinstance(what, str) else describe(target, what)

    return {
        "target": target,
        "vm": target.client,
        "kernel": kernel,
        "ps": fresh(ps),
        "task": fresh(task),
        "modules": fresh(lambda: modules.modules(kernel)),
        "dmesg": fresh(lambda: [message.text for message in log.messages(kernel)]),
        "maps": fresh(lambda owner: maps.maps(kernel, owner)),
        "files": fresh(lambda owner: list(files.files(kernel, owner))),
        "check": fresh(lambda: checker.check(target)),
        "sym": sym,
        "struct": kernel.struct,
        "show": fresh(_show),
        "x": fresh(lambda address, size=64: print(hexdump(address, kernel.read(address, size)))),
        "dis": fresh(lambda address, count=8: print(disassemble(target, address, count))),
    }


def _show(structure: Struct) -> None:
    """Print the members of a structure."""
    for name, member in structure.members():
        value = f"0x{structure.bytes(name)[:32].hex()}" if member.size > 8 else f"{structure.number(name):#x}"
        print(f"{member.offset:6} {name:<28} {structure.reader.types.spell(member.type):<32} {value}")


def hexdump(address: int, data: bytes) -> str:
    """Memory as hexdump -C shows it."""
    lines = []
    for at in range(0, len(data), 16):
        row = data[at : at + 16]
        letters = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in row)
        lines.append(f"{address + at:016x}  {row.hex(' '):<47}  |{letters}|")
    return "\n".join(lines)


def disassemble(target: Target, address: int, count: int) -> str:
    """Instructions with the addresses that they name as symbols."""
    from iced_x86 import Decoder, Formatter, FormatterSyntax

    formatter = Formatter(FormatterSyntax.GAS)
    lines: list[str] = []
    decoder = Decoder(64, target.kernel.space.read_available(address, 15 * count), ip=address)
    for instruction in decoder:
        if len(lines) == count:
            break
        goes = instruction.near_branch_target
        note = f"  # {describe(target, goes)}" if goes else ""
        lines.append(f"{describe(target, instruction.ip):<32} {formatter.format(instruction)}{note}")
    return "\n".join(lines)
