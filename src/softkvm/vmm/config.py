"""What a caller may ask of a machine, checked: every mistake is a `ConfigError` of one sentence before anything is built."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from softkvm import kvm
from softkvm.host.clock import Clock
from softkvm.vmm import layout
from softkvm.vmm.errors import ConfigError
from softkvm.vmm.layout import GIB, KIB, MIB

SerialBackend = Callable[[bytes], object]
"""Takes what the guest sends on a serial port, a piece at a time, on a vCPU's thread; what it raises comes out of `Machine.run()`."""

DEFAULT_MEMORY = "512M"
DEFAULT_CPU = "cascadelake"
DEFAULT_TIER = "auto"

SMALLEST_MEMORY = 4 * MIB
LARGEST_MEMORY = layout.RAM_BELOW_4G.size + layout.RAM_ABOVE_4G.size
MOST_CPUS = 64
LARGEST_TSC_KHZ = (1 << 31) - 1
LARGEST_SEED = (1 << 64) - 1

_PAGE = 4096
_UNITS = {"": MIB, "K": KIB, "M": MIB, "G": GIB, "T": 1024 * GIB}
_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,6})?) ?([KMGT]?)(?:i?B)?", re.IGNORECASE | re.ASCII)
_FEATURE = re.compile(r"[+-][a-z0-9][a-z0-9_.-]*", re.ASCII)


@dataclass(frozen=True)
class Hardware:
    """What a machine is made of, whatever runs on it."""

    memory: int
    """Bytes of RAM, whole pages."""
    cpu: str
    features: Mapping[str, bool]
    cpus: int
    parameters: kvm.Parameters

    @property
    def cpu_name(self) -> str:
        """The model with the features that were switched, as `parse_cpu()` takes it."""
        return ",".join([self.cpu, *(f"{'+' if on else '-'}{name}" for name, on in self.features.items())])


@dataclass(frozen=True)
class Config(Hardware):
    """A machine that can be booted."""

    kernel: Path
    initrd: bytes | None
    command_line: bytes
    serial: Mapping[int, SerialBackend] = field(default_factory=dict)
    seed: int | None = None
    """Of a deterministic machine."""
    tsc_khz: int | None = None
    """Rate of the guest's TSC, None for the host's."""


@dataclass(frozen=True)
class Surroundings:
    """What a machine uses of the process that it is in."""

    serial: Mapping[int, SerialBackend]
    output_limit: int
    clock: Clock
    process: kvm.Process
    cores: int | None
    seed: int | None = None
    """Of a deterministic machine, whose clock is a virtual one."""
    tsc_khz: int | None = None
    """Rate of the vCPUs' TSCs."""
    tier: str = DEFAULT_TIER


def check(
    kernel: str | Path | None,
    initrd: str | Path | bytes | None,
    append: str,
    memory: str | int,
    cpu: str,
    cpus: int,
    serial: Mapping[int, SerialBackend] | None,
    kvm_parameters: Iterable[str] = (),
    deterministic: int | None = None,
    tsc_khz: int | None = None,
) -> Config:
    """The configuration for the arguments of `Machine`; ConfigError names the first mistake."""
    if kernel is None:
        raise ConfigError("an initrd was given without a kernel" if initrd is not None else "no kernel was given")
    if not 1 <= cpus <= MOST_CPUS:
        raise ConfigError(f"a machine has 1 to {MOST_CPUS} CPUs, not {cpus}")
    if deterministic is not None and not 0 <= deterministic <= LARGEST_SEED:
        raise ConfigError(f"the seed of a deterministic machine is a number from 0 to {LARGEST_SEED}, not {deterministic}")
    if tsc_khz is not None and not 1 <= tsc_khz <= LARGEST_TSC_KHZ:
        raise ConfigError(f"a TSC runs at 1 to {LARGEST_TSC_KHZ} kHz, not {tsc_khz}")
    ports = check_serial(serial)
    name, features = parse_cpu(cpu)
    return Config(
        kernel=Path(kernel),
        memory=parse_memory(memory),
        initrd=read_initrd(initrd),
        command_line=command_line(append),
        cpu=name,
        features=features,
        cpus=cpus,
        parameters=parse_parameters(kvm_parameters),
        serial=ports,
        seed=deterministic,
        tsc_khz=tsc_khz,
    )


def check_serial(serial: Mapping[int, SerialBackend] | None) -> Mapping[int, SerialBackend]:
    """The listeners of the serial ports that there are."""
    ports = dict(serial or {})
    for port in ports:
        if port not in range(len(layout.SERIAL_PORTS)):
            raise ConfigError(f"there is no serial port {port}; the machine has ports 0 to {len(layout.SERIAL_PORTS) - 1}")
    return ports


def parse_memory(memory: str | int) -> int:
    """Bytes of RAM from a number of bytes or from text such as `512M` or `1.5G` (no unit: MB), rounded down to whole pages."""
    if isinstance(memory, int):
        size = memory
    elif match := _SIZE.fullmatch(memory.strip()):
        size = int(float(match[1]) * _UNITS[match[2].upper()])
    else:
        raise ConfigError(f"{memory!r} is not a memory size; write for example 512M or 2G")
    if size < SMALLEST_MEMORY:
        raise ConfigError(f"{memory!r} is too small for the memory of a machine; it needs at least {SMALLEST_MEMORY // MIB}M")
    if size > LARGEST_MEMORY:
        raise ConfigError(f"{memory!r} is too large for the memory of a machine; it can have at most {LARGEST_MEMORY // GIB}G")
    return size & -_PAGE


def parse_cpu(cpu: str) -> tuple[str, dict[str, bool]]:
    """Model name and switched features from text such as `cascadelake,-pcid,+avx2`; the names themselves are checked by KVM."""
    name, *switches = cpu.strip().lower().split(",")
    features: dict[str, bool] = {}
    for switch in switches:
        if not _FEATURE.fullmatch(switch):
            raise ConfigError(f"{switch!r} in the CPU {cpu!r} is not +feature or -feature")
        feature, on = switch[1:], switch.startswith("+")
        if features.setdefault(feature, on) != on:
            raise ConfigError(f"the CPU {cpu!r} switches {feature} both on and off")
    return name, features


def parse_parameters(settings: Iterable[str]) -> kvm.Parameters:
    """Module parameters of KVM from texts such as `nrips=0`."""
    try:
        return kvm.Parameters.parse(settings)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def read_initrd(initrd: str | Path | bytes | None) -> bytes | None:
    """The initial RAM disk's bytes."""
    if initrd is None:
        return None
    if isinstance(initrd, bytes):
        data = initrd
    else:
        try:
            data = Path(initrd).read_bytes()
        except FileNotFoundError as error:
            raise ConfigError(f"there is no initrd file {initrd}") from error
        except OSError as error:
            raise ConfigError(f"the initrd file {initrd} cannot be read: {error.strerror}") from error
    if not data:
        raise ConfigError("the initrd is empty")
    return data


def command_line(append: str) -> bytes:
    """The kernel command line as bytes."""
    if "\0" in append or "\n" in append:
        raise ConfigError("the kernel command line must be one line of text")
    return append.strip().encode()
