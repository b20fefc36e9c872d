"""The KVM ABI of x86-64: ioctl numbers, capabilities, exit reasons and structures.

Source of truth: `<linux/kvm.h>`, `<asm/kvm.h>` and `<linux/kvm_para.h>` of Linux 6.1 (Debian's linux-libc-dev);
`tests/uapi/test_kvm.py` compares every number, size and offset here with those headers. Structures carry the C name without `kvm_`
in CamelCase. Trailing flexible arrays are not part of a structure: `ioctl.py` handles them beside it.
"""

import ctypes
from ctypes import Array, Structure, c_uint8, c_uint32, c_uint64
from typing import Annotated

from softkvm.uapi.layout import S16, S32, S64, U8, U16, U32, U64, Arm, layout

_KVMIO = 0xAE
_IOC_WRITE, _IOC_READ = 1, 2  # as user space sees it: WRITE passes a structure in, READ gets one back


def _ioc(direction: int, number: int, size: int) -> int:
    return direction << 30 | size << 16 | _KVMIO << 8 | number


def _io(number: int) -> int:
    return _ioc(0, number, 0)


def _iow(number: int, argument: type[Structure] | type[c_uint64]) -> int:
    return _ioc(_IOC_WRITE, number, ctypes.sizeof(argument))


def _ior(number: int, argument: type[Structure] | type[c_uint64]) -> int:
    return _ioc(_IOC_READ, number, ctypes.sizeof(argument))


def _iowr(number: int, argument: type[Structure]) -> int:
    return _ioc(_IOC_READ | _IOC_WRITE, number, ctypes.sizeof(argument))


# --- Registers ---------------------------------------------------------------------------------------------------------------------


@layout
class Regs(Structure):
    """General registers (`struct kvm_regs`)."""

    rax: U64
    rbx: U64
    rcx: U64
    rdx: U64
    rsi: U64
    rdi: U64
    rsp: U64
    rbp: U64
    r8: U64
    r9: U64
    r10: U64
    r11: U64
    r12: U64
    r13: U64
    r14: U64
    r15: U64
    rip: U64
    rflags: U64


@layout
class Segment(Structure):
    """A segment register with the hidden part taken apart into fields."""

    base: U64
    limit: U32
    selector: U16
    type: U8
    present: U8
    dpl: U8
    db: U8
    s: U8
    l: U8  # noqa: E741 - the ABI's name
    g: U8
    avl: U8
    unusable: U8
    padding: U8


@layout
class Dtable(Structure):
    """GDTR or IDTR."""

    base: U64
    limit: U16
    padding: Annotated[Array[ctypes.c_uint16], ctypes.c_uint16 * 3]


@layout
class Sregs(Structure):
    """Segment, control and descriptor-table registers; `interrupt_bitmap` has at most one bit set, an interrupt already accepted."""

    cs: Segment
    ds: Segment
    es: Segment
    fs: Segment
    gs: Segment
    ss: Segment
    tr: Segment
    ldt: Segment
    gdt: Dtable
    idt: Dtable
    cr0: U64
    cr2: U64
    cr3: U64
    cr4: U64
    cr8: U64
    efer: U64
    apic_base: U64
    interrupt_bitmap: Annotated[Array[c_uint64], c_uint64 * 4]


@layout
class Sregs2(Structure):
    """`Sregs` with the PDPTEs instead of the interrupt bitmap."""

    cs: Segment
    ds: Segment
    es: Segment
    fs: Segment
    gs: Segment
    ss: Segment
    tr: Segment
    ldt: Segment
    gdt: Dtable
    idt: Dtable
    cr0: U64
    cr2: U64
    cr3: U64
    cr4: U64
    cr8: U64
    efer: U64
    apic_base: U64
    flags: U64
    pdptrs: Annotated[Array[c_uint64], c_uint64 * 4]


@layout
class Fpu(Structure):
    """x87 and SSE registers; `ftwx` is the abridged tag word, `fpr` is in stack order."""

    fpr: Annotated[Array[Array[c_uint8]], c_uint8 * 16 * 8]
    fcw: U16
    fsw: U16
    ftwx: U8
    pad1: U8
    last_opcode: U16
    last_ip: U64
    last_dp: U64
    xmm: Annotated[Array[Array[c_uint8]], c_uint8 * 16 * 16]
    mxcsr: U32
    pad2: U32


@layout
class Xsave(Structure):
    """An XSAVE area in the standard format, 4096 bytes."""

    region: Annotated[Array[c_uint32], c_uint32 * 1024]


@layout
class Xcr(Structure):
    """One extended control register."""

    xcr: U32
    reserved: U32
    value: U64


@layout
class Xcrs(Structure):
    """The extended control registers; `nr_xcrs` of the 16 are meant."""

    nr_xcrs: U32
    flags: U32
    xcrs: Annotated[Array[Xcr], Xcr * 16]
    padding: Annotated[Array[c_uint64], c_uint64 * 16]


@layout
class Debugregs(Structure):
    """DR0..DR3, DR6 and DR7."""

    db: Annotated[Array[c_uint64], c_uint64 * 4]
    dr6: U64
    dr7: U64
    flags: U64
    reserved: Annotated[Array[c_uint64], c_uint64 * 9]


