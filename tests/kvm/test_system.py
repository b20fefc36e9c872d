"""/dev/kvm: the ioctls of the system file."""

from __future__ import annotations

import errno

import pytest

from softkvm.host.clock import VirtualClock
from softkvm.kvm import System, dispatch
from softkvm.uapi import kvm as uapi


def test_version_and_mapping_size(system: System) -> None:
    assert (system.get_api_version(), system.get_vcpu_mmap_size()) == (12, 3 * 4096)


def test_feature_msrs_stop_at_the_first_that_is_none(system: System) -> None:
    known = system.get_msr_feature_index_list()
    assert len(system.get_msrs([known[0], 0x1234_5678, known[0]])) == 1


def test_machine_check_capabilities(system: System) -> None:
    buffer = memoryview(bytearray(8))
    assert dispatch(system, uapi.KVM_X86_GET_MCE_CAP_SUPPORTED, buffer) == 0
    assert int.from_bytes(buffer, "little") == system.x86_get_mce_cap_supported() == 1 << 8 | 1 << 24


def test_there_is_one_type_of_vm(system: System) -> None:
    with pytest.raises(OSError, match="one type") as caught:
        system.create_vm(1)
    assert caught.value.errno == errno.EINVAL


def test_vms_live_by_the_clock_that_they_are_given(system: System, clock: VirtualClock) -> None:
    with system.create_vm(clock=clock) as vm:
        assert vm.clock is clock
