"""A function for another CPU, run once. Answers to Linux 6.1 `kernel/smp.c` (`smp_call_function_single()`); sent by `host/sched.py`."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

_Result = TypeVar("_Result")


class Call(Generic[_Result]):
    """A function that several threads may be asked to run, and the first one does."""

    __slots__ = ("_error", "_function", "_lock", "_taken", "_value", "done")

    def __init__(self, function: Callable[[], _Result]) -> None:
        """A call of `function`."""
        self._function = function
        self._lock = threading.Lock()
        self._taken = False
        self._value: list[_Result] = []
        self._error: BaseException | None = None
        self.done = threading.Event()
        """Set when the function has run."""

    def __call__(self) -> None:
        """Run the function, unless somebody has begun to."""
        with self._lock:
            if self._taken:
                return
            self._taken = True
        try:
            self._value.append(self._function())
        except BaseException as error:
            self._error = error
        finally:
            self.done.set()

    def result(self) -> _Result:
        """What the function has returned, once it is `done`; raises what it has raised."""
        if self._error is not None:
            raise self._error
        return self._value[0]
