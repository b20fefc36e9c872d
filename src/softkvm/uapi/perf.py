"""The ABI of perf events: numbers of `struct perf_event_attr`, samples, branches. Answers to Linux 6.1 `uapi/linux/perf_event.h`."""

from __future__ import annotations

from enum import IntEnum, IntFlag

PERF_TYPE_HARDWARE = 0
PERF_TYPE_RAW = 4


class Hardware(IntEnum):
    """`enum perf_hw_id`: the generalised hardware events."""

    CPU_CYCLES = 0
    INSTRUCTIONS = 1
    CACHE_REFERENCES = 2
    CACHE_MISSES = 3
    BRANCH_INSTRUCTIONS = 4
    BRANCH_MISSES = 5
    BUS_CYCLES = 6
    REF_CPU_CYCLES = 9


class SampleFormat(IntFlag):
    """`enum perf_event_sample_format`: what a sample holds, in the order of the record."""

    IP = 1 << 0
    TID = 1 << 1
    TIME = 1 << 2
    ADDR = 1 << 3
    READ = 1 << 4
    CALLCHAIN = 1 << 5
    ID = 1 << 6
    CPU = 1 << 7
    PERIOD = 1 << 8
    STREAM_ID = 1 << 9
    RAW = 1 << 10
    BRANCH_STACK = 1 << 11
    IDENTIFIER = 1 << 16


class BranchSample(IntFlag):
    """`enum perf_branch_sample_type`: which branches a sample's stack holds."""

    USER = 1 << 0
    KERNEL = 1 << 1
    HV = 1 << 2
    ANY = 1 << 3
    ANY_CALL = 1 << 4
    ANY_RETURN = 1 << 5
    IND_CALL = 1 << 6
    COND = 1 << 10
    CALL_STACK = 1 << 11
    IND_JUMP = 1 << 12
    CALL = 1 << 13


class Record(IntEnum):
    """`enum perf_event_type`: the records of a ring buffer and of perf.data."""

    MMAP = 1
    COMM = 3
    SAMPLE = 9
    MMAP2 = 10


PERF_RECORD_MISC_KERNEL, PERF_RECORD_MISC_USER = 1, 2
PERF_CONTEXT_KERNEL, PERF_CONTEXT_USER = (1 << 64) - 128, (1 << 64) - 512
"""Entries of a call chain that say in which mode those behind them were."""

ATTR_SIZE = 112
"""Bytes of `struct perf_event_attr` up to `aux_watermark` and `sample_max_stack` (PERF_ATTR_SIZE_VER5): what files are written with."""
