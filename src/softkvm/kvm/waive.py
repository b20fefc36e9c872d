"""An access that page tracking refused: its hook is asked, and a single instruction is let through.

Answers to "VM introspection" v9, patches 34, 35 and 83 (`kvm_page_track_pre{read,write,exec}()`), and to `kvm_mmu_page_fault()` of Linux
6.1, which emulates the instruction on a tracked page. Here the silicon executes it with the rights that it lacks waived for it alone
(`ControlBlock.waivers`); other vCPUs, and the instruction behind it, meet the restriction as before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from softkvm.kvm import emulate
from softkvm.kvm.events import EVENT_VALID
from softkvm.kvm.memslots import PAGE_SHIFT, PAGE_SIZE
from softkvm.kvm.page_track import ALL
from softkvm.silicon import EMULATE_FIRST, RIGHT_R, RIGHT_W, RIGHT_X, WAIVE_WALK, WAIVER_LIMIT

if TYPE_CHECKING:
    from softkvm.kvm.vcpu import Vcpu


def violation(vcpu: Vcpu, gpa: int, gva: int, access: int, walk: bool) -> int | None:
    """The silicon refused an access: an exit handler's result if tracking is the reason, else None.

    A page that is not mapped yet is nobody's business until it is: only then does the silicon tell a read-modify-write's two halves apart.
    """
    mmu = vcpu.vm.mmu
    node, refused = mmu.track.node, access & ~mmu.track.rights(gpa >> PAGE_SHIFT)
    if node is None or not (refused or walk) or mmu.track.rights(gpa >> PAGE_SHIFT) == ALL or mmu.npt.lookup(gpa) is None:
        return None
    if walk:  # accessed and dirty bits are the silicon's work, not the guest's
        return waive(vcpu, gpa, WAIVE_WALK)
    if _is_waived(vcpu, gpa, refused):
        return None
    hook = {RIGHT_R: node.pre_read, RIGHT_W: node.pre_write, RIGHT_X: node.pre_exec}[refused]
    result = hook(vcpu, gpa, gva)
    return waive(vcpu, gpa, refused) if result is None else result


def _is_waived(vcpu: Vcpu, gpa: int, rights: int) -> bool:
    waivers = vcpu.block.waivers
    page = gpa & -PAGE_SIZE
    return any(waivers[n] & -PAGE_SIZE == page and waivers[n] & rights for n in range(vcpu.control.waiver_count))


def waive(vcpu: Vcpu, gpa: int, rights: int) -> int:
    """Let the instruction that exited, or the event whose delivery did, have these rights to a page, once: as an exit handler."""
    control = vcpu.control
    if control.waiver_count >= WAIVER_LIMIT:
        emulate.stop(vcpu)
        return emulate.handle_emulation_failure(vcpu, emulate.EMULTYPE_PF)
    vcpu.block.waivers[control.waiver_count] = gpa & -PAGE_SIZE | rights
    control.waiver_count += 1
    if rights & (RIGHT_W | WAIVE_WALK):
        vcpu.vm.mmu.log_write(gpa)
    if vcpu.exit.vectoring & EVENT_VALID:
        return 1  # the event is injected again
    hold(vcpu)
    return 1


def hold(vcpu: Vcpu) -> None:
    """The instruction at RIP goes first at the next entry, whatever waits for the vCPU."""
    if not vcpu.half_done:
        control = vcpu.control
        if not control.emulate:
            control.access_count, control.emulate = 0, EMULATE_FIRST
        vcpu.half_done = True
