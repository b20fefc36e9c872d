"""Where everything is: guest-physical addresses, I/O ports and interrupt lines of the PC, one line of meaning each.

The arrangement is a PC of the ICH9 era as operating systems expect it: ISA devices at IBM's addresses, a hole for devices below 4 GB, the
APICs at Intel's addresses. `docs/memory-map.md` is the text of `markdown()`; a test holds the two equal.
"""

from __future__ import annotations

from dataclasses import dataclass

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


@dataclass(frozen=True)
class Range:
    """`size` bytes (or ports) from `base`."""

    base: int
    size: int
    meaning: str

    @property
    def end(self) -> int:
        """The first address after the range."""
        return self.base + self.size

    @property
    def last(self) -> int:
        """The last address of the range."""
        return self.end - 1


@dataclass(frozen=True)
class Line:
    """An interrupt line: a global system interrupt, which for 0..15 is also the ISA IRQ."""

    gsi: int
    meaning: str


IOAPIC_PINS = 24
"""Inputs of the I/O APIC; GSI n is pin n, but for the timer on pin `TIMER_PIN`."""

# --- Guest-physical memory -----------------------------------------------------------------------------------------------------------

BOOT_GDT = Range(0x500, 0x20, "GDT of the 64-bit boot entry: null, unused, code 0x10, data 0x18")
ZERO_PAGE = Range(0x7000, 0x1000, "struct boot_params, RSI at the kernel's entry")
BOOT_STACK = Range(0x8000, 0x1000, "stack at the kernel's entry")
BOOT_PAGE_TABLES = Range(0x9000, 0x6000, "PML4, PDPT and four page directories: identity map of the first 4 GB")
COMMAND_LINE = Range(0x20000, 0x10000, "kernel command line")
MULTIBOOT_INFO = Range(0x30000, 0x2000, "multiboot information, EBX at the kernel's entry, and what it points to")
PVH_INFO = Range(0x32000, 0x1000, "struct hvm_start_info, EBX at the entry of a PVH kernel, and what it points to")
EBDA = Range(0x9FC00, 0x400, "end of base memory: the BIOS data area of a PC, reserved")
LEGACY_VIDEO = Range(0xA0000, 0x40000, "video memory and option ROMs of a PC; nothing is there")
ACPI_TABLES = Range(0xE0000, 0x20000, "ACPI tables, the RSDP first; reserved")
KERNEL_FLOOR = Range(0x100000, 0, "lowest address of a kernel; a bzImage goes to its preferred address, 16 MB, if memory is large enough")
RAM_BELOW_4G = Range(0, 3 * GIB, "RAM, up to 3 GB of it")
PCI_MMIO_32 = Range(0xC0000000, 0x20000000, "window for 32-bit memory BARs")
PCI_BUSES = 16
"""Buses of the PCI segment: Linux scans every one of them at boot, 32 slots each, so there are no more than a machine may need."""
PCI_ECAM = Range(0xE0000000, PCI_BUSES * MIB, "PCI Express configuration space, 1 MB for each of 16 buses; reserved")
IOAPIC = Range(0xFEC00000, 0x1000, "I/O APIC (in KVM)")
LOCAL_APIC = Range(0xFEE00000, 0x1000, "local APIC of each CPU (in KVM); writes of devices here are MSIs")
KVM_IDENTITY_MAP = Range(0xFEFFC000, 0x1000, "one page for KVM's identity map (KVM_SET_IDENTITY_MAP_ADDR); reserved")
KVM_TSS = Range(0xFEFFD000, 0x3000, "three pages for KVM's real-mode TSS (KVM_SET_TSS_ADDR); reserved")
TEST_MEMORY = Range(0xFF000000, 0x10000, "test device: memory behind MMIO exits (only on request)")
RAM_ABOVE_4G = Range(4 * GIB, 252 * GIB, "RAM beyond the first 3 GB")
PCI_MMIO_64 = Range(256 * GIB, 256 * GIB, "window for 64-bit memory BARs")

MEMORY_MAP = (
    RAM_BELOW_4G,
    BOOT_GDT,
    ZERO_PAGE,
    BOOT_STACK,
    BOOT_PAGE_TABLES,
    COMMAND_LINE,
    MULTIBOOT_INFO,
    PVH_INFO,
    EBDA,
    LEGACY_VIDEO,
    ACPI_TABLES,
    KERNEL_FLOOR,
    PCI_MMIO_32,
    PCI_ECAM,
    IOAPIC,
    LOCAL_APIC,
    KVM_IDENTITY_MAP,
    KVM_TSS,
    TEST_MEMORY,
    RAM_ABOVE_4G,
    PCI_MMIO_64,
)

# --- I/O ports -----------------------------------------------------------------------------------------------------------------------

