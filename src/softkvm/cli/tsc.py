"""`softkvm tsc`: the clocks of a running VM, as KVM keeps them."""

from __future__ import annotations

import click
import msgspec

from softkvm import kvm
from softkvm.cli import output, status, vms
from softkvm.cli.errors import CliError

_KHZ_NSEC = 1_000_000
_NSEC = 1_000_000_000
_TSC_COLUMNS = ("vCPU", "offset", "ratio", "kHz", "generation", "TSC_ADJUST")
_KVMCLOCK_COLUMNS = ("vCPU", "page", "at TSC", "kvmclock (s)", "multiplier", "shift", "flags")
_FLAGS = {1: "stable", 2: "stopped"}


def show(name: str | None, as_json: bool) -> int:
    """Print the clocks of the VM `name`, or of the only one that runs, on standard output."""
    with vms.connected(name) as vm:
        answer = vm.execute("query-tsc")
        title = f"Clocks of {vm.name}"
    try:
        clocks = msgspec.convert(answer, kvm.TscStatus)
    except msgspec.ValidationError as error:
        raise CliError(f"the VM's answer is not to be understood: {error}") from error
    if as_json:
        click.echo(msgspec.json.encode(answer))
        return status.SUCCESS
    output.table(title, ("clock", "now"), _vm_rows(clocks), on_stdout=True)
    output.table("TSC", _TSC_COLUMNS, [_tsc_row(vcpu) for vcpu in clocks.vcpus], on_stdout=True)
    pages = [_kvmclock_row(vcpu.vcpu_id, vcpu.kvmclock_page, vcpu.hv_clock) for vcpu in clocks.vcpus if vcpu.kvmclock_page is not None]
    output.table("kvmclock, as last written to the guest", _KVMCLOCK_COLUMNS, pages, on_stdout=True)
    return status.SUCCESS


def _vm_rows(clocks: kvm.TscStatus) -> list[tuple[str, str]]:
    in_phase = sum(vcpu.matched for vcpu in clocks.vcpus)
    spread = _spread(clocks)
    return [
        ("host TSC", f"{clocks.host_tsc} at {clocks.host_tsc_khz} kHz"),
        ("generation", f"{clocks.cur_tsc_generation}, with {in_phase} of {clocks.online_vcpus} vCPUs"),
        ("guest TSCs apart", "their rates differ" if spread is None else f"{spread} cycles"),
        ("master clock", f"on, {_age(clocks)} s old" if clocks.use_master_clock else "off"),
        ("kvmclock", f"{_seconds(clocks.kvmclock)} s"),
        ("wall clock", f"{_seconds(clocks.realtime)} s"),
        ("kvmclock was 0 at", f"{_seconds(clocks.realtime - clocks.kvmclock)} s"),
    ]


def _age(clocks: kvm.TscStatus) -> str:
    return _seconds((clocks.host_tsc - clocks.master_cycle_now) * _KHZ_NSEC // clocks.host_tsc_khz)


def _spread(clocks: kvm.TscStatus) -> int | None:
    """Cycles between the first and the last vCPU's TSC at one instant; None if they do not run at one rate."""
    if len({vcpu.virtual_tsc_khz for vcpu in clocks.vcpus}) > 1:
        return None
    readings = [vcpu.guest_tsc for vcpu in clocks.vcpus]
    return max(readings, default=0) - min(readings, default=0)


def _tsc_row(vcpu: kvm.VcpuTscStatus) -> tuple[str, ...]:
    ratio = vcpu.tsc_scaling_ratio / (1 << vcpu.tsc_scaling_ratio_frac_bits)
    generation = f"{vcpu.this_tsc_generation}{'' if vcpu.matched else ' (old)'}"
    adjust = str(_signed(vcpu.ia32_tsc_adjust))
    scaling = "catches up" if vcpu.tsc_catchup else f"{ratio:.9g}"
    return (str(vcpu.vcpu_id), str(_signed(vcpu.tsc_offset)), scaling, str(vcpu.virtual_tsc_khz), generation, adjust)


def _kvmclock_row(vcpu_id: int, page: int, info: kvm.TimeInfo | None) -> tuple[str, ...]:
    if info is None:
        return (str(vcpu_id), f"{page:#x}", "not yet", "", "", "", "")
    flags = " ".join(name for bit, name in _FLAGS.items() if info.flags & bit)
    scale = (f"{info.tsc_to_system_mul:#x}", str(info.tsc_shift))
    return (str(vcpu_id), f"{page:#x}", str(info.tsc_timestamp), _seconds(info.system_time), *scale, flags)


def _signed(value: int) -> int:
    return value - (value >> 63 << 64)


def _seconds(ns: int) -> str:
    sign, ns = ("-", -ns) if ns < 0 else ("", ns)
    return f"{sign}{ns // _NSEC}.{ns % _NSEC:09d}"
