"""Types out of BTF: layouts as C has them, and errors for bytes that no compiler writes."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from softkvm.vmi.errors import Corrupt, UnknownName, VmiError
from softkvm.vmi.linux.btf import Btf, Kind
from tests.vmi.kernel_image import Types


def sample() -> bytes:
    types = Types()
    char, number = types.integer("char", 1, 1), types.integer("int", 4, 1)
    text = types.array(char, 16)
    inner = types.structure("", 8, [("left", number, 0), ("right", number, 4)], kind=5)
    task = types.structure("task", 40, [("pid", number, 0), ("", inner, 8), ("comm", text, 16)])
    types.add("task_t", 8, types.add("", 10, task))
    types.add("kind", 6, 4, struct.pack("<IiIi", types.string("ZERO"), 0, types.string("MINUS"), -1), 2, flag=True)
    types.add("f", 12, types.add("", 13, number, struct.pack("<II", types.string("argument"), types.pointer(char)), 1))
    flags = struct.pack("<III", types.string("flag"), number, 3 << 24 | 5)
    types.add("bits", 4, 4, flags, 1, flag=True)
    return types.blob()


def test_members_of_anonymous_unions_belong_to_the_structure() -> None:
    btf = Btf(sample())
    layout = btf.layout(btf.find("task").number)
    assert {name: member.bit_offset // 8 for name, member in layout.items()} == {"pid": 0, "left": 8, "right": 12, "comm": 16}
    assert btf.size(layout["comm"].type) == 16


def test_typedefs_and_qualifiers_are_looked_through() -> None:
    btf = Btf(sample())
    alias = btf.find("task_t", frozenset({Kind.TYPEDEF}))
    assert btf.strip(alias.number) == btf.find("task")
    assert btf.spell(alias.target) == "struct task const"


def test_bit_fields() -> None:
    btf = Btf(sample())
    member = btf.layout(btf.find("bits").number)["flag"]
    assert (member.bit_offset, member.bit_size) == (5, 3)


def test_enumerators_keep_their_sign() -> None:
    btf = Btf(sample())
    assert btf.enumerators(btf.find("kind", frozenset({Kind.ENUM})).number) == {"ZERO": 0, "MINUS": -1}


def test_parameters_of_functions() -> None:
    btf = Btf(sample())
    ((name, target),) = btf.parameters(btf.find("f", frozenset({Kind.FUNCTION})).number)
    assert (name, btf.spell(target)) == ("argument", "char *")


def test_unknown_type() -> None:
    with pytest.raises(UnknownName):
        Btf(sample()).find("nosuch")


def test_structure_inside_itself_ends() -> None:
    types = Types()
    types.structure("snake", 8, [("", 1, 0)])
    btf = Btf(types.blob())
    with pytest.raises(Corrupt):
        btf.layout(1)


def test_typedef_of_itself_ends() -> None:
    types = Types()
    types.add("ouroboros", 8, 1)
    btf = Btf(types.blob())
    with pytest.raises(Corrupt):
        btf.strip(1)
    with pytest.raises(Corrupt):
        btf.size(1)


@settings(max_examples=300)
@given(st.data())
def test_bent_types_are_corrupt_or_readable(choices: st.DataObject) -> None:
    data = bytearray(sample())
    for _ in range(choices.draw(st.integers(1, 6))):
        data[choices.draw(st.integers(0, len(data) - 1))] = choices.draw(st.integers(0, 255))
    try:
        btf = Btf(bytes(data))
    except Corrupt:
        return
    for number in range(len(btf)):
        for look in (btf.layout, btf.strip, btf.size, btf.spell, btf.enumerators, btf.parameters):
            try:
                look(number)
            except VmiError:
                continue
