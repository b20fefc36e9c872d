"""The kernel's code, read-only data, descriptor tables and system call MSRs, locked from outside.

Source of truth: Linux 6.1 `arch/x86/kernel/vmlinux.lds.S` (sections), `arch/x86/mm/init_64.c` (`mark_rodata_ro()`: what the kernel itself
holds read-only from then on), `arch/x86/kernel/idt.c`, `arch/x86/include/asm/{desc,segment}.h`. A write that is not legal does not happen:
the guest goes on behind the instruction, and whoever wrote is reported.
"""

from __future__ import annotations

from contextlib import suppress
from functools import cached_property

import msgspec

from softkvm.uapi.kvm import Regs
from softkvm.uapi.kvmi import Access, Descriptor, Event, FilterField
from softkvm.vmi.errors import KernelNotFound, Unreadable, VmiError
from softkvm.vmi.events import CrEvent, DescriptorEvent, HiddenBreakpointEvent, MsrEvent, PageEvent, VcpuEvent
from softkvm.vmi.linux import modules
from softkvm.vmi.linux.objects import Struct
from softkvm.vmi.linux.patching import Patching
from softkvm.vmi.memory import PAGE_MASK, PAGE_SIZE
from softkvm.vmi.target import Target
from softkvm.vmi.tools import instructions
from softkvm.vmi.tools.dispatch import Dispatcher, OnPage

_LSTAR = 0xC000_0082
_AFTER_MARK_READONLY = "rcu_end_inkernel_boot"
"""What `kernel_init()` calls next, in every version since 4.13."""
_LONG_MODE = 8
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

_GDT_LEGAL = {range(8 * 8, 10 * 8): "task state", range(12 * 8, 15 * 8): "thread-local storage", range(15 * 8, 16 * 8): "CPU number"}
"""What the kernel itself changes in a GDT: when a CPU starts, and for 32-bit processes when they are switched."""
_TABLE_REGISTERS = {Descriptor.IDTR: "IDTR", Descriptor.GDTR: "GDTR"}
_EARLY_IDT = "bringup_idt_table"
"""What a CPU that starts has before its own."""


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
    legal: str = ""
    """Why it was let through, such as `jump label`; empty if it was not legal."""


