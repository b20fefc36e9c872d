"""Stepping over intercepted instructions, as guest code: {silicon} x {module parameter} x {prefixes} x {instruction} x {circumstance}.

The series "x86: KVM: svm: get rid of hardcoded instructions" (docs/series.md). A guest executes one intercepted instruction, at a known
place and of a known number of bytes, and its own exception frames say where the CPU went on.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softkvm.host import trace
from softkvm.kvm import emulate
from softkvm.kvm.emulate import FORCED_EMULATION_PREFIX as FEP
from softkvm.silicon.control import Intercept
from softkvm.uapi import kvm as uapi
from tests.helpers import long_guest
from tests.helpers.hosts import HOSTS, Host
from tests.helpers.long_guest import CODE, CR4_PAE, DATA, END, Guest
from tests.kvm_guests.conftest import Boot, system_of

DB, UD, GP = 1, 6, 13
TF, IF, RF = 1 << 8, 1 << 9, 1 << 16
DR6_BS = 1 << 14
VECTOR = 0x20
STI, NOP, LOCK = b"\xfb", b"\x90", b"\xf0"
PORT = 0x80
IA32_TSC, NO_MSR = 0x10, 0x1234_5678


@dataclass(frozen=True)
class Instruction:
    """An intercepted instruction: what it needs to succeed (`good`), what makes KVM refuse it (`bad`), which prefixes it ignores."""

    name: str
    code: bytes
    good: dict[str, int] | None
    bad: dict[str, int] | None = None
    fault: int = GP
    prefixes: bytes = b"\x66\x2e\x67"
    exits: tuple[tuple[int, ...], ...] = ()
    """Exits to user space on the way."""
    vendor: str | None = None
    steps: bool = True
    """Whether TF traps once, behind it: a repeated string traps in the middle, and a debugger takes the trap."""
    arrange: Callable[[Guest], None] = field(default=lambda guest: None)
    """What KVM must be asked for before it intercepts the instruction."""
    check: Callable[[Guest], bool] = field(default=lambda guest: True)


def after(**registers: int) -> Callable[[Guest], bool]:
    """Registers that the instruction has left."""
    return lambda guest: all(getattr(guest.vcpu.get_regs(), name) == value for name, value in registers.items())


def no_such_call(guest: Guest) -> bool:
    """-KVM_ENOSYS in RAX, of which the handler of an event overwrites the low byte."""
    return guest.vcpu.get_regs().rax >> 8 == -1000 >> 8 & (1 << 56) - 1


def debugged(guest: Guest) -> None:
    """A debugger has the debug registers of the silicon; the guest's own DR1 is 0xD1."""
    guest.vcpu.state.dr[1] = 0xD1
    guest.vcpu.set_guest_debug(uapi.GuestDebug(control=uapi.KVM_GUESTDBG_ENABLE | uapi.KVM_GUESTDBG_USE_HW_BP))


def without_pause_filter(guest: Guest) -> None:
    """Every PAUSE exits."""
    guest.vcpu.set_intercept(Intercept.PAUSE, True)


OUT = (uapi.KVM_EXIT_IO, uapi.KVM_EXIT_IO_OUT, PORT)
IN = (uapi.KVM_EXIT_IO, uapi.KVM_EXIT_IO_IN, PORT)
UNPREFIXED = b"\x2e\x67"  # where 66, F2 and F3 make another opcode or #UD

