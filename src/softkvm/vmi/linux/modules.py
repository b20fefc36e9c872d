"""Loaded modules: from the list that lsmod(8) reads, and from the other places that know a module.

Source of truth: Linux 6.1 `include/linux/module.h`, `kernel/module/tree_lookup.c`, `include/linux/rbtree_latch.h`. A module that takes
itself off the list is still in the tree by which the kernel finds the owner of an address, and mostly in sysfs.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum

import msgspec

from softkvm.vmi.errors import UnknownName
from softkvm.vmi.linux.kernel import Kernel
from softkvm.vmi.linux.objects import Struct

_MOST_NODES = 1 << 16
_TAINTS = {0: "P", 10: "C", 12: "O", 13: "E", 15: "K", 16: "X"}
"""Letters of Documentation/admin-guide/tainted-kernels.rst that a module can have."""
_STATES = {0: "live", 1: "coming", 2: "going", 3: "unformed"}


class ModuleView(Enum):
    """A place where a module can be seen."""

    LIST = "module list"
    SYSFS = "sysfs"
    TREE = "address tree"


class Module(msgspec.Struct, frozen=True):
    """A loaded module; `base` and `size` are those of its code, which nothing else lies in."""

    name: str
    base: int
    size: int
    references: int
    state: str
    taints: str
    """Letters as in /proc/modules: O is out of tree, E unsigned."""
    address: int
    """Of its `struct module`."""
    hidden_from: tuple[ModuleView, ...] = ()
    init_base: int = 0
    init_size: int = 0
    """Code that is there while the module is initialized."""


def _listed(kernel: Kernel) -> Iterator[Struct]:
    return kernel.walk(kernel.symbols["modules"], "module", "list")


def _in_sysfs(kernel: Kernel) -> Iterator[Struct]:
    address = kernel.number(kernel.symbols["module_kset"])
    for kobject in kernel.walk(kernel.struct("kset", address).at("list"), "kobject", "entry"):
        owner = kobject.container("module_kobject", "kobj").follow("mod")
        if owner is not None:  # built-in code has a directory, but is no module
            yield owner


def _in_tree(kernel: Kernel) -> Iterator[Struct]:
    """The latch tree of code addresses; of its two copies the first one."""
    root = kernel.struct("latch_tree_root", kernel.symbols["mod_tree"])
    pending, seen = [kernel.number(root.at("tree"))], set[int]()
    while pending and len(seen) < _MOST_NODES:
        node = pending.pop()
        if not node or node in seen:
            continue
        seen.add(node)
        links = kernel.struct("rb_node", node)
        owner = links.container("mod_tree_node", "node").follow("mod")
        if owner is not None:
            yield owner
        pending += [links.number("rb_left"), links.number("rb_right")]


_LOOKS = {ModuleView.LIST: _listed, ModuleView.SYSFS: _in_sysfs, ModuleView.TREE: _in_tree}
_NEEDS = {ModuleView.SYSFS: "module_kset", ModuleView.TREE: "mod_tree"}


def modules(kernel: Kernel) -> list[Module]:
    """All modules by address, hidden ones marked; Corrupt if a list does not hold together."""
    looks = {view: look for view, look in _LOOKS.items() if _NEEDS.get(view, "modules") in kernel.symbols}
    found: dict[Struct, set[ModuleView]] = {}
    for view, look in looks.items():
        for module in look(kernel):
            found.setdefault(module, set()).add(view)
    listed = [_describe(module, tuple(view for view in looks if view not in views)) for module, views in found.items()]
    return sorted(listed, key=lambda module: module.base)


def _describe(module: Struct, missing: tuple[ModuleView, ...]) -> Module:
    base, size = code(module)
    taints = module.number("taints")
    state = _STATES.get(module.number("state"), "?")
    return Module(
        name=module.text("name"),
        base=base,
        size=size,
        references=max(0, module.number("refcnt.counter") - 1) if module.has("refcnt") else 0,
        state=state,
        taints="".join(letter for bit, letter in _TAINTS.items() if taints >> bit & 1),
        address=module.address,
        hidden_from=missing if state == "live" else (),
        init_base=module.number("init_layout.base") if module.has("init_layout") else 0,
        init_size=module.number("init_layout.size") if module.has("init_layout") else 0,
    )


def code(module: Struct) -> tuple[int, int]:
    """Address and size of a module's memory that begins with its code."""
    if module.has("core_layout"):  # up to 6.3
        return module.number("core_layout.base"), module.number("core_layout.size")
    if module.has("mem"):
        memory = module.inside("mem")  # mem[MOD_TEXT]
        first = Struct(module.reader, module.reader.types.strip(memory.type.target).number, memory.address)
        return first.number("base"), first.number("size")
    raise UnknownName("this kernel's struct module keeps its code in an unknown way")


def owner(found: list[Module], address: int) -> Module | None:
    """The module whose memory holds an address."""
    return next((module for module in found if describe(module, address)), None)


def describe(module: Module, address: int) -> str:
    """An address in a module as `name+0x12`, in its initialization code as `name:init+0x12`; empty if it is elsewhere."""
    for base, size, part in ((module.base, module.size, ""), (module.init_base, module.init_size, ":init")):
        if base <= address < base + size:
            return f"{module.name}{part}+{address - base:#x}"
    return ""
