"""Module parameters: their texts, and whom they reach."""

from __future__ import annotations

import pytest

from softkvm import silicon
from softkvm.host.clock import VirtualClock
from softkvm.kvm import Parameters, System


def test_the_last_setting_of_a_name_counts() -> None:
    assert Parameters.parse([]) == Parameters(nrips=True, force_emulation_prefix=True)
    assert Parameters.parse(["nrips=0", "force_emulation_prefix=N", "nrips=on"]) == Parameters(nrips=True, force_emulation_prefix=False)
    assert Parameters.parse(["halt_poll_ns=0", "halt_poll_ns_grow=4294967295"]) == Parameters(
        halt_poll_ns=0, halt_poll_ns_grow=(1 << 32) - 1
    )


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("nrip=0", "KVM has no parameter 'nrip'; it has enable_apicv, enable_pmu, force_emulation_prefix, "),
        ("nrips", "the KVM parameter nrips is 0 or 1, not ''"),
        ("nrips=2", "the KVM parameter nrips is 0 or 1, not '2'"),
        ("halt_poll_ns=-1", "the KVM parameter halt_poll_ns is a number below 2\\^32, not '-1'"),
        ("halt_poll_ns=4294967296", "the KVM parameter halt_poll_ns is a number below 2\\^32, not '4294967296'"),
        ("halt_poll_ns=" + "9" * 5000, "the KVM parameter halt_poll_ns is a number below 2\\^32"),
    ],
)
def test_what_is_no_setting(setting: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Parameters.parse([setting])


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("saved", [True, False])
def test_nrips_needs_the_silicon_and_the_parameter(wanted: bool, saved: bool, clock: VirtualClock) -> None:
    system = System(silicon.Model("epyc", {"nrip-save": saved}), Parameters(nrips=wanted))
    assert system.create_vm(clock=clock).create_vcpu(0).saves_next_rip is (wanted and saved)