@layout
class MsrEntry(Structure):
    """One MSR index and value."""

    index: U32
    reserved: U32
    data: U64


@layout
class Msrs(Structure):
    """Header of an array of `MsrEntry`."""

    nmsrs: U32
    pad: U32


@layout
class MsrList(Structure):
    """Header of an array of MSR indices (u32)."""

    nmsrs: U32


@layout
class CpuidEntry2(Structure):
    """The answer to one CPUID leaf; `index` counts only under `KVM_CPUID_FLAG_SIGNIFCANT_INDEX`."""

    function: U32
    index: U32
    flags: U32
    eax: U32
    ebx: U32
    ecx: U32
    edx: U32
    padding: Annotated[Array[c_uint32], c_uint32 * 3]


@layout
class Cpuid2(Structure):
    """Header of an array of `CpuidEntry2`."""

    nent: U32
    padding: U32


@layout
class MpState(Structure):
    """Multiprocessing state, `KVM_MP_STATE_*`."""

    mp_state: U32


@layout
class EventException(Structure):
    """The exception part of `VcpuEvents`."""

    injected: U8
    nr: U8
    has_error_code: U8
    pending: U8
    error_code: U32


@layout
class EventInterrupt(Structure):
    """The interrupt part of `VcpuEvents`."""

    injected: U8
    nr: U8
    soft: U8
    shadow: U8


@layout
class EventNmi(Structure):
    """The NMI part of `VcpuEvents`."""

    injected: U8
    pending: U8
    masked: U8
    pad: U8


@layout
class EventSmi(Structure):
    """The SMI part of `VcpuEvents`."""

    smm: U8
    pending: U8
    smm_inside_nmi: U8
    latched_init: U8


@layout
class EventTripleFault(Structure):
    """The triple fault part of `VcpuEvents`."""

    pending: U8


@layout
class VcpuEvents(Structure):
    """Events on their way into the guest; `flags` says which optional fields are meant."""

    exception: EventException
    interrupt: EventInterrupt
    nmi: EventNmi
    sipi_vector: U32
    flags: U32
    smi: EventSmi
    triple_fault: EventTripleFault
    reserved: Annotated[Array[c_uint8], c_uint8 * 26]
    exception_has_payload: U8
    exception_payload: U64


@layout
class Interrupt(Structure):
    """The vector that KVM_INTERRUPT queues."""

    irq: U32


@layout
class Translation(Structure):
    """KVM_TRANSLATE: linear address in, the rest out."""

    linear_address: U64
    physical_address: U64
    valid: U8
    writeable: U8
    usermode: U8
    pad: Annotated[Array[c_uint8], c_uint8 * 5]


@layout
class SignalMask(Structure):
    """Header of a signal set of `len` bytes (8); `len` 0xFFFFFFFF is not special, a null argument removes the mask."""

    len: U32


@layout
class EnableCap(Structure):
    """A capability to enable and its arguments."""

    cap: U32
    flags: U32
    args: Annotated[Array[c_uint64], c_uint64 * 4]
    pad: Annotated[Array[c_uint8], c_uint8 * 64]


# --- Machine -----------------------------------------------------------------------------------------------------------------------


@layout
class UserspaceMemoryRegion(Structure):
    """A memory slot: guest-physical range and the user address behind it, in bytes; size 0 deletes."""

    slot: U32
    flags: U32
    guest_phys_addr: U64
    memory_size: U64
    userspace_addr: U64


@layout
class DirtyLog(Structure):
    """KVM_GET_DIRTY_LOG: slot and the user address of a bitmap, one bit per page in 64-bit words."""

    slot: U32
    padding1: U32
    dirty_bitmap: U64


@layout
class PmuEventFilter(Structure):
    """Header of an array of events (u64: bits 35:32 and 15:0 of the event select) that a VM may, or may not, count."""

    action: U32
    nevents: U32
    fixed_counter_bitmap: U32
    flags: U32
    pad: Annotated[Array[c_uint32], c_uint32 * 4]


@layout
class ClearDirtyLog(Structure):
    """KVM_CLEAR_DIRTY_LOG: pages of a slot and the user address of a bitmap, one bit per page from `first_page` on."""

    slot: U32
    num_pages: U32
    first_page: U64
    dirty_bitmap: U64


@layout
class DirtyGfn(Structure):
    """An entry of a vCPU's dirty ring: a page of a slot (its address space in bits 31..16) by its offset in pages."""

    flags: U32
    slot: U32
    offset: U64


@layout
class MsrFilterRange(Structure):
    """MSRs from `base` on; `bitmap` is the user address of a bit per MSR, 1 = allowed."""

    flags: U32
    nmsrs: U32
    base: U32
    bitmap: U64


@layout
class MsrFilter(Structure):
    """KVM_X86_SET_MSR_FILTER."""

    flags: U32
    ranges: Annotated[Array[MsrFilterRange], MsrFilterRange * 16]


@layout
class GuestDebug(Structure):
    """KVM_SET_GUEST_DEBUG: `control` are KVM_GUESTDBG_*, `debugreg` DR0 to DR7 of the debugger."""

    control: U32
    pad: U32
    debugreg: Annotated[Array[c_uint64], c_uint64 * 8]


