"""What others do, as plans in the same space: what the optimum is measured against.

Each returns a `Solution` of status FEASIBLE, costed by the ledger (INFEASIBLE where it needs more than the
budget it was given). Revolve and Mixed plan for unit chains (equal layers): they count steps and slots, not
bytes. rotor's dynamic program is in `mwplan.solvers.rotor`.

Sources: Chen et al., arXiv:1604.06174 (square root); Griewank and Walther, ACM TOMS 26(1), 2000 (Revolve);
Maddison, J. Comput. Sci. 82, 2024 (Mixed). The rest is what practitioners write by hand.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from mwplan.common.errors import ArgumentError
from mwplan.plans.ledger import replay
from mwplan.plans.profiles import InvertOption, MoonwalkOption, Profile
from mwplan.plans.schedule import Choice, Run, RunKind, Solution, Status, Strategy, check_allowed
from mwplan.solvers.frontier import solve_frontier
from mwplan.solvers.runs import ALL_STRATEGIES, invert_error, invert_share, moonwalk_strategy

Option = TypeVar("Option", MoonwalkOption, InvertOption)


def _solution(
    profile: Profile, runs: Sequence[Run], solver: str, budget_bytes: int | None = None
) -> Solution:
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


def _store(profile: Profile, at: int) -> Run:
    """The fastest STORE option of layer `at + 1`; of equally fast ones the leanest."""
    best = min(profile.layers[at].store, key=lambda o: (o.forward_ns + o.backward_ns, o.residual_bytes))
    return Run(kind=RunKind.STORE, start=at, stop=at + 1, options=(best.name,))


def _recompute(start: int, stop: int, inner: Sequence[Run]) -> Run:
    return Run(kind=RunKind.RECOMPUTE, start=start, stop=stop, inner=tuple(inner))


def store_all(profile: Profile) -> Solution:
    """Plain backpropagation: every layer by its fastest STORE option."""
    return _solution(profile, [_store(profile, at) for at in range(len(profile))], "store_all")


def recompute_each(profile: Profile) -> Solution:
    """Every layer recomputed on its own: `jax.checkpoint` around each."""
    runs = [_recompute(at, at + 1, [_store(profile, at)]) for at in range(len(profile))]
    return _solution(profile, runs, "recompute_each")


def chen_sqrt(profile: Profile, segments: int | None = None) -> Solution:
    """Chen's segments: about sqrt(L) of equal length, all but the last recomputed, each once."""
    size = len(profile)
    count = segments or max(1, round(math.sqrt(size)))
    cuts = [round(k * size / count) for k in range(count + 1)]
    runs: list[Run] = []
    for start, stop in itertools.pairwise(cuts):
        inner = [_store(profile, at) for at in range(start, stop)]
        runs += inner if stop == size else [_recompute(start, stop, inner)] if inner else []
    return _solution(profile, runs, "chen_sqrt")


def best_recomputation(profile: Profile, budget_bytes: int) -> Solution:
    """The fastest schedule of STORE and RECOMPUTE runs alone, exact bytes, any depth: the best persistent
    checkpointing."""
    return solve_frontier(profile, allowed={Strategy.STORE, Strategy.RECOMPUTE}).at(budget_bytes)


def _unit_plan(profile: Profile, slots: int, solver: str, mixed: bool) -> Solution:
    if isinstance(slots, bool) or not isinstance(slots, int) or slots < 1:
        raise ArgumentError(f"`slots={slots!r}` must be an integer, at least 1: the chain's input takes one")

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
            first = _store(profile, start)
            return [first] if stop == start + 1 else [first, *runs(start + 1, stop, free - 1)]
        first = _recompute(start, start + k, runs(start, start + k, free))
        return [first, *runs(start + k, stop, free - 1)]

    for n in range(1, len(profile)):
        best(n, slots)  # shallow recursion
    return _solution(profile, runs(0, len(profile), slots), solver)


_NEVER = 2**62


def revolve(profile: Profile, slots: int) -> Solution:
    """The least forward steps with `slots` stored activations, the chain's input among them: only the last
    step of a stretch is taped.

    `t(n, c) = min_k k + t(n - k, c - 1) + t(k, c)`, `t(1, .) = 1`. **Cost:** O(n^2 slots).
    """
    return _unit_plan(profile, slots, "revolve", mixed=False)


def mixed(profile: Profile, slots: int) -> Solution:
    """As `revolve`, but a slot may also hold a step's tape, which then need not be recomputed:
    `1 + t(n - 1, c - 1)` joins the choices."""
    return _unit_plan(profile, slots, "mixed", mixed=True)


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
            runs.append(_store(profile, at))
            at += 1
    return runs


def _error(options: Iterable[MoonwalkOption]) -> float:
    error = worst = 0.0
    for o in options:
        if not math.isfinite(o.growth):
            return math.inf
        error = math.hypot(o.growth * error, o.local_error)
        worst = max(worst, error)
    return worst


