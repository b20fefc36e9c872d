"""Flame graphs: stacks folded into lines, and drawn as SVG.

The folded form is that of the FlameGraph tools (frames from the root on, separated by semicolons, and a count), so others can draw it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from zlib import crc32

from softkvm.cli.perf.guest import GuestView
from softkvm.cli.perf.sampler import Sample
from softkvm.cli.perf.symbols import Symbolizer

Stacks = Counter[tuple[str, ...]]

_WIDTH, _ROW, _TOP, _TEXT = 1200.0, 16, 40, 6.6
_NARROWEST = 0.2
"""Pixels below which a frame is not drawn."""


def fold(samples: Sequence[Sample], view: GuestView) -> Stacks:
    """Samples by their stack: the process, its functions from the outermost on, and the kernel's."""
    names, stacks = Symbolizer(view), Counter[tuple[str, ...]]()
    for sample in samples:
        process = sample.process
        frames = [f"{process.name}" if process is not None else "[boot]"]
        user = [sample.ip] if sample.user else []
        for position, branch in enumerate(sample.branches):
            if process is None or process.area(branch.from_) is None:
                break  # calls of whoever was on the CPU before
            if position == 0 and not sample.user:
                user.append(branch.to)
            user.append(branch.from_)
        frames += [names.user(process, address) for address in reversed(user)]
        frames += [f"{names.kernel(address)}_[k]" for address in reversed(sample.kernel_chain)]
        stacks[tuple(frame.replace(";", ":") for frame in frames)] += 1
    return stacks


def text(stacks: Stacks) -> str:
    """The folded form."""
    return "".join(f"{';'.join(frames)} {count}\n" for frames, count in sorted(stacks.items()))


@dataclass
class _Node:
    count: int = 0
    children: dict[str, _Node] = field(default_factory=dict)


def svg(stacks: Stacks, title: str) -> str:
    """The picture: a frame is as wide as the share of samples that it was on the stack in; hovering tells its name and number."""
    root = _Node()
    for frames, count in stacks.items():
        node = root
        node.count += count
        for frame in frames:
            node = node.children.setdefault(frame, _Node())
            node.count += count
    depth = max((len(frames) for frames in stacks), default=0)
    height = _TOP + (depth + 2) * _ROW
    body = "".join(_draw(root, "all", 0.0, 0, height, max(root.count, 1)))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH:.0f}" height="{height}" font-family="monospace" font-size="11">\n'
        f'<rect width="100%" height="100%" fill="#fffdf5"/>\n<text x="{_WIDTH / 2:.0f}" y="24" text-anchor="middle" font-size="15">'
        f"{escape(title)}</text>\n{body}</svg>\n"
    )


def _draw(node: _Node, name: str, left: float, level: int, height: int, total: int) -> Iterator[str]:
    width = _WIDTH * node.count / total
    if width < _NARROWEST:
        return
    top = height - (level + 2) * _ROW
    shown = name.removesuffix("_[k]")
    label = shown[: int((width - 4) / _TEXT)] if width > 3 * _TEXT else ""
    yield f"<g><title>{escape(shown)}: {node.count} samples, {100 * node.count / total:.2f} %</title>"
    yield f'<rect x="{left:.1f}" y="{top}" width="{width:.1f}" height="{_ROW - 1}" rx="1" fill="{_colour(name)}"/>'
    yield f'<text x="{left + 2:.1f}" y="{top + 12}">{escape(label)}</text></g>\n'
    for child, below in sorted(node.children.items()):
        yield from _draw(below, child, left, level + 1, height, total)
        left += _WIDTH * below.count / total


def _colour(name: str) -> str:
    """The same for the same name: warm for programs, cool for the kernel."""
    shade = crc32(name.encode()) & 0xFF
    return f"hsl({200 + shade % 40},60%,70%)" if name.endswith("_[k]") else f"hsl({20 + shade % 35},85%,65%)"