INSTRUCTIONS = [
    Instruction("cpuid", b"\x0f\xa2", {"rax": 0x4000_0000}, prefixes=b"\x66\x2e\x67\x48", check=after(rbx=0x4B4D_564B)),
    Instruction("rdmsr", b"\x0f\x32", {"rcx": 0x1A0, "rdx": 1 << 40}, {"rcx": NO_MSR}, check=after(rdx=0)),
    Instruction("wrmsr", b"\x0f\x30", {"rcx": IA32_TSC}, {"rcx": NO_MSR}),
    Instruction("hlt", b"\xf4", {}, prefixes=b"\x66\x2e", exits=((uapi.KVM_EXIT_HLT,),)),
    Instruction("invd", b"\x0f\x08", {}),
    Instruction("wbinvd", b"\x0f\x09", {}),
    Instruction("pause", b"\xf3\x90", {}, prefixes=UNPREFIXED, arrange=without_pause_filter),
    Instruction(
        "mov to dr1", b"\x0f\x23\xc8", {"rax": 7}, steps=False, arrange=debugged, check=lambda guest: guest.vcpu.debug_registers.dr[1] == 7
    ),
    Instruction("mov from dr1", b"\x0f\x21\xcb", {}, steps=False, arrange=debugged, check=after(rbx=0xD1)),
    Instruction("monitor", b"\x0f\x01\xc8", {"rax": DATA}, prefixes=UNPREFIXED),
    Instruction("mwait", b"\x0f\x01\xc9", {}, prefixes=UNPREFIXED),
    Instruction("rdpmc", b"\x0f\x33", {"rdx": 1}, {"rcx": 64}, check=after(rdx=0)),
    Instruction("xsetbv", b"\x0f\x01\xd1", {"rax": 3}, {"rax": 2}, prefixes=UNPREFIXED, check=lambda guest: guest.vcpu.state.xcr0 == 3),
    Instruction("xsetbv of XCR1", b"\x0f\x01\xd1", None, {"rax": 3, "rcx": 1}, prefixes=UNPREFIXED),
    Instruction("vmcall", b"\x0f\x01\xc1", {"rax": 99}, prefixes=UNPREFIXED, vendor="intel", check=no_such_call),
    Instruction("vmmcall", b"\x0f\x01\xd9", {"rax": 99}, prefixes=UNPREFIXED, vendor="amd", check=no_such_call),
    Instruction("out", bytes([0xE6, PORT]), {}, prefixes=UNPREFIXED, exits=((*OUT, 1),)),
    Instruction("in", bytes([0xE4, PORT]), {}, prefixes=UNPREFIXED, exits=((*IN, 1),)),
    Instruction("out dx, ax", b"\x66\xef", {"rdx": PORT}, prefixes=b"\x66\x2e\x67", exits=((*OUT, 2),)),
    Instruction("outsb", b"\x6e", {"rdx": PORT, "rsi": DATA}, prefixes=b"\x66\x2e", exits=((*OUT, 1),), check=after(rsi=DATA + 1)),
    Instruction("insb", b"\x6c", {"rdx": PORT, "rdi": DATA}, prefixes=b"\x66\x67", exits=((*IN, 1),), check=after(rdi=DATA + 1)),
    Instruction(
        "rep outsb",
        b"\xf3\x6e",
        {"rdx": PORT, "rsi": DATA, "rcx": 5},
        prefixes=b"\x66\x2e",
        exits=((*OUT, 5),),
        steps=False,
        check=after(rsi=DATA + 5, rcx=0),
    ),
    Instruction(
        "mov cr4", b"\x0f\x22\xe0", {"rax": CR4_PAE}, {"rax": CR4_PAE | 1 << 13}, check=lambda guest: guest.vcpu.state.cr4 == CR4_PAE
    ),
    Instruction("mov cr8", b"\x44\x0f\x22\xc0", {"rax": 0}, {"rax": 16}),
    Instruction("mov from cr8", b"\x44\x0f\x20\xc0", {"rax": 0x700}, check=lambda guest: guest.vcpu.get_regs().rax >> 8 == 0),
    Instruction("vmxon", b"\xf3\x0f\xc7\x33", None, {"rbx": DATA}, UD, b"\x2e\x67", vendor="intel"),
    *(
        Instruction(name, code, None, {"rbx": DATA}, UD, b"\x2e\x67", vendor="intel")
        for name, code in {
            "vmlaunch": b"\x0f\x01\xc2",
            "vmresume": b"\x0f\x01\xc3",
            "vmxoff": b"\x0f\x01\xc4",
            "vmfunc": b"\x0f\x01\xd4",
            "vmptrld": b"\x0f\xc7\x33",
            "vmptrst": b"\x0f\xc7\x3b",
            "vmclear": b"\x66\x0f\xc7\x33",
            "vmread": b"\x0f\x78\xc1",
            "vmwrite": b"\x0f\x79\xc1",
            "invept": b"\x66\x0f\x38\x80\x03",
            "invvpid": b"\x66\x0f\x38\x81\x03",
        }.items()
    ),
    *(
        Instruction(name, bytes((0x0F, 0x01, last)), None, {}, UD, b"\x2e\x67", vendor="amd")
        for name, last in {
            "vmrun": 0xD8,
            "vmload": 0xDA,
            "vmsave": 0xDB,
            "stgi": 0xDC,
            "clgi": 0xDD,
            "skinit": 0xDE,
            "invlpga": 0xDF,
        }.items()
    ),
]


