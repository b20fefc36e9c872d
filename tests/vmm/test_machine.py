"""The machine as its users see it, on a KVM whose guests are scripts."""

from __future__ import annotations

import errno
import itertools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from softkvm.host.clock import VirtualClock
from softkvm.uapi import kvm as uapi
from softkvm.vmm import ConfigError, Machine, RunState, Status, StopReason, assembly, layout, machine
from tests.vmm.boot import images
from tests.vmm.fake_kvm import Exit, FakeKvm, fail, in_, load, out, outs, reason, say, store

PANIC = "[    1.0] Kernel panic - not syncing: Attempted to kill init!\r\n"
S5 = out(layout.PM1A_CONTROL.base, 5 << 10 | 1 << 13, 2)
RESET = out(0xCF9, 6)

Boot = Callable[..., Machine]


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    path = tmp_path / "vmlinuz"
    path.write_bytes(images.bzimage())
    return path


@pytest.fixture
def boot(kernel: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Boot]:
    """Make machines whose guest plays the given exits."""
    machines: list[Machine] = []

    def make(exits: Iterator[Exit] | list[Exit], **options: Any) -> Machine:
        fake = FakeKvm(lambda: iter(exits))
        install(monkeypatch, fake)
        settings: dict[str, Any] = {"kernel": kernel, "memory": "64M", "clock": VirtualClock()}
        made = Machine(**settings | options)
        machines.append(made)
        return made

    yield make
    for made in machines:
        made.close()


def install(monkeypatch: pytest.MonkeyPatch, fake: FakeKvm) -> None:
    """Give the machine's modules a KVM to build upon."""
    for module in (machine, assembly):
        monkeypatch.setattr(module, "kvm", fake)


def vm_of(made: Machine) -> Any:
    return machine.kvm.vm  # type: ignore[attr-defined]  # the fake


# How runs end


@pytest.mark.parametrize(
    ("exits", "expected", "detail"),
    [
        ([S5], StopReason.POWER_OFF, "off"),
        ([RESET], StopReason.RESET, "reset"),
        ([out(0x64, 0xFE)], StopReason.RESET, "reset"),
        ([reason(uapi.KVM_EXIT_SHUTDOWN)], StopReason.TRIPLE_FAULT, "double fault"),
        ([reason(uapi.KVM_EXIT_SYSTEM_EVENT, type=uapi.KVM_SYSTEM_EVENT_SHUTDOWN)], StopReason.POWER_OFF, "system event"),
        ([reason(uapi.KVM_EXIT_SYSTEM_EVENT, type=99)], StopReason.INTERNAL_ERROR, "system event 99"),
        ([reason(uapi.KVM_EXIT_FAIL_ENTRY, hardware_entry_failure_reason=0x80000021)], StopReason.INTERNAL_ERROR, "0x80000021"),
        ([reason(uapi.KVM_EXIT_INTERNAL_ERROR, suberror=1, ndata=2)], StopReason.INTERNAL_ERROR, "emulated (0x0, 0x0)"),
        ([reason(uapi.KVM_EXIT_INTERNAL_ERROR, suberror=77, ndata=1 << 31)], StopReason.INTERNAL_ERROR, "internal error 77"),
        ([reason(uapi.KVM_EXIT_HLT)], StopReason.INTERNAL_ERROR, "exit reason hlt"),
        ([reason(4711)], StopReason.INTERNAL_ERROR, "exit reason 4711"),
        ([fail(errno.EFAULT)], StopReason.INTERNAL_ERROR, "Bad address"),
        ([*say(PANIC), RESET], StopReason.PANIC, "Attempted to kill init!"),
        ([*say(PANIC), reason(uapi.KVM_EXIT_SHUTDOWN)], StopReason.PANIC, "Attempted to kill init!"),
        ([*say(PANIC + "---[ end Kernel panic - not syncing ]---\n")], StopReason.PANIC, "Attempted to kill init!"),
        ([*say(PANIC), S5], StopReason.POWER_OFF, "off"),
    ],
)
def test_ends_of_a_guest(boot: Boot, exits: list[Exit], expected: StopReason, detail: str) -> None:
    vm = boot([*exits, *say("never printed")])
    stop = vm.run(timeout=60)
    assert stop.reason is expected
    assert detail in stop.detail
    assert stop.reason.final
    assert stop.rip == 0x1000200 + len(exits)
    assert vm.run() is stop, "a guest that is over stays over"
    assert "never" not in vm.text


