"""What can go wrong in the machine around a VM.

    ConfigError(ValueError)      the caller asked for a machine that cannot be; one plain sentence, ready to print
    StateError(ValueError)       a saved record that this version cannot restore

A guest cannot cause either: whatever it does ends in a `Stop` (see `stop.py`). Errors of KVM itself stay the `OSError` that KVM raised.
"""

from __future__ import annotations


class ConfigError(ValueError):
    """A bad or contradicting setting, a file that is missing or is not what it should be; the message is one sentence."""


class StateError(ValueError):
    """A saved device record of another version or with impossible values."""