@layout
class IrqLevel(Structure):
    """A GSI and its level; `status` is written by KVM_IRQ_LINE_STATUS."""

    irq: Arm[U32]
    status: Arm[S32]
    level: U32


@layout
class PicState(Structure):
    """One 8259A."""

    last_irr: U8
    irr: U8
    imr: U8
    isr: U8
    priority_add: U8
    irq_base: U8
    read_reg_select: U8
    poll: U8
    special_mask: U8
    init_state: U8
    auto_eoi: U8
    rotate_on_auto_eoi: U8
    special_fully_nested_mode: U8
    init4: U8
    elcr: U8
    elcr_mask: U8


@layout
class IoapicState(Structure):
    """The I/O APIC; `redirtbl` entries as the chip lays them out."""

    base_address: U64
    ioregsel: U32
    id: U32
    irr: U32
    pad: U32
    redirtbl: Annotated[Array[c_uint64], c_uint64 * 24]


@layout
class Irqchip(Structure):
    """One of the three interrupt chips, told by `chip_id`."""

    chip_id: U32
    pad: U32
    dummy: Arm[Annotated[Array[c_uint8], c_uint8 * 512]]
    pic: Arm[PicState]
    ioapic: Arm[IoapicState]


@layout
class LapicState(Structure):
    """The 1 KB register page of a local APIC."""

    regs: Annotated[Array[c_uint8], c_uint8 * 1024]


@layout
class ReinjectControl(Structure):
    """Argument of KVM_REINJECT_CONTROL."""

    pit_reinject: U8
    reserved: Annotated[Array[c_uint8], c_uint8 * 31]


@layout
class PitConfig(Structure):
    """KVM_CREATE_PIT2 flags."""

    flags: U32
    pad: Annotated[Array[c_uint32], c_uint32 * 15]


@layout
class PitChannelState(Structure):
    """One 8254 counter; `count_load_time` in kernel monotonic ns."""

    count: U32
    latched_count: U16
    count_latched: U8
    status_latched: U8
    status: U8
    read_state: U8
    write_state: U8
    write_latch: U8
    rw_mode: U8
    mode: U8
    bcd: U8
    gate: U8
    count_load_time: S64


@layout
class PitState2(Structure):
    """The 8254."""

    channels: Annotated[Array[PitChannelState], PitChannelState * 3]
    flags: U32
    reserved: Annotated[Array[c_uint32], c_uint32 * 9]


@layout
class IrqRoutingIrqchip(Structure):
    """A route to a chip's pin."""

    irqchip: U32
    pin: U32


@layout
class IrqRoutingMsi(Structure):
    """A route to a message."""

    address_lo: U32
    address_hi: U32
    data: U32
    devid: U32


@layout
class IrqRoutingEntry(Structure):
    """One route of a GSI."""

    gsi: U32
    type: U32
    flags: U32
    pad: U32
    irqchip: Arm[IrqRoutingIrqchip]
    msi: Arm[IrqRoutingMsi]
    _space: Arm[Annotated[Array[c_uint32], c_uint32 * 8]]


@layout
class IrqRouting(Structure):
    """Header of an array of `IrqRoutingEntry`."""

    nr: U32
    flags: U32


@layout
class Irqfd(Structure):
    """An eventfd that raises a GSI."""

    fd: U32
    gsi: U32
    flags: U32
    resamplefd: U32
    pad: Annotated[Array[c_uint8], c_uint8 * 16]


@layout
class Ioeventfd(Structure):
    """An eventfd that a guest write to a port or an address signals."""

    datamatch: U64
    addr: U64
    len: U32
    fd: S32
    flags: U32
    pad: Annotated[Array[c_uint8], c_uint8 * 36]


@layout
class Msi(Structure):
    """A message-signalled interrupt."""

    address_lo: U32
    address_hi: U32
    data: U32
    flags: U32
    devid: U32
    pad: Annotated[Array[c_uint8], c_uint8 * 12]


@layout
class CoalescedMmioZone(Structure):
    """A range whose writes go to the ring in page 2 of the vCPU mapping."""

    addr: U64
    size: U32
    pio: U32


@layout
class CoalescedMmio(Structure):
    """One write in the ring."""

    phys_addr: U64
    len: U32
    pio: U32
    data: Annotated[Array[c_uint8], c_uint8 * 8]


@layout
class CoalescedMmioRing(Structure):
    """Header of the ring: KVM writes at `last`, user space reads at `first`."""

    first: U32
    last: U32


@layout
class ClockData(Structure):
    """kvmclock in ns, and the host's clocks at the same instant as `flags` says."""

    clock: U64
    flags: U32
    pad0: U32
    realtime: U64
    host_tsc: U64
    pad: Annotated[Array[c_uint32], c_uint32 * 4]


@layout
class DeviceAttr(Structure):
    """An attribute of a device, or of a vCPU, and the user address of its value."""

    flags: U32
    group: U32
    attr: U64
    addr: U64


