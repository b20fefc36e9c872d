"""The command `softkvm`: what a person types, and nothing that a library user needs.

`main` is the console script's entry point. The command tree lives in `softkvm.cli.app`; it is imported on the first call so that
importing this package costs nothing.
"""

from __future__ import annotations


def main() -> int:
    """Run the command line and return the exit status, one of those that `softkvm.cli.status` lists."""
    from softkvm.cli import app  # pulls in click: not a price for `import softkvm.cli`

    return app.main()


__all__ = ["main"]
