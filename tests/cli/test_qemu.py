"""QEMU's command line: what is understood, what is refused, and what scripts find in the answers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from softkvm.cli import qemu, qemu_cpu, qemu_run
from softkvm.vmm import ConfigError, Stop, StopReason
from softkvm.vmm.config import MOST_CPUS

KVM_UNIT_TESTS = [
    *("--no-reboot", "-nodefaults", "-global", "kvm-pit.lost_tick_policy=discard", "-device", "pc-testdev"),
    *("-device", "isa-debug-exit,iobase=0xf4,iosize=0x4", "-display", "none", "-serial", "stdio"),
    *("-machine", "accel=tcg", "-kernel", "x86/apic.flat"),
]


def test_the_command_line_of_kvm_unit_tests() -> None:
    found = qemu.parse([*KVM_UNIT_TESTS, "-smp", "2", "-cpu", "max,+pcid", "-append", "-all but", "-m", "2048", "-initrd", "env"])
    assert (found.kernel, found.append, found.initrd) == ("x86/apic.flat", "-all but", "env")
    assert (found.cpus, found.cpu, found.memory) == (2, "max,+pcid", "2048")
    assert (found.serial, found.test_device) == ("stdio", True)
    assert found.answer is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-fda", "x"], "-fda: invalid option"),
        (["-kernel"], "-kernel: requires an argument"),
        (["-device", "edu"], "'edu' is not a valid device"),
        (["-device", "isa-debug-exit,iobase=0x501,iosize=0x4"], "0xf4"),
        (["-smp", "64000"], r"SMP CPUs.* \(64\)$"),
        (["-smp", "many"], "not a number of CPUs"),
        (["-machine", "accel=xen"], "invalid accelerator xen"),
        (["-accel", "xen"], "invalid accelerator xen"),
        (["-accel", "kvm,tier=cranelift"], "the tiers are interpreter, translator, auto"),
        (["-M", "q35,kernel-irqchip=split"], "interrupt controllers"),
        (["-machine", "vmport=on"], "VMware"),
        (["-display", "gtk"], "only none"),
        (["-serial", "tcp:1"], "only stdio"),
    ],
)
def test_what_is_refused(arguments: list[str], words: str) -> None:
    with pytest.raises(qemu.UsageError, match=words) as info:
        qemu.parse(arguments)
    assert "\n" not in str(info.value)


def test_machine_properties() -> None:
    assert qemu.parse(["-machine", "pit=off"]).warnings
    assert not qemu.parse(["-machine", "q35,accel=tcg,kernel-irqchip=on"]).warnings


def test_accelerators_and_their_tier() -> None:
    assert qemu.parse(["-machine", "accel=kvm,tier=interpreter"]).tier == "interpreter"
    assert qemu.parse(["-accel", "tcg,tier=translator"]).tier == "translator"
    assert qemu.parse(["-accel", "tcg"]).tier is None


def test_the_limit_of_cpus_is_the_machines() -> None:
    assert qemu.parse(["-smp", str(MOST_CPUS)]).cpus == MOST_CPUS
    with pytest.raises(qemu.UsageError):
        qemu.parse(["-smp", str(MOST_CPUS + 1)])


def test_a_probe_does_not_load_the_machine() -> None:
    code = "import sys; from softkvm.cli import qemu; qemu.main(['-device', '?']); sys.exit('softkvm.vmm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, stdout=subprocess.DEVNULL).returncode == 0


def test_probes(capfd: pytest.CaptureFixture[str]) -> None:
    assert qemu.main(["-device", "?"]) == 0
    assert '"pc-testdev"' in capfd.readouterr().out
    assert qemu.main(["-h"]) == 0
    assert capfd.readouterr().out.startswith("QEMU emulator version 7.2")
    assert qemu.main(["-kernel", "_NO_FILE_4Uhere_"]) == 1
    assert "could not open kernel file '_NO_FILE_4Uhere_'" in capfd.readouterr().err
    assert qemu.main([]) == 1
    assert "no -kernel" in capfd.readouterr().err


def test_bad_settings_are_one_sentence(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(b"")
    assert qemu.main(["-kernel", str(kernel), "-cpu", "z80"]) == 1
    assert "unknown CPU model" in capfd.readouterr().err
    assert qemu.main(["-kernel", str(kernel)]) == 1
    assert "not a Linux kernel" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("stop", "status"),
    [
        (Stop(StopReason.EXIT, 0, 0, "", 1), 1),
        (Stop(StopReason.EXIT, 0, 0, "", 0x203), 3),
        (Stop(StopReason.POWER_OFF, 0, 0, ""), 0),
        (Stop(StopReason.TRIPLE_FAULT, 0, 0, ""), 0),
        (Stop(StopReason.INTERNAL_ERROR, 0, 0, "why"), 1),
    ],
)
def test_exit_status(stop: Stop, status: int) -> None:
    assert qemu_run._status(stop) == status


def test_cpu_names() -> None:
    assert qemu_cpu.translate("max,vendor=AuthenticAMD")[0] == "epyc"
    assert qemu_cpu.translate("Opteron_G1,vendor=AuthenticAMD,-sse4_1")[0] == "epyc,-sse4-1"
    small = qemu_cpu.translate("qemu64,-x2apic,+pcid")[0].split(",")
    assert small[0] == "cascadelake"
    assert {"-x2apic", "+pcid", "-smap", "-xsave"} <= set(small)
    assert "-sse2" not in small
    assert qemu_cpu.translate("max,+vmx,vmx-mbec=off,host-phys-bits") == (
        qemu_cpu.translate("max")[0],
        ["this CPU does not support the requested feature vmx"],
    )


@pytest.mark.parametrize("text", ["z80", "max,vendor=Cyrix"])
def test_cpus_that_do_not_exist(text: str) -> None:
    with pytest.raises(ConfigError, match="-cpu"):
        qemu_cpu.translate(text)
