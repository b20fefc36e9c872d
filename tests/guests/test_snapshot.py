"""A Debian guest that is saved, waits, and goes on in another machine: its clocks are in step with each other and with the wall."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from softkvm import kvm, silicon
from softkvm.host.clock import KHZ_NSEC, Clock
from softkvm.testing import VmFactory
from softkvm.vmm import Machine, StopReason
from softkvm.vmm.memory import GuestMemory
from softkvm.vmm.snapshot import SnapshotFile, write

pytestmark = [pytest.mark.guest, pytest.mark.slow]

CPUS = 4
PAUSE_SECONDS = 2
MICROSECOND = 1000
"""In ns: how far clocks may be apart."""
SECOND = 10**9
RTC_ERROR = SECOND // 2
"""In ns: Linux sets its time at boot from the RTC, which tells whole seconds, and takes the middle of the second (drivers/rtc/class.c)."""
# Linux compares the TSCs of two CPUs when one of them comes online (arch/x86/kernel/tsc_sync.c), unless they have TSC_ADJUST to go by.
QUESTIONS = (
    "echo 0 > /sys/devices/system/cpu/cpu3/online; echo 1 > /sys/devices/system/cpu/cpu3/online; "
    "cat /sys/devices/system/clocksource/clocksource0/current_clocksource; nproc; dmesg | grep -ci unstable; "
    "date +%s; echo en''d\n"
)
SOFTKVM = [sys.executable, "-m", "softkvm.cli"]


class SteadyClock(Clock):
    """The host's clocks, but the wall clock goes by the TSC: nobody sets it right meanwhile, and it is never read late."""

    start = time.time_ns() - silicon.tsc() * KHZ_NSEC // silicon.tsc_khz()

    def realtime_and_tsc(self) -> tuple[int, int]:
        tsc = self.tsc()
        return self.start + tsc * KHZ_NSEC // self.tsc_khz, tsc

    def realtime_ns(self) -> int:
        return self.realtime_and_tsc()[0]


# Without an invariant TSC, Linux holds the TSCs of several AMD CPUs to be unsynchronized; with one it prefers the TSC to kvm-clock.
@pytest.mark.parametrize(("cpu", "clocksource"), [("cascadelake", "kvm-clock"), ("epyc,+invtsc", "tsc")])
def test_clocks_of_four_vcpus_go_on_in_a_second_machine(vm_factory: VmFactory, tmp_path: Path, cpu: str, clocksource: str) -> None:
    path = tmp_path / "snapshot"
    first = vm_factory(cpu=cpu, cpus=CPUS, clock=SteadyClock())
    assert first.run(until="# ", timeout=600).reason is StopReason.UNTIL
    first.save(path)
    first.close()
    time.sleep(PAUSE_SECONDS)
    with Machine.restore(path, clock=SteadyClock()) as second, SnapshotFile(path) as file:
        saved, now = file.state, second.tsc_status()
        passed = now.realtime - saved.clock.realtime
        assert passed > PAUSE_SECONDS * SECOND
        assert abs(now.kvmclock - saved.clock.kvmclock - passed) < MICROSECOND
        for before, vcpu in zip(saved.vcpus, now.vcpus, strict=True):
            # KVM's definition of a guest's TSC, in values that were read from both VMs: there is no race with the wall clock in it.
            scaled = now.host_tsc * vcpu.tsc_scaling_ratio >> vcpu.tsc_scaling_ratio_frac_bits
            assert vcpu.guest_tsc == scaled + vcpu.tsc_offset & (1 << 64) - 1
            assert abs((vcpu.guest_tsc - before.tsc) * KHZ_NSEC // before.tsc_khz - passed) < MICROSECOND
        assert len({vcpu.guest_tsc for vcpu in now.vcpus}) == 1

        second.send(QUESTIONS)
        assert second.run(until="end", timeout=600).reason is StopReason.UNTIL
        *_, answer, cpus, complaints, seconds, _ = second.text.replace("\r", "").splitlines()
        assert (answer.split()[-1], cpus, complaints) == (clocksource, str(CPUS), "0")
        after = second.tsc_status()
        assert after.use_master_clock
        assert (now.realtime - RTC_ERROR) // SECOND <= int(seconds) <= (after.realtime + RTC_ERROR) // SECOND, (
            "the guest has the time of day"
        )
        for vcpu in after.vcpus:
            assert vcpu.matched
            assert vcpu.hv_clock is not None
            assert vcpu.hv_clock.flags & 1, "and may trust kvm-clock"


def test_a_day_on_the_shelf_alarms_no_watchdog(vm_factory: VmFactory, tmp_path: Path) -> None:
    day, path = 86_400 * SECOND, tmp_path / "snapshot"
    with vm_factory(cpu="cascadelake", cpus=2) as first:
        assert first.run(until="# ", timeout=600).reason is StopReason.UNTIL
        first.save(path)
    age_by(path, day)
    with Machine.restore(path) as second:
        assert second.tsc_status().kvmclock >= day
        second.send("sleep 5; cat /proc/uptime; dmesg | grep -ciE 'unstable|lockup|stall|hung'; echo en''d\n")
        assert second.run(until="end", timeout=600).reason is StopReason.UNTIL
        *_, answer, complaints, _ = second.text.replace("\r", "").splitlines()
        assert complaints == "0", second.text
        assert float(answer.split()[0]) >= day // SECOND, "its own uptime, which began when its kernel had come so far"


def age_by(path: Path, ns: int) -> None:
    """Make a snapshot older than it is."""
    with SnapshotFile(path) as file:
        state = file.state
        memory = GuestMemory(state.hardware.memory, kvm.allocate_memory)
        file.load(memory)
    clock = msgspec.structs.replace(state.clock, realtime=state.clock.realtime - ns)
    write(path, msgspec.structs.replace(state, clock=clock), memory)
    memory.close()


def test_snapshot_and_restore_at_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "snapshot"
    with subprocess.Popen([*SOFTKVM, "run", "--name", "saved"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdin is not None
        assert first.stdout is not None
        first.stdin.write("x=42; echo to be sa''ved\n")
        first.stdin.flush()
        while not first.stdout.readline().endswith("to be saved\n"):
            pass
        command = subprocess.run([*SOFTKVM, "snapshot", "saved", str(path), "--json"], capture_output=True, check=True)
        assert json.loads(command.stdout) == {"path": str(path), "size": path.stat().st_size}
        first.communicate("poweroff -f\n")
        assert first.returncode == 0, "the saved machine runs on"
    second = subprocess.run(
        [*SOFTKVM, "run", "--restore", str(path), "--timeout", "600"], input="echo x is $x; poweroff -f\n", capture_output=True, text=True
    )
    assert "x is 42" in second.stdout
    assert second.returncode == 0
    assert second.stderr == f"softkvm: going on from {path}\n"