PIC_MASTER = Range(0x20, 2, "8259A master (in KVM)")
PIT = Range(0x40, 4, "8254 timer (in KVM)")
SYSTEM_CONTROL_B = Range(0x61, 1, "gate and output of timer channel 2 (in KVM)")
KEYBOARD_CONTROLLER = Range(0x64, 1, "command port of a keyboard controller: only the reset pulse, 0xFE")
RTC = Range(0x70, 2, "MC146818 clock and CMOS memory: index, data")
PIC_SLAVE = Range(0xA0, 2, "8259A slave (in KVM)")
TEST_IOPORT = Range(0xE0, 4, "test device: a register that keeps what was written (only on request)")
TEST_FLUSH = Range(0xE4, 4, "test device: a write of an address unmaps that page from the nested page tables (only on request)")
DEBUG_EXIT = Range(0xF4, 4, "debug exit: a write of v ends the run with status v << 1 | 1")
COM4 = Range(0x2E8, 8, "16550A ttyS3")
COM2 = Range(0x2F8, 8, "16550A ttyS1")
COM3 = Range(0x3E8, 8, "16550A ttyS2")
COM1 = Range(0x3F8, 8, "16550A ttyS0, the console")
PIC_ELCR = Range(0x4D0, 2, "edge/level control of both 8259A (in KVM)")
FW_CFG = Range(0x510, 2, "firmware configuration: selector (word), data (byte)")
PM1A_EVENT = Range(0x600, 4, "ACPI PM1a event block: status, enable")
PM1A_CONTROL = Range(0x604, 2, "ACPI PM1a control: SLP_TYP, SLP_EN")
PM_TIMER = Range(0x608, 4, "ACPI power management timer, 3.579545 MHz, 32 bits")
PCI_CONFIG_ADDRESS = Range(0xCF8, 4, "PCI configuration address, doublewords only; the byte 0xCF9 is the reset control register")
PCI_CONFIG_DATA = Range(0xCFC, 4, "PCI configuration data")
RESET_CONTROL = Range(0xCF9, 1, "reset control register, the ACPI reset register: 0x06 resets")
PCI_IO = Range(0x1000, 0xF000, "window for I/O BARs")
TEST_LINES = Range(0x2000, IOAPIC_PINS, "test device: one byte for each interrupt line, its level (only on request)")

PORT_MAP = (
    PIC_MASTER,
    PIT,
    SYSTEM_CONTROL_B,
    KEYBOARD_CONTROLLER,
    RTC,
    PIC_SLAVE,
    TEST_IOPORT,
    TEST_FLUSH,
    DEBUG_EXIT,
    COM4,
    COM2,
    COM3,
    COM1,
    PIC_ELCR,
    FW_CFG,
    PM1A_EVENT,
    PM1A_CONTROL,
    PM_TIMER,
    PCI_CONFIG_ADDRESS,
    RESET_CONTROL,
    PCI_CONFIG_DATA,
    PCI_IO,
    TEST_LINES,
)

SERIAL_PORTS = (COM1, COM2, COM3, COM4)
"""The UARTs in the order of Linux' ttyS numbers."""

# --- Interrupt lines -----------------------------------------------------------------------------------------------------------------

IRQ_TIMER = Line(0, "8254 channel 0; pin 2 of the I/O APIC")
IRQ_CASCADE = Line(2, "cascade of the slave 8259A, no device")
IRQ_COM2 = Line(3, "ttyS1 and ttyS3, shared")
IRQ_COM1 = Line(4, "ttyS0 and ttyS2, shared")
IRQ_RTC = Line(8, "RTC alarm, periodic and update interrupts")
IRQ_SCI = Line(9, "ACPI system control interrupt, level, active high")
IRQ_PCI_FIRST = Line(16, "PCI INTx: pin p (INTA = 0) of slot s is GSI 16 + (s + p) % 8")

LINE_MAP = (IRQ_TIMER, IRQ_CASCADE, IRQ_COM2, IRQ_COM1, IRQ_RTC, IRQ_SCI, IRQ_PCI_FIRST)

SERIAL_LINES = (IRQ_COM1, IRQ_COM2, IRQ_COM1, IRQ_COM2)
"""The lines of `SERIAL_PORTS`."""

PCI_LINES = 8
"""Number of GSIs that PCI slots share, from `IRQ_PCI_FIRST`."""
TIMER_PIN = 2
"""The I/O APIC input of the 8254, as every PC has wired it."""


def pci_line(slot: int, pin: int) -> int:
    """The GSI of interrupt pin `pin` (0 = INTA) of PCI slot `slot` on bus 0."""
    return IRQ_PCI_FIRST.gsi + (slot + pin) % PCI_LINES


def _table(heading: str, ranges: tuple[Range, ...], digits: int) -> list[str]:
    rows = [f"| {heading} | what |", "|---|---|"]
    for each in ranges:
        last = f" .. {each.last:#0{digits + 2}x}" if each.size > 1 else ""
        rows.append(f"| `{each.base:#0{digits + 2}x}{last}` | {each.meaning} |")
    return rows


def markdown() -> str:
    """The text of `docs/memory-map.md`."""
    lines = ["# The map of the machine", "", "The text of `markdown()` in `src/softkvm/vmm/layout.py`; do not edit.", ""]
    lines += ["## Guest-physical addresses", "", *_table("address", MEMORY_MAP, 10), ""]
    lines += ["## I/O ports", "", *_table("port", PORT_MAP, 4), ""]
    lines += ["## Interrupt lines", "", "| GSI | what |", "|---|---|", *(f"| {line.gsi} | {line.meaning} |" for line in LINE_MAP), ""]
    return "\n".join(lines)
