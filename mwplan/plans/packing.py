"""Where a compiler puts buffers that live at different times, and the bytes that they take with the
fragmentation between them.

What is alive at once is a lower bound of what a step takes: buffers keep their places for life, and where one
of another size, or of another life, comes next, a gap may stay. XLA decides by a simple rule, on CPUs and
GPUs alike, so fragmentation can be predicted: buffers are placed one after another, each in the smallest gap
that holds it among those alive at any of its moments; once with the largest first (of equal ones the
longest-lived), once with the longest-lived first (of equal ones the largest), and what takes less is kept.

**Source:** the algorithm is that of XLA's heap simulator (openxla/xla, `GlobalDecreasingSizeBestFitHeap`);
the implementation is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

ALIGNMENT = 64  # bytes, of every place


@dataclass(frozen=True, slots=True)
class Buffer:
    """Something that takes `size_bytes` from the moment `start` to the moment `stop`, both included. Moments
    count allocations and releases."""

    size_bytes: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Workspace:
    """What an operation's workspace of `total_bytes` consists of. The moments of `buffers` are ranks among
    these alone, in the order of allocation.

    A buffer's life ends at the latest where another takes its place, which is all that a compiled program
    tells; else with the operation.
    """

    total_bytes: int
    buffers: tuple[Buffer, ...]


@dataclass(frozen=True, slots=True)
class Packing:
    """A place for each buffer, in their order, and the bytes that all of them take together."""

    total_bytes: int
    offsets: tuple[int, ...]


def pack(buffers: Sequence[Buffer], firsts: Sequence[int] | None = None) -> Packing:
    """Places `buffers` as XLA does. Cost: quadratic in their number (a thousand take some 30 ms).

    `firsts`: when the first of the arrays that a buffer holds, one written in the place of another, ends: the
    order by size counts its life alone. By default a buffer holds one.
    """
    ends = [buffer.stop for buffer in buffers] if firsts is None else firsts
    by_size = sorted(
        range(len(buffers)), key=lambda i: (-buffers[i].size_bytes, buffers[i].start - ends[i], i)
    )
    by_life = sorted(range(len(buffers)), key=lambda i: (-_life(buffers[i]), -buffers[i].size_bytes, i))
    return min((_placed(buffers, order) for order in (by_size, by_life)), key=lambda p: p.total_bytes)


def _life(buffer: Buffer) -> int:
    return buffer.stop - buffer.start


def _placed(buffers: Sequence[Buffer], order: Sequence[int]) -> Packing:
    """Each in the smallest gap that holds it, the lowest of equal ones, in this order."""
    offsets = [0] * len(buffers)
    # Of what has been placed, one entry each in the order of placing: life, and where it begins and ends,
    # aligned.
    start, stop, low, high = (np.zeros(len(buffers), np.int64) for _ in range(4))
    total = 0
    for placed, i in enumerate(order):
        one = buffers[i]
        meets = (start[:placed] <= one.stop) & (stop[:placed] >= one.start)
        lows, highs = low[:placed][meets], high[:placed][meets]
        by_place = np.argsort(lows, kind="stable")
        lows = lows[by_place]
        floors = np.maximum.accumulate(
            np.concatenate(([0], highs[by_place]))
        )  # where the gap below each may begin
        gaps = lows - floors[:-1]
        fits = np.flatnonzero(gaps >= one.size_bytes)
        at = int(floors[fits[np.argmin(gaps[fits])]] if len(fits) else floors[-1])
        offsets[i] = at
        end = at + one.size_bytes
        start[placed], stop[placed], low[placed] = one.start, one.stop, at
        high[placed] = -(-end // ALIGNMENT) * ALIGNMENT
        total = max(total, end)
    return Packing(total, tuple(offsets))
