"""Traces in the binary form of trace-cmd, `trace.dat`: what `trace-cmd report` and KernelShark read.

Answers to trace-cmd.dat.v6(5) and to Linux 6.1 `Documentation/trace/ring-buffer-design.rst`, `include/linux/ring_buffer.h`. The file tells
the format of each event, then for each core pages of a ring buffer: a time, a length, and events with the time since the one before. The
pages are spooled beside the file while the trace runs, because what comes before them is known at the end only.
"""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import BinaryIO

from softkvm.host import trace
from softkvm.host.task import TIF_NEED_RESCHED, Task

_MAGIC = b"\x17\x08\x44tracing6\0"
_LITTLE, _LONG, _PAGE = 0, 8, 4096
_PAGE_HEAD = struct.Struct("<QQ")
_DELTA_BITS, _TIME_EXTEND = 27, 30
_COMMON = struct.Struct("<HBBi")
_TEXT, _ARRAY, _CODE = 16, 6, 16
"""Bytes of a text, numbers of a tuple, bytes of an instruction."""
_IRQS_OFF, _NEED_RESCHED, _HARDIRQ = 0x01, 0x04, 0x08
_FIRST_ID = 1
_NO_OPTIONS = 0

_HEADER_PAGE = """\
\tfield: u64 timestamp;\toffset:0;\tsize:8;\tsigned:0;
\tfield: local_t commit;\toffset:8;\tsize:8;\tsigned:1;
\tfield: int overwrite;\toffset:8;\tsize:1;\tsigned:1;
\tfield: char data;\toffset:16;\tsize:4080;\tsigned:0;
"""
_HEADER_EVENT = """\
# compressed entry header
\ttype_len    :    5 bits
\ttime_delta  :   27 bits
\tarray       :   32 bits

\tpadding     : type == 29
\ttime_extend : type == 30
\ttime_stamp : type == 31
\tdata max type_len  == 28
"""
_COMMON_FIELDS = """\
\tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;
\tfield:unsigned char common_flags;\toffset:2;\tsize:1;\tsigned:0;
\tfield:unsigned char common_preempt_count;\toffset:3;\tsize:1;\tsigned:0;
\tfield:int common_pid;\toffset:4;\tsize:4;\tsigned:1;

"""


class _Event:
    """How one tracepoint is laid out in the file."""

    def __init__(self, number: int, point: trace.Tracepoint) -> None:
        self.number, self.point = number, point
        self.kinds = [parameter.annotation for parameter in signature(point.print).parameters.values()]

    def format(self) -> str:
        """The text that tells the layout, as the kernel's `events/SYSTEM/NAME/format`."""
        lines, shown, arguments, offset = [], [], [], _COMMON.size
        for name, kind in zip(self.point.fields, self.kinds, strict=True):
            field = name.rstrip("_")
            if kind == "str":
                declaration, size, item = f"char {field}[{_TEXT}]", _TEXT, (f"{field}=%s", f"REC->{field}")
            elif kind == "bytes":
                declaration, size, item = f"u8 {field}[{_CODE}]", _CODE, (f"{field}=%s", f"__print_hex(REC->{field}, {_CODE})")
            elif kind.startswith("tuple"):
                declaration, size = f"unsigned long {field}[{_ARRAY}]", _LONG * _ARRAY
                places = ", ".join(f"REC->{field}[{index}]" for index in range(_ARRAY))
                item = (f"{field}=({', '.join(['%lx'] * _ARRAY)})", places)
            else:
                declaration, size, item = f"u64 {field}", _LONG, (f"{field}=0x%llx", f"REC->{field}")
            lines.append(f"\tfield:{declaration};\toffset:{offset};\tsize:{size};\tsigned:0;\n")
            shown.append(item[0])
            arguments.append(item[1])
            offset += size
        head = f"name: {self.point.name}\nID: {self.number}\nformat:\n{_COMMON_FIELDS}"
        return f'{head}{"".join(lines)}\nprint fmt: "{" ".join(shown)}", {", ".join(arguments)}\n'

    def encode(self, task: Task, values: Sequence[object]) -> bytes:
        """One hit."""
        flags = _IRQS_OFF * task.irqs_off | _NEED_RESCHED * bool(task.flags & TIF_NEED_RESCHED) | _HARDIRQ * bool(task.rcu_irq_nesting)
        parts = [_COMMON.pack(self.number, flags, task.preempt_count & 0xFF, task.tid)]
        for value in values:
            if isinstance(value, str):
                parts.append(value.encode(errors="replace")[: _TEXT - 1].ljust(_TEXT, b"\0"))
            elif isinstance(value, bytes):
                parts.append(value[:_CODE].ljust(_CODE, b"\0"))
            elif isinstance(value, tuple):
                parts.append(b"".join(_number(item) for item in (*value, *(0,) * _ARRAY)[:_ARRAY]))
            else:
                parts.append(_number(value))
        return b"".join(parts)


