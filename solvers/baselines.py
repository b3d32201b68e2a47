"""What others do, as plans in the same space: what the optimum is measured against.

Each takes a `Problem`, of which it keeps `max_error` and, where its docstring says so, `budget_bytes` and
`allowed`, and returns a `Solution` of status FEASIBLE, costed by the ledger (INFEASIBLE where it needs more
than the budget). Revolve and Mixed plan for unit chains (equal layers): they count steps and slots, not
bytes. rotor's dynamic program is in `mwplan.solvers.rotor`, the rule of thumb in `mwplan.solvers.greedy`.

Sources: Chen et al., arXiv:1604.06174 (square root); Griewank and Walther, ACM TOMS 26(1), 2000 (Revolve);
Maddison, J. Comput. Sci. 82, 2024 (Mixed). The rest is what practitioners write by hand.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

from mwplan.plans.ledger import replay
from mwplan.plans.profiles import InvertOption, MoonwalkOption, Profile
from mwplan.plans.schedule import Run, RunKind, Solution, Status, Strategy
from mwplan.solvers.frontier import solve_frontier
from mwplan.solvers.predictions import invert_error, invert_share
from mwplan.solvers.problem import Problem, check_integer

Option = TypeVar("Option", MoonwalkOption, InvertOption)


def costed(profile: Profile, runs: Sequence[Run], solver: str, budget_bytes: int | None = None) -> Solution:
    """The solution that these runs are, by the ledger."""
    found = replay(profile, runs)
    fits = budget_bytes is None or found.peak_bytes <= budget_bytes
    return Solution(
        status=Status.FEASIBLE if fits else Status.INFEASIBLE,
        runs=tuple(runs) if fits else None,
        time_ns=found.time_ns,
        peak_bytes=found.peak_bytes,
        error=found.error,
        solver=solver,
    )


def fastest_store(profile: Profile, at: int) -> Run:
    """The fastest STORE option of layer `at + 1`; of equally fast ones the one of least bytes."""
    return Run(kind=RunKind.STORE, start=at, stop=at + 1, options=(profile.layers[at].fastest_store.name,))


def recomputed(start: int, stop: int, inner: Sequence[Run]) -> Run:
    """A RECOMPUTE run."""
    return Run(kind=RunKind.RECOMPUTE, start=start, stop=stop, inner=tuple(inner))


def store_all(problem: Problem) -> Solution:
    """Plain backpropagation: every layer by its fastest STORE option."""
    profile = problem.profile
    return costed(profile, [fastest_store(profile, at) for at in range(len(profile))], "store_all")


def recompute_each(problem: Problem) -> Solution:
    """Every layer recomputed on its own: `jax.checkpoint` around each."""
    profile = problem.profile
    runs = [recomputed(at, at + 1, [fastest_store(profile, at)]) for at in range(len(profile))]
    return costed(profile, runs, "recompute_each")


def chen_sqrt(problem: Problem, segments: int | None = None) -> Solution:
    """Chen's segments: about sqrt(L) of equal length, all but the last recomputed, each once."""
    profile = problem.profile
    size = len(profile)
    count = segments or max(1, round(math.sqrt(size)))
    cuts = [round(k * size / count) for k in range(count + 1)]
    runs: list[Run] = []
    for start, stop in itertools.pairwise(cuts):
        inner = [fastest_store(profile, at) for at in range(start, stop)]
        runs += inner if stop == size else [recomputed(start, stop, inner)] if inner else []
    return costed(profile, runs, "chen_sqrt")


def best_recomputation(problem: Problem) -> Solution:
    """The fastest schedule within `budget_bytes` of STORE and RECOMPUTE runs alone, exact bytes, any depth:
    the best persistent checkpointing."""
    alone = replace(problem.unconditional(), allowed={Strategy.STORE, Strategy.RECOMPUTE})
    return solve_frontier(alone).at(problem.budget)


def _unit_plan(profile: Profile, slots: int, solver: str, mixed: bool) -> Solution:
    check_integer("slots", slots, 1)  # the chain's input takes one

    @functools.cache
    def best(n: int, free: int) -> tuple[int, int]:
        """Forward steps that `n` layers take with `free` slots, their start's included, and the first move: 0
        stores, k checkpoints."""
        if n == 1:
            return 1, 0
        if free == 0:
            return _NEVER, 0
        out = (1 + best(n - 1, free - 1)[0], 0) if mixed else (_NEVER, 0)
        for k in range(1, n):
            out = min(out, (k + best(n - k, free - 1)[0] + best(k, free)[0], k))
        return out

    def runs(start: int, stop: int, free: int) -> list[Run]:
        _, k = best(stop - start, free)
        if k == 0:
            first = fastest_store(profile, start)
            return [first] if stop == start + 1 else [first, *runs(start + 1, stop, free - 1)]
        first = recomputed(start, start + k, runs(start, start + k, free))
        return [first, *runs(start + k, stop, free - 1)]

    for n in range(1, len(profile)):
        best(n, slots)  # shallow recursion
    return costed(profile, runs(0, len(profile), slots), solver)


