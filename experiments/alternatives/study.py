"""One point of a sweep: one network, its methods and budgets, measured."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import mwplan as mw
from experiments import zoo
from experiments.alternatives.bench import Bench
from experiments.alternatives.methods import BUDGETED, FIXED, METHODS
from experiments.alternatives.problem import (
    RECOMPUTATION,
    Problem,
)
from experiments.alternatives.timing import Compiled, interleave
from mwplan import planning
from mwplan.solvers import baselines

#: Programs of more than so many times the largest budget are compiled, to know their memory, and not run.
MOST = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """What to measure on one network.

    - `methods`: those that plan run at every one of `budgets`, the others once.
    - `budgets`: total bytes. A number instead spaces so many evenly by ratio, from the least feasible one to
      what the fastest schedule or backpropagation needs.
    - `limits`: with such a number, more budgets. For each limit the least ones at which the plan, and the
      best recomputation, are predicted to take so many times the time of storing every layer, the first
      touch of memory included.
    - `rounds` of interleaved runs, fewer after `seconds`. Then `ties` more rounds of the programs that tie
      with the fastest at a budget, again fewer after `seconds`.
    - `yardstick`: depth of a second network that backpropagation is timed on in the same rounds; 0 for none.
    - `check`: whether to compare gradients with float64.
    """

    methods: tuple[str, ...] = tuple(METHODS)
    budgets: int | tuple[int, ...] = ()
    limits: tuple[float, ...] = ()
    rounds: int = 7
    seconds: float = 60.0
    ties: int = 0
    yardstick: int = 0
    check: bool = True
    max_error: float = 1e-4
    thin: float = 0.0
    repeats: int = 5
    try_settings: bool = True


def point(config: zoo.Config, study: Study) -> dict[str, Any]:
    """Both as plain values, for `sweep.run(points, alternatives.measure, ...)`; without `limits` and `ties`,
    which are newer than some records, where there are none."""
    plain = json.loads(json.dumps(dataclasses.asdict(study)))
    for name in ("limits", "ties"):
        if not plain[name]:
            del plain[name]
    return {"network": dataclasses.asdict(config), "study": plain}


def measure(point: dict[str, Any], unroll: int = zoo.UNROLL) -> dict[str, Any]:
    """Measures one point: `rows`, one a method and budget (see `Bench.records`), the frontier's
    `(total bytes, ns)`, the yardstick's samples."""
    config = zoo.Config(**point["network"])
    given = point["study"]
    plain: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in given.items()
    }
    study = Study(**plain)
    chain, x, labels, loss = zoo.build(config)
    problem = Problem(chain, x, labels, loss, study.max_error, study.thin, study.repeats, unroll)
    bench = Bench(problem, try_settings=study.try_settings)
    for name in study.methods:
        if name in FIXED:
            bench.add(name, None)
    points: tuple[tuple[int, int], ...] = ()
    if any(name in BUDGETED for name in study.methods):
        points = problem.frontier().points
        budgets: Iterable[int]
        if isinstance(study.budgets, int):
            spaced = _spaced(study.budgets, points, bench)
            budgets = sorted({*spaced, *_within(study.limits, problem)})
        else:
            budgets = study.budgets
        for budget in budgets:
            for name in study.methods:
                if name in BUDGETED:
                    bench.add(name, budget)
    bench.tune_plans()
    if not isinstance(study.budgets, int) and study.budgets:
        bench.idle = MOST * max(study.budgets)
    programs = bench.run_at_all()
    measures = [] if not study.yardstick else _yardstick(config, study, problem)
    if study.rounds:
        interleave([*programs, *measures], study.rounds, study.seconds)
    if study.ties:
        bench.settle(study.ties, study.seconds)
    if study.check:
        bench.check()
    step = max(1, len(points) // 300)
    return {
        "rows": bench.records(),
        "frontier": [list(one) for one in (*points[::step], *points[-1:])],
        "yardstick": [{"method": one.candidate.key, "seconds": one.seconds} for one in measures],
    }


def _spaced(count: int, points: Sequence[tuple[int, int]], bench: Bench) -> list[int]:
    plain = [
        one.temporary_bytes + bench.problem.fixed_bytes
        for row, one in bench.rows
        if one and row["method"] == "backprop"
    ]
    low = math.ceil(1.03 * points[0][0])  # room for fragmentation
    high = max([points[-1][0], *plain])
    return [math.ceil(low * (high / low) ** (k / max(1, count - 1))) for k in range(count)]


def _within(limits: Sequence[float], problem: Problem) -> list[int]:
    stored = mw.replay(problem.profile, baselines.store_all(problem.asked).runs or ())
    base = stored.time_ns + stored.first_touch_ns
    every = [problem.frontier(allowed).points for allowed in (planning.EVERY_STRATEGY, RECOMPUTATION)]
    least = [
        min((b for b, ns in points if ns <= limit * base), default=None)
        for points in every
        for limit in limits
    ]
    return [one for one in least if one is not None]


def _yardstick(config: zoo.Config, study: Study, problem: Problem) -> list[Compiled]:
    """Backpropagation of the network at the yardstick's depth, in both its forms."""
    small = Problem(*zoo.build(dataclasses.replace(config, depth=study.yardstick, group=0)))
    bench = Bench(small, try_settings=study.try_settings)
    for name in ("backprop", "backprop_scan"):
        made = bench.add(name, None)
        if made is not None:
            made.candidate = dataclasses.replace(made.candidate, key=name)
    return bench.used()
