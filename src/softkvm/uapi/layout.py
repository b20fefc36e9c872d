"""C structures written once: annotated class bodies become `ctypes` fields, so the type checker and the binary layout cannot disagree.

`class Segment(Structure): base: U64; limit: U32` under `@layout` is `struct { __u64 base; __u32 limit; }`. Consecutive fields
marked `Arm[...]` share one anonymous C union. Layout rules are those of the x86-64 System V ABI (natural alignment), as ctypes has them.
"""

import ctypes
from ctypes import c_int16, c_int32, c_int64, c_uint8, c_uint16, c_uint32, c_uint64
from itertools import groupby
from typing import Annotated, Any, TypeVar, get_args, get_origin

U8 = Annotated[int, c_uint8]
U16 = Annotated[int, c_uint16]
U32 = Annotated[int, c_uint32]
S16 = Annotated[int, c_int16]
U64 = Annotated[int, c_uint64]
S32 = Annotated[int, c_int32]
S64 = Annotated[int, c_int64]

_UNION = "arm of an anonymous union"
_T = TypeVar("_T")
Arm = Annotated[_T, _UNION]

_Structure = TypeVar("_Structure", bound=type[ctypes.Structure])


def _ctype(annotation: Any) -> Any:
    """The ctypes type behind a field's annotation."""
    if get_origin(annotation) is Annotated:
        base, *marks = get_args(annotation)
        return next((mark for mark in marks if mark is not _UNION), base)
    return annotation


def _is_arm(item: tuple[str, Any]) -> bool:
    return get_origin(item[1]) is Annotated and _UNION in get_args(item[1])


def layout(cls: _Structure) -> _Structure:
    """Class decorator: give a `ctypes.Structure` its `_fields_` from its annotations, in order."""
    fields: list[tuple[str, Any]] = []
    anonymous: list[str] = []
    for overlaid, group in groupby(cls.__annotations__.items(), _is_arm):
        members = [(name, _ctype(annotation)) for name, annotation in group]
        if overlaid:
            name = f"_union{len(anonymous)}"
            members = [(name, type(name, (ctypes.Union,), {"_fields_": members}))]
            anonymous.append(name)
        fields += members
    cls._anonymous_ = anonymous
    cls._fields_ = fields
    return cls


def offset_of(structure: type[ctypes.Structure], field: str) -> int:
    """Bytes from the start of the structure to the field."""
    offset: int = getattr(structure, field).offset
    return offset
