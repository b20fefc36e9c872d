"""Where the engine is not built, its stand-in takes its place, so that every test of the Python floors runs without Rust."""

from __future__ import annotations

import importlib.util
import sys

import softkvm

if importlib.util.find_spec("softkvm._engine") is None:
    from tests import fake_engine

    sys.modules["softkvm._engine"] = fake_engine
    softkvm._engine = fake_engine
