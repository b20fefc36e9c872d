"""Static calls: call sites that are pointed at another function when a hook is turned on or off, so that a hook that is off costs nothing.

Answers to Linux 6.1 `include/linux/static_call.h` and `jump_label.h`. A site is an object that keeps the function to call in an attribute.
Whoever turns something on or off (a tracepoint, an ioctl filter, context tracking) calls `update()`, and every site chooses again.
"""

from __future__ import annotations

import threading
from typing import Protocol
from weakref import WeakSet


class Site(Protocol):
    """Something with a call that depends on what is turned on."""

    def update_static_calls(self) -> None:
        """Choose the function again; called by any thread."""


_sites: WeakSet[Site] = WeakSet()
_lock = threading.Lock()


def register(site: Site) -> None:
    """Let `site` choose now and after every change, as long as somebody else keeps it alive."""
    with _lock:
        _sites.add(site)
    site.update_static_calls()


def update() -> None:
    """Something was turned on or off. Crossings in progress end as they began, later ones take the new way."""
    with _lock:
        sites = tuple(_sites)
    for site in sites:
        site.update_static_calls()
