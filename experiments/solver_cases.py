"""What is measured of the solvers: one function for each part, which returns a record."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from experiments import record
from experiments.solver_chains import chain, deep, identical
from mwplan.plans.ledger import replay
from mwplan.plans.profiles import Profile
from mwplan.plans.schedule import Strategy
from mwplan.solvers import baselines, integer_program, rotor, unrestricted
from mwplan.solvers.frontier import Frontier, general_frontier, solve_frontier
from mwplan.solvers.greedy import greedy
from mwplan.solvers.problem import Problem
from mwplan.solvers.tuning import TUNING

RECOMPUTATION = frozenset({Strategy.STORE, Strategy.RECOMPUTE})


@dataclass(frozen=True)
class Config:
    """Chain lengths and seeds of each part; `thin` is the loss aimed at where the frontier is not exact."""

    seeds: tuple[int, ...] = (0, 1, 2)
    exact: tuple[int, ...] = (20, 50, 100)
    exact_submersive: tuple[int, ...] = (20, 40, 60, 100)
    thinned: tuple[int, ...] = (20, 50, 100)
    long: tuple[int, ...] = (200, 300)
    one_level: tuple[int, ...] = (300, 1_000)
    identical: tuple[int, ...] = (100, 1_000, 10_000)
    deep: tuple[int, ...] = (512, 1_024)
    quality: tuple[int, ...] = (10, 20, 40, 60)
    host: tuple[int, ...] = (60, 100)
    unrestricted: tuple[int, ...] = (2, 3)
    budgets: int = 10
    thin: float = 0.01
    slots: int = 500
    out: Path = record.RESULTS / "solver_scaling"


def timed(call: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What `call` returns, and the seconds it took."""
    wall, cpu = time.perf_counter(), time.process_time()
    out = call()
    return out, {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}


def budgets(frontier: Frontier, count: int) -> list[int]:
    """`count` budgets from the least to the most that any point needs, evenly spaced by ratio."""
    low, high = frontier.points[0][0], frontier.points[-1][0]
    return [int(low * (high / low) ** (k / (count - 1))) for k in range(count)]


