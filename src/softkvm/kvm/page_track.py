"""Page tracking: rights that somebody in the host takes away from the guest, page by page, to be asked at each access that needs one.

Answers to Linux 6.1 `arch/x86/kvm/mmu/page_track.c`, with the read, write and execute modes of "VM introspection" v9, patches 34 and 35.
Rights belong to guest frame numbers: they outlive the memslots that come and go over them. Here they are in the nested page tables
themselves, so every access meets them, whichever way the instruction is executed; the guest's page walker passes without being asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Protocol

from softkvm.kvm import emulate
from softkvm.kvm.events import EVENT_VALID
from softkvm.kvm.memslots import PAGE_SHIFT, PAGE_SIZE
from softkvm.silicon import EMULATE_FIRST, RIGHT_R, RIGHT_W, RIGHT_X, WAIVER_LIMIT

if TYPE_CHECKING:
    from softkvm.kvm.vcpu import Vcpu

ALL = RIGHT_R | RIGHT_W | RIGHT_X


class Node(Protocol):
    """Who tracks pages. A hook returns None to let the access happen, or ends the instruction with the result of an exit handler."""

    def pre_read(self, vcpu: Vcpu, gpa: int, gva: int) -> int | None:
        """The guest is about to read a page without RIGHT_R."""

    def pre_write(self, vcpu: Vcpu, gpa: int, gva: int) -> int | None:
        """The guest is about to write a page without RIGHT_W."""

    def pre_exec(self, vcpu: Vcpu, gpa: int, gva: int) -> int | None:
        """The guest is about to fetch an instruction from a page without RIGHT_X."""


class PageTrack:
    """The tracked pages of one VM. The VM's slots lock is held by whoever changes them (`Mmu.restrict()`)."""

    def __init__(self) -> None:
        """No page is tracked, and nobody asks for one."""
        self._rights: dict[int, int] = {}
        self.node: Node | None = None

    def rights(self, gfn: int) -> int:
        """What the guest may do with a page, as far as tracking is concerned."""
        return self._rights.get(gfn, ALL)

    def set(self, gfn: int, rights: int) -> None:
        """Track a page; with all rights, forget it."""
        if rights == ALL:
            self._rights.pop(gfn, None)
        else:
            self._rights[gfn] = rights

    @property
    def pages(self) -> list[int]:
        """The tracked gfns."""
        return list(self._rights)

    def pieces(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Cut the guest-physical range into (address, size, rights) of equal rights."""
        if not self._rights:
            yield start, end - start, ALL
            return
        for rights, run in groupby(range(start >> PAGE_SHIFT, end >> PAGE_SHIFT), self.rights):
            gfns = list(run)
            yield gfns[0] << PAGE_SHIFT, len(gfns) << PAGE_SHIFT, rights


def runs(pages: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """Join (gfn, rights) in order into (address, size, rights) of neighbours with equal rights."""
    for _, group in groupby(enumerate(sorted(pages)), lambda item: (item[1][0] - item[0], item[1][1])):
        members = [page for _, page in group]
        yield members[0][0] << PAGE_SHIFT, len(members) << PAGE_SHIFT, members[0][1]


def violation(vcpu: Vcpu, gpa: int, gva: int, access: int, walk: bool) -> int | None:
    """The silicon refused an access: an exit handler's result if tracking is the reason, else None.

    A page that is not mapped yet is nobody's business until it is: only then does the silicon tell a read-modify-write's two halves apart.
    """
    mmu = vcpu.vm.mmu
    node, refused = mmu.track.node, access & ~mmu.track.rights(gpa >> PAGE_SHIFT)
    if node is None or not (refused or walk) or mmu.track.rights(gpa >> PAGE_SHIFT) == ALL or mmu.npt.lookup(gpa) is None:
        return None
    if walk:  # accessed and dirty bits are the silicon's work, not the guest's
        return waive(vcpu, gpa, RIGHT_R | RIGHT_W)
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
    if rights & RIGHT_W:
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
