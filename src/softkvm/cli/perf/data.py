"""A perf.data file, as perf of Linux 6.1 reads it.

Answers to `tools/perf/Documentation/perf.data-file-format.txt` and `uapi/linux/perf_event.h` of Linux 6.1. Samples are written as if they
were taken inside the guest. Beside the file lies what `perf report` needs to name addresses: the kernel's symbols, the guest's programs.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from softkvm.cli.perf.guest import GuestView, Process
from softkvm.cli.perf.sampler import Sample
from softkvm.host.perf.event import Attr
from softkvm.uapi.perf import ATTR_SIZE, PERF_RECORD_MISC_KERNEL, PERF_RECORD_MISC_USER, Record, SampleFormat
from softkvm.vmi.linux.kernel import Kernel

_HEADER_SIZE = 104
_MAGIC = b"PERFILE2"
_FEATURE_HOSTNAME, _FEATURE_OSRELEASE, _FEATURE_ARCH, _FEATURE_BRANCH_STACK = 3, 4, 6, 15
_FLAG_EXCLUDE_USER, _FLAG_EXCLUDE_KERNEL, _FLAG_MMAP, _FLAG_COMM, _FLAG_MMAP2 = 1 << 4, 1 << 5, 1 << 8, 1 << 9, 1 << 23
_SAMPLE = SampleFormat.IP | SampleFormat.TID | SampleFormat.TIME | SampleFormat.CPU | SampleFormat.PERIOD
_PROT_READ, _PROT_EXEC, _MAP_PRIVATE = 1, 4, 2
_KERNEL_MAP_END = 0xFFFF_FFFF_FF00_0000
_PREDICTED, _MISPREDICTED = 1 << 1, 1 << 0
_SWAPPER = Process(0, "swapper")
"""Whom samples belong to before there is a task that says so."""


def write(path: Path, attr: Attr, samples: Sequence[Sample], view: GuestView, exec_name: str) -> None:
    """Write the file `path`, `path`.kallsyms, and the directory `path`.symfs with the programs; OSError."""
    data = b"".join(_records(attr, samples, view))
    attributes = _attribute(attr)
    start = _HEADER_SIZE + len(attributes)
    features = _features(attr, view, exec_name)
    blobs_at = start + len(data) + 16 * len(features)
    table, blobs = b"", b""
    for _, blob in features:
        table += struct.pack("<QQ", blobs_at + len(blobs), len(blob))
        blobs += blob
    bitmap = sum(1 << number for number, _ in features)
    sections = (_HEADER_SIZE, len(attributes), start, len(data), 0, 0)
    header = _MAGIC + struct.pack("<QQ6Q4Q", _HEADER_SIZE, ATTR_SIZE + 16, *sections, bitmap, 0, 0, 0)
    path.write_bytes(header + attributes + data + table + blobs)
    _write_symbols(path, view)


def _write_symbols(path: Path, view: GuestView) -> None:
    if view.kernel is not None:
        lines = (f"{symbol.address:016x} {symbol.kind} {symbol.name}\n" for symbol in view.kernel.symbols if symbol.address >> 63)
        Path(f"{path}.kallsyms").write_text("".join(lines))
    root = Path(f"{path}.symfs")
    for name, content in view.files.items():
        target = root.joinpath(*(part for part in PurePosixPath(name).parts if part not in ("/", "..")))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)


def _attribute(attr: Attr) -> bytes:
    """`struct perf_event_attr`, and an empty section of ids."""
    sample_type = _SAMPLE | (SampleFormat.BRANCH_STACK if attr.has_branch_stack else 0)
    flags = _FLAG_MMAP | _FLAG_COMM | _FLAG_MMAP2
    flags |= (_FLAG_EXCLUDE_USER if attr.exclude_user else 0) | (_FLAG_EXCLUDE_KERNEL if attr.exclude_kernel else 0)
    fields = (attr.type, ATTR_SIZE, attr.config, attr.sample_period, sample_type, 0, flags, 0, 0, 0, 0, attr.branch_sample_type)
    return struct.pack("<IIQQQQQIIQQQ", *fields).ljust(ATTR_SIZE, b"\0") + bytes(16)


def _features(attr: Attr, view: GuestView, exec_name: str) -> list[tuple[int, bytes]]:
    release = view.kernel.release if view.kernel is not None else exec_name
    features = [(_FEATURE_HOSTNAME, _string("softkvm")), (_FEATURE_OSRELEASE, _string(release)), (_FEATURE_ARCH, _string("x86_64"))]
    return [*features, (_FEATURE_BRANCH_STACK, b"")] if attr.has_branch_stack else features


def _string(text: str) -> bytes:
    data = text.encode() + b"\0"
    data = data.ljust(-(-len(data) // 64) * 64, b"\0")
    return struct.pack("<I", len(data)) + data


# --- Records -----------------------------------------------------------------------------------------------------------------------


def _records(attr: Attr, samples: Sequence[Sample], view: GuestView) -> Iterator[bytes]:
    if view.kernel is not None:
        yield _kernel_map(view.kernel)
    known: dict[int, Process] = {}
    for sample in samples:
        process = sample.process or _SWAPPER
        if known.get(process.pid) is not process:
            known[process.pid] = process
            yield from _describe(process)
        yield _sample(attr, sample, process)


def _record(kind: Record, misc: int, body: bytes) -> bytes:
    return struct.pack("<IHH", kind, misc, 8 + len(body)) + body


def _name(text: str) -> bytes:
    data = text.encode(errors="replace")[:4000] + b"\0"
    return data.ljust(-(-len(data) // 8) * 8, b"\0")


def _kernel_map(kernel: Kernel) -> bytes:
    start = kernel.symbols["_text"]
    body = struct.pack("<IIQQQ", 0xFFFF_FFFF, 0, start, _KERNEL_MAP_END - start, start) + _name("[kernel.kallsyms]_text")
    return _record(Record.MMAP, PERF_RECORD_MISC_KERNEL, body)


def _describe(process: Process) -> Iterator[bytes]:
    """The process's name, and what it has mapped to execute."""
    yield _record(Record.COMM, 0, struct.pack("<II", process.pid, process.pid) + _name(process.name))
    for area in process.areas:
        place = (process.pid, process.pid, area.start, area.end - area.start, area.offset, 0, 0, area.inode, 0)
        body = struct.pack("<IIQQQIIQQII", *place, _PROT_READ | _PROT_EXEC, _MAP_PRIVATE) + _name(area.name or "//anon")
        yield _record(Record.MMAP2, PERF_RECORD_MISC_USER, body)


def _sample(attr: Attr, sample: Sample, process: Process) -> bytes:
    body = struct.pack("<QIIQIIQ", sample.ip, process.pid, process.pid, sample.time, sample.cpu, 0, attr.sample_period)
    if attr.has_branch_stack:
        body += struct.pack("<Q", len(sample.branches))
        for branch in sample.branches:
            flags = (_MISPREDICTED if branch.mispredicted else _PREDICTED) | branch.cycles << 4
            body += struct.pack("<QQQ", branch.from_, branch.to, flags)
    return _record(Record.SAMPLE, PERF_RECORD_MISC_USER if sample.user else PERF_RECORD_MISC_KERNEL, body)