@layout
class X86Mce(Structure):
    """KVM_X86_SET_MCE: a machine check, the registers of its bank."""

    status: U64
    addr: U64
    misc: U64
    mcg_status: U64
    bank: U8
    pad1: Annotated[Array[c_uint8], c_uint8 * 7]
    pad2: Annotated[Array[c_uint64], c_uint64 * 3]


@layout
class StatsHeader(Structure):
    """Start of a statistics file; offsets from there, in bytes."""

    flags: U32
    name_size: U32
    num_desc: U32
    id_offset: U32
    desc_offset: U32
    data_offset: U32


@layout
class StatsDesc(Structure):
    """What one statistic of the file is; its name, of `StatsHeader.name_size` bytes, follows."""

    flags: U32
    exponent: S16
    size: U16
    offset: U32
    bucket_size: U32


KVM_VCPU_TSC_CTRL = 0
"""Group of vCPU attributes: the time stamp counter."""
KVM_VCPU_TSC_OFFSET = 0
"""Its attribute: the u64 that is added to the (scaled) TSC of the host."""


# --- struct kvm_run ----------------------------------------------------------------------------------------------------------------


@layout
class RunHw(Structure):
    """KVM_EXIT_UNKNOWN."""

    hardware_exit_reason: U64


@layout
class RunFailEntry(Structure):
    """KVM_EXIT_FAIL_ENTRY."""

    hardware_entry_failure_reason: U64
    cpu: U32


@layout
class RunException(Structure):
    """KVM_EXIT_EXCEPTION."""

    exception: U32
    error_code: U32


@layout
class RunIo(Structure):
    """KVM_EXIT_IO; the data are at `data_offset` bytes from the start of the mapping."""

    direction: U8
    size: U8
    port: U16
    count: U32
    data_offset: U64


@layout
class RunDebug(Structure):
    """KVM_EXIT_DEBUG (`struct kvm_debug_exit_arch`)."""

    exception: U32
    pad: U32
    pc: U64
    dr6: U64
    dr7: U64


@layout
class RunMmio(Structure):
    """KVM_EXIT_MMIO."""

    phys_addr: U64
    data: Annotated[Array[c_uint8], c_uint8 * 8]
    len: U32
    is_write: U8


@layout
class RunHypercall(Structure):
    """KVM_EXIT_HYPERCALL."""

    nr: U64
    args: Annotated[Array[c_uint64], c_uint64 * 6]
    ret: U64
    longmode: U32
    pad: U32


@layout
class RunInternal(Structure):
    """KVM_EXIT_INTERNAL_ERROR."""

    suberror: U32
    ndata: U32
    data: Annotated[Array[c_uint64], c_uint64 * 16]


@layout
class RunEmulationFailure(Structure):
    """KVM_EXIT_INTERNAL_ERROR of suberror EMULATION, with the instruction's bytes."""

    suberror: U32
    ndata: U32
    flags: U64
    insn_size: U8
    insn_bytes: Annotated[Array[c_uint8], c_uint8 * 15]


@layout
class RunSystemEvent(Structure):
    """KVM_EXIT_SYSTEM_EVENT."""

    type: U32
    ndata: U32
    data: Annotated[Array[c_uint64], c_uint64 * 16]


@layout
class RunEoi(Structure):
    """KVM_EXIT_IOAPIC_EOI."""

    vector: U8


@layout
class RunMsr(Structure):
    """KVM_EXIT_X86_RDMSR and KVM_EXIT_X86_WRMSR."""

    error: U8
    pad: Annotated[Array[c_uint8], c_uint8 * 7]
    reason: U32
    index: U32
    data: U64


@layout
class SyncRegs(Structure):
    """Registers shared through the mapping (KVM_CAP_SYNC_REGS)."""

    regs: Regs
    sregs: Sregs
    events: VcpuEvents


@layout
class Run(Structure):
    """`struct kvm_run`, page 0 of a vCPU's mapping."""

    request_interrupt_window: U8
    immediate_exit: U8
    padding1: Annotated[Array[c_uint8], c_uint8 * 6]
    exit_reason: U32
    ready_for_interrupt_injection: U8
    if_flag: U8
    flags: U16
    cr8: U64
    apic_base: U64
    hw: Arm[RunHw]
    fail_entry: Arm[RunFailEntry]
    ex: Arm[RunException]
    io: Arm[RunIo]
    debug: Arm[RunDebug]
    mmio: Arm[RunMmio]
    hypercall: Arm[RunHypercall]
    internal: Arm[RunInternal]
    emulation_failure: Arm[RunEmulationFailure]
    system_event: Arm[RunSystemEvent]
    eoi: Arm[RunEoi]
    msr: Arm[RunMsr]
    padding: Arm[Annotated[Array[c_uint8], c_uint8 * 256]]
    kvm_valid_regs: U64
    kvm_dirty_regs: U64
    regs: Arm[SyncRegs]
    _sync_space: Arm[Annotated[Array[c_uint8], c_uint8 * 2048]]


# --- ioctl numbers -----------------------------------------------------------------------------------------------------------------

KVM_API_VERSION = 12

