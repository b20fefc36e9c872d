"""A VM on scripted cores and virtual time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from softkvm import kvm, silicon
from softkvm.host import nmi
from softkvm.host.clock import VirtualClock
from softkvm.uapi import kvm as uapi
from tests import fake_engine

Script = Callable[..., None]


@pytest.fixture(autouse=True)
def scripted_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every core is a scripted one, of a model that does not grow with the engine, whatever engine there is."""
    monkeypatch.setattr(silicon, "Model", fake_engine.Model)
    monkeypatch.setattr(silicon, "Core", fake_engine.Core)
    for name in ("Wakeup", "PostedInterrupts", "IpiTable"):
        monkeypatch.setattr(silicon, name, getattr(fake_engine, name))
    monkeypatch.setattr(fake_engine.Core, "script", iter(()))
    monkeypatch.setattr(fake_engine.Core, "cores", [])


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Script:
    """`play(step, ...)`: what the guest does in its next runs."""

    def script(*steps: fake_engine.Step) -> None:
        monkeypatch.setattr(fake_engine.Core, "script", iter(steps))

    return script


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


@pytest.fixture(params=["cascadelake", "epyc"])
def model(request: pytest.FixtureRequest) -> silicon.Model:
    """Both vendors."""
    return silicon.Model(request.param)


@pytest.fixture
def system(model: silicon.Model) -> kvm.System:
    return kvm.System(model)


@pytest.fixture
def vm(system: kvm.System, clock: VirtualClock) -> Iterator[kvm.Vm]:
    with system.create_vm(clock=clock) as machine:
        yield machine


@pytest.fixture
def ram(vm: kvm.Vm) -> object:
    """1 MB of RAM at 0."""
    memory = silicon.allocate(1 << 20)
    vm.set_user_memory_region(uapi.UserspaceMemoryRegion(memory_size=memory.size, userspace_addr=memory.address))
    return memory


@pytest.fixture
def vcpu(vm: kvm.Vm, system: kvm.System) -> kvm.Vcpu:
    """A vCPU with local APIC and the CPUID that KVM supports."""
    vm.create_irqchip()
    return ready(vm.create_vcpu(0), system)


@pytest.fixture
def bare_vcpu(vm: kvm.Vm, system: kvm.System) -> kvm.Vcpu:
    """A vCPU without interrupt chips in the kernel."""
    return ready(vm.create_vcpu(0), system)


@pytest.fixture
def host_nmis() -> Iterator[list[int]]:
    """NMIs of the host that its handlers have seen."""
    seen: list[int] = []

    def handler() -> bool:
        seen.append(1)
        return True

    nmi.register_nmi_handler(handler)
    yield seen
    nmi.unregister_nmi_handler(handler)


def ready(vcpu: kvm.Vcpu, system: kvm.System) -> kvm.Vcpu:
    vcpu.set_cpuid2(system.get_supported_cpuid())
    return vcpu