class KernelLock(Dispatcher[Attempt]):
    """Locks what a kernel must not change once it has booted. Legal patches are noted only with `verbose`."""

    def __init__(self, target: Target, *, verbose: bool = False) -> None:
        super().__init__(target)
        self._verbose = verbose
        self._what: dict[int, str] = {}
        self._gdts: dict[int, int] = {}
        """CPU by guest-physical address."""
        self._tables: set[int] = set()
        """Pages of tables that GDTR and IDTR may be loaded with."""
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
        if kernel.is_booted:
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
        """Lock now. A store that leaves memory as it is harms nobody, and the kernel makes three in the GDT at each switch of processes."""
        self.engaged = True
        self.only(Event.PF, FilterField.CHANGE, [(1, 1)])
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
        self._tables.update(self._lock("interrupt descriptor table", idt, idt + PAGE_SIZE, Access.R))
        for cpu in kernel.cpus:
            gdt = kernel.percpu("gdt_page", cpu)
            (page,) = self._lock("global descriptor table", gdt, gdt + PAGE_SIZE, Access.R, self._gdt)
            self._gdts[page] = cpu
            self._tables.add(page)
        if _EARLY_IDT in kernel.symbols:
            self._tables.add(kernel.physical(kernel.symbols[_EARLY_IDT]))
        self.on_descriptor(self._load_table)

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

    def _lock(self, what: str, start: int, end: int, access: Access, judge: OnPage | None = None) -> list[int]:
        pages = self._physical_pages(start, end)
        self._what.update(dict.fromkeys(pages, what))
        self.protect(pages, access, judge or self._page)
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
        self._judge(event, what, address, "", self._legal(event, address))

    def _judge(self, event: PageEvent, what: str, address: int, where: str, legal: str) -> None:
        """Let a write through that is legal, and report it if that is wanted; stop any other."""
        if legal:
            event.continue_()
            if self._verbose:
                self._report(event, what, address, where, stopped=False, legal=legal)
        else:
            self._report(event, what, address, where, stopped=self._skip(event))

    def _gdt(self, event: PageEvent) -> None:
        """A descriptor changes."""
        if event.access is not Access.W:
            return
        page, offset = event.gpa & ~PAGE_MASK, event.gpa & PAGE_MASK
        instruction, symbols = instructions.at(self.target, event), self.target.kernel.symbols
        legal = ""
        if instruction is not None and symbols["_text"] <= event.regs.rip < symbols["_etext"]:
            last = offset + max(1, instructions.operand_size(instruction)) - 1
            legal = next((why for part, why in _GDT_LEGAL.items() if offset in part and last in part), "")
        where = f"descriptor {offset // 8} of CPU {self._gdts[page]}"
        self._judge(event, self._what[page], event.gva or event.gpa, where, legal)

    def _load_table(self, event: DescriptorEvent) -> None:
        """GDTR or IDTR is loaded: it may be with a table that is locked, and while a CPU starts, before it is in 64-bit code."""
        name = _TABLE_REGISTERS.get(event.register)
        if name is None or not event.write or event.arch.mode != _LONG_MODE:
            return
        table = self._new_table(event)
        if self._page_of(table) not in self._tables:
            self._report(event, name, table, stopped=self._skip(event))

    def _new_table(self, event: DescriptorEvent) -> int:
        """The address that LGDT or LIDT loads; 0 if it cannot be seen."""
        instruction = instructions.at(self.target, event)
        if instruction is None:
            return 0
        operand = instructions.operand_address(event, instruction)
        try:
            return int.from_bytes(instructions.space(self.target, event).read(operand + 2, 8), "little")
        except Unreadable:
            return 0

    def _page_of(self, address: int) -> int | None:
        try:
            return self.target.kernel.physical(address) & ~PAGE_MASK
        except Unreadable:
            return None

    def _image_address(self, event: PageEvent) -> int:
        """The address in the kernel image of what is written, whichever alias it is written through."""
        virtual = event.gpa + self.target.kernel.image.shift
        if self.target.kernel.symbols.lookup(virtual) is not None:
            return virtual
        return event.gva if event.gva is not None else event.gpa

    def _legal(self, event: PageEvent, address: int) -> str:
        """Why a write is let through. A kernel whose structures have been bent so far that this cannot be told patches nothing any more."""
        try:
            return self._patching.site(self._text_address(event, address)).value if self._patching.is_poking(event.cr3) else ""
        except VmiError:
            return ""

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

    def _skip(self, event: PageEvent | DescriptorEvent) -> bool:
        """Send the vCPU on behind the instruction; where it cannot be decoded it is let through, and reported as not stopped."""
        instruction = instructions.at(self.target, event)
        if instruction is None:
            return False
        regs = Regs.from_buffer_copy(event.regs)
        regs.rip += instruction.len
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

    def _report(self, event: VcpuEvent, what: str, address: int, where: str = "", *, stopped: bool, legal: str = "") -> None:
        task = self._task(event)
        pid, name = (task.number("pid"), task.text("comm")) if task is not None else (0, "")
        rip = event.regs.rip
        where = where or describe(self.target, address)
        self.note(Attempt(what, address, where, pid, name, rip, describe(self.target, rip), stopped, legal=legal))

    def _task(self, event: VcpuEvent) -> Struct | None:
        try:
            return self.target.task(event)
        except VmiError:
            return None


def describe(target: Target, address: int) -> str:
    """An address as a symbol of the kernel, or as a place in a module, also in one that hides."""
    text = target.kernel.symbols.describe(address)
    if text.startswith("0x"):
        with suppress(VmiError):  # whatever the guest has made of its lists, the number is right
            if (owner := modules.owner(modules.modules(target.kernel), address)) is not None:
                return modules.describe(owner, address)
    return text