def booted(boot: Boot, host: Host, instruction: Instruction, code: bytes, **registers: int) -> Guest:
    """A guest that is about to execute `code`, of which `instruction` is a part."""
    guest = boot(host, code, **registers)
    instruction.arrange(guest)
    return guest


EVENTS = {"TASK_SWITCH", "ACCESS", "EMULATED", "BUDGET"}
"""Exits at no instruction that KVM steps over: what comes between two, or goes elsewhere (`test_task_switch.py`)."""
BEHIND = {"APIC_WRITE", "EOI_INDUCED", "AVIC_INCOMPLETE_IPI", "AVIC_UNACCELERATED_ACCESS"}
"""Those of the virtualized local APIC come when the instruction is done."""
OTHER_EXITS = {
    "intel": EVENTS | BEHIND | {"EXCEPTION_NMI", "EXTERNAL_INTERRUPT", "TRIPLE_FAULT", "INTERRUPT_WINDOW", "NMI_WINDOW"},
    "amd": EVENTS | BEHIND | {"EXCP_", "INTR", "NMI", "VINTR", "IRET", "SHUTDOWN"},
}
UNDEFINED_IN_SILICON = {"intel": {"VMFUNC"}, "amd": {"VMRUN", "VMLOAD", "VMSAVE", "STGI", "CLGI", "SKINIT", "INVLPGA"}}
"""No guest has the VM functions, or EFER.SVME: #UD comes before the exit. They are in the matrix all the same."""


@pytest.mark.parametrize("host", [host for host in HOSTS if host.saves_next_rip and host.nrips], ids=str)
def test_the_matrix_has_every_intercepted_instruction(boot: Boot, host: Host) -> None:
    vendor, met = boot(host, b"").vcpu.vendor, set[int]()
    for instruction in INSTRUCTIONS:
        if instruction.vendor in (None, host.vendor):
            guest = booted(boot, host, instruction, instruction.code + END, **instruction.good or instruction.bad or {})
            guest.run()
            met |= {reason for reason, count in guest.vcpu.exit_counts.items() if count}
    left_out = {re.sub(r"(_DR|EXCP_)\d+", r"\1", vendor.exit_names[reason]) for reason in set(vendor.handlers) - met}
    left_out -= {"READ_DR", "WRITE_DR"}  # DR1 stands for all
    assert left_out - OTHER_EXITS[host.vendor] == UNDEFINED_IN_SILICON[host.vendor]


def cases(wanted: Callable[[Instruction], bool]) -> pytest.MarkDecorator:
    """Every host x every instruction of its vendor that is wanted x plain and prefixed."""
    return pytest.mark.parametrize(
        ("host", "instruction", "prefixed"),
        [
            pytest.param(host, instruction, prefixed, id=f"{host} {'prefixed ' if prefixed else ''}{instruction.name}")
            for host in HOSTS
            for instruction in INSTRUCTIONS
            if instruction.vendor in (None, host.vendor) and wanted(instruction)
            for prefixed in (False, True)
        ],
    )


