"""INT3 and INT n whose delivery the hypervisor must cut short and begin again, on every host of the skip matrix.

The series "x86: KVM: svm: get rid of hardcoded instructions" (docs/series.md) and kvm-unit-tests' eventinj: the pages of the IDT, of the
handler's stack and of the handler are not in the nested page table when the event comes, so each of them ends one delivery.
"""

from __future__ import annotations

import pytest

from softkvm.uapi import kvm as uapi
from tests.helpers.hosts import HOSTS, Host
from tests.helpers.long_guest import CODE, END, RAM_SIZE, STACK
from tests.kvm_guests.conftest import Boot

BP, VECTOR = 3, 0x41
RF = 1 << 16
FORMS = {
    "int3": (b"\xcc", BP),
    "prefixed int3": (b"\x66\x2e\xcc", BP),
    "int 3": (b"\xcd\x03", BP),
    "int n": (bytes((0xCD, VECTOR)), VECTOR),
    "prefixed int n": (bytes((0x67, 0x48, 0xCD, VECTOR)), VECTOR),
}


@pytest.mark.parametrize("host", HOSTS, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shadow", [False, True])
def test_an_event_that_is_cut_short_arrives_once_behind_its_instruction(boot: Boot, host: Host, form: str, shadow: bool) -> None:
    code, vector = FORMS[form]
    prologue = b"\xfb" if shadow else b""  # sti
    guest = boot(host, prologue + code + END)
    logged = uapi.UserspaceMemoryRegion(flags=uapi.KVM_MEM_LOG_DIRTY_PAGES, memory_size=RAM_SIZE, userspace_addr=guest.memory.address)
    guest.vm.set_user_memory_region(logged)  # which maps page by page, each at its first use
    outcome = guest.run()
    assert outcome.event is not None
    assert (outcome.event.vector, outcome.event.rip) == (vector, CODE + len(prologue) + len(code))
    assert not outcome.event.rflags & RF
    faults = guest.vcpu.exits_by_reason()["NPF" if host.vendor == "amd" else "EPT_VIOLATION"]
    assert faults >= 4  # the code, the IDT, the stack, the handler
    assert guest.vcpu.get_regs().rsp == STACK - 40
