"""Compiled steps, run in turn, and how their times compare."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax

from experiments.alternatives.problem import (
    Candidate,
)

#: Programs whose step takes so many times the median of all, and a second or more, are timed once, in the
#: warm-up.
SLOW = 6
#: Programs at most so many times as slow as the fastest for the same budget tie with it, and more rounds
#: decide; the second number is that of the trial's last part.
TIE, CLOSE = 1.1, 1.05


@dataclass(eq=False)
class Compiled:
    """A compiled step with its arguments.

    `temporary_bytes` by `memory_analysis()`; `compile_seconds`, tracing included; `seconds`, one sample a
    step; `error`, `worst_error`, see `relative_error`; `found`: what the one run of a very slow step gave.
    """

    candidate: Candidate
    executable: Any
    args: tuple[Any, ...]
    temporary_bytes: int
    compile_seconds: float
    setting: str
    seconds: list[float] = field(default_factory=list)
    error: float | None = None
    worst_error: float | None = None
    found: Any = None

    def run(self) -> Any:
        """One step: `(loss, gradients)`."""
        return jax.block_until_ready(self.executable(*self.args))


def interleave(
    programs: Sequence[Compiled], rounds: int, seconds: float = math.inf, *, again: bool = False
) -> None:
    """Runs the programs `rounds` times in turn, after a warm-up; each round begins with another program.

    It stops after `seconds`, but not before 3 rounds (2 where the warm-up took longer than that). Programs
    slower than `SLOW` times the median are not run again: the warm-up is their sample. `again`: further
    rounds of programs that were run before, without a warm-up.
    """

    def timed(one: Compiled) -> tuple[float, Any]:
        begin = time.perf_counter()
        found = one.run()
        return time.perf_counter() - begin, found

    start = time.perf_counter()
    left = list(programs)
    if not again:
        first = []
        for one in programs:
            taken, one.found = timed(one)
            first.append(taken)
        slow = max(1.0, SLOW * statistics.median(first)) if first else 0.0
        left = [one for one, taken in zip(programs, first) if taken <= slow]
        for one, taken in zip(programs, first):
            if taken > slow:
                one.seconds.append(taken)
            else:
                one.found = None
    least = 3 if time.perf_counter() - start < seconds else 2
    for at in range(rounds):
        if at >= least and time.perf_counter() - start > seconds:
            break
        turn = at % max(1, len(left))
        for one in [*left[turn:], *left[:turn]]:
            one.seconds.append(timed(one)[0])


def ties(groups: Iterable[Sequence[Compiled]], limit: float = TIE) -> list[Compiled]:
    """Of each group the fastest program, and those at most `limit` times as slow. Only those count that were
    run most often."""
    found: list[Compiled] = []
    for group in groups:
        most = max((len(one.seconds) for one in group), default=0)
        medians = {one: statistics.median(one.seconds) for one in group if most and len(one.seconds) == most}
        found += [one for one, median in medians.items() if median <= limit * min(medians.values())]
    return list(dict.fromkeys(found))


def ratio(seconds: Sequence[float], base: Sequence[float]) -> float:
    """Median over the rounds of the ratio of two interleaved programs' times."""
    return statistics.median(a / b for a, b in zip(seconds, base))