def test_debug_exit_gives_its_status(boot: Boot) -> None:
    stop = boot([out(0xF4, 1, 4)]).run(timeout=60)
    assert (stop.reason, stop.status) == (StopReason.EXIT, 3)


def test_run_until_text_and_go_on(boot: Boot) -> None:
    vm = boot([*say("debian login: "), *say("welcome\n"), S5])
    stop = vm.run(until="login: ", timeout=60)
    assert (stop.reason, stop.detail) == (StopReason.UNTIL, "login: ")
    assert vm.output == b"debian login: ", "the guest must stand still at once"
    assert not stop.reason.final
    assert vm.run(timeout=60).reason is StopReason.POWER_OFF
    assert vm.text == "debian login: welcome\n"


def test_text_that_is_there_already_is_found_without_running(boot: Boot) -> None:
    vm = boot([outs(0x3F8, b"one two three"), S5])
    assert vm.run(until="one", timeout=60).reason is StopReason.UNTIL
    assert vm.run(until="three", timeout=60).reason is StopReason.UNTIL
    assert vm.run(until="one", timeout=60).reason is StopReason.POWER_OFF


def test_timeout_stops_a_halted_guest(boot: Boot) -> None:
    vm = boot([])
    stop = vm.run(timeout=0)
    assert stop.reason is StopReason.TIMEOUT
    assert vm.run(timeout=0.001).reason is StopReason.TIMEOUT


def test_stop_from_another_thread_ends_the_run(boot: Boot) -> None:
    started = threading.Event()
    vm = boot(say("x" * 10), serial={0: lambda data: started.set()})

    def stop_it() -> None:
        assert started.wait(60)
        vm.stop()

    stopper = threading.Thread(target=stop_it)
    stopper.start()
    assert vm.run(timeout=60).reason is StopReason.INTERRUPTED
    stopper.join()
    assert vm.run(timeout=0).reason is StopReason.TIMEOUT, "one stop ends one run"


def test_stop_before_a_run_ends_that_run(boot: Boot) -> None:
    vm = boot(say("hello"))
    vm.stop()
    assert vm.run(timeout=60).reason is StopReason.INTERRUPTED
    assert vm.output == b""
    assert vm.run(until="hello", timeout=60).reason is StopReason.UNTIL


def test_pause_parks_a_guest_within_its_run_and_between_runs(boot: Boot) -> None:
    printed, go_on = threading.Event(), threading.Event()

    def listener(data: bytes) -> None:
        printed.set()
        assert go_on.wait(60)

    vm = boot([*say("x"), *say("yz"), S5], serial={0: listener})
    vm.pause()
    assert vm.run(timeout=0).reason is StopReason.TIMEOUT
    assert vm.output == b"", "a paused guest does not move in a new run"
    outcome: list[StopReason] = []
    runner = threading.Thread(target=lambda: outcome.append(vm.run(timeout=60).reason))
    vm.resume()
    assert vm.status().state is RunState.STOPPED
    runner.start()
    assert printed.wait(60)
    assert vm.status().state is RunState.RUNNING
    pauser = threading.Thread(target=vm.pause)
    pauser.start()
    go_on.set()
    pauser.join()
    if not outcome:  # the guest may have been quicker
        assert vm.status().state is RunState.PAUSED
    vm.resume()
    runner.join()
    assert outcome == [StopReason.POWER_OFF]
    assert vm.output == b"xyz"


def test_stop_ends_the_run_of_a_paused_guest(boot: Boot) -> None:
    vm = boot(say("hello"))
    vm.pause()
    vm.stop()
    assert vm.run(timeout=60).reason is StopReason.INTERRUPTED
    assert vm.status() == Status(RunState.STOPPED, "cascadelake", 1, 64 << 20)
    vm.resume()
    assert vm.run(until="hello", timeout=60).reason is StopReason.UNTIL


