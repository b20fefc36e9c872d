"""Errors that a person at the command line can act upon.

    CliError                 one plain sentence on stderr, exit status 125
    ├── GuestUnavailable     the default guest is not in the cache and cannot be fetched
    └── CacheError           the cache directory cannot be written or holds damaged files

Anything else that leaves a command is either `vmm.ConfigError` (bad input, the same sentence and status) or a bug in softkvm, which
`softkvm.cli.report` writes down.
"""

from __future__ import annotations


class CliError(Exception):
    """A mistake or a missing thing outside softkvm; the message is one sentence, ready to follow a colon, that says what
    and, where certain, the remedy."""


class GuestUnavailable(CliError):
    """Kernel or busybox are neither cached nor to be had from apt."""


class CacheError(CliError):
    """The cache directory cannot be used: no space, no permission, or a file that does not match its record."""
