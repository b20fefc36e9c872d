"""How soon a vCPU that left the guest gets to run Python again.

A thread that comes back from the engine waits for the interpreter lock until the thread that holds it has used up Python's switch interval,
5 ms by default: an eternity for an exit. While any machine runs, the interval is short.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SWITCH_INTERVAL = 50e-6
"""Seconds."""

_lock = threading.Lock()
_users = 0
_previous = 0.0


@contextmanager
def short_switch_interval() -> Iterator[None]:
    """Shorten the switch interval for the time of the block; the last block to end restores it."""
    global _users, _previous
    with _lock:
        if _users == 0:
            _previous = sys.getswitchinterval()
            sys.setswitchinterval(SWITCH_INTERVAL)
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                sys.setswitchinterval(_previous)
