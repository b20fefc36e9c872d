"""The kernel's code, read-only data, descriptor tables and system call MSRs, locked from outside.

Source of truth: Linux 6.1 `arch/x86/kernel/vmlinux.lds.S` (sections), `arch/x86/mm/init_64.c` (`mark_rodata_ro()`: what the kernel itself
holds read-only from then on), `arch/x86/kernel/idt.c`, `arch/x86/include/asm/desc.h`. A write that is not legal does not happen: the guest
goes on behind the instruction, and whoever wrote is reported.
"""

from __future__ import annotations

from functools import cached_property

import msgspec

from softkvm.uapi.kvmi import Access
from softkvm.vmi.errors import KernelNotFound, UnknownName, Unreadable
from softkvm.vmi.events import CrEvent, HiddenBreakpointEvent, MsrEvent, PageEvent, VcpuEvent
from softkvm.vmi.linux import modules
from softkvm.vmi.linux.btf import Kind
from softkvm.vmi.linux.objects import Struct
from softkvm.vmi.linux.patching import Patching
from softkvm.vmi.memory import PAGE_MASK, PAGE_SIZE
from softkvm.vmi.target import Target
from softkvm.vmi.tools.dispatch import Dispatcher

_LSTAR = 0xC000_0082
_AFTER_MARK_READONLY = "rcu_end_inkernel_boot"
"""What `kernel_init()` calls next, in every version since 4.13."""
_LONGEST_INSTRUCTION = 15
_LARGEST_SECTION = 1 << 28

MSRS = {
    0xC000_0081: "STAR",
    0xC000_0082: "LSTAR",
    0xC000_0083: "CSTAR",
    0xC000_0084: "FMASK",
    0x174: "SYSENTER_CS",
    0x175: "SYSENTER_ESP",
    0x176: "SYSENTER_EIP",
}
"""What decides where a system call begins. They are written once for each CPU, when it comes up."""

CR0_WP = 1 << 16
CR4_LOCKED = 1 << 20 | 1 << 21 | 1 << 11
"""SMEP, SMAP and UMIP."""

# In a GDT the kernel itself changes the descriptors of the task state (8, 9: busy) and of thread-local storage (12 to 14).
_GDT_SIZE = 16 * 8
_GDT_FIXED = ((0, 8 * 8), (10 * 8, 12 * 8), (15 * 8, 16 * 8))


class Attempt(msgspec.Struct, frozen=True):
    """Somebody wrote, or tried to, what is locked."""

    what: str
    address: int
    """Virtual, of the memory; the index of an MSR; the number of a control register."""
    where: str
    """The address as a symbol."""
    pid: int
    process: str
    rip: int
    code: str
    """RIP as a symbol."""
    stopped: bool
    restored: bool = False
    """Whether it was done and has been undone."""
    legal: str = ""
    """Why it was let through, such as `jump label`; empty if it was not legal."""