@pytest.fixture
def ctrl_c() -> Iterator[Callable[[bytes], None]]:
    """Sends this process a SIGINT that raises KeyboardInterrupt, even where it was started with SIGINT ignored, as a shell's job is."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda data: os.kill(os.getpid(), signal.SIGINT)
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_comes_out_of_run_with_the_guest_at_rest(boot: Boot, ctrl_c: Callable[[bytes], None]) -> None:
    vm = boot(say("x"), serial={0: ctrl_c})
    interval = sys.getswitchinterval()
    with pytest.raises(KeyboardInterrupt):
        vm.run(timeout=60)
    assert sys.getswitchinterval() == interval
    assert vm.run(timeout=0).reason is StopReason.TIMEOUT


def test_exception_of_a_listener_comes_out_of_run_with_the_position(boot: Boot) -> None:
    def broken(data: bytes) -> None:
        raise BrokenPipeError("nobody reads")

    vm = boot(say("ab"), serial={0: broken})
    with pytest.raises(BrokenPipeError) as info:
        vm.run(timeout=60)
    assert info.value.__notes__ == [f"the guest was at {0x1000201:#x} on vCPU 0"]
    assert vm.output == b"a", "the guest must stop at that byte"


def test_run_cannot_be_nested_and_not_follow_close(boot: Boot) -> None:
    errors: list[str] = []

    def run_again(data: bytes) -> None:
        with pytest.raises(RuntimeError, match="running already") as info:
            vm.run()
        errors.append(str(info.value))

    vm = boot([*say("x"), S5], serial={0: run_again})
    vm.run(timeout=60)
    assert errors == ["the machine is running already"]
    vm.close()
    vm.close()
    with pytest.raises(RuntimeError, match="closed"):
        vm.run()
    assert vm_of(vm).closed
    assert vm_of(vm).vcpus[0].closed


def test_listeners_get_the_output_of_their_ports(boot: Boot) -> None:
    got: dict[int, bytearray] = {port: bytearray() for port in range(4)}
    places = [place.base for place in layout.SERIAL_PORTS]
    exits = [outs(base, f"port {port}".encode()) for port, base in enumerate(places)]
    vm = boot([*exits, S5], serial={port: data.extend for port, data in got.items()})
    vm.run(timeout=60)
    assert [bytes(data) for data in got.values()] == [b"port 0", b"port 1", b"port 2", b"port 3"]
    assert vm.output == b"port 0"


def test_sent_bytes_reach_the_guest_and_raise_its_line(boot: Boot) -> None:
    vm = boot([out(0x3FC, 8), out(0x3F9, 1), in_(0x3F8), in_(0x3F8), S5])
    vm.send("hé"[:1])
    vm.send(b"i")
    with pytest.raises(ValueError, match="no serial port 7"):
        vm.send("x", port=7)
    vm.run(timeout=60)
    assert vm_of(vm).vcpus[0].answers == [b"h", b"i"]
    assert vm_of(vm).levels == [(4, 1), (4, 0)]


def test_unclaimed_ports_and_memory_read_as_all_ones(boot: Boot) -> None:
    vm = boot([in_(0x80, 4), in_(0x300, 2, count=3), load(0xFED00000, 8), store(0xFED00000, 1, 4), S5])
    vm.run(timeout=60)
    assert vm_of(vm).vcpus[0].answers == [b"\xff" * 4, b"\xff" * 6, b"\xff" * 8]


def test_configuration_space_is_in_memory_too(boot: Boot) -> None:
    vm = boot([load(layout.PCI_ECAM.base, 4), S5])
    vm.run(timeout=60)
    assert vm_of(vm).vcpus[0].answers == [bytes.fromhex("361b0800")]


def test_power_button_asks_the_guest_through_sci(boot: Boot) -> None:
    vm = boot([out(layout.PM1A_EVENT.base + 2, 1 << 8, 2), *say("x"), in_(layout.PM1A_EVENT.base, 2), S5])
    vm.run(until="x", timeout=60)
    vm.press_power_button()
    vm.run(timeout=60)
    assert vm_of(vm).levels == [(layout.IRQ_SCI.gsi, 1)]
    assert vm_of(vm).vcpus[0].answers == [bytes((0, 1))]


# How it is built


def test_kvm_is_set_up_for_a_pc(boot: Boot) -> None:
    vm = vm_of(boot([], cpus=2))
    assert vm.calls == ["identity", "tss", "irqchip", "pit"]
    assert [(slot.guest_phys_addr, slot.memory_size) for slot in vm.slots] == [(0, 64 << 20)]
    assert all(slot.userspace_addr % 4096 == 0 for slot in vm.slots)
    assert len(vm.routes) == 15 + 23
    first, second = vm.vcpus
    assert (first.regs.rip, first.regs.rsi) == (0x1000200, layout.ZERO_PAGE.base)
    assert first.sregs.efer == 0x500
    assert second.regs.rip == 0
    assert (first.cpuid[0].ebx >> 24, second.cpuid[0].ebx >> 24) == (0, 1)
    assert first.msrs[0x2FF] == 0x806
    assert (bytes(first.lapic.regs)[0x351], bytes(second.lapic.regs)[0x351]) == (7, 0)


def test_all_vcpus_stop_together(boot: Boot) -> None:
    before = set(threading.enumerate())
    vm = boot(itertools.chain(say("go"), [S5]), cpus=3)
    assert vm.run(timeout=60).reason is StopReason.POWER_OFF
    threads = set(threading.enumerate()) - before
    assert {"softkvm-vcpu0", "softkvm-vcpu1", "softkvm-vcpu2"} <= {thread.name for thread in threads}
    vm.close()
    assert not any(thread.is_alive() for thread in threads)


def test_stats_count_exits_by_reason(boot: Boot) -> None:
    vm = boot([*say("abc"), load(0xFED00000, 4), S5])
    vm.run(timeout=60)
    stats = vm.stats()
    assert stats.user_exits == {"io": 4, "mmio": 1}
    assert list(stats.exits.items()) == [("IO_INSTRUCTION", 4), ("EPT_VIOLATION", 1)]
    assert (stats.instructions, stats.engine, stats.vcpu) == (5000, {"tlb_fills": 2}, {"exits": 5})
    assert stats.seconds > 0


def test_output_is_bounded(boot: Boot) -> None:
    vm = boot([*(outs(0x3F8, bytes(4000)) for _ in range(20)), S5], output_limit=1000)
    vm.run(timeout=60)
    assert len(vm.output) < 10_000


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kernel": None}, "no kernel was given"),
        ({"kernel": "/nonexistent/vmlinuz"}, "there is no kernel file /nonexistent/vmlinuz"),
        ({"kernel": "/etc/passwd"}, "/etc/passwd is not a Linux kernel"),
        ({"memory": "8M"}, "too small for the kernel"),
        ({"memory": "much"}, "is not a memory size"),
        ({"initrd": bytes(65 << 20)}, "does not fit into 64 MB"),
        ({"cpu": "z80"}, "there is no CPU model z80; there are cascadelake, epyc"),
        ({"append": "x" * 3000}, "kernel command line has"),
        ({"tsc_khz": 20_000_000}, "a TSC of 20000000 kHz is too fast for this silicon, whose own runs at 2000000 kHz"),
        ({"tsc_khz": 1_000_000}, "without TSC scaling no TSC is slower than the host's 2000000 kHz"),
        ({"deterministic": -1}, "the seed of a deterministic machine is a number from 0 to 18446744073709551615, not -1"),
        ({"deterministic": 1, "cores": 2}, "a deterministic machine has a clock and a processor of its own"),
    ],
)
def test_impossible_machines(boot: Boot, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        boot([], **options)


def test_memory_that_the_host_lacks(kernel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeKvm(lambda: iter(()))
    fake.memory_error = OSError(errno.ENOMEM, "Cannot allocate memory")
    install(monkeypatch, fake)
    with pytest.raises(ConfigError, match="this host cannot provide 512 MB of memory: Cannot allocate memory"):
        Machine(kernel, clock=VirtualClock())