KVM_GET_API_VERSION = _io(0x00)
KVM_CREATE_VM = _io(0x01)
KVM_GET_MSR_INDEX_LIST = _iowr(0x02, MsrList)
KVM_CHECK_EXTENSION = _io(0x03)
KVM_GET_VCPU_MMAP_SIZE = _io(0x04)
KVM_GET_SUPPORTED_CPUID = _iowr(0x05, Cpuid2)
KVM_GET_MSR_FEATURE_INDEX_LIST = _iowr(0x0A, MsrList)

KVM_CREATE_VCPU = _io(0x41)
KVM_GET_DIRTY_LOG = _iow(0x42, DirtyLog)
KVM_SET_USER_MEMORY_REGION = _iow(0x46, UserspaceMemoryRegion)
KVM_SET_TSS_ADDR = _io(0x47)
KVM_SET_IDENTITY_MAP_ADDR = _iow(0x48, c_uint64)
KVM_CREATE_IRQCHIP = _io(0x60)
KVM_IRQ_LINE = _iow(0x61, IrqLevel)
KVM_GET_IRQCHIP = _iowr(0x62, Irqchip)
KVM_SET_IRQCHIP = _ior(0x63, Irqchip)
KVM_IRQ_LINE_STATUS = _iowr(0x67, IrqLevel)
KVM_REGISTER_COALESCED_MMIO = _iow(0x67, CoalescedMmioZone)
KVM_UNREGISTER_COALESCED_MMIO = _iow(0x68, CoalescedMmioZone)
KVM_SET_GSI_ROUTING = _iow(0x6A, IrqRouting)
KVM_REINJECT_CONTROL = _io(0x71)
KVM_IRQFD = _iow(0x76, Irqfd)
KVM_CREATE_PIT2 = _iow(0x77, PitConfig)
KVM_SET_BOOT_CPU_ID = _io(0x78)
KVM_IOEVENTFD = _iow(0x79, Ioeventfd)
KVM_SET_CLOCK = _iow(0x7B, ClockData)
KVM_GET_CLOCK = _ior(0x7C, ClockData)
KVM_X86_SETUP_MCE = _iow(0x9C, c_uint64)
KVM_X86_GET_MCE_CAP_SUPPORTED = _ior(0x9D, c_uint64)
KVM_X86_SET_MCE = _iow(0x9E, X86Mce)
KVM_GET_PIT2 = _ior(0x9F, PitState2)
KVM_SET_PIT2 = _iow(0xA0, PitState2)
KVM_SET_TSC_KHZ = _io(0xA2)
KVM_GET_TSC_KHZ = _io(0xA3)
KVM_ENABLE_CAP = _iow(0xA3, EnableCap)
KVM_SIGNAL_MSI = _iow(0xA5, Msi)

KVM_CLEAR_DIRTY_LOG = _iowr(0xC0, ClearDirtyLog)
KVM_X86_SET_MSR_FILTER = _iow(0xC6, MsrFilter)
KVM_RESET_DIRTY_RINGS = _io(0xC7)

KVM_RUN = _io(0x80)
KVM_GET_REGS = _ior(0x81, Regs)
KVM_SET_REGS = _iow(0x82, Regs)
KVM_GET_SREGS = _ior(0x83, Sregs)
KVM_SET_SREGS = _iow(0x84, Sregs)
KVM_TRANSLATE = _iowr(0x85, Translation)
KVM_INTERRUPT = _iow(0x86, Interrupt)
KVM_GET_MSRS = _iowr(0x88, Msrs)
KVM_SET_MSRS = _iow(0x89, Msrs)
KVM_SET_SIGNAL_MASK = _iow(0x8B, SignalMask)
KVM_GET_FPU = _ior(0x8C, Fpu)
KVM_SET_FPU = _iow(0x8D, Fpu)
KVM_GET_LAPIC = _ior(0x8E, LapicState)
KVM_SET_LAPIC = _iow(0x8F, LapicState)
KVM_SET_PMU_EVENT_FILTER = _iow(0xB2, PmuEventFilter)
KVM_PMU_EVENT_ALLOW, KVM_PMU_EVENT_DENY = 0, 1
KVM_PMU_CAP_DISABLE = 1 << 0
KVM_SET_CPUID2 = _iow(0x90, Cpuid2)
KVM_GET_CPUID2 = _iowr(0x91, Cpuid2)
KVM_GET_MP_STATE = _ior(0x98, MpState)
KVM_SET_MP_STATE = _iow(0x99, MpState)
KVM_NMI = _io(0x9A)
KVM_SET_GUEST_DEBUG = _iow(0x9B, GuestDebug)
KVM_GET_VCPU_EVENTS = _ior(0x9F, VcpuEvents)
KVM_SET_VCPU_EVENTS = _iow(0xA0, VcpuEvents)
KVM_GET_DEBUGREGS = _ior(0xA1, Debugregs)
KVM_SET_DEBUGREGS = _iow(0xA2, Debugregs)
KVM_GET_XSAVE = _ior(0xA4, Xsave)
KVM_SET_XSAVE = _iow(0xA5, Xsave)
KVM_GET_XCRS = _ior(0xA6, Xcrs)
KVM_SET_XCRS = _iow(0xA7, Xcrs)
KVM_KVMCLOCK_CTRL = _io(0xAD)
KVM_SMI = _io(0xB7)
KVM_SET_DEVICE_ATTR = _iow(0xE1, DeviceAttr)
KVM_GET_DEVICE_ATTR = _iow(0xE2, DeviceAttr)
KVM_HAS_DEVICE_ATTR = _iow(0xE3, DeviceAttr)
KVM_GET_SREGS2 = _ior(0xCC, Sregs2)
KVM_SET_SREGS2 = _iow(0xCD, Sregs2)
KVM_GET_STATS_FD = _io(0xCE)
KVM_GET_XSAVE2 = _ior(0xCF, Xsave)

