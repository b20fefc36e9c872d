"""Soft events on SVM: next RIP stuffed, or RIP moved and moved back (Linux 6.1 `svm_{update,complete}_soft_interrupt*()`)."""

from __future__ import annotations

import pytest

from softkvm import kvm, silicon
from softkvm.kvm import Vcpu, emulate, emulator_ops, events
from softkvm.silicon import control
from softkvm.uapi.svm import ExitCode
from tests import fake_engine
from tests.fake_engine import exits_with
from tests.kvm.conftest import Script, ready
from tests.kvm.guest import out_of_guest

RIP = 0x1000
INT3 = 1 << 31 | 3 << 8 | events.BP
INT_N = 1 << 31 | 4 << 8 | 0x41


@pytest.fixture(params=["epyc"])
def model(request: pytest.FixtureRequest) -> silicon.Model:
    return silicon.Model(request.param)


@pytest.fixture(params=[True, False], ids=["nrips=1", "nrips=0"])
def vcpu(request: pytest.FixtureRequest, model: silicon.Model) -> Vcpu:
    system = kvm.System(model, kvm.Parameters(nrips=request.param))
    vcpu = ready(system.create_vm().create_vcpu(0), system)
    vcpu.state.rip = RIP
    vcpu.state.rflags |= events.RFLAGS_RF
    vcpu.state.interruptibility = 1
    return vcpu


def has_length(monkeypatch: pytest.MonkeyPatch, *lengths: int | None) -> None:
    """What the decoder says of the instruction at RIP, one time after the other."""
    answers = iter(lengths)
    monkeypatch.setattr(emulate, "soft_event_length", lambda vcpu, vector: next(answers))


@pytest.mark.parametrize("event", [INT3, INT_N])
def test_reinjection_knows_where_the_instruction_ends_though_its_bytes_are_gone(
    vcpu: Vcpu, play: Script, monkeypatch: pytest.MonkeyPatch, event: int
) -> None:
    has_length(monkeypatch, 2)  # a second decoding would be an error

    def entered(view: control.ControlBlock) -> None:
        assert view.control.next_rip == RIP + 2
        if vcpu.saves_next_rip:
            assert (view.state.rip, view.state.rflags & events.RFLAGS_RF, view.state.interruptibility) == (RIP, events.RFLAGS_RF, 1)
        else:
            assert (view.state.rip, view.state.rflags & events.RFLAGS_RF, view.state.interruptibility) == (RIP + 2, 0, 0)

    def cut_again(view: control.ControlBlock) -> int | None:
        entered(view)
        return exits_with(ExitCode.INTR, vectoring=event)(view)

    def arrives(view: control.ControlBlock) -> int | None:
        entered(view)
        return exits_with(ExitCode.INTR, vectoring=0)(view)

    out_of_guest(vcpu, play, exits_with(ExitCode.INTR, vectoring=event), cut_again, arrives)
    assert fake_engine.Core.cores[-1].injected == [event] * 2
    assert vcpu.state.rip == (RIP if vcpu.saves_next_rip else RIP + 2)
    assert vcpu.events.soft_return is None


def test_an_event_whose_instruction_cannot_be_decoded_is_dropped(vcpu: Vcpu, play: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guest executes the instruction again, which is the least awful."""
    has_length(monkeypatch, None)
    out_of_guest(vcpu, play, exits_with(ExitCode.INTR, vectoring=INT3), exits_with(ExitCode.INTR, vectoring=0))
    assert fake_engine.Core.cores[-1].injected == []
    assert vcpu.state.rip == RIP
    assert not vcpu.events.reinjection


def test_an_event_whose_entry_never_was_takes_rip_back(vcpu: Vcpu, play: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    has_length(monkeypatch, 1)
    vcpu.load()

    def cut(view: control.ControlBlock) -> int | None:
        fake_engine.Core.cores[-1].kicked = True  # the next entry returns at once
        return exits_with(ExitCode.INTR, vectoring=INT3)(view)

    out_of_guest(vcpu, play, cut, exits_with(ExitCode.INTR, vectoring=0))
    assert fake_engine.Core.cores[-1].injected == [INT3]
    assert vcpu.state.rip == (RIP if vcpu.saves_next_rip else RIP + 1)


@pytest.mark.parametrize(
    ("code", "vector", "length"),
    [
        (b"\xcc", 3, 1),
        (b"\x66\xcc", 3, 2),
        (b"\xcd\x41", 0x41, 2),
        (b"\xcd\x03", 3, 2),
        (b"\xcd\x41", 0x42, None),
        (b"\xb0\xcc", 3, None),
        (b"\xf1", 1, None),
    ],
)
def test_only_the_instruction_of_the_event_counts(
    vcpu: Vcpu, monkeypatch: pytest.MonkeyPatch, code: bytes, vector: int, length: int | None
) -> None:
    """EMULTYPE_SKIP_SOFT_INT: what is at RIP now may be something else."""
    monkeypatch.setattr(emulator_ops, "fetch", lambda vcpu: code + b"\x90" * 5)
    monkeypatch.setattr(emulate, "instruction_length", lambda vcpu: len(code))
    assert emulate.soft_event_length(vcpu, vector) == length
