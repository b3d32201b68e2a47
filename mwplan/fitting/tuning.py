"""Compiled steps timed in turn: a profile's times are estimates of operations on their own."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from mwplan.fitting.fitted import Fitted


def fastest(found: list[Fitted], args: tuple[Any, ...], rounds: int, say: Callable[[str], None]) -> Fitted:
    """The one of least median time over `rounds` interleaved steps each, after a warm-up."""
    seconds: list[list[float]] = [[] for _ in found]
    for at in range(rounds + 1):
        for one, samples in zip(found, seconds):
            start = time.perf_counter()
            jax.block_until_ready(one.step(*args))
            if at:
                samples.append(time.perf_counter() - start)
    medians = [statistics.median(samples) for samples in seconds]
    best = found[quickest(seconds)]
    text = ", ".join(
        f"{one.schedule.time_ns / 1e6:.1f} ms predicted, {m * 1e3:.1f} measured"
        for one, m in zip(found, medians)
    )
    say(f"{len(found)} plans timed: {text}")
    return best


def quickest(seconds: Sequence[Sequence[float]]) -> int:
    """Which program is the fastest, from interleaved samples of each: every round's times over that round's
    mean, so that a slow moment counts for all alike, and the least median of these."""
    means = [statistics.fmean(samples) for samples in zip(*seconds)]
    shares = [statistics.median(a / b for a, b in zip(samples, means)) for samples in seconds]
    return shares.index(min(shares))
