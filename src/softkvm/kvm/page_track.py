"""Page tracking: rights that somebody in the host takes away from the guest, page by page, to be asked at each access that needs one.

Answers to Linux 6.1 `arch/x86/kvm/mmu/page_track.c`, with the read, write and execute modes of "VM introspection" v9, patches 34 and 35.
Rights belong to guest frame numbers: they outlive the memslots that come and go over them. Here they are in the nested page tables
themselves, so every access meets them, whichever way the instruction is executed (`kvm/waive.py` has what happens then).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Protocol

from softkvm.kvm.memslots import PAGE_SHIFT
from softkvm.silicon import RIGHT_R, RIGHT_SAME, RIGHT_W, RIGHT_X

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
        self.passes_same_stores = False
        """Whether a plain store that leaves memory as it is needs no RIGHT_W: nobody is asked, and nothing is written."""

    def rights(self, gfn: int) -> int:
        """What the guest may do with a page, as far as tracking is concerned."""
        return self._rights.get(gfn, ALL)

    def set(self, gfn: int, rights: int) -> None:
        """Track a page; with all rights, forget it."""
        if rights == ALL:
            self._rights.pop(gfn, None)
        else:
            self._rights[gfn] = rights

    def limit(self, rights: int, tracked: int) -> int:
        """What the nested page table says of a page that may have `rights` and is tracked with `tracked`."""
        same = RIGHT_SAME if self.passes_same_stores and rights & ~tracked & RIGHT_W else 0
        return rights & tracked | same

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