_NEVER = 2**62


def revolve(problem: Problem, slots: int) -> Solution:
    """The least forward steps with `slots` stored activations, the chain's input among them: only the last
    step of a stretch is taped.

    `t(n, c) = min_k k + t(n - k, c - 1) + t(k, c)`, `t(1, .) = 1`. **Cost:** O(n^2 slots).
    """
    return _unit_plan(problem.profile, slots, "revolve", mixed=False)


def mixed(problem: Problem, slots: int) -> Solution:
    """As `revolve`, but a slot may also hold a step's tape, which then need not be recomputed:
    `1 + t(n - 1, c - 1)` joins the choices."""
    return _unit_plan(problem.profile, slots, "mixed", mixed=True)


def _grouped(profile: Profile, choose: Callable[[int, list[str]], str | None], kind: RunKind) -> list[Run]:
    """Runs of `kind` as long as `choose(layer index, names so far)` gives an option; STORE where it gives
    none even alone."""
    runs: list[Run] = []
    at, size = 0, len(profile)
    while at < size:
        names: list[str] = []
        while at + len(names) < size:
            name = choose(at, names)
            if name is None:
                break
            names.append(name)
        if names:
            runs.append(Run(kind=kind, start=at, stop=at + len(names), options=tuple(names)))
            at += len(names)
        else:
            runs.append(fastest_store(profile, at))
            at += 1
    return runs


def moonwalk_error(options: Iterable[MoonwalkOption]) -> float:
    """The largest error of a MOONWALK run by these options, input first."""
    error = worst = 0.0
    for o in options:
        if not math.isfinite(o.growth):
            return math.inf
        error = math.hypot(o.growth * error, o.local_error)
        worst = max(worst, error)
    return worst


def named(options: Sequence[Option], name: str) -> Option:
    """The option of that name."""
    return next(o for o in options if o.name == name)


def all_moonwalk(problem: Problem) -> Solution:
    """Moonwalk runs with the smallest fragments, each as long as `max_error` lets it be; STORE where a layer
    has no usable option."""
    return _moonwalk(problem, "all_moonwalk", largest=False)


def all_fragment(problem: Problem) -> Solution:
    """Moonwalk runs with the largest fragments: usually whole cotangents, so that no error is carried on."""
    return _moonwalk(problem, "all_fragment", largest=True)


def _moonwalk(problem: Problem, solver: str, *, largest: bool) -> Solution:
    profile, max_error = problem.profile, problem.max_error

    def choose(start: int, names: list[str]) -> str | None:
        at = start + len(names)
        before = [named(profile.layers[start + k].moonwalk, name) for k, name in enumerate(names)]
        options = sorted(profile.layers[at].moonwalk, key=lambda o: o.fragment_bytes, reverse=largest)
        return next((o.name for o in options[:1] if moonwalk_error([*before, o]) <= max_error), None) or (
            next((o.name for o in options if moonwalk_error([o]) <= max_error), None) if not names else None
        )

    return costed(profile, _grouped(profile, choose, RunKind.MOONWALK), solver)


def all_invert(problem: Problem) -> Solution:
    """Invert runs as long as `max_error` lets them be; STORE where a layer cannot be inverted."""
    profile, max_error = problem.profile, problem.max_error

    def choose(start: int, names: list[str]) -> str | None:
        at = start + len(names)
        before = [named(profile.layers[start + k].invert, name) for k, name in enumerate(names)]
        share = invert_share(max_error, len(before) + 1, len(profile))
        for o in sorted(profile.layers[at].invert, key=lambda o: o.forward_ns + o.backward_ns):
            finite = all(
                map(math.isfinite, (o.growth, o.local_error, o.sensitivity, o.gradient_sensitivity, o.kink))
            )
            if finite and invert_error([*before, o]) <= share:
                return o.name
        return None

    return costed(profile, _grouped(profile, choose, RunKind.INVERT), "all_invert")