# --- Exit reasons ------------------------------------------------------------------------------------------------------------------

KVM_EXIT_UNKNOWN = 0
KVM_EXIT_EXCEPTION = 1
KVM_EXIT_IO = 2
KVM_EXIT_HYPERCALL = 3
KVM_EXIT_DEBUG = 4
KVM_EXIT_HLT = 5
KVM_EXIT_MMIO = 6
KVM_EXIT_IRQ_WINDOW_OPEN = 7
KVM_EXIT_SHUTDOWN = 8
KVM_EXIT_FAIL_ENTRY = 9
KVM_EXIT_INTR = 10
KVM_EXIT_SET_TPR = 11
KVM_EXIT_TPR_ACCESS = 12
KVM_EXIT_NMI = 16
KVM_EXIT_INTERNAL_ERROR = 17
KVM_EXIT_SYSTEM_EVENT = 24
KVM_EXIT_IOAPIC_EOI = 26
KVM_EXIT_HYPERV = 27
KVM_EXIT_X86_RDMSR = 29
KVM_EXIT_X86_WRMSR = 30
KVM_EXIT_DIRTY_RING_FULL = 31
KVM_EXIT_X86_BUS_LOCK = 33
KVM_EXIT_XEN = 34
KVM_EXIT_NOTIFY = 37

KVM_EXIT_IO_IN = 0
KVM_EXIT_IO_OUT = 1

KVM_INTERNAL_ERROR_EMULATION = 1
KVM_INTERNAL_ERROR_SIMUL_EX = 2
KVM_INTERNAL_ERROR_DELIVERY_EV = 3
KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON = 4
KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES = 1 << 0

KVM_SYSTEM_EVENT_SHUTDOWN = 1
KVM_SYSTEM_EVENT_RESET = 2
KVM_SYSTEM_EVENT_CRASH = 3

KVM_MSR_EXIT_REASON_INVAL = 1 << 0
KVM_MSR_EXIT_REASON_UNKNOWN = 1 << 1
KVM_MSR_EXIT_REASON_FILTER = 1 << 2

# --- Flags and states --------------------------------------------------------------------------------------------------------------

KVM_MEM_LOG_DIRTY_PAGES = 1 << 0
KVM_MEM_READONLY = 1 << 1

KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE = 1 << 0
KVM_DIRTY_LOG_INITIALLY_SET = 1 << 1
KVM_DIRTY_LOG_PAGE_OFFSET = 64
"""Page of a vCPU's mapping at which its dirty ring begins."""
KVM_DIRTY_GFN_F_DIRTY = 1 << 0
KVM_DIRTY_GFN_F_RESET = 1 << 1

KVM_MSR_FILTER_DEFAULT_DENY = 1 << 0
KVM_MSR_FILTER_READ = 1 << 0
KVM_MSR_FILTER_WRITE = 1 << 1
KVM_MSR_FILTER_MAX_BITMAP_SIZE = 0x600

KVM_GUESTDBG_ENABLE = 1 << 0
KVM_GUESTDBG_SINGLESTEP = 1 << 1
KVM_GUESTDBG_USE_SW_BP = 1 << 16
KVM_GUESTDBG_USE_HW_BP = 1 << 17
KVM_GUESTDBG_INJECT_DB = 1 << 18
KVM_GUESTDBG_INJECT_BP = 1 << 19
KVM_GUESTDBG_BLOCKIRQ = 1 << 20

KVM_RUN_X86_SMM = 1 << 0
"""`Run.flags`: the vCPU is in system management mode."""
KVM_X86_DISABLE_EXITS_MWAIT = 1 << 0
KVM_X86_DISABLE_EXITS_HLT = 1 << 1
KVM_X86_DISABLE_EXITS_PAUSE = 1 << 2
KVM_X86_DISABLE_EXITS_CSTATE = 1 << 3
KVM_X86_XCOMP_GUEST_SUPP = 0
"""Attribute of the system, group 0: the XSAVE components that guests may have."""

KVM_STATS_TYPE_CUMULATIVE = 0
KVM_STATS_TYPE_INSTANT = 1 << 0
KVM_STATS_UNIT_NONE = 0
KVM_STATS_UNIT_SECONDS = 2 << 4
KVM_STATS_UNIT_BOOLEAN = 4 << 4

KVM_MP_STATE_RUNNABLE = 0
KVM_MP_STATE_UNINITIALIZED = 1
KVM_MP_STATE_INIT_RECEIVED = 2
KVM_MP_STATE_HALTED = 3
KVM_MP_STATE_SIPI_RECEIVED = 4

