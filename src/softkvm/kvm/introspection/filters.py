"""Which events are worth a message: softkvm's VM_SET_EVENT_FILTER.

A tool that waits for one process among hundreds, or for writes from outside one function, gets those alone; for all others the answer
would have been CONTINUE, and KVM gives it by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from ctypes import Structure
from dataclasses import dataclass
from typing import TYPE_CHECKING

from softkvm.uapi.kvmi import EVENTS, Event, FilterField

if TYPE_CHECKING:
    from softkvm.kvm.vcpu import Vcpu


@dataclass(frozen=True, slots=True)
class Filter:
    """Lets a value pass that lies, masked, in one of the ranges; with `inverted`, one that lies in none."""

    mask: int
    inverted: bool
    ranges: tuple[tuple[int, int], ...]

    def passes(self, value: int) -> bool:
        """Whether the event is sent."""
        value &= self.mask
        return any(first <= value <= last for first, last in self.ranges) != self.inverted


def _rip(vcpu: Vcpu) -> int:
    return int(vcpu.state.rip)


def _cr3(vcpu: Vcpu) -> int:
    return int(vcpu.state.cr3)


def _rax(vcpu: Vcpu) -> int:
    return int(vcpu.gpr[0])


def _change(vcpu: Vcpu) -> int:
    return 1  # an access that gets here was not let through by the silicon


_STATE_FIELDS: dict[FilterField, Callable[[Vcpu], int]] = {FilterField.RIP: _rip, FilterField.CR3: _cr3, FilterField.RAX: _rax}
"""Fields that every event of a vCPU has."""
_READERS = {**_STATE_FIELDS, FilterField.CHANGE: _change}


def has_field(event: Event, field: FilterField) -> bool:
    """Whether events of the kind can be filtered by the field."""
    return field in _STATE_FIELDS or field in EVENTS[event].filters or (event, field) == (Event.PF, FilterField.CHANGE)


class Filters:
    """All filters of a session."""

    def __init__(self) -> None:
        """Every event passes."""
        self._filters: dict[Event, dict[FilterField, Filter]] = {}

    def set(self, event: Event, field: FilterField, new: Filter | None) -> None:
        """Replace the filter of an event's field; None removes it."""
        filters = {kept: old for kept, old in self._filters.get(event, {}).items() if kept is not field}
        if new is not None:
            filters[field] = new
        self._filters = {**self._filters, event: filters}

    @property
    def wants_no_same_stores(self) -> bool:
        """Whether stores that leave memory as it is make no PF event; the silicon lets them through by itself."""
        change = self._filters.get(Event.PF, {}).get(FilterField.CHANGE)
        return change is not None and not change.passes(0)

    def passes(self, vcpu: Vcpu, event: Event, data: Structure | None) -> bool:
        """Whether the event is sent."""
        filters = self._filters.get(event)
        if not filters:
            return True
        names = EVENTS[event].filters
        for field, chosen in filters.items():
            read = _READERS.get(field)
            if not chosen.passes(read(vcpu) if read is not None else getattr(data, names[field])):
                return False
        return True
