"""Rights to guest pages that a tool has taken away, and the PF events of accesses that need them.

Answers to `kvmi_handle_pf_event()` and `kvmi_vm_set_page_access()` of "VM introspection" v9, patches 77 and 78.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from softkvm.kvm import emulate
from softkvm.uapi import kvmi
from softkvm.uapi.kvmi import Access, Action, Event

if TYPE_CHECKING:
    from softkvm.kvm.introspection.session import Session
    from softkvm.kvm.vcpu import Vcpu


class PageAccess:
    """The tracker of one session (`page_track.Node`)."""

    def __init__(self, session: Session) -> None:
        """No page is restricted."""
        self._session = session

    def pre_read(self, vcpu: Vcpu, gpa: int, gva: int) -> int | None:
        """A read: ask the tool."""
        return self._ask(vcpu, gpa, gva, Access.R)

    def pre_write(self, vcpu: Vcpu, gpa: int, gva: int) -> int | None:
        """A write: ask the tool."""
        return self._ask(vcpu, gpa, gva, Access.W)

    def pre_exec(self, vcpu: Vcpu, gpa: int, gva: int) -> int | None:
        """A fetch: ask the tool."""
        return self._ask(vcpu, gpa, gva, Access.X)

    def _ask(self, vcpu: Vcpu, gpa: int, gva: int, access: Access) -> int | None:
        """None lets the access happen; else the instruction starts again, or the VM ends."""
        introspection = vcpu.introspection
        if introspection is None or Event.PF not in introspection.enabled:
            return None
        data = kvmi.EventPf(gva=gva, gpa=gpa, access=access)
        if not self._session.filters.passes(vcpu, Event.PF, data):
            return None
        rip = vcpu.state.rip
        reply = introspection.ask(Event.PF, data)
        if reply.action is Action.CONTINUE and vcpu.state.rip == rip:
            return None
        if vcpu.state.rip != rip:
            emulate.stop(vcpu)  # the tool has moved the vCPU on, or will look at the rest from elsewhere
        return introspection.crash() if reply.action is Action.CRASH else 1
