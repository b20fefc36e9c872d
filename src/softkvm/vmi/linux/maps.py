"""What a process has mapped, as /proc/PID/maps shows it.

Source of truth: Linux 6.1 `include/linux/maple_tree.h` and `lib/maple_tree.c` (nodes, their types in the low bits of the pointers, pivots),
`fs/proc/task_mmu.c` (names). Kernels before 6.1 keep the areas on a list.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from softkvm.vmi.linux import files
from softkvm.vmi.linux.kernel import Kernel
from softkvm.vmi.linux.objects import Struct

_VM_READ, _VM_WRITE, _VM_EXEC, _VM_MAYSHARE = 1, 2, 4, 0x80
_PAGE = 4096
_MOST_AREAS = 1 << 18
_HIGHEST = (1 << 64) - 1
_NODE_MASK = 0xFF
_RANGE_64, _ARANGE_64 = 2, 3
_LEAF_64 = 1
_NODE_NAMES = {_LEAF_64: "maple_range_64", _RANGE_64: "maple_range_64", _ARANGE_64: "maple_arange_64"}


class Area(msgspec.Struct, frozen=True):
    """One area of virtual memory; `end` is exclusive."""

    start: int
    end: int
    rights: str
    """As `r-xp`."""
    offset: int
    inode: int
    name: str


def maps(kernel: Kernel, task: Struct) -> list[Area]:
    """All areas of a process, ascending; none for a kernel thread."""
    memory = task.follow("mm")
    if memory is None:
        return []
    return sorted((_describe(kernel, memory, area) for area in areas(kernel, memory)), key=lambda area: area.start)


def areas(kernel: Kernel, memory: Struct) -> Iterator[Struct]:
    """The `vm_area_struct` of each area of an `mm_struct`, in no order; no more than a process can have."""
    found = _listed(memory) if memory.has("mmap") else _maple_tree(kernel, memory.inside("mm_mt"))
    return (area for area, _ in zip(found, range(_MOST_AREAS), strict=False))


def _listed(memory: Struct) -> Iterator[Struct]:
    area = memory.follow("mmap")
    while area is not None:
        yield area
        area = area.follow("vm_next")


def _maple_tree(kernel: Kernel, tree: Struct) -> Iterator[Struct]:
    """The areas in the leaves; a node is 256 bytes, its type is in bits 3 to 6 of the pointer to it, and bit 1 marks a root."""
    root = tree.number("ma_root")
    if root & 3 != 2 or root < _PAGE:
        if root and not root & 3:  # a tree of one entry
            yield kernel.struct("vm_area_struct", root)
        return
    pending, budget = [(root, _HIGHEST)], _MOST_AREAS
    while pending and budget:
        entry, highest = pending.pop()
        budget -= 1
        kind = entry >> 3 & 0xF
        if kind not in _NODE_NAMES:
            continue
        node = kernel.struct(_NODE_NAMES[kind], entry & ~_NODE_MASK)
        for slot, end in zip(node.numbers("slot"), [*node.numbers("pivot"), highest], strict=False):
            if slot and kind == _LEAF_64:
                yield kernel.struct("vm_area_struct", slot)
            elif slot:
                pending.append((slot, end or highest))
            if end in (0, highest):  # an unset pivot: the slot was the last one
                break


def _describe(kernel: Kernel, memory: Struct, area: Struct) -> Area:
    flags = area.number("vm_flags")
    file = area.follow("vm_file")
    letters = [letter if flags & bit else "-" for letter, bit in (("r", _VM_READ), ("w", _VM_WRITE), ("x", _VM_EXEC))]
    inode = file.follow("f_inode") if file is not None else None
    return Area(
        start=area.number("vm_start"),
        end=area.number("vm_end"),
        rights="".join(letters) + ("s" if flags & _VM_MAYSHARE else "p"),
        offset=area.number("vm_pgoff") * _PAGE if file is not None else 0,
        inode=inode.number("i_ino") if inode is not None else 0,
        name=files.path(kernel, file) if file is not None else _name(kernel, memory, area),
    )


def _name(kernel: Kernel, memory: Struct, area: Struct) -> str:
    if area.number("vm_ops") == kernel.symbols["special_mapping_vmops"]:  # the vDSO and its data
        return kernel.struct("vm_special_mapping", area.number("vm_private_data")).text("name")
    start, end = area.number("vm_start"), area.number("vm_end")
    if start <= memory.number("brk") and end >= memory.number("start_brk"):
        return "[heap]"
    return "[stack]" if start <= memory.number("start_stack") < end else ""
