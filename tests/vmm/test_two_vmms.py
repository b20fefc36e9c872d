"""Two VMMs in one Python process, one of them under an ioctl filter, both at work at the same time: the filter's reach ends at its VMM."""

from __future__ import annotations

import errno
import json
import threading
from pathlib import Path
from typing import Any

import pytest

from softkvm import kvm
from softkvm.host import seccomp_file
from softkvm.host.audit import AuditLog
from softkvm.host.seccomp import Killed
from softkvm.vmm import Machine, StopReason, layout
from tests.vmm.boot import images

PRINTED, CALLS = 200, 50
EXIT = bytes.fromhex("b000e6f4")  # mov al, 0; out 0xF4, al
# mov ecx, PRINTED; again: mov dx, COM1; mov al, 'x'; out dx, al; dec ecx; jnz again
PRINT = (
    b"\xb9"
    + PRINTED.to_bytes(4, "little")
    + b"\x66\xba"
    + layout.COM1.base.to_bytes(2, "little")
    + bytes.fromhex("b078 ee ffc9 75f5")
    + EXIT
)

ALLOWED = ("KVM_CREATE_VM", "KVM_CHECK_EXTENSION", "KVM_GET_SUPPORTED_CPUID", "KVM_GET_MSR_INDEX_LIST")
STATE = ("MP_STATE", "TSC_KHZ", "SREGS2", "XCRS", "XSAVE", "DEBUGREGS", "VCPU_EVENTS")
"""What a machine reads of its vCPUs before they run, to give it back after a suspend to RAM."""


def filter_file(kind: str = "vcpu", **changes: Any) -> bytes:
    """All of the system's and the VM's calls, of the vCPU's those that a machine needs; `changes` replace the verdict on some of a file."""
    vcpu: tuple[str, ...] = (
        "RUN",
        "GET_REGS",
        "SET_REGS",
        "GET_SREGS",
        "SET_SREGS",
        "SET_CPUID2",
        "GET_MSRS",
        "SET_MSRS",
        "GET_LAPIC",
        "SET_LAPIC",
    )
    vcpu += tuple(f"GET_{name}" for name in STATE)
    rules: list[dict[str, Any]] = [{"fd": kind, "ioctl": name, "action": action} for name, action in changes.items()]
    rules += [{"fd": "vcpu", "ioctl": f"KVM_{name}", "action": "allow"} for name in vcpu]
    rules += [{"fd": "vm", "action": "allow"}] + [{"fd": "system", "ioctl": name, "action": "allow"} for name in ALLOWED]
    return json.dumps({"default_action": "kill_process", "rules": rules}).encode()


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "program"
    path.write_bytes(images.program(PRINT))
    return path


def under(filter: bytes) -> kvm.Process:
    return kvm.Process((seccomp_file.parse(filter),))


def test_both_finish_under_load_and_only_one_is_filtered(program: Path, tmp_path: Path) -> None:
    """The filtered VMM's forbidden calls fail again and again while both guests run, and the other one does the same calls freely."""
    refused: list[int] = []
    allowed: list[int] = []
    with AuditLog(tmp_path / "audit") as audit:
        process = under(filter_file("vm", KVM_GET_CLOCK={"errno": errno.EACCES}))
        process.audit = audit
        machines = [Machine(program, memory="32M", process=process), Machine(program, memory="32M")]
        stops = []

        def work(machine: Machine, results: list[int]) -> None:
            run = threading.Thread(target=lambda: stops.append(machine.run(timeout=60)))
            run.start()
            while run.is_alive() or len(results) < CALLS:
                try:
                    machine._vm.get_clock()
                    results.append(0)
                except OSError as error:
                    results.append(error.errno or 0)
            run.join()

        threads = [
            threading.Thread(target=work, args=(machine, results)) for machine, results in zip(machines, (refused, allowed), strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        outputs = [machine.output for machine in machines]
        for machine in machines:
            machine.close()
    assert [stop.reason for stop in stops] == [StopReason.EXIT, StopReason.EXIT]
    assert outputs == [b"x" * PRINTED] * 2
    assert set(refused) == {errno.EACCES}
    assert set(allowed) == {0}
    lines = [json.loads(line) for line in (tmp_path / "audit").read_text().splitlines()]
    assert sum(line.get("action") == "errno(13)" for line in lines) == len(refused) >= CALLS
    assert sum(line["call"] == "KVM_RUN" and "result" in line for line in lines) > PRINTED
    assert sorted(line["seq"] for line in lines) == list(range(1, len(lines) + 1))


def test_killing_one_leaves_the_other_alone(program: Path) -> None:
    process = under(filter_file())
    with Machine(program, memory="32M", process=process) as filtered, Machine(program, memory="32M") as free:
        with pytest.raises(Killed, match="KVM_GET_FPU on a vcpu file"):
            filtered._vcpus[0].get_fpu()
        with pytest.raises(Killed):
            filtered.run(timeout=60)
        assert free.run(timeout=60).reason is StopReason.EXIT


def test_a_call_forbidden_while_the_guest_runs_ends_the_run(program: Path) -> None:
    process = under(filter_file(KVM_RUN="kill_process"))
    with Machine(program, memory="32M", process=process) as machine, pytest.raises(Killed, match="KVM_RUN"):
        machine.run(timeout=60)


def test_a_machine_that_may_not_be_built_is_not(program: Path) -> None:
    with pytest.raises(Killed, match="KVM_CREATE_VM on a system file"):
        Machine(program, memory="32M", process=under(b'{"default_action": "kill_process", "rules": []}'))
