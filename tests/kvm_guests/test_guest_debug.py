"""KVM_SET_GUEST_DEBUG on guest code: what the kernel's own selftest `debug_regs` checks, and that the guest does not notice."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator

import pytest

from softkvm import kvm, silicon
from softkvm.uapi import kvm as uapi
from tests.helpers.long_guest import CODE, DATA, END, Guest

DB, BP = 1, 3
DR6_FIXED, DR6_BD, DR6_BS = 0xFFFF_0FF0, 1 << 13, 1 << 14
DR7_FIXED, DR7_GD, DR7_WRITE = 0x400, 1 << 13, 1
NOP, INT3 = b"\x90", b"\xcc"
TF = 1 << 8
STEP, HW_BP, SW_BP = uapi.KVM_GUESTDBG_SINGLESTEP, uapi.KVM_GUESTDBG_USE_HW_BP, uapi.KVM_GUESTDBG_USE_SW_BP

Boot = Callable[..., Guest]


@pytest.fixture(params=["cascadelake", "epyc"])
def boot(request: pytest.FixtureRequest) -> Iterator[Boot]:
    """Make guests on both vendors' silicon."""
    guests: list[Guest] = []

    def make(code: bytes, **registers: int) -> Guest:
        guests.append(Guest(kvm.System(silicon.Model(request.param)), code, **registers))
        return guests[-1]

    yield make
    for guest in guests:
        guest.close()


def debug(guest: Guest, control: int, *registers: int, dr7: int = 0) -> None:
    request = uapi.GuestDebug(control=control | uapi.KVM_GUESTDBG_ENABLE if control else 0)
    request.debugreg[: len(registers)] = list(registers)
    request.debugreg[7] = dr7
    guest.vcpu.set_guest_debug(request)


def stop(guest: Guest) -> tuple[int, int, int]:
    """Run to the debugger's next stop: exception, pc, dr6."""
    guest.vcpu.run()
    shared = guest.vcpu.kvm_run
    assert shared.exit_reason == uapi.KVM_EXIT_DEBUG
    return shared.debug.exception, shared.debug.pc, shared.debug.dr6


def skip_to(guest: Guest, rip: int) -> None:
    regs = guest.vcpu.get_regs()
    regs.rip = rip
    guest.vcpu.set_regs(regs)


def test_a_software_breakpoint(boot: Boot) -> None:
    guest = boot(NOP + INT3 + END)
    debug(guest, SW_BP)
    assert stop(guest)[:2] == (BP, CODE + 1)
    skip_to(guest, CODE + 2)
    assert guest.run().event is None


def test_the_guests_own_breakpoint_is_given_back_to_it(boot: Boot) -> None:
    guest = boot(NOP + INT3 + END)
    debug(guest, SW_BP)
    stop(guest)
    debug(guest, SW_BP | uapi.KVM_GUESTDBG_INJECT_BP)
    outcome = guest.run()
    assert outcome.event is not None
    assert (outcome.event.vector, outcome.event.rip) == (BP, CODE + 2)


@pytest.mark.parametrize("number", range(4))
def test_hardware_breakpoints_on_code(boot: Boot, number: int) -> None:
    guest = boot(NOP * 8 + END)
    registers = [0] * 4
    registers[number] = CODE + 3
    debug(guest, HW_BP, *registers, dr7=DR7_FIXED | 1 << 2 * number + 1)
    assert stop(guest) == (DB, CODE + 3, DR6_FIXED | 1 << number)
    debug(guest, 0)
    assert guest.run().event is None
    assert guest.vcpu.get_debugregs().dr6 == DR6_FIXED


@pytest.mark.parametrize("number", range(4))
def test_hardware_breakpoints_on_data_stop_behind_the_store(boot: Boot, number: int) -> None:
    store = b"\xc6\x04\x25" + DATA.to_bytes(4, "little") + b"\x01"  # mov byte [DATA], 1
    guest = boot(NOP + store + NOP + END)
    registers = [0] * 4
    registers[number] = DATA
    debug(guest, HW_BP, *registers, dr7=DR7_FIXED | 1 << 2 * number + 1 | DR7_WRITE << 16 + 4 * number)
    assert stop(guest) == (DB, CODE + 1 + len(store), DR6_FIXED | 1 << number)
    assert guest.run().event is None


STEPPED = [b"\xfb", b"\x31\xc0", b"\x0f\xa2", b"\xb9\xa0\x01\x00\x00", b"\x0f\x32", b"\xfa"]
"""sti; xor eax, eax; cpuid; mov ecx, IA32_MISC_ENABLE; rdmsr; cli: some of them done by KVM, the first with a shadow."""


def test_single_steps_with_an_interrupt_held_back(boot: Boot) -> None:
    guest = boot(b"".join(STEPPED) + END)
    guest.vcpu.interrupt(0x20)
    debug(guest, STEP | uapi.KVM_GUESTDBG_BLOCKIRQ)
    rip = CODE
    for instruction in STEPPED:
        rip += len(instruction)
        assert stop(guest) == (DB, rip, DR6_FIXED | DR6_BS)
        assert not guest.vcpu.get_regs().rflags & TF
    debug(guest, 0)
    assert guest.run().event is None  # cli came before the interrupt
    assert guest.vcpu.get_regs().rip == rip


def test_the_debug_registers_are_hidden_from_the_guest(boot: Boot) -> None:
    move_to_dr0 = b"\x0f\x23\xc0"  # mov dr0, rax
    move_from_dr0 = b"\x0f\x21\xc3"  # mov rbx, dr0
    guest = boot(move_to_dr0 + move_from_dr0 + END, rax=0x1234)
    debug(guest, HW_BP, CODE + 6, dr7=DR7_FIXED | 2)
    assert stop(guest)[:2] == (DB, CODE + 6)
    assert (guest.vcpu.get_regs().rbx, guest.vcpu.get_debugregs().db[0]) == (0x1234, 0x1234)
    debug(guest, 0)
    assert guest.vcpu.state.dr[0] == 0x1234
    assert guest.run().event is None


def test_general_detection(boot: Boot) -> None:
    guest = boot(NOP + b"\x0f\x21\xc0" + END)  # mov rax, dr0
    debug(guest, HW_BP, dr7=DR7_FIXED | DR7_GD)
    assert stop(guest) == (DB, CODE + 1, DR6_FIXED | DR6_BD)


def test_an_injected_debug_exception(boot: Boot) -> None:
    guest = boot(NOP + END)
    debug(guest, uapi.KVM_GUESTDBG_INJECT_DB)
    with pytest.raises(OSError, match="waits") as caught:
        debug(guest, uapi.KVM_GUESTDBG_INJECT_DB)
    assert caught.value.errno == errno.EBUSY
    outcome = guest.run()
    assert outcome.event is not None
    assert (outcome.event.vector, outcome.event.rip) == (DB, CODE)
