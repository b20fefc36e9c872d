"""The arguments of a call as JSON, with every byte of their structures: what an audit log needs so that its calls can be made again.

Numbers, text and nothing stand for themselves; a structure is `{"UserspaceMemoryRegion": "0000..."}`, its bytes in hexadecimal; sequences
are lists, mappings `{"map": [[key, value], ...]}`, sets `{"set": [...]}`.
"""

from __future__ import annotations

from ctypes import Structure, sizeof
from typing import Any

from softkvm.uapi import kvm as uapi

_DEPTH = 4


def encode(argument: Any) -> Any:
    """An argument of an ioctl method."""
    if isinstance(argument, Structure):
        return {type(argument).__name__: bytes(argument).hex()}
    if isinstance(argument, dict):
        return {"map": [[encode(key), encode(value)] for key, value in argument.items()]}
    if isinstance(argument, set | frozenset):
        return {"set": sorted(argument)}
    if isinstance(argument, list | tuple):
        return [encode(item) for item in argument]
    return argument if argument is None or isinstance(argument, int | str) else str(argument)


def decode(data: Any, depth: int = _DEPTH) -> Any:
    """The inverse; ValueError for what no call has."""
    if data is None or isinstance(data, int | str):
        return data
    if depth == 0:
        raise ValueError("arguments are not nested so deep")
    if isinstance(data, list):
        return [decode(item, depth - 1) for item in data]
    if not isinstance(data, dict) or len(data) != 1:
        raise ValueError("an argument is a number, a list, or an object with one name")
    ((name, value),) = data.items()
    if name == "map":
        return dict(decode(pair, depth - 1) for pair in value)
    if name == "set":
        return {number for number in value if isinstance(number, int)}
    return _structure(name, value)


def _structure(name: str, text: Any) -> Structure:
    kind = getattr(uapi, name, None)
    if not (isinstance(kind, type) and issubclass(kind, Structure)) or not isinstance(text, str):
        raise ValueError(f"there is no structure {name}")
    content = bytes.fromhex(text)
    if len(content) != sizeof(kind):
        raise ValueError(f"{len(content)} bytes are no {name}")
    return kind.from_buffer_copy(content)
