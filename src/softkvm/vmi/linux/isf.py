"""The guest's symbols and types as Volatility 3 wants them: an "intermediate symbol file", made of kallsyms and BTF.

Source of truth: Volatility 3 `schemas/schema-6.2.0.json`; dwarf2json for how it names what C leaves anonymous. The banner in it is the
guest's own byte for byte, which is how Volatility recognises that a file belongs to a dump. Addresses are those of the kernel before KASLR
moved it.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

from softkvm.vmi.linux.btf import Btf, Kind, Member, Type
from softkvm.vmi.linux.kernel import Kernel

FORMAT = "6.2.0"
LINK_BASE = 0xFFFF_FFFF_8100_0000
"""Where `_text` is without KASLR (CONFIG_PHYSICAL_START is 16 MB in every distribution)."""

_LONGEST_BANNER = 4096
_VOID = {"kind": "base", "name": "void"}

# BTF has no types of variables but the per-CPU ones; these are the ones that Volatility's plug-ins make objects of, from the declarations
# in Linux 6.1's headers. `*` is a pointer, `[]` an array whose length is the distance to the next symbol.
_VARIABLES = {
    "init_task": "task_struct",
    "init_mm": "mm_struct",
    "init_files": "files_struct",
    "init_pid_ns": "pid_namespace",
    "init_nsproxy": "nsproxy",
    "init_net": "net",
    "modules": "list_head",
    "module_kset": "*kset",
    "mod_tree": "mod_tree_root",
    "prb": "*printk_ringbuffer",
    "log_buf": "*char",
    "log_buf_len": "unsigned int",
    "net_namespace_list": "list_head",
    "tty_drivers": "list_head",
    "keyboard_notifier_list": "atomic_notifier_head",
    "iomem_resource": "resource",
    "super_blocks": "list_head",
    "timekeeper": "timekeeper",
    "prog_idr": "idr",
    "map_idr": "idr",
    "bpf_kallsyms": "list_head",
    "ftrace_ops_list": "*ftrace_ops",
    "ftrace_list_end": "ftrace_ops",
    "ftrace_mod_maps": "list_head",
    "vmemmap_base": "unsigned long",
    "page_offset_base": "unsigned long",
    "vmalloc_base": "unsigned long",
    "module_addr_min": "unsigned long",
    "module_addr_max": "unsigned long",
    "taint_flags": "[]taint_flag",
    "cap_last_cap": "int",
    "num_registered_fb": "int",
    "sys_call_table": "[]*void",
    "ia32_sys_call_table": "[]*void",
    "idt_table": "[]gate_struct",
    "__start___tracepoints_ptrs": "[]*tracepoint",
    "socket_file_ops": "file_operations",
    "sockfs_dentry_operations": "dentry_operations",
}


def build(kernel: Kernel) -> dict[str, Any]:
    """The symbol file of a kernel, ready to be written as JSON."""
    exporter = _Exporter(kernel.types)
    user_types = {name: exporter.user_type(owner) for owner, name in _named(kernel.types, (Kind.STRUCT, Kind.UNION))}
    enums = {name: exporter.enumeration(owner) for owner, name in _named(kernel.types, (Kind.ENUM, Kind.ENUM64))}
    return {
        "metadata": {
            "format": FORMAT,
            "producer": {"name": "softkvm", "version": "1"},
            "linux": {"symbols": [{"kind": "symtab", "name": kernel.release}], "types": [{"kind": "symtab", "name": kernel.release}]},
        },
        "base_types": exporter.base_types(),
        "user_types": user_types,
        "enums": enums,
        "symbols": _symbols(kernel),
    }


def _named(types: Btf, kinds: tuple[Kind, ...]) -> Iterator[tuple[Type, str]]:
    """Each type of these kinds under a name of its own: of several definitions of one name the first keeps it."""
    taken: set[str] = set()
    for owner in types:
        if owner.kind in kinds:
            name = _name(owner)
            if name not in taken:
                taken.add(name)
                yield owner, name


def _name(owner: Type) -> str:
    return owner.name or f"unnamed_{owner.number:x}"


class _Exporter:
    def __init__(self, types: Btf) -> None:
        self._types = types

    def base_types(self) -> dict[str, Any]:
        """Integers, floating-point types, pointers and nothing."""
        found: dict[str, Any] = {
            "void": {"size": 0, "signed": False, "kind": "void", "endian": "little"},
            "pointer": {"size": 8, "signed": False, "kind": "int", "endian": "little"},
        }
        for owner in self._types:
            if owner.kind is Kind.INT:
                kind = "bool" if self._types.is_bool(owner.number) else "char" if self._types.is_char(owner.number) else "int"
                signed = self._types.is_signed(owner.number)
                found.setdefault(owner.name, {"size": owner.size, "signed": signed, "kind": kind, "endian": "little"})
            elif owner.kind is Kind.FLOAT:
                found.setdefault(owner.name, {"size": owner.size, "signed": True, "kind": "float", "endian": "little"})
        return found

    def user_type(self, owner: Type) -> dict[str, Any]:
        """A structure or union."""
        fields: dict[str, Any] = {}
        for number, member in enumerate(self._types.members(owner.number)):
            entry = {"type": self._member(member), "offset": member.bit_offset // 8}
            if member.bit_size:
                entry["offset"] = self._storage(member) // 8
            if not member.name:
                entry["anonymous"] = True
            fields[member.name or f"unnamed_field_{number:x}"] = entry
        return {"kind": "struct" if owner.kind is Kind.STRUCT else "union", "size": owner.size, "fields": fields}

    def _storage(self, member: Member) -> int:
        """The bit at which the unit begins that a bit-field is stored in."""
        unit = 8 * max(self._types.size(member.type), 1)
        return member.bit_offset // unit * unit

    def _member(self, member: Member) -> dict[str, Any]:
        if not member.bit_size:
            return self.describe(member.type)
        position = member.bit_offset - self._storage(member)
        return {"kind": "bitfield", "bit_position": position, "bit_length": member.bit_size, "type": self.describe(member.type)}

    def enumeration(self, owner: Type) -> dict[str, Any]:
        """An enumeration; its base is the integer that holds it."""
        base = {1: "char", 2: "short int", 4: "int", 8: "long int"}.get(owner.size, "int") if owner.flag else None
        unsigned = {1: "unsigned char", 2: "short unsigned int", 8: "long unsigned int"}.get(owner.size, "unsigned int")
        return {"size": owner.size, "base": base or unsigned, "constants": self._types.enumerators(owner.number)}

    def describe(self, number: int) -> dict[str, Any]:
        """A use of a type."""
        owner = self._types.strip(number)
        if owner.kind is Kind.POINTER:
            return {"kind": "pointer", "subtype": self.describe(owner.target)}
        if owner.kind is Kind.ARRAY:
            return {"kind": "array", "count": owner.count, "subtype": self.describe(owner.target)}
        return self._plain(owner)

    def _plain(self, owner: Type) -> dict[str, Any]:
        if owner.kind in (Kind.STRUCT, Kind.UNION):
            return {"kind": "struct" if owner.kind is Kind.STRUCT else "union", "name": _name(owner)}
        if owner.kind is Kind.FORWARD:
            return {"kind": "union" if owner.flag else "struct", "name": owner.name}
        if owner.kind in (Kind.ENUM, Kind.ENUM64):
            return {"kind": "enum", "name": _name(owner)}
        if owner.kind is Kind.PROTOTYPE:
            return {"kind": "function"}
        return {"kind": "base", "name": owner.name} if owner.kind in (Kind.INT, Kind.FLOAT) else _VOID


def _symbols(kernel: Kernel) -> dict[str, Any]:
    slide = kernel.symbols["_text"] - LINK_BASE
    base = kernel.symbols.base
    ordered = list(kernel.symbols)
    found: dict[str, Any] = {}
    for symbol in ordered:
        found.setdefault(symbol.name, {"address": symbol.address - slide if symbol.address >= base else symbol.address})
    lengths = {ordered[at].name: ordered[at + 1].address - ordered[at].address for at in range(len(ordered) - 1)}
    for name, spelling in _VARIABLES.items():
        if name in found:
            found[name]["type"] = _spelled(kernel, spelling, lengths.get(name, 0))
    banner = kernel.read(kernel.symbols["linux_banner"], _LONGEST_BANNER).split(b"\0")[0] + b"\0"
    kind = {"kind": "array", "count": len(banner), "subtype": {"kind": "base", "name": "char"}}
    found["linux_banner"] |= {"type": kind, "constant_data": base64.b64encode(banner).decode()}
    return found


def _spelled(kernel: Kernel, spelling: str, room: int) -> dict[str, Any]:
    if spelling.startswith("[]"):
        subtype = _spelled(kernel, spelling[2:], 0)
        size = 8 if subtype["kind"] == "pointer" else kernel.types.find(spelling[2:]).size
        return {"kind": "array", "count": max(0, room // size), "subtype": subtype}
    if spelling.startswith("*"):
        return {"kind": "pointer", "subtype": _spelled(kernel, spelling[1:], 0)}
    if spelling in _BASES:
        return {"kind": "base", "name": _BASES[spelling]}
    return {"kind": "struct", "name": spelling}


_BASES = {"void": "void", "char": "char", "int": "int", "unsigned int": "unsigned int", "unsigned long": "long unsigned int"}
"""How the compiler spells what the table above calls otherwise."""
