"""Segments: runs of a model's layers that one ``lax.scan`` computes, each with static kinds of layers."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple


class Segment(NamedTuple):
    """``repeats`` times the same ``period`` of layers, from layer ``first`` on."""

    first: int
    period: int
    repeats: int


def segments(kinds: Sequence[Hashable]) -> tuple[Segment, ...]:
    """Divides layers into segments in which the kinds of a period repeat.

    A scan's body is one period, so the sum of periods is what a program is long by, and it is the
    least possible: layers of one kind are one segment of period 1, five local layers before each
    global one a segment of period 6, and layers behind the last whole period further segments.

    Args:
      kinds: the kind of each layer.
    """
    count = len(kinds)
    best: list[tuple[int, tuple[Segment, ...]]] = [(0, ())] * (count + 1)
    for first in reversed(range(count)):
        found = []
        for period in range(1, count - first + 1):
            same = first + period
            while same < count and kinds[same] == kinds[same - period]:
                same += 1
            repeats = (same - first) // period
            if repeats == 1 and period > 1:
                continue  # as cheap layer by layer
            length, rest = best[first + period * repeats]
            found.append((period + length, (Segment(first, period, repeats), *rest)))
        best[first] = min(found, key=lambda one: (one[0], len(one[1])))
    return best[0][1]
