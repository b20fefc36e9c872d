"""What a caller may ask for, and the sentence for everything else."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

from softkvm.vmm import config
from softkvm.vmm.errors import ConfigError
from softkvm.vmm.layout import GIB, KIB, MIB

GOOD: dict[str, Any] = {
    "kernel": "vmlinuz",
    "initrd": None,
    "append": "",
    "memory": "512M",
    "cpu": "cascadelake",
    "cpus": 1,
    "serial": None,
    "kvm_parameters": (),
    "tsc_khz": None,
    "deterministic": None,
}


def test_good_configuration() -> None:
    checked = config.check(**GOOD | {"initrd": b"cpio", "cpu": "EPYC,-tsc-deadline,+sse4.1", "kvm_parameters": ["nrips=0"]})
    assert not checked.parameters.nrips
    assert checked.kernel == Path("vmlinuz")
    assert checked.initrd == b"cpio"
    assert checked.memory == 512 * MIB
    assert (checked.cpu, checked.features) == ("epyc", {"tsc-deadline": False, "sse4.1": True})


def test_check_takes_the_arguments_of_the_machine() -> None:
    assert set(inspect.signature(config.check).parameters) == set(GOOD)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512M", 512 * MIB),
        ("512", 512 * MIB),
        ("1G", GIB),
        ("1.5G", 3 * GIB // 2),
        ("0.5g", GIB // 2),
        ("65536k", 64 * MIB),
        ("1 GiB", GIB),
        ("256MB", 256 * MIB),
        (64 * MIB, 64 * MIB),
        (64 * MIB + 1, 64 * MIB),
        ("20000.3K", 20000 * KIB),
    ],
)
def test_memory_sizes(text: str | int, size: int) -> None:
    assert config.parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "lots", "M", "-1G", "1.2.3G", "1G2", "0x100M", "1e3M", "٣G", "nan", "1P"])
def test_text_that_is_not_a_size(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a memory size"):
        config.parse_memory(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [("0", "too small"), ("3M", "too small"), (-5, "too small"), ("1K", "too small"), ("256G", "too large"), ("9999999T", "too large")],
)
def test_impossible_sizes(text: str | int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config.parse_memory(text)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kernel": None}, "no kernel was given"),
        ({"kernel": None, "initrd": b"x"}, "an initrd was given without a kernel"),
        ({"cpus": 0}, "1 to 64 CPUs, not 0"),
        ({"cpus": 65}, "1 to 64 CPUs, not 65"),
        ({"kvm_parameters": ["nrip=0"]}, "KVM has no parameter 'nrip'"),
        ({"serial": {4: print}}, "no serial port 4"),
        ({"tsc_khz": 0}, "a TSC runs at 1 to 2147483647 kHz, not 0"),
        ({"cpu": "epyc,pcid"}, "not \\+feature or -feature"),
        ({"cpu": "epyc,+pcid,-pcid"}, "pcid both on and off"),
        ({"initrd": b""}, "the initrd is empty"),
        ({"initrd": "/nonexistent/initrd"}, "there is no initrd file /nonexistent/initrd"),
        ({"initrd": "/"}, "cannot be read: Is a directory"),
        ({"append": "a\nb"}, "one line of text"),
        ({"append": "a\0b"}, "one line of text"),
    ],
)
def test_mistakes_are_one_sentence(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as info:
        config.check(**GOOD | change)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    ("append", "line"),
    [
        ("", b""),
        ("  ", b""),
        ("quiet console=ttyS0,115200 ", b"quiet console=ttyS0,115200"),
        ("name=\u00e4", "name=\u00e4".encode()),
    ],
)
def test_command_line_is_utf_8(append: str, line: bytes) -> None:
    assert config.command_line(append) == line
