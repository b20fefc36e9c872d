"""The call chain of a Linux kernel without frame pointers, by the tables that the kernel unwinds its own stacks with.

Source of truth: Linux 6.1 `arch/x86/kernel/unwind_orc.c`, `arch/x86/include/asm/orc_types.h`. For each address in the kernel's code the
tables say where the frame begins (relative to SP or BP) and where the caller's BP was saved. The stack is a hostile guest's: steps are
limited.
"""

from __future__ import annotations

import struct
from array import array
from typing import NamedTuple

from softkvm.vmi.errors import UnknownName, VmiError
from softkvm.vmi.linux.kernel import Kernel

DEEPEST = 64
_TABLES = ("__start_orc_unwind_ip", "__stop_orc_unwind_ip", "__start_orc_unwind")
_ENTRY = struct.Struct("<hhH")
_LARGEST = 1 << 22
_PREVIOUS_SP, _BP, _SP, _BP_INDIRECT, _SP_INDIRECT = 1, 4, 5, 8, 9
_CALL, _REGISTERS, _IRET_FRAME = 0, 1, 2
_REGISTERS_BP, _REGISTERS_IP = 32, 128
_U64 = (1 << 64) - 1


class Frame(NamedTuple):
    """Where a function is, and the two registers that lead to its caller."""

    ip: int
    sp: int
    bp: int


class Unwinder:
    """The tables of one kernel."""

    def __init__(self, kernel: Kernel) -> None:
        """Read once; a kernel without them has chains of one."""
        self._kernel = kernel
        self._relative: array[int] = array("i")
        self._entries = b""
        self._base = 0
        try:
            start, end, entries = (kernel.symbols[name] for name in _TABLES)
            if 0 < end - start <= _LARGEST:
                self._relative.frombytes(kernel.read(start, end - start & ~3))
                self._entries = kernel.read(entries, len(self._relative) * _ENTRY.size)
                self._base = start
        except (UnknownName, VmiError):
            self._relative = array("i")

    def chain(self, frame: Frame) -> list[int]:
        """Addresses in the functions on the stack, the innermost first; ends where user mode or nothing known begins."""
        found = [frame.ip]
        first = True
        while len(found) < DEEPEST:
            try:
                caller = self._step(frame, first)
            except VmiError:
                break
            if caller is None or caller.sp <= frame.sp:
                break
            frame, first = caller, False
            found.append(frame.ip)
        return found

    def _step(self, frame: Frame, interrupted: bool) -> Frame | None:
        entry = self._lookup(frame.ip if interrupted else frame.ip - 1)
        if entry is None:
            return None
        sp_offset, bp_offset, bits = entry
        sp = self._frame_start(frame, bits & 0xF, sp_offset)
        kind = bits >> 8 & 3
        if sp is None or kind not in (_CALL, _REGISTERS, _IRET_FRAME):
            return None
        read = self._kernel.number
        if kind == _CALL:
            ip, caller_sp, bp = read(sp - 8 & _U64), sp, self._caller_bp(frame, sp, bits >> 4 & 0xF, bp_offset)
        else:
            saved = sp + _REGISTERS_IP if kind == _REGISTERS else sp
            if read(saved + 8 & _U64) & 3:  # CS: user mode
                return None
            ip, caller_sp = read(saved & _U64), read(saved + 24 & _U64)
            bp = read(sp + _REGISTERS_BP & _U64) if kind == _REGISTERS else frame.bp
        return Frame(ip, caller_sp, bp) if ip >> 63 else None

    def _frame_start(self, frame: Frame, register: int, offset: int) -> int | None:
        if register == _SP:
            return frame.sp + offset & _U64
        if register == _BP:
            return frame.bp + offset & _U64
        if register == _SP_INDIRECT:
            return self._kernel.number(frame.sp) + offset & _U64
        if register == _BP_INDIRECT:
            return self._kernel.number(frame.bp + offset & _U64)
        return None

    def _caller_bp(self, frame: Frame, sp: int, register: int, offset: int) -> int:
        if register == _PREVIOUS_SP:
            return self._kernel.number(sp + offset & _U64)
        if register == _BP:
            return self._kernel.number(frame.bp + offset & _U64)
        return frame.bp

    def _lookup(self, ip: int) -> tuple[int, int, int] | None:
        """The last entry at or below an address: each is kept relative to its own place."""
        low, high = 0, len(self._relative)
        while low < high:
            middle = (low + high) // 2
            if self._base + 4 * middle + self._relative[middle] <= ip:
                low = middle + 1
            else:
                high = middle
        if not low:
            return None
        sp_offset, bp_offset, bits = _ENTRY.unpack_from(self._entries, (low - 1) * _ENTRY.size)
        return sp_offset, bp_offset, bits