KVM_IRQCHIP_PIC_MASTER = 0
KVM_IRQCHIP_PIC_SLAVE = 1
KVM_IRQCHIP_IOAPIC = 2
KVM_NR_IRQCHIPS = 3
KVM_IOAPIC_NUM_PINS = 24
KVM_NR_INTERRUPTS = 256
KVM_APIC_REG_SIZE = 0x400

KVM_IRQ_ROUTING_IRQCHIP = 1
KVM_IRQ_ROUTING_MSI = 2
KVM_MSI_VALID_DEVID = 1 << 0

KVM_IRQFD_FLAG_DEASSIGN = 1 << 0
KVM_IRQFD_FLAG_RESAMPLE = 1 << 1
KVM_IOEVENTFD_FLAG_DATAMATCH = 1 << 0
KVM_IOEVENTFD_FLAG_PIO = 1 << 1
KVM_IOEVENTFD_FLAG_DEASSIGN = 1 << 2

KVM_PIT_FLAGS_HPET_LEGACY = 1 << 0
KVM_PIT_FLAGS_SPEAKER_DATA_ON = 1 << 1
KVM_PIT_SPEAKER_DUMMY = 1 << 0

KVM_CLOCK_TSC_STABLE = 1 << 1
KVM_CLOCK_REALTIME = 1 << 2
KVM_CLOCK_HOST_TSC = 1 << 3

KVM_CPUID_FLAG_SIGNIFCANT_INDEX = 1 << 0
KVM_CPUID_FLAG_STATEFUL_FUNC = 1 << 1
KVM_CPUID_FLAG_STATE_READ_NEXT = 1 << 2

KVM_VCPUEVENT_VALID_NMI_PENDING = 1 << 0
KVM_VCPUEVENT_VALID_SIPI_VECTOR = 1 << 1
KVM_VCPUEVENT_VALID_SHADOW = 1 << 2
KVM_VCPUEVENT_VALID_SMM = 1 << 3
KVM_VCPUEVENT_VALID_PAYLOAD = 1 << 4
KVM_VCPUEVENT_VALID_TRIPLE_FAULT = 1 << 5
KVM_X86_SHADOW_INT_MOV_SS = 1 << 0
KVM_X86_SHADOW_INT_STI = 1 << 1

KVM_SYNC_X86_REGS = 1 << 0
KVM_SYNC_X86_SREGS = 1 << 1
KVM_SYNC_X86_EVENTS = 1 << 2
KVM_SYNC_X86_VALID_FIELDS = KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS | KVM_SYNC_X86_EVENTS

KVM_SREGS2_FLAGS_PDPTRS_VALID = 1 << 0
KVM_MAX_XCRS = 16

# --- Capabilities ------------------------------------------------------------------------------------------------------------------