def encoded(instruction: Instruction, prefixed: bool) -> bytes:
    """The instruction's bytes; in those that have it, REX stays next to the opcode."""
    return (instruction.prefixes if prefixed else b"") + instruction.code


@cases(lambda instruction: instruction.good is not None)
def test_plain(boot: Boot, host: Host, instruction: Instruction, prefixed: bool) -> None:
    code = encoded(instruction, prefixed)
    guest = booted(boot, host, instruction, code + END, **instruction.good or {}, rflags=2 | RF)
    outcome = guest.run()
    assert outcome.event is None
    assert tuple(outcome.exits) == instruction.exits
    assert guest.vcpu.get_regs().rip == CODE + len(code)
    assert not guest.vcpu.get_regs().rflags & RF
    assert instruction.check(guest)
    assert guest.retired == 1


COUNT_INSTRUCTIONS = 0x43_00C0
"""Of an event select register of either vendor: instructions retired, in user and kernel mode, enabled."""
COUNTERS = {"intel": ({0x38F: 1, 0x186: COUNT_INSTRUCTIONS}, 0xC1), "amd": ({0xC001_0000: COUNT_INSTRUCTIONS}, 0xC001_0004)}
"""What to write to which MSRs, and the counter."""


@cases(lambda instruction: instruction.good is not None)
def test_the_guests_counter_of_instructions(boot: Boot, host: Host, instruction: Instruction, prefixed: bool) -> None:
    control, counter = COUNTERS[host.vendor]
    guest = booted(boot, host, instruction, NOP + encoded(instruction, prefixed) + NOP + END, **instruction.good or {})
    assert guest.vcpu.set_msrs(control) == len(control)
    assert guest.run().event is None
    assert guest.vcpu.get_msrs([counter]) == [3]


@cases(lambda instruction: instruction.good is not None and instruction.steps)
def test_trap_flag(boot: Boot, host: Host, instruction: Instruction, prefixed: bool) -> None:
    code = encoded(instruction, prefixed)
    guest = booted(boot, host, instruction, code + NOP + END, **instruction.good or {}, rflags=2 | TF | RF)
    outcome = guest.run()
    assert outcome.event is not None
    assert (outcome.event.vector, outcome.event.rip) == (DB, CODE + len(code))
    assert outcome.event.rflags & (TF | RF) == TF
    assert guest.vcpu.get_debugregs().dr6 & DR6_BS
    assert tuple(outcome.exits) == instruction.exits
    assert instruction.check(guest)
    assert guest.retired == 2  # and the first one of the handler


@cases(lambda instruction: instruction.good is not None)
def test_interrupt_shadow(boot: Boot, host: Host, instruction: Instruction, prefixed: bool) -> None:
    code = encoded(instruction, prefixed)
    guest = booted(boot, host, instruction, STI + code + NOP + END, **instruction.good or {})
    guest.vcpu.interrupt(VECTOR)
    outcome = guest.run()
    assert outcome.event is not None
    assert (outcome.event.vector, outcome.event.rip) == (VECTOR, CODE + 1 + len(code))
    assert tuple(outcome.exits) == instruction.exits
    assert instruction.check(guest)
    assert guest.retired == 3  # STI, the instruction, and the first one of the handler


@cases(lambda instruction: instruction.good is not None)
def test_shadow_of_mov_ss(boot: Boot, host: Host, instruction: Instruction, prefixed: bool) -> None:
    """A shadow that user space restores: the guest is behind a MOV SS, with interrupts on and one of them waiting."""
    code = encoded(instruction, prefixed)
    guest = booted(boot, host, instruction, code + NOP + END, **instruction.good or {}, rflags=2 | IF)
    events = uapi.VcpuEvents(flags=uapi.KVM_VCPUEVENT_VALID_SHADOW)
    events.interrupt.shadow = uapi.KVM_X86_SHADOW_INT_MOV_SS
    guest.vcpu.set_vcpu_events(events)
    guest.vcpu.interrupt(VECTOR)
    outcome = guest.run()
    assert outcome.event is not None
    assert (outcome.event.vector, outcome.event.rip) == (VECTOR, CODE + len(code))
    assert tuple(outcome.exits) == instruction.exits
    assert instruction.check(guest)


