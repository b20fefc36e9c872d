"""What the shell completes an argument to."""

from __future__ import annotations

import click
from click.shell_completion import CompletionItem


def cpus(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """CPU models."""
    from softkvm import silicon

    return [CompletionItem(name) for name in silicon.model_names() if name.startswith(incomplete)]


def vms(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Running VMs."""
    from softkvm.vmm import ConfigError
    from softkvm.vmm.monitor import running

    try:
        return [CompletionItem(name) for name in running() if name.startswith(incomplete)]
    except ConfigError:  # there is no place for sockets, and so no VM to name; the command itself will say so
        return []
