"""Is this kernel still what it was built to be? Everything that rootkits bend, looked at from outside.

Source of truth: Linux 6.1 `arch/x86/entry/syscall_64.c`, `arch/x86/kernel/{idt,ftrace}.c`, `kernel/cred.c`. The techniques are those of
public rootkits: system call table, entry MSRs, interrupt gates, calls written into functions, objects off their lists, stolen credentials.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import msgspec

from softkvm.vmi.errors import VmiError
from softkvm.vmi.linux import modules, tasks
from softkvm.vmi.linux.kernel import Kernel
from softkvm.vmi.linux.modules import Module
from softkvm.vmi.linux.syscalls import SyscallTable
from softkvm.vmi.memory import PAGE_SIZE
from softkvm.vmi.paging import Mapping
from softkvm.vmi.requests import Registers
from softkvm.vmi.target import Target

_GATES, _GATE_SIZE = 256, 16
_EARLY_HANDLERS = "early_idt_handler_array"
"""Where vectors that no exception uses still lead after the boot."""
_ENTRY_MSRS = {
    0xC000_0082: ("LSTAR", ("entry_SYSCALL_64", "entry_SYSCALL_64_trampoline")),
    0xC000_0083: ("CSTAR", ("entry_SYSCALL_compat", "ignore_sysret", "entry_SYSCALL32_ignore")),
    0x176: ("SYSENTER_EIP", ("entry_SYSENTER_compat",)),
}
_ENDBR64 = b"\xf3\x0f\x1e\xfa"
_CALL, _JUMP = 0xE8, 0xE9
_MODULE_AREA = (0xFFFF_FFFF_C000_0000, 0xFFFF_FFFF_FF00_0000)
_LARGEST_TEXT = 1 << 27


class Finding(msgspec.Struct, frozen=True):
    """Something that is not as it should be."""

    check: str
    what: str
    address: int
    detail: str


class Report(msgspec.Struct, frozen=True):
    """What was looked at, how many things each time, and what was found."""

    checked: dict[str, int]
    findings: list[Finding]


def check(target: Target) -> Report:
    """Look at everything. The guest should stand still meanwhile (`target.still()`)."""
    return _Checker(target).run()


class _Checker:
    def __init__(self, target: Target) -> None:
        self._target = target
        self._kernel: Kernel = target.kernel
        self._text = (self._kernel.symbols["_text"], self._kernel.symbols["_etext"])
        self._modules: list[Module] = []
        self._checked: dict[str, int] = {}
        self._findings: list[Finding] = []

    def run(self) -> Report:
        registers = [self._target.registers(vcpu) for vcpu in range(self._target.client.vcpus)]
        running = [cpu for cpu in registers if cpu is not None]
        for name, look in (
            ("modules", self._check_modules),
            ("processes", lambda: self._check_processes(running)),
            ("system calls", self._check_system_calls),
            ("interrupt gates", self._check_gates),
            ("entry MSRs", lambda: self._check_msrs(running)),
            ("functions", self._check_functions),
            ("executable pages", self._check_pages),
        ):
            try:
                self._checked[name] = look()
            except VmiError as error:
                self._checked[name] = 0
                self._find(name, "cannot be read", 0, str(error))
        return Report(self._checked, self._findings)

    def _find(self, check: str, what: str, address: int, detail: str) -> None:
        self._findings.append(Finding(check, what, address, detail))

    def _in_text(self, address: int) -> bool:
        return self._text[0] <= address < self._text[1]

    def _describe(self, address: int) -> str:
        owner = modules.owner(self._modules, address)
        return modules.describe(owner, address) if owner is not None else self._kernel.symbols.describe(address)

    def _check_modules(self) -> int:
        self._modules = modules.modules(self._kernel)
        for module in self._modules:
            if module.hidden_from:
                places = ", ".join(view.value for view in module.hidden_from)
                self._find("modules", f"module {module.name} is hidden", module.base, f"missing from {places}")
        return len(self._modules)

    def _check_processes(self, running: list[Registers]) -> int:
        found = tasks.processes(self._kernel, tuple(cpu.sregs.cr3 for cpu in running))
        init_cred = self._kernel.symbols["init_cred"]
        for process in found:
            if process.hidden_from:
                places = ", ".join(view.value for view in process.hidden_from)
                self._find("processes", f"process {process.pid} ({process.name}) is hidden", process.address, f"missing from {places}")
            task = self._kernel.struct("task_struct", process.address)
            if not process.kernel and init_cred in (task.number("cred"), task.number("real_cred")):
                self._find("processes", f"process {process.pid} ({process.name}) has the kernel's own credentials", process.address, "")
        return len(found)

    def _check_system_calls(self) -> int:
        table = SyscallTable(self._kernel)
        for number, entry in enumerate(table.entries):
            symbol = self._kernel.symbols.lookup(entry)
            if symbol is None or symbol.address != entry or not self._in_text(entry):
                call = table[number]
                self._find("system calls", f"{call.name} ({number}) leads elsewhere", entry, self._describe(entry))
        return len(table.entries)

    def _check_gates(self) -> int:
        data = self._kernel.read(self._kernel.symbols["idt_table"], _GATES * _GATE_SIZE)
        for vector in range(_GATES):
            low, _, flags, middle, high = struct.unpack_from("<HHHHI", data, vector * _GATE_SIZE)
            address = high << 32 | middle << 16 | low
            symbol = self._kernel.symbols.lookup(address)
            early = symbol is not None and symbol.name == _EARLY_HANDLERS
            if flags >> 15 & 1 and not early and not self._in_text(address):
                self._find("interrupt gates", f"vector {vector} leads elsewhere", address, self._describe(address))
        return _GATES

    def _check_msrs(self, running: list[Registers]) -> int:
        for number, cpu in enumerate(running):
            for index, (name, expected) in _ENTRY_MSRS.items():
                value = cpu.msrs.get(index, 0)
                entries = [self._kernel.symbols[symbol] for symbol in expected if symbol in self._kernel.symbols]
                # AMD's SYSENTER_EIP has 32 bits, and is not used in long mode.
                if value and not any(value in (entry, entry & 0xFFFF_FFFF) for entry in entries):
                    self._find("entry MSRs", f"{name} of CPU {number} leads elsewhere", value, self._describe(value))
        return len(running) * len(_ENTRY_MSRS)

    def _check_functions(self) -> int:
        """A function that begins with a call or jump out of the kernel. ftrace puts calls to its trampolines there, which it knows."""
        start, end = self._text
        code = self._kernel.read(start, min(end - start, _LARGEST_TEXT))
        known = self._trampolines()
        count = 0
        for symbol in self._kernel.symbols:
            if symbol.kind not in "tT" or not start <= symbol.address < start + len(code) - 16:
                continue
            count += 1
            target = _leaves(code, symbol.address - start, symbol.address)
            if target is not None and not self._in_text(target) and not any(low <= target < high for low, high in known):
                self._find("functions", f"{symbol.name} is redirected", symbol.address, f"to {self._describe(target)}")
        return count

    def _trampolines(self) -> list[tuple[int, int]]:
        """ftrace's own trampolines, one for each of its users that has one, and the functions that they call."""
        ranges = []
        kernel = self._kernel
        operations = kernel.number(kernel.symbols["ftrace_ops_list"]) if "ftrace_ops_list" in kernel.symbols else 0
        end = kernel.symbols["ftrace_list_end"] if operations else 0
        for _ in range(_GATES):
            if not operations or operations == end:
                break
            record = kernel.struct("ftrace_ops", operations)
            if (start := record.number("trampoline")) and (size := record.number("trampoline_size")):
                ranges.append((start, start + size))
            function = record.number("func")
            if not self._in_text(function):
                self._find("functions", "ftrace calls a function outside the kernel", function, self._describe(function))
            operations = record.number("next")
        return ranges

    def _check_pages(self) -> int:
        """Memory in the area of modules that can be both written and executed, which the kernel never leaves behind."""
        pages = 0
        for mapping in self._executable():
            pages += mapping.size // PAGE_SIZE
            if mapping.writable:
                owner = self._describe(mapping.virtual)
                self._find("executable pages", "memory is writable and executable", mapping.virtual, owner)
        return pages

    def _executable(self) -> Iterator[Mapping]:
        return (mapping for mapping in self._kernel.space.mappings(*_MODULE_AREA) if mapping.executable)


def _leaves(code: bytes, offset: int, address: int) -> int | None:
    """Where the first instruction of a function goes, if it is a call, a jump, or loads an address to jump to."""
    if code[offset : offset + 4] == _ENDBR64:
        offset, address = offset + 4, address + 4
    if code[offset] in (_CALL, _JUMP):
        (distance,) = struct.unpack_from("<i", code, offset + 1)
        return int(address + 5 + distance) & (1 << 64) - 1
    if code[offset : offset + 2] in (b"\x48\xb8", b"\x49\xbb"):  # MOV RAX or R11, then JMP or PUSH and RET
        after = code[offset + 10 : offset + 13]
        if after[:2] in (b"\xff\xe0", b"\x50\xc3") or after == b"\x41\xff\xe3":
            return int.from_bytes(code[offset + 2 : offset + 10], "little")
    return None