@cases(lambda instruction: instruction.bad is not None)
@pytest.mark.parametrize("shadow", [False, True])
def test_fault_leaves_rip_on_the_instruction(boot: Boot, host: Host, instruction: Instruction, prefixed: bool, shadow: bool) -> None:
    code = (STI if shadow else b"") + encoded(instruction, prefixed)
    guest = boot(host, code + NOP + END, **instruction.bad or {}, rflags=2 | (0 if shadow else TF))
    outcome = guest.run()
    assert outcome.event is not None
    assert (outcome.event.vector, outcome.event.rip) == (instruction.fault, CODE + len(STI) * shadow)
    assert outcome.event.rflags & RF
    assert outcome.event.error == (0 if instruction.fault == GP else None)
    assert outcome.exits == []
    assert guest.vcpu.instructions_skipped == 0
    assert not guest.vcpu.get_debugregs().dr6 & DR6_BS


@cases(lambda instruction: "cr8" not in instruction.name)  # LOCK MOV CR0 is AMD's MOV CR8 (APM vol. 3)
def test_lock_is_undefined_before_every_intercepted_instruction(boot: Boot, host: Host, instruction: Instruction, prefixed: bool) -> None:
    guest = booted(boot, host, instruction, LOCK + encoded(instruction, prefixed) + END, **instruction.good or instruction.bad or {})
    outcome = guest.run()
    assert outcome.event is not None
    assert (outcome.event.vector, outcome.event.rip) == (UD, CODE)
    assert guest.vcpu.instructions_skipped == 0


PREFIXES = (0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x66, 0x67, 0xF0, 0xF2, 0xF3, *range(0x40, 0x50))


@pytest.mark.parametrize("vendor", ["intel", "amd"])
@given(
    prefixes=st.lists(st.sampled_from(PREFIXES), max_size=14).map(bytes), number=st.integers(0, len(INSTRUCTIONS) - 1), trap=st.booleans()
)
def test_any_prefixes_do_the_same_on_every_host(vendor: str, prefixes: bytes, number: int, trap: bool) -> None:
    """Whatever a guest puts before the instruction, it faults there or goes on behind it, however KVM learns where that is."""
    instruction = INSTRUCTIONS[number]
    registers = {**(instruction.good or instruction.bad or {}), "rflags": 2 | TF * trap}
    code, seen = prefixes + instruction.code, []
    for host in HOSTS:
        if host.vendor == vendor:
            guest = Guest(system_of(host), code + NOP + END, **registers)
            instruction.arrange(guest)
            outcome, regs = guest.run(), guest.vcpu.get_regs()
            assert not {(uapi.KVM_EXIT_INTERNAL_ERROR,), (uapi.KVM_EXIT_SHUTDOWN,)} & set(outcome.exits), (
                "it harms KVM, or more than itself"
            )
            assert outcome.event is None or CODE <= outcome.event.rip <= CODE + len(code) + 1
            seen.append((outcome.event, outcome.exits, regs.rip, regs.rflags, guest.vcpu.instructions_skipped))
            guest.close()
    assert seen == seen[:1] * len(seen)


