"""The command `softkvm`: what a person types, and nothing that a library user needs.

`main` is the console script's entry point. The command tree lives in `softkvm.cli.commands`; it is imported on the first call so that
importing this package costs nothing.
"""

from __future__ import annotations


def main() -> None:
    """Run the command line; ends the process with the exit status that `softkvm.cli.status` documents."""
    from softkvm.cli.commands import softkvm  # the command tree pulls in click: not a price for `import softkvm.cli`

    softkvm(prog_name="softkvm")


__all__ = ["main"]