def _number(value: object) -> bytes:
    return (value & (1 << 64) - 1 if isinstance(value, int) else 0).to_bytes(_LONG, "little")


class _Cpu:
    """The pages of one core."""

    def __init__(self) -> None:
        self.spool: BinaryIO = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        self._data = bytearray()
        self._first = self._last = 0

    def add(self, now: int, event: bytes) -> None:
        """Append an event at `now` (ns), which never goes back."""
        now = max(now, self._last)
        record = struct.pack("<I", len(event) + 4) + event.ljust(-(-len(event) // 4) * 4, b"\0")
        if len(self._data) + len(record) + 12 > _PAGE - _PAGE_HEAD.size:
            self.flush()
        if not self._data:
            self._first = self._last = now
        delta, self._last = now - self._last, now
        if delta >> _DELTA_BITS:
            self._data += struct.pack("<II", _TIME_EXTEND | (delta & (1 << _DELTA_BITS) - 1) << 5, delta >> _DELTA_BITS & 0xFFFF_FFFF)
            delta = 0
        self._data += struct.pack("<I", delta << 5) + record

    def flush(self) -> None:
        """End the page."""
        if self._data:
            self.spool.write((_PAGE_HEAD.pack(self._first, len(self._data)) + self._data).ljust(_PAGE, b"\0"))
            self._data.clear()


class DatFile:
    """A `trace.dat` being recorded."""

    def __init__(self, path: str | Path, points: Sequence[trace.Tracepoint]) -> None:
        """A file for hits of `points`; OSError if it cannot be made."""
        self._file: BinaryIO = Path(path).open("wb")  # noqa: SIM115 - closed by close()
        self._events = {point.name: _Event(number, point) for number, point in enumerate(points, _FIRST_ID)}
        self._cpus: dict[int, _Cpu] = {}
        self._comms: dict[int, str] = {}

    def record(self, task: Task, cpu: int, now: int, point: trace.Tracepoint, values: Sequence[object]) -> None:
        """A hit of `point` on core `cpu` at `now` (ns)."""
        self._comms[task.tid] = task.comm
        if cpu not in self._cpus:
            self._cpus[cpu] = _Cpu()
        self._cpus[cpu].add(now, self._events[point.name].encode(task, values))

    def close(self) -> None:
        """Write the file."""
        with self._file as file:
            file.write(_MAGIC + bytes((_LITTLE, _LONG)) + struct.pack("<I", _PAGE))
            for name, text in (("header_page", _HEADER_PAGE), ("header_event", _HEADER_EVENT)):
                file.write(name.encode() + b"\0" + _sized(text))
            self._write_formats(file)
            comms = "".join(f"{tid} {comm.replace(chr(10), ' ')}\n" for tid, comm in sorted(self._comms.items()))
            file.write(struct.pack("<II", 0, 0) + _sized(comms))  # neither kallsyms nor printk formats
            self._write_pages(file)

    def _write_formats(self, file: BinaryIO) -> None:
        systems: dict[str, list[_Event]] = {}
        for event in self._events.values():
            systems.setdefault(event.point.system, []).append(event)
        file.write(struct.pack("<II", 0, len(systems)))  # no events of the tracer itself
        for system, events in systems.items():
            file.write(system.encode() + b"\0" + struct.pack("<I", len(events)) + b"".join(_sized(event.format()) for event in events))

    def _write_pages(self, file: BinaryIO) -> None:
        cpus = [self._cpus.get(number) or _Cpu() for number in range(max(self._cpus, default=0) + 1)]
        file.write(struct.pack("<I", len(cpus)) + b"options  \0" + struct.pack("<H", _NO_OPTIONS) + b"flyrecord\0")
        offset = -(-(file.tell() + 16 * len(cpus)) // _PAGE) * _PAGE
        for cpu in cpus:
            cpu.flush()
            size = cpu.spool.tell()
            file.write(struct.pack("<QQ", offset, size))
            offset += size
        file.write(bytes(-file.tell() % _PAGE))
        for cpu in cpus:
            cpu.spool.seek(0)
            while piece := cpu.spool.read(1 << 20):
                file.write(piece)
            cpu.spool.close()


def _sized(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data