@pytest.mark.parametrize("host", HOSTS, ids=str)
def test_what_is_decoded_is_traced_and_counted(boot: Boot, host: Host) -> None:
    lines: list[str] = []

    def probe(*values: object) -> None:
        lines.append(trace.kvm_emulate_insn.print(*values))

    trace.kvm_emulate_insn.register(probe)
    try:
        guest = boot(host, FEP + b"\x2e\x0f\xa2" + END)
        guest.run()
    finally:
        trace.kvm_emulate_insn.unregister(probe)
    emulated = f"0:{CODE + len(FEP):x}:2e 0f a2 (prot64)"
    skipped = host.vendor == "amd" and not (host.saves_next_rip and host.nrips)
    assert lines == [emulated] * (2 if skipped else 1)
    assert guest.vcpu.stats["insn_emulation"] == len(lines)


# --- Skips that fail ---------------------------------------------------------------------------------------------------------------

CLEAR_MAPPING = b"\x48\xc7\x04\x25" + long_guest.PD.to_bytes(4, "little") + bytes(4)
"""mov qword [PD], 0: what follows runs from the TLB."""


@pytest.mark.parametrize("host", [host for host in HOSTS if not (host.saves_next_rip and host.nrips) and host.vendor == "amd"], ids=str)
def test_code_that_is_not_mapped_any_more_cannot_be_skipped(boot: Boot, host: Host, caplog: pytest.LogCaptureFixture) -> None:
    emulate._say_once_that_skipping_failed.cache_clear()
    guest = boot(host, CLEAR_MAPPING + STI + b"\x0f\xa2" + END)
    failure = guest.vcpu.kvm_run.emulation_failure
    for _ in range(3):
        assert guest.run().exits == [(uapi.KVM_EXIT_INTERNAL_ERROR,)]
        assert (failure.suberror, failure.flags, failure.ndata) == (uapi.KVM_INTERNAL_ERROR_EMULATION, 0, 6)
        assert guest.vcpu.get_regs().rip == CODE + len(CLEAR_MAPPING) + 1
        assert guest.vcpu.get_vcpu_events().interrupt.shadow
    assert guest.vcpu.stats["insn_emulation_fail"] == 3
    assert len(caplog.records) == 1


PT = 0x7000
ELSEWHERE = CODE + 0x1000
MOVE_CODE = b"\x48\xc7\x04\x25" + long_guest.PD.to_bytes(4, "little") + (PT | 3).to_bytes(4, "little")
"""mov qword [PD], PT | 3: what follows runs from the TLB, and has other bytes by the page tables."""


@pytest.mark.parametrize("host", [host for host in HOSTS if not (host.saves_next_rip and host.nrips) and host.vendor == "amd"], ids=str)
def test_bytes_that_are_no_instruction_come_with_the_exit(boot: Boot, host: Host) -> None:
    guest = boot(host, MOVE_CODE + b"\x0f\xa2" + END)
    at = len(MOVE_CODE)
    guest.ram[PT + (CODE >> 9) : PT + (CODE >> 9) + 8] = (ELSEWHERE | 3).to_bytes(8, "little")
    guest.ram[ELSEWHERE + at : ELSEWHERE + at + 15] = bytes([0x06] * 15)  # PUSH ES, which 64-bit mode has not
    failure = guest.vcpu.kvm_run.emulation_failure
    assert guest.run().exits == [(uapi.KVM_EXIT_INTERNAL_ERROR,)]
    assert (failure.suberror, failure.ndata) == (uapi.KVM_INTERNAL_ERROR_EMULATION, 8)
    assert failure.flags == uapi.KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES
    assert (failure.insn_size, bytes(failure.insn_bytes)) == (15, bytes([0x06] * 15))
    assert guest.vcpu.get_regs().rip == CODE + at


@pytest.mark.parametrize("host", [host for host in HOSTS if host.vendor == "amd"], ids=str)
def test_instruction_across_a_page_is_decoded_whole(boot: Boot, host: Host) -> None:
    code = b"\x66\x2e\x67\x48\x0f\xa2" + END
    guest = boot(host, b"", rip=CODE + 0xFFD)
    guest.ram[CODE + 0xFFD : CODE + 0xFFD + len(code)] = code
    assert guest.run().event is None
    assert guest.vcpu.get_regs().rip == CODE + 0x1003