class KernelLock(Dispatcher[Attempt]):
    """Locks what a kernel must not change once it has booted. Legal patches are noted only with `verbose`."""

    def __init__(self, target: Target, *, verbose: bool = False) -> None:
        super().__init__(target)
        self._verbose = verbose
        self._what: dict[int, str] = {}
        self._gdts: dict[int, bytes] = {}
        self._module_pages: dict[int, list[int]] = {}
        self.engaged = False
        """Whether the locks are on."""

    @cached_property
    def _patching(self) -> Patching:
        return Patching(self.target.kernel)

    # When

    def engage_when_booted(self) -> None:
        """Lock now or, if the kernel still boots or is not even there, when it has made its own read-only data read-only."""
        try:
            kernel = self.target.kernel
        except KernelNotFound:
            self.on_msr(_LSTAR, self._kernel_comes)
            return
        states = kernel.types.enumerators(kernel.types.find("system_states", frozenset({Kind.ENUM})).number)
        if kernel.number(kernel.symbols["system_state"], 4) >= states["SYSTEM_RUNNING"]:
            self.engage()
        else:
            self.at(kernel.symbols[_AFTER_MARK_READONLY], self._booted)

    def _kernel_comes(self, event: MsrEvent) -> None:
        """A CPU is told where system calls begin: the kernel has its place and its symbols, if it is the one that we know."""
        if not self.engaged:
            self.engage_when_booted()

    def _booted(self, event: HiddenBreakpointEvent) -> None:
        if not self.engaged:
            self.engage()

    def engage(self) -> None:
        """Lock now."""
        self.engaged = True
        self._lock_sections()
        self._lock_tables()
        self._lock_registers()
        self._lock_modules()

    # What is locked

    def _lock_sections(self) -> None:
        symbols = self.target.kernel.symbols
        self._lock("kernel text", symbols["_text"], symbols["_etext"], Access.R | Access.X)
        self._lock("read-only data", symbols["__start_rodata"], symbols["__end_rodata"], Access.R)

    def _lock_tables(self) -> None:
        kernel = self.target.kernel
        idt = kernel.symbols["idt_table"]
        self._lock("interrupt descriptor table", idt, idt + PAGE_SIZE, Access.R)
        for cpu in kernel.cpus:
            physical = kernel.physical(kernel.percpu("gdt_page", cpu))
            self._gdts[physical] = _fixed_part(self.target.client.memory.read(physical, _GDT_SIZE))

    def turn(self) -> None:
        """Put back what somebody has changed in a GDT. A lock on its page would cost three events at every context switch."""
        for cpu, (physical, good) in enumerate(self._gdts.items()):
            if _fixed_part(found := self.target.client.memory.read(physical, _GDT_SIZE)) != good:
                for start, end in _GDT_FIXED:
                    self.target.client.write(physical + start, good[start:end])
                entry = next(at for at in range(0, _GDT_SIZE, 8) if _fixed_part(found)[at : at + 8] != good[at : at + 8])
                where = f"descriptor {entry // 8} of CPU {cpu}"
                self.note(Attempt("global descriptor table", physical + entry, where, 0, "", 0, "", stopped=False, restored=True))

    def _lock_registers(self) -> None:
        for index in MSRS:
            self.on_msr(index, self._msr)
        self.on_cr(0, self._cr)
        self.on_cr(4, self._cr)

    def _lock_modules(self) -> None:
        """The code of modules that are there, and of each that comes; what a module leaves is unlocked before it is used again."""
        kernel = self.target.kernel
        for module in modules.modules(kernel):
            if module.state == "live":
                self._lock_module(kernel.struct("module", module.address))
        self.at(kernel.symbols["do_init_module"], self._module_comes)
        self.at(kernel.symbols["free_module"], self._module_goes)

    def _lock_module(self, module: Struct) -> None:
        start, size = modules.code(module)
        text = module.number("core_layout.text_size") if module.has("core_layout") else size
        pages = self._lock(f"module {module.text('name')}", start, start + min(text, size), Access.R | Access.X)
        self._module_pages[module.address] = pages

    def _module_comes(self, event: HiddenBreakpointEvent) -> None:
        self._lock_module(self.target.kernel.struct("module", event.regs.rdi))

    def _module_goes(self, event: HiddenBreakpointEvent) -> None:
        self.release(self._module_pages.pop(event.regs.rdi, ()))

    def _lock(self, what: str, start: int, end: int, access: Access) -> list[int]:
        pages = self._physical_pages(start, end)
        self._what.update(dict.fromkeys(pages, what))
        self.protect(pages, access, self._page)
        return pages

    def _physical_pages(self, start: int, end: int) -> list[int]:
        """Guest-physical addresses of the pages of a range; what is not mapped needs no lock."""
        found = []
        for address in range(start & ~PAGE_MASK, min(end, start + _LARGEST_SECTION), PAGE_SIZE):
            try:
                found.append(self.target.kernel.physical(address))
            except Unreadable:
                continue
        return found

    # Who comes

    def _page(self, event: PageEvent) -> None:
        if event.access is not Access.W:
            return  # data that is executed, code that is read: the rights are those of the kernel's own page tables
        what = self._what.get(event.gpa & ~PAGE_MASK, "")
        address = self._image_address(event)
        legal = self._legal(event, address)
        if legal:
            event.continue_()
            if self._verbose:
                self._report(event, what, address, stopped=False, legal=legal)
            return
        stopped = self._skip(event)
        self._report(event, what, address, stopped=stopped)

    def _image_address(self, event: PageEvent) -> int:
        """The address in the kernel image of what is written, whichever alias it is written through."""
        virtual = event.gpa + self.target.kernel.image.shift
        if self.target.kernel.symbols.lookup(virtual) is not None:
            return virtual
        return event.gva if event.gva is not None else event.gpa

    def _legal(self, event: PageEvent, address: int) -> str:
        return self._patching.site(self._text_address(event, address)).value if self._patching.is_poking(event.cr3) else ""

    def _text_address(self, event: PageEvent, address: int) -> int:
        """Where the poked instruction is: for a module, its own address instead of the alias."""
        if self.target.kernel.symbols.lookup(address) is not None:
            return address
        page = event.gpa & ~PAGE_MASK
        for module in modules.modules(self.target.kernel):
            for start in range(module.base, module.base + module.size, PAGE_SIZE):
                if self.target.kernel.physical(start) == page:
                    return start + (event.gpa & PAGE_MASK)
        return address

    def _skip(self, event: PageEvent) -> bool:
        """Send the vCPU on behind the instruction; where it cannot be decoded the write is let through, and reported as not stopped."""
        length = instruction_length(self.target, event)
        if not length:
            return False
        regs = event.regs
        regs.rip += length
        self.target.client.set_registers(event.vcpu, regs)
        event.retry()
        return True

    def _msr(self, event: MsrEvent) -> None:
        event.continue_(event.old)
        self._report(event, f"MSR {MSRS[event.index]}", event.index, stopped=True)

    def _cr(self, event: CrEvent) -> None:
        lost = event.old & ~event.new & (CR0_WP if event.number == 0 else CR4_LOCKED)
        if not lost:
            return
        # Without WP nothing that is locked here can be written; with it, who took it away would fault, and with him what he interrupted.
        stopped = event.number != 0
        event.continue_(event.new | lost if stopped else event.new)
        self._report(event, f"CR{event.number}", event.number, stopped=stopped)

    def _report(self, event: VcpuEvent, what: str, address: int, *, stopped: bool, legal: str = "") -> None:
        kernel, task = self.target.kernel, self.target.task(event)
        pid, name = (task.number("pid"), task.text("comm")) if task is not None else (0, "")
        rip = event.regs.rip
        where = kernel.symbols.describe(address)
        self.note(Attempt(what, address, where, pid, name, rip, describe(self.target, rip), stopped, legal=legal))


def _fixed_part(gdt: bytes) -> bytes:
    """A GDT with zeros where the kernel may write."""
    kept = bytearray(len(gdt))
    for start, end in _GDT_FIXED:
        kept[start:end] = gdt[start:end]
    return bytes(kept)


def describe(target: Target, address: int) -> str:
    """An address as a symbol of the kernel, or as a place in a module, also in one that hides."""
    text = target.kernel.symbols.describe(address)
    if text.startswith("0x"):
        try:
            owner = modules.owner(modules.modules(target.kernel), address)
        except (UnknownName, Unreadable):
            return text
        if owner is not None:
            return modules.describe(owner, address)
    return text


def instruction_length(target: Target, event: VcpuEvent) -> int:
    """Bytes of the instruction at RIP; 0 if it cannot be read or decoded."""
    from iced_x86 import Decoder  # loaded when somebody writes what is locked, which is not often

    kernel = target.kernel
    try:
        code = kernel.space.read_available(event.regs.rip, _LONGEST_INSTRUCTION)
    except Unreadable:
        return 0
    if not code:
        return 0
    instruction = Decoder(64, code, ip=event.regs.rip).decode()
    return 0 if instruction.is_invalid else int(instruction.len)