def speed(profile: Profile, thin: float, depth: int | None) -> dict[str, Any]:
    """One frontier, and the ledger's word on three of its points."""
    problem = Problem(profile=profile, thin=thin, max_recompute_depth=depth)
    frontier, seconds = timed(partial(solve_frontier, problem))
    points = frontier.points
    confirmed = 0
    for need, ns in (points[0], points[len(points) // 2], points[-1]):
        found = replay(profile, frontier.at(need).runs or ())
        confirmed += (found.peak_bytes, found.time_ns) == (need, ns)
    return {**seconds, "points": len(points), "confirmed": confirmed}


def loss(profile: Profile, thin: float) -> dict[str, Any]:
    """What thinning loses, measured against the exact frontier at every budget, and what it proves about
    that."""
    exact, thinned = (solve_frontier(Problem(profile=profile, thin=x)) for x in (0.0, thin))
    worst = 0.0
    for need, ns in exact.points:
        got = min((t for n, t in thinned.points if n <= need), default=None)
        worst = max(worst, float("inf") if got is None else got / ns - 1)
    return {"measured": worst, "proved": thinned.loss()}


def identical_loss(profile: Profile, thin: float) -> dict[str, Any]:
    """What thinning loses on identical layers, at budgets that both reach, and how much more memory its
    least-memory schedule takes."""
    exact, thinned = (solve_frontier(Problem(profile=profile, thin=x)) for x in (0.0, thin))
    least = thinned.points[0][0]
    worst = max(
        min(t for n, t in thinned.points if n <= need) / ns - 1 for need, ns in exact.points if need >= least
    )
    return {"measured": worst, "least_over_exact": least / exact.points[0][0]}


def deep_loss(profile: Profile, thin: float) -> dict[str, Any]:
    """What tables of the identical layers alone lose at multiples of the least bytes, against general tables
    thinned to a fifth of the loss."""
    tuning = dataclasses.replace(TUNING, label_share=1 / 6)
    best = general_frontier(Problem(profile=profile, thin=thin / 5, tuning=tuning)).points
    found = solve_frontier(Problem(profile=profile, thin=thin)).points
    rows = []
    for times in (1.25, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0):
        budget = int(best[0][0] * times)
        got = min((t for n, t in found if n <= budget), default=None)
        ratio = None if got is None else got / min(t for n, t in best if n <= budget) - 1
        rows.append({"over_least": times, "loss": ratio})
    return {"rows": rows, "least_over_general": found[0][0] / best[0][0]}


def proof(profile: Profile, count: int) -> dict[str, Any]:
    """The integer program at `count` budgets, the frontier being known."""
    problem = Problem(profile=profile, time_limit_s=60.0)
    frontier = solve_frontier(problem)
    rows = []
    for budget in budgets(frontier, count):
        solution, seconds = timed(partial(integer_program.solve, problem.within(budget), frontier))
        row = {
            "status": solution.status.value,
            "objective": solution.time_ns,
            "bound": solution.bound_ns,
            **seconds,
        }
        rows.append({**row, "budget": budget, **dict(solution.stats)})
    return {"rows": rows}


def host(profile: Profile) -> dict[str, Any]:
    """The least budget of all with memory on the host beside it, at 20 GB/s: shares of what all layers could
    send there."""
    profile = profile.offloading(2e10)
    frontier = solve_frontier(Problem(profile=profile))
    budget = frontier.points[0][0]
    every = sum(max(o.host_bytes for o in layer.offload) for layer in profile.layers if layer.offload)
    rows = []
    for share in (32, 16, 8, 4):
        problem = Problem(profile=profile, budget_bytes=budget, host_bytes=every // share, time_limit_s=60.0)
        solution, seconds = timed(partial(integer_program.solve, problem, frontier))
        row = {"share": 1 / share, "status": solution.status.value, "gap": solution.gap, **seconds}
        rows.append({**row, "over_frontier": solution.time_ns / frontier.points[0][1]})
    return {"rows": rows}


def quality(profile: Profile, config: Config) -> dict[str, Any]:
    """Time over the optimum's, at ten budgets: rotor with slots, greedy, and recomputation alone at its
    best."""
    problem = Problem(profile=profile)
    alone = Problem(profile=profile, allowed=RECOMPUTATION)
    every, recompute = solve_frontier(problem), solve_frontier(alone)
    rows = []
    for budget in budgets(recompute, config.budgets):
        best, persistent = every.at(budget), recompute.at(budget)
        slotted, seconds = timed(partial(rotor.rotor, problem.within(budget), config.slots))
        rough, rough_recompute = greedy(problem.within(budget)), greedy(alone.within(budget))
        rows.append(
            {
                "budget": budget,
                "optimum": best.time_ns,
                "recomputation": persistent.time_ns,
                "rotor": slotted.time_ns if slotted.runs else None,
                "rotor_cpu_s": seconds["cpu_s"],
                "greedy": rough.time_ns if rough.runs else None,
                "greedy_recomputation": rough_recompute.time_ns if rough_recompute.runs else None,
            }
        )
    least = (every.least_bytes, recompute.least_bytes)
    plans = {
        f.__name__: {"bytes": s.peak_bytes, "ns": s.time_ns}
        for f in (
            baselines.store_all,
            baselines.recompute_each,
            baselines.chen_sqrt,
            baselines.all_moonwalk,
            baselines.all_fragment,
        )
        for s in [f(problem)]
    }
    return {"rows": rows, "least_bytes": least, "plans": plans}


def structure(profile: Profile) -> dict[str, Any]:
    """What the run structure gives away: the frontier's points against single operations in any order, at
    most as many."""
    problem = Problem(profile=profile, time_limit_s=20.0)
    frontier = solve_frontier(problem)
    rows = []
    for need, ns in frontier.points[:: max(1, len(frontier.points) // 4)]:
        steps = unrestricted.steps_of(frontier.at(need).runs or ()) + 1
        found = unrestricted.solve_unrestricted(problem.within(need), steps)
        row = {"budget": need, "runs": ns, "operations": found.time_ns, "bound": found.bound_ns}
        rows.append({**row, "status": found.status.value, "steps": steps})
    return {"rows": rows}


Case = tuple[str, dict[str, Any], Callable[[], dict[str, Any]]]


def cases(config: Config) -> Iterator[Case]:
    """Part, what identifies the case, and how to do it."""
    for seed in config.seeds:
        yield from _speed_cases(config, seed)
        for submersive in (False, True):
            for size in config.quality:
                profile = chain(seed, size, submersive=submersive)
                yield "quality", _key(size, submersive, seed), partial(quality, profile, config)
        profile = chain(seed, 100, submersive=False)
        yield "proof", _key(100, False, seed), partial(proof, profile, 5)
        yield "rotor", _key(100, False, seed), partial(rotor_alone, profile, config)
        for size in config.host:
            yield "host", _key(size, False, seed), partial(host, chain(seed, size, submersive=False))
        for size in config.unrestricted:
            profile = chain(seed, size, submersive=True)
            yield "unrestricted", _key(size, True, seed), partial(structure, profile)
    yield from _long_cases(config)


def _key(size: int, submersive: bool, seed: int = 0) -> dict[str, Any]:
    return {"size": size, "submersive": submersive, "seed": seed}


def _speed_cases(config: Config, seed: int) -> Iterator[Case]:
    """Frontiers of random chains, exact and thinned, and what thinning loses."""
    for submersive, sizes in ((False, config.exact), (True, config.exact_submersive)):
        for size in sizes:
            profile = chain(seed, size, submersive=submersive)
            yield "exact", _key(size, submersive, seed), partial(speed, profile, 0.0, None)
    for submersive in (False, True):
        for size in config.thinned:
            profile, key = chain(seed, size, submersive=submersive), _key(size, submersive, seed)
            yield "thinned", key, partial(speed, profile, config.thin, None)
            if size <= 50:
                yield "loss", key, partial(loss, profile, config.thin)


def _long_cases(config: Config) -> Iterator[Case]:
    """Chains of hundreds of layers."""
    for part, sizes, depth in (("one_level", config.one_level, 1), ("thinned", config.long, None)):
        for size in sizes:
            profile = chain(0, size, submersive=False)
            yield part, _key(size, False), partial(speed, profile, config.thin, depth)
    profile = identical(250, submersive=False)
    yield "identical_loss", _key(250, False), partial(identical_loss, profile, config.thin)
    for submersive in (False, True):
        profile = deep(160, submersive=submersive)
        yield "deep_loss", _key(160, submersive), partial(deep_loss, profile, config.thin)
        for size in config.deep:
            profile = deep(size, submersive=submersive)
            yield "deep", _key(size, submersive), partial(speed, profile, config.thin, None)
        for size in config.identical:
            profile = identical(size, submersive=submersive)
            yield "identical", _key(size, submersive), partial(speed, profile, config.thin, None)


def rotor_alone(profile: Profile, config: Config) -> dict[str, Any]:
    """rotor's recurrence for one budget, a third of what plain backpropagation needs."""
    problem = Problem(profile=profile)
    budget = baselines.store_all(problem).peak_bytes // 3
    solution, seconds = timed(partial(rotor.rotor, problem.within(budget), config.slots))
    return {**seconds, "ns": solution.time_ns, "slots": config.slots}