KVM_CAP_IRQCHIP = 0
KVM_CAP_HLT = 1
KVM_CAP_USER_MEMORY = 3
KVM_CAP_SET_TSS_ADDR = 4
KVM_CAP_VAPIC = 6
KVM_CAP_EXT_CPUID = 7
KVM_CAP_CLOCKSOURCE = 8
KVM_CAP_NR_VCPUS = 9
KVM_CAP_NR_MEMSLOTS = 10
KVM_CAP_PIT = 11
KVM_CAP_MP_STATE = 14
KVM_CAP_COALESCED_MMIO = 15
KVM_CAP_SYNC_MMU = 16
KVM_CAP_DESTROY_MEMORY_REGION_WORKS = 21
KVM_CAP_USER_NMI = 22
KVM_CAP_SET_GUEST_DEBUG = 23
KVM_CAP_REINJECT_CONTROL = 24
KVM_CAP_IRQ_ROUTING = 25
KVM_CAP_IRQ_INJECT_STATUS = 26
KVM_CAP_JOIN_MEMORY_REGIONS_WORKS = 30
KVM_CAP_MCE = 31
KVM_CAP_IRQFD = 32
KVM_CAP_PIT2 = 33
KVM_CAP_SET_BOOT_CPU_ID = 34
KVM_CAP_PIT_STATE2 = 35
KVM_CAP_IOEVENTFD = 36
KVM_CAP_SET_IDENTITY_MAP_ADDR = 37
KVM_CAP_ADJUST_CLOCK = 39
KVM_CAP_INTERNAL_ERROR_DATA = 40
KVM_CAP_VCPU_EVENTS = 41
KVM_CAP_INTR_SHADOW = 49
KVM_CAP_DEBUGREGS = 50
KVM_CAP_X86_ROBUST_SINGLESTEP = 51
KVM_CAP_ENABLE_CAP = 54
KVM_CAP_XSAVE = 55
KVM_CAP_XCRS = 56
KVM_CAP_ASYNC_PF = 59
KVM_CAP_TSC_CONTROL = 60
KVM_CAP_GET_TSC_KHZ = 61
KVM_CAP_MAX_VCPUS = 66
KVM_CAP_ONE_REG = 70
KVM_CAP_TSC_DEADLINE_TIMER = 72
KVM_CAP_SYNC_REGS = 74
KVM_CAP_KVMCLOCK_CTRL = 76
KVM_CAP_SIGNAL_MSI = 77
KVM_CAP_READONLY_MEM = 81
KVM_CAP_IRQFD_RESAMPLE = 82
KVM_CAP_DEVICE_CTRL = 89
KVM_CAP_EXT_EMUL_CPUID = 95
KVM_CAP_IOAPIC_POLARITY_IGNORED = 97
KVM_CAP_ENABLE_CAP_VM = 98
KVM_CAP_IOEVENTFD_NO_LENGTH = 100
KVM_CAP_VM_ATTRIBUTES = 101
KVM_CAP_CHECK_EXTENSION_VM = 105
KVM_CAP_DISABLE_QUIRKS = 116
KVM_CAP_X86_SMM = 117
KVM_CAP_MULTI_ADDRESS_SPACE = 118
KVM_CAP_GUEST_DEBUG_HW_BPS = 119
KVM_CAP_GUEST_DEBUG_HW_WPS = 120
KVM_CAP_SPLIT_IRQCHIP = 121
KVM_CAP_IOEVENTFD_ANY_LENGTH = 122
KVM_CAP_VCPU_ATTRIBUTES = 127
KVM_CAP_MAX_VCPU_ID = 128
KVM_CAP_X2APIC_API = 129
KVM_CAP_IMMEDIATE_EXIT = 136
KVM_CAP_X86_DISABLE_EXITS = 143
KVM_CAP_GET_MSR_FEATURES = 153
KVM_CAP_NESTED_STATE = 157
KVM_CAP_MSR_PLATFORM_INFO = 159
KVM_CAP_COALESCED_PIO = 162
KVM_CAP_EXCEPTION_PAYLOAD = 164
KVM_CAP_MANUAL_DIRTY_LOG_PROTECT = 166
KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 = 168
KVM_CAP_PMU_EVENT_FILTER = 173
KVM_CAP_HALT_POLL = 182
KVM_CAP_ASYNC_PF_INT = 183
KVM_CAP_SMALLER_MAXPHYADDR = 185
KVM_CAP_X86_USER_SPACE_MSR = 188
KVM_CAP_X86_MSR_FILTER = 189
KVM_CAP_ENFORCE_PV_FEATURE_CPUID = 190
KVM_CAP_DIRTY_LOG_RING = 192
KVM_CAP_X86_BUS_LOCK_EXIT = 193
KVM_CAP_SET_GUEST_DEBUG2 = 195
KVM_CAP_SGX_ATTRIBUTE = 196
KVM_CAP_SREGS2 = 200
KVM_CAP_EXIT_HYPERCALL = 201
KVM_CAP_BINARY_STATS_FD = 203
KVM_CAP_EXIT_ON_EMULATION_FAILURE = 204
KVM_CAP_VM_GPA_BITS = 207
KVM_CAP_XSAVE2 = 208
KVM_CAP_SYS_ATTRIBUTES = 209
KVM_CAP_PMU_CAPABILITY = 212
KVM_CAP_DISABLE_QUIRKS2 = 213
KVM_CAP_VM_TSC_CONTROL = 214
KVM_CAP_SYSTEM_EVENT_DATA = 215
KVM_CAP_X86_TRIPLE_FAULT_EVENT = 218
KVM_CAP_X86_NOTIFY_VMEXIT = 219
KVM_CAP_VM_DISABLE_NX_HUGE_PAGES = 220
KVM_CAP_DIRTY_LOG_RING_ACQ_REL = 223

# --- <linux/kvm_para.h>: hypercalls and paravirtual features --------------------------------------------------------------------------

KVM_ENOSYS = 1000
KVM_HC_KICK_CPU = 5
KVM_HC_SEND_IPI = 10
KVM_HC_SCHED_YIELD = 11

KVM_FEATURE_CLOCKSOURCE = 0
KVM_FEATURE_NOP_IO_DELAY = 1
KVM_FEATURE_CLOCKSOURCE2 = 3
KVM_FEATURE_ASYNC_PF = 4
KVM_FEATURE_STEAL_TIME = 5
KVM_FEATURE_PV_EOI = 6
KVM_FEATURE_PV_UNHALT = 7
KVM_FEATURE_PV_TLB_FLUSH = 9
KVM_FEATURE_PV_SEND_IPI = 11
KVM_FEATURE_POLL_CONTROL = 12
KVM_FEATURE_PV_SCHED_YIELD = 13
KVM_FEATURE_MSI_EXT_DEST_ID = 15
KVM_FEATURE_CLOCKSOURCE_STABLE_BIT = 24

MSR_KVM_WALL_CLOCK = 0x11
MSR_KVM_SYSTEM_TIME = 0x12
MSR_KVM_WALL_CLOCK_NEW = 0x4B564D00
MSR_KVM_SYSTEM_TIME_NEW = 0x4B564D01
MSR_KVM_ASYNC_PF_EN = 0x4B564D02
MSR_KVM_STEAL_TIME = 0x4B564D03
MSR_KVM_PV_EOI_EN = 0x4B564D04
MSR_KVM_POLL_CONTROL = 0x4B564D05
MSR_KVM_ASYNC_PF_INT = 0x4B564D06
MSR_KVM_ASYNC_PF_ACK = 0x4B564D07
MSR_KVM_MIGRATION_CONTROL = 0x4B564D08
