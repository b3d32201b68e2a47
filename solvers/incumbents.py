"""Schedules to begin with, before the integer program: the staircases' own, and those under penalties.

Under pins the staircases' own schedule is the fastest. Where distinct runs are limited, a penalty on each
outermost run makes runs few; where the host's memory is, a price on each byte of it makes them offload less.
"""

from __future__ import annotations

import dataclasses
import time as clock
from collections.abc import Callable

from mwplan.plans.schedule import Solution, Status
from mwplan.solvers.conditions import Conditioned, host_price_ns
from mwplan.solvers.pareto import INF, value_at
from mwplan.solvers.top import Top


def incumbent(asked: Conditioned, budget: int, deadline: float) -> Solution | None:
    """A schedule within `budget`, the limit on distinct runs and the host's memory, if one is found: the
    staircases' own, or those under penalties, the smaller the better, found by halving their logarithms until
    half of the time is gone. Penalties on each outermost run, which then offloads nothing, where distinct
    runs are limited; else on each byte of the host's."""
    top, half = asked.staircases, (clock.monotonic() + deadline) / 2
    best = _read(asked, top, budget)
    if best is not None or not asked.limited:
        return best
    if asked.host_bytes:
        top = Top(asked.tables, asked.at_host_price(INF), closing=True)
        best = _read(asked, top, budget)
        if asked.problem.max_distinct_runs is None:
            return _cheapest(asked, budget, best, half)
        if best is not None:
            return best
    high = min(value_at(*top.stairs(), budget), 2**61 // (top.size + 1))
    low = max(1, high >> 16)

    def under(penalty_ns: int) -> Solution | None:
        found = Top(asked.tables, top.candidates, closing=True, penalty_ns=penalty_ns)
        return _read(asked, found, budget)

    return _least_penalty(under, low, high, high, best, half)


def _read(asked: Conditioned, top: Top, budget: int) -> Solution | None:
    """The schedule of these staircases, if it is within the limits."""
    need, time = top.stairs()
    step = int(need.searchsorted(budget, side="right")) - 1
    if step < 0:
        return None
    runs, limit = top.runs(int(need[step])), asked.problem.max_distinct_runs
    if sum(map(asked.host_of, runs)) > asked.host_bytes:
        return None
    if limit is not None:
        nodes = [True, *map(asked.keeps_end, runs)]
        if len({asked.signature(run, kept) for run, kept in zip(runs, nodes)}) > limit:
            return None
    spent = int(time[step]) - top.penalty_ns * len(runs)
    return Solution(status=Status.FEASIBLE, runs=runs, time_ns=spent, peak_bytes=int(need[step]))


def _least_penalty(
    under: Callable[[int], Solution | None],
    low: int,
    high: int,
    first: int,
    best: Solution | None,
    until: float,
) -> Solution | None:
    """The fastest of `best` and what is found `under` penalties between `low` and `high`, from the `first`
    on: smaller ones where something is found, larger ones where nothing is."""
    penalty = first
    while penalty > low and clock.monotonic() < until:
        found = under(penalty)
        if found is None and penalty == high:
            break
        low, high = (penalty, high) if found is None else (low, penalty)
        if found is not None and (best is None or found.time_ns < best.time_ns):
            best = found
        if high < low + low // 8:
            break
        penalty = int((low * high) ** 0.5)
    return best


def _cheapest(asked: Conditioned, budget: int, best: Solution | None, until: float) -> Solution | None:
    """The fastest of `best` and schedules under prices on the host's memory, so high that they keep within
    it."""
    # With as much of it as one likes.
    quickest_ns = value_at(*asked.staircases.stairs(), budget)
    high = 1 + 2 * max(quickest_ns, 0 if best is None else best.time_ns) * 2**20 // asked.host_bytes
    every = sum(o.host_bytes for layer in asked.problem.profile.layers for o in layer.offload)
    high = min(high, 2**58 // (every + 1) << 20)
    low = max(1, high >> 20)

    def under(price: int) -> Solution | None:
        found = _read(asked, Top(asked.tables, asked.at_host_price(price), closing=True), budget)
        if found is None:
            return None
        paid = sum(host_price_ns(asked.host_of(run), price) for run in found.runs or ())
        return dataclasses.replace(found, time_ns=found.time_ns - paid)

    return _least_penalty(under, low, high, int((low * high) ** 0.5), best, until)
