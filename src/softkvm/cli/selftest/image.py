"""The self-test guest: a bzImage of our own that walks through the processor's modes and reports on the first serial port.

Source of truth: the boot protocol (Linux 6.1, Documentation/x86/boot.rst) for the header and the three entry points; SDM vol. 3, 10.8
(mode changes), 4.5 (paging), 6.14 (64-bit interrupts), 11.5.4 (APIC timer).

    64-bit entry ─► leave long mode ─► real mode ─► protected mode ─► long mode ─► CPUID, paging, timer interrupt ─► exit

A boot loader may come in at any of the three entry points; the first pass only finds its way down to real mode.
"""

from __future__ import annotations

from softkvm.cli.selftest.assembler import Assembler

# Guest-physical memory
_TRAMPOLINE = 0x8000  # real-mode code
_STACK = 0x7C00  # grows down
_TABLES = 0x70000  # PML4, page directory pointers, directories for the first and second GiB, one page table
_KERNEL = 0x100000
_SCRATCH = 0x200000  # the page under the second mapping
_PML4, _POINTERS, _LOW, _ALIASES, _TABLE = range(_TABLES, _TABLES + 0x5000, 0x1000)

# Virtual addresses; absolute operands reach 2 GiB in 64-bit code
_ALIAS = 1 << 30  # second mapping of the scratch page
_LAPIC = _ALIAS + (1 << 21)

# Selectors
_CODE32, _CODE64, _DATA, _CODE16, _DATA16 = 0x08, 0x10, 0x18, 0x20, 0x28
_GDT = (0, 0x00CF9A000000FFFF, 0x00AF9A000000FFFF, 0x00CF92000000FFFF, 0x00009A000000FFFF, 0x000092000000FFFF)

_CR0_PE, _CR0_WP, _CR0_PG = 1 << 0, 1 << 16, 1 << 31
_CR4_PAE = 1 << 5
_EFER, _EFER_LME = 0xC0000080, 1 << 8
_PRESENT, _WRITABLE, _LARGE, _UNCACHED = 1 << 0, 1 << 1, 1 << 7, 1 << 4
_PAGE_FAULT = 14
_PF_PRESENT, _PF_WRITE = 1 << 0, 1 << 1

_LAPIC_PHYSICAL = 0xFEE00000
_LAPIC_EOI, _LAPIC_SVR, _LAPIC_TIMER, _LAPIC_INITIAL, _LAPIC_DIVIDE = (_LAPIC + offset for offset in (0xB0, 0xF0, 0x320, 0x380, 0x3E0))
_TIMER_VECTOR, _TIMER_COUNT = 0x40, 100_000
_PIC_MASKS = (0x21, 0xA1)
_DIVIDE_BY_1 = 0xB
_APIC_ENABLED = 0x1FF

_COM1, _DEBUG_EXIT = 0x3F8, 0xF4
_PASSED, _FAILED = 0, 1
PASSED_STATUS = _PASSED << 1 | 1  # what the debug-exit port makes of it

# The boot protocol's header
_SECTOR = 512
_SETUP_SECTORS = 2
_HEADER, _HEADER_END = 0x1F1, 0x268
_VERSION, _LOADED_HIGH, _KERNEL_64 = 0x020C, 1, 1
ENTRY64 = 0x200
_KERNEL_SIZE = 0x1000

_BANNER = b"softkvm self-test\n"


def build() -> bytes:
    """The image, a bzImage."""
    kernel = _kernel()
    return bzimage(kernel.finish(), kernel.address("gdt"))


def bzimage(kernel: bytes, gdt: int = 0) -> bytes:
    """A bzImage around `kernel`, which has its 32-bit entry at its start and its 64-bit entry at ENTRY64.

    `gdt` is the address of the descriptors that the real-mode entry loads, which a loader that starts elsewhere does not need.
    """
    return _setup(gdt) + kernel.ljust(_KERNEL_SIZE, b"\0")


def expected(vendor: str) -> str:
    """What the guest prints on a processor of `vendor` (the 12 letters of CPUID leaf 0) if all is well."""
    return f"{_BANNER.decode()}real mode\nprotected mode\nlong mode\ncpu {vendor}\npaging\ntimer interrupt\npassed\n"