def _named(options: Sequence[Option], name: str) -> Option:
    return next(o for o in options if o.name == name)


def all_moonwalk(profile: Profile, *, max_error: float = 1e-4) -> Solution:
    """Moonwalk runs with the smallest fragments, each as long as `max_error` lets it be; STORE where a layer
    has no usable option."""
    return _moonwalk(profile, max_error, "all_moonwalk", largest=False)


def all_fragment(profile: Profile, *, max_error: float = 1e-4) -> Solution:
    """Moonwalk runs with the largest fragments: usually whole cotangents, so that no error is carried on."""
    return _moonwalk(profile, max_error, "all_fragment", largest=True)


def _moonwalk(profile: Profile, max_error: float, solver: str, *, largest: bool) -> Solution:
    def choose(start: int, names: list[str]) -> str | None:
        at = start + len(names)
        before = [_named(profile.layers[start + k].moonwalk, name) for k, name in enumerate(names)]
        options = sorted(profile.layers[at].moonwalk, key=lambda o: o.fragment_bytes, reverse=largest)
        return next((o.name for o in options[:1] if _error([*before, o]) <= max_error), None) or (
            next((o.name for o in options if _error([o]) <= max_error), None) if not names else None
        )

    return _solution(profile, _grouped(profile, choose, RunKind.MOONWALK), solver)


def all_invert(profile: Profile, *, max_error: float = 1e-4) -> Solution:
    """Invert runs as long as `max_error` lets them be; STORE where a layer cannot be inverted."""

    def choose(start: int, names: list[str]) -> str | None:
        at = start + len(names)
        before = [_named(profile.layers[start + k].invert, name) for k, name in enumerate(names)]
        share = invert_share(max_error, len(before) + 1, len(profile))
        for o in sorted(profile.layers[at].invert, key=lambda o: o.forward_ns + o.backward_ns):
            finite = all(
                map(math.isfinite, (o.growth, o.local_error, o.sensitivity, o.gradient_sensitivity, o.kink))
            )
            if finite and invert_error([*before, o]) <= share:
                return o.name
        return None

    return _solution(profile, _grouped(profile, choose, RunKind.INVERT), "all_invert")


def greedy(
    profile: Profile,
    budget_bytes: int,
    *,
    max_error: float = 1e-4,
    allowed: Choice = ALL_STRATEGIES,
) -> Solution:
    """The rule of thumb: from plain backpropagation, change the layer with the most bytes saved per ns, until
    it fits.

    A layer may change to a leaner STORE option, to RECOMPUTE, or to its fastest moonwalk option; neighbours
    changed alike become one run. Recomputed stretches are tried whole, in pieces of about the square root of
    their length, and layer by layer; the fastest schedule found that fits is returned. **Cost:** three
    replays for each change.
    """
    allowed = check_allowed(allowed)
    moves: list[tuple[float, int, str, str]] = []
    for at, layer in enumerate(profile.layers):
        stored = next(o for o in layer.store if o.name == _store(profile, at).options[0])
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
        usable = [o for o in layer.moonwalk if moonwalk_strategy(o) in allowed and _error([o]) <= max_error]
        if usable:
            way = min(usable, key=lambda o: o.reverse_ns + o.rebuild_ns)
            extra = 2 * layer.forward_ns + way.reverse_ns + way.rebuild_ns - plain
            moves.append(((kept - way.residual_bytes) / max(1, extra), at, "moonwalk", way.name))
    moves = sorted((m for m in moves if m[0] > 0), key=lambda m: (-m[0], m[1]))
    state = [("store", _store(profile, at).options[0]) for at in range(len(profile))]
    best: Solution | None = None
    for step in range(len(moves) + 1):
        if step:
            _, at, how, name = moves[step - 1]
            # A layer changes away from STORE once.
            if state[at][0] != "store":
                continue
            state[at] = (how, name)
        tried = [
            _solution(profile, _spelled(profile, state, pieces, max_error), "greedy", budget_bytes)
            for pieces in (1, 0, -1)
        ]
        fits = [s for s in tried if s.runs is not None]
        if fits:
            return min(fits, key=lambda s: s.time_ns)
        lean = min(tried, key=lambda s: s.peak_bytes)
        best = lean if best is None or lean.peak_bytes < best.peak_bytes else best
    assert best is not None
    return Solution(status=Status.INFEASIBLE, peak_bytes=best.peak_bytes, solver="greedy")


def _spelled(profile: Profile, state: list[tuple[str, str]], pieces: int, max_error: float) -> list[Run]:
    """Runs for greedy's choices; recomputed stretches whole (`pieces` 1), by square roots (0), or layer by
    layer (-1)."""
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
                o = _named(profile.layers[stop].moonwalk, state[stop][1])
                if _error([*used, o]) > max_error:
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
            runs.append(_recompute(start, end, [_store(profile, k) for k in range(start, end)]))
        at = stop
    return runs
