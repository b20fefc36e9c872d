"""What `softkvm run` was asked for, checked for contradictions before anything is fetched or started."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from softkvm.cli.errors import CliError

if TYPE_CHECKING:
    from softkvm.vmm.introspection_peer import PeerOptions

StatsFormat = Literal["table", "json"]
TIERS = ("interpreter", "translator", "auto")
"""How guest code may run."""


@dataclass(frozen=True)
class RunOptions:
    """The options of `softkvm run`; `kernel` is a path or a flavour of Debian's kernel, `timeout` is in seconds."""

    kernel: str = "cloud"
    initrd: str | None = None
    append: str = ""
    memory: str = "512M"
    cpus: int = 1
    cpu: str = "cascadelake"
    cores: int | None = None
    tier: str = "auto"
    kvm: tuple[str, ...] = ()
    timeout: float | None = None
    stats: StatsFormat | None = None
    contexts: bool = False
    json: bool = False
    command: tuple[str, ...] = ()
    extras: tuple[str, ...] = ()
    trace: tuple[str, ...] = ()
    trace_file: str | None = None
    audit: str | None = None
    ioctl_filter: str | None = None
    name: str | None = None
    restore: str | None = None
    tsc_khz: int | None = None
    deterministic: int | None = None
    introspection: str | None = None

    def peer(self) -> PeerOptions | None:
        """`--introspection`; CliError, one sentence."""
        if self.introspection is None:
            return None
        from softkvm.vmm import ConfigError
        from softkvm.vmm.introspection_peer import PeerOptions

        try:
            return PeerOptions.parse(self.introspection)
        except ConfigError as error:
            raise CliError(str(error)) from error

    def check(self) -> None:
        """Raise CliError, one sentence, for options that contradict each other."""
        if self.command and self.initrd is not None:
            raise CliError("a command runs in softkvm's own initramfs, so `-i` and `-- CMD` exclude each other")
        if self.extras and self.initrd is not None:
            raise CliError("packages are added to softkvm's own initramfs, so `-i` and `--with` exclude each other")
        if self.command and self.restore is not None:
            raise CliError("a snapshot goes on with what it was doing, so `--restore` and `-- CMD` exclude each other")
        self.peer()
        if self.timeout is not None and self.timeout <= 0:
            raise CliError(f"the time-out must be more than 0 seconds, not {self.timeout:g}")
        if self.deterministic is not None and self.cores is not None:
            raise CliError("`--deterministic` runs the vCPUs by turns, so `--cores` has no meaning beside it")
        if self.trace_file is not None and not self.trace:
            raise CliError("`--trace-file` says where events go, and `--trace` which; one without the other has no meaning")
