"""Which code must not be instrumented, and where within it instrumentation is allowed.

Answers to Linux 6.1 `Documentation/core-api/entry.rst` and `include/linux/instrumentation.h`. Between the crossing from user space and the
point where RCU watches, and again on the way back, nothing may trace, lock, log or sleep: whatever did would run with context and interrupt
state half switched. `tests/host/test_noinstr.py` plays objtool: a `@noinstr` function calls `@noinstr` functions, or others in a window.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

_Function = TypeVar("_Function", bound=Callable[..., Any])


def noinstr(function: _Function) -> _Function:
    """Mark a function as not to be instrumented."""
    return function


class _Window:
    """`instrumentation_begin()` and `instrumentation_end()`."""

    __slots__ = ()

    def __enter__(self) -> None:
        return None

    def __exit__(self, *exception: object) -> None:
        return None


_WINDOW = _Window()


def instrumentation() -> _Window:
    """`with instrumentation():` a stretch of a `@noinstr` function that may call anything."""
    return _WINDOW
