"""The typed face of the silicon: CPU models, cores, nested page tables and RAM of the engine, and the control block's layout."""

from softkvm._engine import Core, Memory, Model, NestedPageTable, build_info, feature_names, model_names, tsc, tsc_khz
from softkvm.silicon.core import (
    EMULATE_FIRST,
    EMULATE_ONE,
    EXIT_ACCESS,
    EXIT_BREAKPOINT,
    EXIT_BUDGET,
    EXIT_EMULATED,
    EXIT_MONITOR_TRAP_AMD,
    RIGHT_R,
    RIGHT_SAME,
    RIGHT_W,
    RIGHT_X,
    WAIVE_WALK,
    WAIVER_LIMIT,
    Vmcb,
)
from softkvm.silicon.memory import allocate

__all__ = [
    "EMULATE_FIRST",
    "EMULATE_ONE",
    "EXIT_ACCESS",
    "EXIT_BREAKPOINT",
    "EXIT_BUDGET",
    "EXIT_EMULATED",
    "EXIT_MONITOR_TRAP_AMD",
    "RIGHT_R",
    "RIGHT_SAME",
    "RIGHT_W",
    "RIGHT_X",
    "WAIVER_LIMIT",
    "WAIVE_WALK",
    "Core",
    "Memory",
    "Model",
    "NestedPageTable",
    "Vmcb",
    "allocate",
    "build_info",
    "feature_names",
    "model_names",
    "tsc",
    "tsc_khz",
]