def _setup(gdt: int) -> bytes:
    """The real-mode part: the header, and an entry for loaders that start there (DS is its segment)."""
    asm = Assembler(0, 16)
    asm.org(_HEADER)
    asm.data(bytes([_SETUP_SECTORS]))
    asm.org(0x1F4)
    asm.data((_KERNEL_SIZE // 16).to_bytes(4, "little"))  # syssize, paragraphs
    asm.org(0x1FE)
    asm.data(b"\x55\xaa")
    asm.jump("entry")
    asm.data(b"HdrS" + _VERSION.to_bytes(2, "little"))
    asm.org(0x211)
    asm.data(bytes([_LOADED_HIGH]))
    asm.org(0x214)
    asm.data(_KERNEL.to_bytes(4, "little"))  # code32_start
    asm.org(0x22C)
    asm.data((0x7FFFFFFF).to_bytes(4, "little"))  # initrd_addr_max
    asm.data((0x1000).to_bytes(4, "little"))  # kernel_alignment
    asm.org(0x236)
    asm.data(_KERNEL_64.to_bytes(2, "little"))  # xloadflags
    asm.data((256).to_bytes(4, "little"))  # cmdline_size
    asm.org(0x258)
    asm.data(_KERNEL.to_bytes(8, "little"))  # pref_address
    asm.data(_KERNEL_SIZE.to_bytes(4, "little"))  # init_size
    asm.org(_HEADER_END)
    asm.label("entry")
    asm.do("cli")
    _enter_protected_mode(asm, _KERNEL)
    _gdt_pointer(asm, gdt)
    return asm.finish().ljust((1 + _SETUP_SECTORS) * _SECTOR, b"\0")


def _trampoline(gdt: int) -> bytes:
    """Code below 64 KiB that starts in a 16-bit protected-mode segment, goes to real mode and comes back."""
    asm = Assembler(_TRAMPOLINE, 16)
    asm.mov("eax", _DATA16)
    asm.load_segments("ds", "es", "ss")
    asm.mov_from_cr(0)
    asm.arithmetic("and", "eax", ~_CR0_PE & 0xFFFFFFFF)
    asm.mov_to_cr(0)
    asm.far_jump(0, "real", size=2)
    asm.label("real")
    asm.mov("eax", 0)
    asm.load_segments("ds", "es", "ss")
    asm.mov("esp", _STACK)
    asm.mov("esi", "text")
    asm.call("print")
    _enter_protected_mode(asm, _KERNEL)
    _print_routine(asm)
    _gdt_pointer(asm, gdt)
    asm.label("text")
    asm.data(b"real mode\n\0")
    return asm.finish()


def _enter_protected_mode(asm: Assembler, target: int) -> None:
    asm.load_table("lgdt", "gdt_pointer")
    asm.mov_from_cr(0)
    asm.arithmetic("or", "eax", _CR0_PE)
    asm.mov_to_cr(0)
    asm.far_jump(_CODE32, target)


def _gdt_pointer(asm: Assembler, gdt: int) -> None:
    asm.label("gdt_pointer")
    asm.data((8 * len(_GDT) - 1).to_bytes(2, "little") + gdt.to_bytes(8, "little"))


def _print_routine(asm: Assembler) -> None:
    """`print`: the zero-terminated text at ESI to the serial port; changes EAX and EDX."""
    asm.label("print")
    asm.mov("edx", _COM1)
    asm.label("next")
    asm.do("lodsb", "test al, al")
    asm.jump("done", "z")
    asm.do("out dx, al")
    asm.jump("next")
    asm.label("done")
    asm.do("ret")


def _kernel() -> Assembler:
    asm = Assembler(_KERNEL, 32)
    _protected_mode(asm)
    asm.org(ENTRY64)
    _long_mode(asm)
    _data(asm)
    return asm


def _protected_mode(asm: Assembler) -> None:
    """The 32-bit entry: build page tables and go to long mode."""
    asm.bits = 32
    asm.do("cli", "cld")
    asm.mov("eax", _DATA)
    asm.load_segments("ds", "es", "ss")
    asm.mov("esp", _STACK)
    asm.compare("pass", 0)
    asm.jump("tables", "z")
    asm.mov("esi", "protected mode")
    asm.call("print")
    asm.label("tables")
    asm.mov("eax", 0)
    asm.mov("ecx", 0x5000 // 4)
    asm.mov("edi", _TABLES)
    asm.do("rep stosd")
    link = _PRESENT | _WRITABLE
    asm.store(_PML4, _POINTERS | link)
    for gigabyte, directory in ((0, _LOW), (1, _ALIASES)):
        asm.store(_POINTERS + 8 * gigabyte, directory | link)
    for page in range(2):  # the first 4 MiB, on themselves
        asm.store(_LOW + 8 * page, page << 21 | _LARGE | link)
    asm.store(_ALIASES, _TABLE | link)
    asm.store(_ALIASES + 8, _LAPIC_PHYSICAL | _LARGE | _UNCACHED | link)
    asm.store(_TABLE, _SCRATCH | _PRESENT)  # read-only
    asm.mov("eax", _CR4_PAE)
    asm.mov_to_cr(4)
    asm.mov("eax", _PML4)
    asm.mov_to_cr(3)
    asm.mov("ecx", _EFER)
    asm.do("rdmsr")
    asm.arithmetic("or", "eax", _EFER_LME)
    asm.do("wrmsr")
    asm.mov_from_cr(0)
    asm.arithmetic("or", "eax", _CR0_PG | _CR0_WP)
    asm.mov_to_cr(0)
    asm.far_jump(_CODE64, _KERNEL + ENTRY64)
    _print_routine(asm)


def _long_mode(asm: Assembler) -> None:
    """The 64-bit entry: down to real mode on the first pass, the tests on the second."""
    asm.bits = 64
    asm.do("cli", "cld")
    asm.mov("esp", _STACK)
    asm.load_table("lgdt", "gdt_pointer")
    asm.compare("pass", 0)
    asm.jump("tests", "nz")
    asm.store("pass", 1)
    asm.mov("esi", "banner")
    asm.call("print")
    asm.push(_CODE32)
    asm.push("leave")
    asm.do("lretq")
    asm.label("tests")
    asm.mov("eax", _DATA)
    asm.load_segments("ds", "es", "ss")
    asm.load_table("lidt", "idt_pointer")
    for test in (_test_long_mode, _test_cpuid, _test_paging, _test_timer):
        test(asm)
    asm.mov("esi", "passed")
    asm.call("print")
    asm.mov("eax", _PASSED)
    asm.label("exit")
    asm.mov("edx", _DEBUG_EXIT)
    asm.do("out dx, al", "hlt")
    asm.label("failed")
    asm.mov("esi", "failed text")
    asm.call("print")
    asm.mov("eax", _FAILED)
    asm.jump("exit")
    _page_fault_handler(asm)
    _timer_handler(asm)
    _leave_long_mode(asm)


def _leave_long_mode(asm: Assembler) -> None:
    """Compatibility mode, paging off, a copy of the trampoline, and a 16-bit segment: the way to real mode."""
    asm.bits = 32
    asm.label("leave")
    asm.mov("eax", _DATA)
    asm.load_segments("ds", "es", "ss")
    asm.mov_from_cr(0)
    asm.arithmetic("and", "eax", ~_CR0_PG & 0xFFFFFFFF)
    asm.mov_to_cr(0)
    asm.mov("ecx", _EFER)
    asm.do("rdmsr")
    asm.arithmetic("and", "eax", ~_EFER_LME & 0xFFFFFFFF)
    asm.do("wrmsr")
    asm.mov("eax", 0)
    asm.mov_to_cr(4)
    asm.mov("esi", "trampoline")
    asm.mov("edi", _TRAMPOLINE)
    asm.mov("ecx", len(_trampoline(0)))
    asm.do("rep movsb")
    asm.far_jump(_CODE16, _TRAMPOLINE)
    asm.bits = 64


def _test_long_mode(asm: Assembler) -> None:
    asm.mov("esi", "long mode")
    asm.call("print")


def _test_cpuid(asm: Assembler) -> None:
    asm.mov("eax", 0)
    asm.do("cpuid")
    asm.store("vendor", "ebx")
    asm.store("vendor+4", "edx")
    asm.store("vendor+8", "ecx")
    asm.mov("esi", "cpu")
    asm.call("print")


def _test_paging(asm: Assembler) -> None:
    """A write through a read-only mapping faults; the handler makes it writable, and the write reaches the page below."""
    asm.store(_SCRATCH, 0)
    asm.store(_ALIAS, 0x600D)
    asm.compare(_SCRATCH, 0x600D)
    asm.jump("failed", "nz")
    asm.compare("fault error", _PF_PRESENT | _PF_WRITE)
    asm.jump("failed", "nz")
    asm.compare("fault address", _ALIAS)
    asm.jump("failed", "nz")
    asm.mov("esi", "paging")
    asm.call("print")


def _test_timer(asm: Assembler) -> None:
    for port in _PIC_MASKS:  # a firmware may have left the PIC's timer running
        asm.mov("edx", port)
        asm.mov("eax", 0xFF)
        asm.do("out dx, al")
    asm.store(_LAPIC_SVR, _APIC_ENABLED)
    asm.store(_LAPIC_DIVIDE, _DIVIDE_BY_1)
    asm.store(_LAPIC_TIMER, _TIMER_VECTOR)  # one shot
    asm.store(_LAPIC_INITIAL, _TIMER_COUNT)
    asm.label("wait")
    asm.do("sti", "hlt", "cli")
    asm.compare("ticks", 1)
    asm.jump("wait", "nz")
    asm.mov("esi", "timer interrupt")
    asm.call("print")


def _page_fault_handler(asm: Assembler) -> None:
    asm.label("page fault")
    asm.do("pop rax")
    asm.store("fault error", "eax")
    asm.mov_from_cr(2)
    asm.store("fault address", "eax")
    asm.store(_TABLE, _SCRATCH | _PRESENT | _WRITABLE)
    asm.invlpg(_ALIAS)
    asm.do("iretq")


def _timer_handler(asm: Assembler) -> None:
    asm.label("timer")
    asm.store("ticks", 1)
    asm.store(_LAPIC_EOI, 0)
    asm.do("iretq")


def _data(asm: Assembler) -> None:
    for name in ("pass", "ticks", "fault error", "fault address"):
        asm.label(name)
        asm.data(bytes(4))
    asm.label("banner")
    asm.data(_BANNER + b"\0")
    for text in ("protected mode", "long mode", "paging", "timer interrupt", "passed"):
        asm.label(text)
        asm.data(text.encode() + b"\n\0")
    asm.label("failed text")
    asm.data(b"failed\n\0")
    asm.label("cpu")
    asm.data(b"cpu ")
    for part in ("vendor", "vendor+4", "vendor+8"):
        asm.label(part)
        asm.data(bytes(4))
    asm.data(b"\n\0")
    asm.label("gdt")
    asm.data(b"".join(descriptor.to_bytes(8, "little") for descriptor in _GDT))
    _gdt_pointer(asm, asm.address("gdt"))
    asm.label("trampoline")
    asm.data(_trampoline(asm.address("gdt")))
    asm.label("idt")
    for vector in range(_TIMER_VECTOR + 1):
        handler = {_PAGE_FAULT: "page fault", _TIMER_VECTOR: "timer"}.get(vector)
        asm.data(_gate(asm.address(handler)) if handler else bytes(16))
    asm.label("idt_pointer")
    asm.data((16 * (_TIMER_VECTOR + 1) - 1).to_bytes(2, "little") + asm.address("idt").to_bytes(8, "little"))


def _gate(handler: int) -> bytes:
    """A present 64-bit interrupt gate, without a stack switch."""
    low, high = handler & 0xFFFF, handler >> 16
    return low.to_bytes(2, "little") + _CODE64.to_bytes(2, "little") + b"\x00\x8e" + high.to_bytes(2, "little") + bytes(8)
