"""The kernel's log, as dmesg(1) prints it, from its ring buffer.

Source of truth: Linux 6.1 `kernel/printk/printk_ringbuffer.{h,c}`. A record is a descriptor (identity, state and the place of its text) and
an info (time, level) of the same number; a text block begins with the identity of the record that it belongs to.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from softkvm.vmi.errors import Corrupt
from softkvm.vmi.linux.kernel import Kernel
from softkvm.vmi.linux.objects import Struct

_STATE_SHIFT = 62
_ID_MASK = (1 << _STATE_SHIFT) - 1
_COMMITTED, _FINALIZED = 1, 2
_NO_TEXT = 1  # bit 0 of a position: the record has no data, or lost it
_MOST_BITS = 24
_LONGEST_TEXT = 1 << 16


class Message(msgspec.Struct, frozen=True):
    """A message of the kernel."""

    sequence: int
    seconds: float
    """After the boot."""
    level: int
    """Of syslog(2): 0 is an emergency, 7 is for debugging."""
    facility: int
    text: str


def messages(kernel: Kernel) -> Iterator[Message]:
    """What is in the log, the oldest message first."""
    ring = kernel.struct("printk_ringbuffer", kernel.number(kernel.symbols["prb"]))
    count_bits = ring.number("desc_ring.count_bits")
    text_bits = ring.number("text_data_ring.size_bits")
    if not (0 < count_bits <= _MOST_BITS and 0 < text_bits <= _MOST_BITS + 8):
        raise Corrupt("the kernel's log has an impossible size")
    tail, head = (ring.number(f"desc_ring.{end}_id.counter") & _ID_MASK for end in ("tail", "head"))
    identity = tail
    for _ in range(1 << count_bits):
        message = _message(kernel, ring, identity, 1 << count_bits, 1 << text_bits)
        if message is not None:
            yield message
        if identity == head:
            break
        identity = identity + 1 & _ID_MASK


def _message(kernel: Kernel, ring: Struct, identity: int, count: int, text_size: int) -> Message | None:
    number = identity & count - 1
    descriptor = kernel.struct("prb_desc", ring.number("desc_ring.descs") + number * kernel.types.find("prb_desc").size)
    state = descriptor.number("state_var.counter")
    if state & _ID_MASK != identity or state >> _STATE_SHIFT & 3 not in (_COMMITTED, _FINALIZED):
        return None
    begin, end = descriptor.number("text_blk_lpos.begin"), descriptor.number("text_blk_lpos.next")
    if begin & _NO_TEXT or end & _NO_TEXT:
        return None
    info = kernel.struct("printk_info", ring.number("desc_ring.infos") + number * kernel.types.find("printk_info").size)
    # A block does not wrap: where it would, it lies at the start of the buffer.
    wrapped = begin // text_size != (end - 1) // text_size
    start = 0 if wrapped else begin % text_size
    length = min(info.number("text_len"), _LONGEST_TEXT)
    text = kernel.read(ring.number("text_data_ring.data") + start + 8, length)
    return Message(
        sequence=info.number("seq"),
        seconds=info.number("ts_nsec") / 1e9,
        level=info.number("level"),
        facility=info.number("facility"),
        text=text.decode(errors="replace"),
    )
