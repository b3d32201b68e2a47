"""The rule of thumb: from plain backpropagation, change the layer with the most bytes saved per ns, until it
fits."""

from __future__ import annotations

import math

from mwplan.plans.profiles import MoonwalkOption
from mwplan.plans.schedule import Run, RunKind, Solution, Status, Strategy
from mwplan.solvers.baselines import costed, fastest_store, moonwalk_error, named, recomputed
from mwplan.solvers.predictions import moonwalk_strategy
from mwplan.solvers.problem import Problem

#: bytes saved per ns, layer less 1, how, and by which option
_Move = tuple[float, int, str, str]


def greedy(problem: Problem) -> Solution:
    """A schedule within `budget_bytes`, of `allowed` strategies, by one change after the other.

    A layer may change to a STORE option of fewer bytes, to RECOMPUTE, or to its fastest moonwalk option;
    neighbours changed alike become one run. Recomputed stretches are looked at whole, in pieces of about the
    square root of their length, and layer by layer; the fastest schedule found that fits is returned.
    **Cost:** three replays for each change.
    """
    profile, budget = problem.profile, problem.budget
    moves = sorted((m for m in _moves(problem) if m[0] > 0), key=lambda m: (-m[0], m[1]))
    state = [("store", fastest_store(profile, at).options[0]) for at in range(len(profile))]
    least: int | None = None
    for step in range(len(moves) + 1):
        if step:
            _, at, how, name = moves[step - 1]
            # A layer changes away from STORE once.
            if state[at][0] != "store":
                continue
            state[at] = (how, name)
        candidates = [
            costed(profile, _spelled(problem, state, pieces), "greedy", budget) for pieces in (1, 0, -1)
        ]
        fits = [s for s in candidates if s.runs is not None]
        if fits:
            return min(fits, key=lambda s: s.time_ns)
        smallest = min(s.peak_bytes for s in candidates)
        least = smallest if least is None else min(least, smallest)
    assert least is not None
    return Solution(status=Status.INFEASIBLE, peak_bytes=least, solver="greedy")


def _moves(problem: Problem) -> list[_Move]:
    """All changes of single layers."""
    profile, allowed, max_error = problem.profile, problem.strategies, problem.max_error
    moves: list[_Move] = []
    for at, layer in enumerate(profile.layers):
        stored = next(o for o in layer.store if o.name == fastest_store(profile, at).options[0])
        kept = (
            stored.residual_bytes
            + stored.keeps_input * profile.activation_bytes[at]
            + stored.keeps_output * profile.activation_bytes[at + 1]
        )
        plain = stored.forward_ns + stored.backward_ns
        for o in layer.store:
            less = kept - o.residual_bytes - o.keeps_input * profile.activation_bytes[at]
            less -= o.keeps_output * profile.activation_bytes[at + 1]
            moves.append((less / max(1, o.forward_ns + o.backward_ns - plain), at, "store", o.name))
        if Strategy.RECOMPUTE in allowed:
            moves.append((kept / max(1, layer.forward_ns), at, "recompute", ""))
        usable = [
            o for o in layer.moonwalk if moonwalk_strategy(o) in allowed and moonwalk_error([o]) <= max_error
        ]
        if usable:
            way = min(usable, key=lambda o: o.reverse_ns + o.rebuild_ns)
            extra = 2 * layer.forward_ns + way.reverse_ns + way.rebuild_ns - plain
            moves.append(((kept - way.residual_bytes) / max(1, extra), at, "moonwalk", way.name))
    return moves


def _spelled(problem: Problem, state: list[tuple[str, str]], pieces: int) -> list[Run]:
    """Runs for greedy's choices; recomputed stretches whole (`pieces` 1), by square roots (0), or layer by
    layer (-1)."""
    profile, max_error = problem.profile, problem.max_error
    runs: list[Run] = []
    at, size = 0, len(profile)
    while at < size:
        how, name = state[at]
        if how == "store":
            runs.append(Run(kind=RunKind.STORE, start=at, stop=at + 1, options=(name,)))
            at += 1
            continue
        stop = at
        if how == "moonwalk":
            names: list[str] = []
            used: list[MoonwalkOption] = []
            while stop < size and state[stop][0] == how:
                o = named(profile.layers[stop].moonwalk, state[stop][1])
                if moonwalk_error([*used, o]) > max_error:
                    break
                used.append(o)
                names.append(o.name)
                stop += 1
            runs.append(Run(kind=RunKind.MOONWALK, start=at, stop=stop, options=tuple(names)))
            at = stop
            continue
        while stop < size and state[stop][0] == how:
            stop += 1
        piece = {1: stop - at, 0: max(1, round(math.sqrt(stop - at))), -1: 1}[pieces]
        for start in range(at, stop, piece):
            end = min(stop, start + piece)
            runs.append(recomputed(start, end, [fastest_store(profile, k) for k in range(start, end)]))
        at = stop
    return runs
