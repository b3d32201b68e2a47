r"""The integer program over candidate runs, in CP-SAT: proof, and side conditions that the frontier does not
know.

Over the nodes `(i, e)` of the chain, with a binary `z_c` for each candidate run `c` from `(s, e)` to
`(j, e')` of peak `P_c`, held bytes `H_c`, time `t_c`:

    minimise    sum t_c z_c
    subject to
      one path through the nodes     sum_{c out of n} z_c - sum_{c into n} z_c = [n = (0, 1)] - [n = (L, .)]
      each layer i, all its events   sum_{c ends before i} H_c z_c + sum_{c covers i} P_c z_c <= M
      the turn                       sum H_c z_c + sum_{c into (L, e)} turn_e z_c <= M
      at most D distinct runs        z_c <= y_k for c in class k,  sum y_k <= D          if asked
      OFFLOAD runs                   sum G_c z_c <= host memory          all are offloaded at the turn

Exactly one run covers layer `i`, so no big-M is needed: for the run that covers `i` the row reads
`H(left of it) + P_c <= M`. A RECOMPUTE run stands once for each point of the Pareto set of its inner
schedules, which offload nothing: what they keep is there for a moment, and the device has room for it then.

**Bound filtering.** Let `V[n](b)` be the frontier's staircase at node `n`: no suffix from `n` within `b`
bytes is faster. Labels `(held, time)` of prefixes grow from the left; a label or a run whose
`time + t_c + V[n'](M - held - H_c)` exceeds a threshold `theta` is dropped. Every schedule of time at most
`theta` survives whole, so an optimum found at or below `theta` is the optimum, and a threshold with no
solution proves `theta + 1` a lower bound: thresholds grow until one holds or time is up. Without side
conditions the first one holds. Before them there is a schedule already: the staircases' own, which under pins
is the fastest, or, where distinct runs or the host's memory are limited, that of staircases with a penalty on
each run that makes runs few, or on each byte that makes them offload less. The filter is ours; side
conditions narrow the runs (`pins`, `forbid`) before `V` is computed, so that the bounds stay tight.

`solve_least_bytes` exchanges objective and limit: minimise `M` subject to `sum t_c z_c <= T`.
"""

from __future__ import annotations

import dataclasses
import time as clock
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mwplan.common.errors import ArgumentError
from mwplan.plans.profiles import Profile
from mwplan.plans.schedule import (
    Choice,
    Run,
    RunKind,
    Solution,
    Status,
    Strategy,
    as_strategies,
    check_allowed,
)
from mwplan.solvers.frontier import Frontier, Tables, Top, solve_frontier
from mwplan.solvers.pareto import INF, Ints, staircase, value_at
from mwplan.solvers.runs import ALL_STRATEGIES, Candidates, error_of, fastest_ns

_SLACKS = (0.0, 0.001, 0.01, 0.03, 0.1, 0.3, 1.0, 4.0)
_INT64 = 2**63 - 1
Node = tuple[int, bool]


def solve(
    profile: Profile,
    budget_bytes: int,
    *,
    max_error: float = 1e-4,
    allowed: Choice = ALL_STRATEGIES,
    pins: Mapping[int, Choice] | None = None,
    forbid: Mapping[int, Choice] | None = None,
    host_bytes: int = 0,
    max_distinct_runs: int | None = None,
    max_recompute_depth: int | None = None,
    time_limit_s: float = 30.0,
    seed: int = 0,
    workers: int = 2,
    slack: float = 0.0,
    frontier: Frontier | None = None,
) -> Solution:
    """The fastest schedule within a budget, with proof.

    **Arguments:** `budget_bytes`, of temporaries; `pins` and `forbid`, for layers 1 to L the strategy or
    strategies they must or must not have in the outermost runs (a layer inside a RECOMPUTE run is RECOMPUTE,
    as in `mwplan.plans.ledger.strategies`); `host_bytes`, of the host's memory that OFFLOAD runs may use
    (`Profile.offloading` gives layers such runs; outermost ones alone); `max_distinct_runs`, a limit on
    different outermost runs: runs are the same when they do the same to equal layers and enter them alike;
    `max_recompute_depth`, as in `solve_frontier`; `time_limit_s`, of the integer program after the frontier
    and the staircases under the side conditions; `slack`, how far above the frontier's optimum (relative)
    runs are still given to the integer program; `frontier`, of the same profile and options, if known.
    **Returns:** a `Solution`. OPTIMAL: proved. FEASIBLE: time was up; `bound_ns` is what was proved.
    INFEASIBLE: proved, with `least_bytes` where it is known. UNKNOWN: time was up before any schedule was
    found.
    **Raises:** `ArgumentError` on arguments that cannot be used, pins that contradict `forbid` or `allowed`
    among them.
    **Cost:** the frontier, if not given; then the filtered program, typically well below a second.
    """
    _check_number("budget_bytes", budget_bytes, 1)
    problem = _Problem.make(
        profile,
        max_error,
        allowed,
        pins,
        forbid,
        host_bytes,
        max_distinct_runs,
        max_recompute_depth,
        time_limit_s,
        seed,
        workers,
        frontier,
    )
    if not 0 <= slack <= 10:
        raise ArgumentError(f"`slack={slack!r}` must be a number from 0 to 10")
    return _search(problem, budget_bytes, None, slack)


def solve_least_bytes(
    profile: Profile,
    limit_ns: int,
    *,
    max_error: float = 1e-4,
    allowed: Choice = ALL_STRATEGIES,
    pins: Mapping[int, Choice] | None = None,
    forbid: Mapping[int, Choice] | None = None,
    host_bytes: int = 0,
    max_distinct_runs: int | None = None,
    max_recompute_depth: int | None = None,
    time_limit_s: float = 30.0,
    seed: int = 0,
    workers: int = 2,
    frontier: Frontier | None = None,
) -> Solution:
    """The leanest schedule that takes at most `limit_ns`: the other direction of `solve`, same arguments and
    errors.

    **Returns:** a `Solution` whose `peak_bytes` is minimal if OPTIMAL, `least_bytes` being what was proved of
    it: no schedule within `limit_ns` needs less. INFEASIBLE: no schedule is that fast.
    """
    _check_number("limit_ns", limit_ns, 0)
    problem = _Problem.make(
        profile,
        max_error,
        allowed,
        pins,
        forbid,
        host_bytes,
        max_distinct_runs,
        max_recompute_depth,
        time_limit_s,
        seed,
        workers,
        frontier,
    )
    return _search(problem, None, limit_ns, 0.0)


@dataclass(slots=True)
class _Problem:
    """What is asked, with the staircases under its pins."""

    frontier: Frontier
    #: None where the frontier has no tables of single stretches (long stretches of identical layers) and
    #: there are no side conditions: it is the answer
    top: Top | None
    #: of OFFLOAD runs; 0 where there are none
    host_bytes: int
    max_distinct_runs: int | None
    time_limit_s: float
    seed: int
    workers: int

    @property
    def staircases(self) -> Top:
        """The staircases of all suffixes, under the pins."""
        assert self.top is not None
        return self.top

    @property
    def candidates(self) -> Candidates:
        """The runs outside RECOMPUTE runs, under the pins."""
        return self.staircases.candidates

    @property
    def limited(self) -> bool:
        """Whether there is a side condition that the staircases do not know."""
        return self.max_distinct_runs is not None or self.host_bytes > 0

    @property
    def tables(self) -> Tables:
        """The inner schedules of RECOMPUTE runs."""
        assert isinstance(self.frontier.tables, Tables)
        return self.frontier.tables

    @classmethod
    def make(
        cls,
        profile: Profile,
        max_error: float,
        allowed: Choice,
        pins: Mapping[int, Choice] | None,
        forbid: Mapping[int, Choice] | None,
        host_bytes: int,
        max_distinct_runs: int | None,
        max_recompute_depth: int | None,
        time_limit_s: float,
        seed: int,
        workers: int,
        frontier: Frontier | None,
    ) -> _Problem:
        if not isinstance(profile, Profile):
            raise ArgumentError(f"`profile` must be a `Profile`, got {type(profile).__name__}")
        if max_distinct_runs is not None:
            _check_number("max_distinct_runs", max_distinct_runs, 1)
        if (
            isinstance(time_limit_s, bool)
            or not isinstance(time_limit_s, (int, float))
            or not time_limit_s > 0
        ):
            raise ArgumentError(f"`time_limit_s={time_limit_s!r}` must be a number of seconds above 0")
        _check_number("host_bytes", host_bytes, 0)
        _check_number("workers", workers, 1)
        _check_number("seed", seed, 0)
        if seed >= 2**31:
            raise ArgumentError(f"`seed={seed}` must be below 2^31")
        allowed = check_allowed(allowed)
        narrowed = _narrowed(len(profile), allowed, pins or {}, forbid or {})
        if frontier is None:
            frontier = solve_frontier(
                profile, max_error=max_error, allowed=allowed, max_recompute_depth=max_recompute_depth
            )
        if frontier.profile != profile or frontier.max_error != max_error or frontier.allowed != allowed:
            raise ArgumentError(
                "`frontier` was made from another profile, `max_error` or `allowed`: leave it out"
            )
        tables = frontier.tables
        if Strategy.OFFLOAD not in allowed or not any(layer.offload for layer in profile.layers):
            host_bytes = 0
        conditions = bool(narrowed) or max_distinct_runs is not None or host_bytes > 0
        if not isinstance(tables, Tables) and conditions:
            # Side conditions tell layers apart.
            thin = frontier.thin
            every = Candidates(profile, max_error=max_error, allowed=allowed, loss=thin)
            tables = Tables(every, max_recompute_depth, loss=thin / 4)
            frontier = Frontier(profile, tables, max_error=max_error, allowed=allowed, thin=thin)
        if not isinstance(tables, Tables):
            return cls(frontier, None, 0, None, time_limit_s, seed, workers)
        if max_recompute_depth is not None and tables.depth not in (0, max_recompute_depth):
            raise ArgumentError("`frontier` was made with another `max_recompute_depth`: leave it out")
        candidates, top = tables.candidates, frontier.top
        if narrowed or host_bytes:
            candidates = Candidates(
                profile,
                max_error=max_error,
                allowed=allowed,
                per_layer=narrowed,
                by_strategy=max_distinct_runs is not None,
                host=host_bytes > 0,
            )
        if conditions:
            top = tables.solve_top(candidates, closing=True)
        return cls(frontier, top, host_bytes, max_distinct_runs, time_limit_s, seed, workers)

    def host_of(self, run: Run) -> int:
        """Bytes that an outermost run has in the host's memory."""
        if run.kind is not RunKind.OFFLOAD:
            return 0
        options = self.candidates.profile.layers[run.start].offload
        return next(o.host_bytes for o in options if o.name == run.options[0])

    def at_host_price(self, price: int) -> Candidates:
        """The candidates with `price` ns a MiB of the host's memory on top of times; `INF`: without OFFLOAD
        runs."""
        c = self.candidates
        profile = c.profile
        if price < INF:
            priced = {
                id(layer): dataclasses.replace(
                    layer,
                    offload=tuple(
                        dataclasses.replace(o, forward_ns=o.forward_ns + host_price_ns(o.host_bytes, price))
                        for o in layer.offload
                    ),
                )
                for layer in profile.layers
            }
            profile = dataclasses.replace(
                profile, layers=tuple(priced[id(layer)] for layer in profile.layers)
            )
        return Candidates(
            profile,
            max_error=c.max_error,
            allowed=c.allowed,
            per_layer={at + 1: chosen for at, chosen in enumerate(c.layer_allowed)},
            by_strategy=c.by_strategy,
            host=price < INF,
        )


def host_price_ns(host_bytes: int, price: int) -> int:
    """What so many bytes cost at `price` ns a MiB."""
    return host_bytes * price >> 20


def _check_number(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not least <= value <= _INT64:
        raise ArgumentError(f"`{name}={value!r}` must be an integer from {least} to 2^63 - 1")


def _narrowed(
    size: int, allowed: frozenset[Strategy], pins: Mapping[int, Choice], forbid: Mapping[int, Choice]
) -> dict[int, frozenset[Strategy]]:
    out: dict[int, frozenset[Strategy]] = {}
    for name, given in (("pins", pins), ("forbid", forbid)):
        for layer, choice in given.items():
            if isinstance(layer, bool) or not isinstance(layer, int) or not 1 <= layer <= size:
                raise ArgumentError(f"`{name}` names layer {layer!r}: layers count from 1 to {size}")
            chosen = as_strategies(choice, f"{name}[{layer}]")
            before = out.get(layer, allowed)
            out[layer] = before & chosen if name == "pins" else before - chosen
    for layer, left in out.items():
        if not left:
            raise ArgumentError(
                f"layer {layer} is left without a strategy: `pins`, `forbid` and `allowed` contradict each "
                "other there"
            )
    return out


@dataclass(slots=True)
class _Columns:
    """The runs that survived the filter: one row each."""

    source: list[Node] = field(default_factory=list)
    target: list[Node] = field(default_factory=list)
    peak: list[int] = field(default_factory=list)
    held: list[int] = field(default_factory=list)
    time: list[int] = field(default_factory=list)
    host: list[int] = field(default_factory=list)
    #: row of the node's atoms, or -1 - need of the inner schedule of a RECOMPUTE run
    handle: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.peak)


class _Node:
    """All candidate runs out of one node, as arrays, with the staircases of where they lead."""

    def __init__(self, problem: _Problem, node: Node) -> None:
        start, kept = node
        c, tables, top = problem.candidates, problem.tables, problem.staircases
        atoms = c.atoms(start, kept)
        parts = [
            (
                atoms.stop,
                atoms.keeps_end.astype(np.int64),
                np.maximum(atoms.forward_peak, atoms.backward_peak),
                atoms.held,
                atoms.time,
                atoms.host,
                np.arange(len(atoms)),
            )
        ]
        source = tables.source(tables.levels)
        if source is not None:
            own = 0 if kept else int(c.activation[start])
            peaks = c.recompute_forward_peak(start, kept)
            limit = int(top.reach[start]) if top.closing else min(int(top.reach[start]), c.size - 1)
            for stop in range(start + 1, limit + 1):
                need, time = tables.suffix(source, start, stop, kept)
                need_, time_ = staircase(np.maximum(need, peaks[stop - start - 1]), time)
                n = need_.size
                forward = int(c.forward_sum[stop] - c.forward_sum[start])
                zero = np.zeros(n, dtype=np.int64)
                parts.append((zero + stop, zero, need_, zero + own, time_ + forward, zero, -1 - need_))
        self.stop, self.keeps, self.peak, self.held, self.time, self.host, self.handle = (
            np.concatenate(x) for x in zip(*parts)
        )
        order = np.argsort(2 * self.stop + self.keeps, kind="stable")
        for name in ("stop", "keeps", "peak", "held", "time", "host", "handle"):
            setattr(self, name, getattr(self, name)[order])
        node_id = 2 * self.stop + self.keeps
        cuts = np.flatnonzero(np.diff(node_id)) + 1
        self.groups = [
            (int(a), int(b))
            for a, b in zip(np.concatenate([[0], cuts]), np.concatenate([cuts, [node_id.size]]))
            if b > a
        ]
        self.top = top

    def completion(self, budget: int, held: int) -> Ints:
        """For each run, a lower bound on its time and that of all after it, `held` bytes being held to its
        left."""
        out = np.full(self.stop.size, INF, dtype=np.int64)
        for a, b in self.groups:
            need, time = self.top.nodes.get(
                (int(self.stop[a]), bool(self.keeps[a])), (np.zeros(0), np.zeros(0))
            )
            if not len(need):
                continue
            at = np.searchsorted(need, budget - held - self.held[a:b], side="right") - 1
            ok = (at >= 0) & (self.peak[a:b] <= budget - held)
            out[a:b][ok] = self.time[a:b][ok] + time[at[ok]]
        return out


def _filter(
    problem: _Problem, nodes: dict[Node, _Node], budget: int, theta: int, deadline: float
) -> _Columns | None:
    """The runs that stand in some schedule within `budget` whose time may be at most `theta`; None if
    `deadline` comes first."""
    out = _Columns()
    size = problem.candidates.size
    labels: dict[Node, tuple[Ints, Ints]] = {
        (0, True): (np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64))
    }
    new: dict[Node, list[tuple[Ints, Ints]]] = {}
    for start in range(size):
        for kept in (False, True):
            if (start, kept) in new:
                held, time = (np.concatenate(x) for x in zip(*new.pop((start, kept))))
                labels[start, kept] = staircase(held, time)
            if (start, kept) not in labels:
                continue
            if (start, kept) not in nodes:
                nodes[start, kept] = _Node(problem, (start, kept))
            node = nodes[start, kept]
            used = np.zeros(node.stop.size, dtype=np.bool_)
            for h, t in zip(*(x.tolist() for x in labels[start, kept])):
                if clock.monotonic() > deadline:
                    return None
                good = np.flatnonzero(node.completion(budget, h) <= theta - t)
                used[good] = True
                for a in good.tolist():
                    to = (int(node.stop[a]), bool(node.keeps[a]))
                    new.setdefault(to, []).append((node.held[a : a + 1] + h, node.time[a : a + 1] + t))
            for a in np.flatnonzero(used).tolist():
                out.source.append((start, kept))
                out.target.append((int(node.stop[a]), bool(node.keeps[a])))
                out.peak.append(int(node.peak[a]))
                out.held.append(int(node.held[a]))
                out.time.append(int(node.time[a]))
                out.host.append(int(node.host[a]))
                out.handle.append(int(node.handle[a]))
    return out


def _spell(problem: _Problem, columns: _Columns, row: int) -> Run:
    """Column `row` as a run."""
    (start, kept), (stop, _), handle = columns.source[row], columns.target[row], columns.handle[row]
    if handle >= 0:
        return problem.candidates.run(start, kept, handle)
    tables = problem.tables
    source = tables.source(tables.levels)
    assert source is not None
    inner = tables.inner_runs(source, start, stop, kept, -1 - handle)
    return Run(kind=RunKind.RECOMPUTE, start=start, stop=stop, inner=inner)


def _signature(problem: _Problem, run: Run, kept: bool) -> tuple[Any, ...]:
    """Equal for runs that do the same to equal layers and enter them alike."""

    def shape(run: Run, base: int) -> tuple[Any, ...]:
        return (
            run.kind,
            run.start - base,
            run.stop - base,
            run.options,
            tuple(shape(x, base) for x in run.inner),
        )

    c, p = problem.candidates, problem.candidates.profile
    at = run.start
    start = (p.activation_bytes[at], p.cotangent_bytes[at], p.sweep_cotangent_bytes[at], kept)
    return (start, tuple(c.layer_class[at + 1 : run.stop + 1]), shape(run, at))


def _keeps_end(problem: _Problem, run: Run) -> bool:
    """Whether an outermost run keeps its end."""
    layer = problem.candidates.profile.layers[run.stop - 1]
    if run.kind in (RunKind.STORE, RunKind.MOONWALK):
        options: Iterable[Any] = layer.store if run.kind is RunKind.STORE else layer.moonwalk
        return any(o.keeps_output for o in options if o.name == run.options[-1])
    return run.kind is RunKind.INVERT


def _incumbent(problem: _Problem, budget: int, deadline: float) -> Solution | None:
    """A schedule within `budget`, the limit on distinct runs and the host's memory, if one is found: the
    staircases' own, or those under penalties, the smaller the better, found by halving their logarithms until
    half of the time is gone. Penalties on each outermost run, which then offloads nothing, where distinct
    runs are limited; else on each byte of the host's."""
    tables, top = problem.tables, problem.staircases
    limit, size = problem.max_distinct_runs, problem.candidates.size
    half = (clock.monotonic() + deadline) / 2

    def read(top: Top) -> Solution | None:
        need, time = top.nodes[0, True]
        step = int(need.searchsorted(budget, side="right")) - 1
        if step < 0:
            return None
        runs = tables.runs(top, int(need[step]))
        if sum(map(problem.host_of, runs)) > problem.host_bytes:
            return None
        if limit is not None:
            nodes = [True, *(_keeps_end(problem, run) for run in runs)]
            if len({_signature(problem, run, kept) for run, kept in zip(runs, nodes)}) > limit:
                return None
        spent = int(time[step]) - top.penalty_ns * len(runs)
        return Solution(status=Status.FEASIBLE, runs=runs, time_ns=spent, peak_bytes=int(need[step]))

    best = read(top)
    if best is not None or not problem.limited:
        return best
    if problem.host_bytes:
        best = read(top := tables.solve_top(problem.at_host_price(INF), closing=True))
        if limit is None:
            return _cheapest(problem, read, best, value_at(*problem.staircases.nodes[0, True], budget), half)
        if best is not None:
            return best
    high = min(value_at(*top.nodes[0, True], budget), 2**61 // (size + 1))
    low = max(1, high >> 16)

    def under(penalty_ns: int) -> Solution | None:
        return read(tables.solve_top(top.candidates, closing=True, penalty_ns=penalty_ns))

    return _least_penalty(under, low, high, high, best, half)


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


def _cheapest(
    problem: _Problem,
    read: Callable[[Top], Solution | None],
    best: Solution | None,
    quickest_ns: int,
    until: float,
) -> Solution | None:
    """The fastest of `best` and schedules under prices on the host's memory, so high that they keep within
    it; `quickest_ns`: with as much of it as one likes."""
    high = 1 + 2 * max(quickest_ns, 0 if best is None else best.time_ns) * 2**20 // problem.host_bytes
    every = sum(o.host_bytes for layer in problem.candidates.profile.layers for o in layer.offload)
    high = min(high, 2**58 // (every + 1) << 20)
    low = max(1, high >> 20)

    def under(price: int) -> Solution | None:
        found = read(problem.tables.solve_top(problem.at_host_price(price), closing=True))
        if found is None:
            return None
        paid = sum(host_price_ns(problem.host_of(run), price) for run in found.runs or ())
        return dataclasses.replace(found, time_ns=found.time_ns - paid)

    return _least_penalty(under, low, high, int((low * high) ** 0.5), best, until)


def _search(problem: _Problem, budget: int | None, limit_ns: int | None, slack: float) -> Solution:
    """Grows the threshold until the program's optimum lies at or below it; one of `budget`, `limit_ns` is
    given."""
    began = clock.monotonic()
    deadline = began + problem.time_limit_s
    if problem.top is None:
        return _by_frontier(problem.frontier, budget, limit_ns)
    need, time = problem.staircases.nodes[0, True]
    unlimited = not problem.limited
    # What a limited memory of the host leaves is not known before.
    least = int(need[0]) if need.size and not problem.host_bytes else None
    name = "integer_program"
    if budget is not None:
        base = value_at(need, time, budget)
        if base >= INF:
            return Solution(status=Status.INFEASIBLE, least_bytes=least, solver=name)
        last = base + int(base * slack) if unlimited else INF
    else:
        assert limit_ns is not None
        fits = np.flatnonzero(time <= limit_ns)
        if not fits.size:
            return Solution(status=Status.INFEASIBLE, solver=name)
        base, last = int(need[fits[0]]), _INT64 // 4
    nodes: dict[Node, _Node] = {}
    best = None if budget is None else _incumbent(problem, budget, deadline)
    bound, solves = base, 0
    stats: dict[str, float] = {}
    thresholds = [min(last, base + int(base * s)) for s in sorted({slack, *_SLACKS}) if s >= slack] + [last]
    goal = INF
    for theta in thresholds:
        if best is not None:
            goal = best.time_ns if budget is not None else best.peak_bytes
            theta = min(theta, max(goal, thresholds[0]))
        caps = (budget, theta) if budget is not None else (theta, limit_ns)
        assert caps[0] is not None
        assert caps[1] is not None
        columns = _filter(problem, nodes, caps[0], caps[1], deadline)
        if columns is None:
            break
        outcome = _solve_columns(problem, columns, caps[0], caps[1], budget is None, deadline, stats)
        solves += 1
        if outcome.runs is not None:
            value = outcome.time_ns if budget is not None else outcome.peak_bytes
            if best is None or value < (best.time_ns if budget is not None else best.peak_bytes):
                best = outcome
        if outcome.status is Status.OPTIMAL:
            assert best is not None
            # The best below the threshold; all schedules that the filter left out lie above it.
            bound = best.time_ns if budget is not None else best.peak_bytes
            break
        if outcome.status is Status.INFEASIBLE:
            bound = max(bound, theta + 1)
            if problem.frontier.thin and (theta >= last or (best is not None and theta >= goal)):
                break
            if theta >= last:
                return Solution(
                    status=Status.INFEASIBLE, least_bytes=least if unlimited else None, solver=name
                )
        else:
            bound = max(bound, min(outcome.bound_ns, theta + 1))
            break
    stats["solves"] = float(solves)
    stats["seconds"] = clock.monotonic() - began
    if best is None:
        known = bound if budget is not None and not problem.frontier.thin else 0
        return Solution(
            status=Status.UNKNOWN, bound_ns=known, least_bytes=least, solver=name, stats=_pairs(stats)
        )
    if problem.frontier.thin and problem.host_bytes:
        # The frontier knows no OFFLOAD runs.
        bound = 0 if budget is None else min(bound, fastest_ns(problem.candidates.profile))
    elif problem.frontier.thin and budget is not None:
        # Thinned staircases are schedules, not bounds.
        bound = min(bound, problem.frontier.bound_ns(budget))
    elif problem.frontier.thin:
        assert limit_ns is not None
        bound = min([bound, *[n for n, t in problem.frontier.bound_points if t <= limit_ns][:1]])
    done = bound >= (best.time_ns if budget is not None else best.peak_bytes)
    return Solution(
        status=Status.OPTIMAL if done else Status.FEASIBLE,
        runs=best.runs,
        time_ns=best.time_ns,
        peak_bytes=best.peak_bytes,
        error=error_of(problem.candidates.profile, best.runs or ()),
        bound_ns=bound if budget is not None else best.time_ns,
        least_bytes=least if budget is not None else bound,
        solver=name,
        stats=_pairs(stats),
    )


def _by_frontier(frontier: Frontier, budget: int | None, limit_ns: int | None) -> Solution:
    """The frontier's own answer in either direction."""
    if budget is None:
        assert limit_ns is not None
        fits = [need for need, time in frontier.points if time <= limit_ns]
        if not fits:
            return Solution(status=Status.UNKNOWN if frontier.thin else Status.INFEASIBLE, solver="frontier")
        budget = fits[0]
        if frontier.thin:
            return dataclasses.replace(frontier.at(budget), status=Status.FEASIBLE, least_bytes=None)
        return dataclasses.replace(frontier.at(budget), least_bytes=budget)
    if frontier.thin:
        frontier.bound_ns(budget)  # which `at` then states
    return frontier.at(budget)


def _pairs(stats: dict[str, float]) -> tuple[tuple[str, float], ...]:
    return tuple(sorted(stats.items()))


def _solve_columns(
    problem: _Problem,
    columns: _Columns,
    budget: int,
    theta: int,
    least_bytes: bool,
    deadline: float,
    stats: dict[str, float],
) -> Solution:
    """Builds and solves the program over `columns`: minimises time within `budget`, or the peak (at most
    `budget`) within `theta` ns. UNKNOWN if `deadline` comes first."""
    if not len(columns):
        return Solution(status=Status.INFEASIBLE)
    from ortools.sat.python import cp_model

    c, n = problem.candidates, len(columns)
    held, peak, spent = (np.array(x, dtype=np.int64) for x in (columns.held, columns.peak, columns.time))
    turn = np.array([c.turn_bytes(e) if i == c.size else 0 for i, e in columns.target], dtype=np.int64)
    # Bytes only enter comparisons of sums, so a common divisor goes; what remains must not overflow CP-SAT's
    # sums.
    unit = max(1, int(np.gcd.reduce(np.concatenate([held, peak, turn]))))
    top_bytes = sum(int(x) for x in held) + sum(int(x) for x in peak) + int(turn.sum())
    if top_bytes // unit >= 2**61 or sum(int(x) for x in spent) >= 2**61:
        raise ArgumentError(
            f"`profile`: the {n} runs of the integer program sum to {top_bytes} bytes, past 2^61: state "
            "bytes and times in larger units"
        )
    model = cp_model.CpModel()
    z = [model.new_bool_var(f"z{k}") for k in range(n)]
    out: dict[Node, list[Any]] = {}
    into: dict[Node, list[Any]] = {}
    for k in range(n):
        out.setdefault(columns.source[k], []).append(z[k])
        into.setdefault(columns.target[k], []).append(z[k])
    for node in {*out, *into}:
        if node[0] == c.size:
            continue
        flow = sum(out.get(node, [])) - sum(into.get(node, []))
        model.add(flow == (1 if node == (0, True) else 0))
    start = np.array([s for s, _ in columns.source])
    stop = np.array([j for j, _ in columns.target])
    cap: Any = budget // unit
    if least_bytes:
        cap = model.new_int_var(0, budget // unit, "peak")
    rows: set[bytes] = set()
    for layer in range(c.size + 1):
        covers = (start <= layer) & (stop > layer) if layer < c.size else stop == c.size
        weight = np.where(stop <= layer, held, 0) + np.where(covers, peak if layer < c.size else turn, 0)
        if clock.monotonic() > deadline:
            return Solution(status=Status.UNKNOWN)
        if weight.tobytes() in rows:
            continue
        rows.add(weight.tobytes())
        used = np.flatnonzero(weight)
        terms = cp_model.LinearExpr.weighted_sum([z[k] for k in used], (weight[used] // unit).tolist())
        model.add(terms <= cap)
    total = cp_model.LinearExpr.weighted_sum(z, spent.tolist())
    model.add(total <= min(theta, 2**61))
    if problem.max_distinct_runs is not None:
        classes: dict[Any, list[int]] = {}
        for k in range(n):
            if clock.monotonic() > deadline:
                return Solution(status=Status.UNKNOWN)
            key = _signature(problem, _spell(problem, columns, k), columns.source[k][1])
            classes.setdefault(key, []).append(k)
        y = []
        for index, members in enumerate(classes.values()):
            y.append(model.new_bool_var(f"y{index}"))
            for k in members:
                model.add_implication(z[k], y[-1])
        model.add(sum(y) <= problem.max_distinct_runs)
    host = np.array(columns.host, dtype=np.int64)
    if int(host.sum()) > problem.host_bytes:
        share = max(1, int(np.gcd.reduce(host)))
        away = np.flatnonzero(host)
        used_ = cp_model.LinearExpr.weighted_sum([z[k] for k in away], (host[away] // share).tolist())
        model.add(used_ <= problem.host_bytes // share)
    model.minimize(cap if least_bytes else total)
    for k in _hint(problem, columns, budget):
        model.add_hint(z[k], 1)
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = max(0.01, deadline - clock.monotonic())
    solver.parameters.num_workers = problem.workers
    solver.parameters.random_seed = problem.seed
    solver.parameters.log_search_progress = False
    status = solver.solve(model)
    stats["columns"] = float(n)
    stats["branches"] = float(solver.num_branches)
    stats["conflicts"] = float(solver.num_conflicts)
    if status == cp_model.MODEL_INVALID:
        raise ArgumentError(
            f"the integer program overflows ({model.validate()}): state bytes and times in larger units"
        )
    if status == cp_model.INFEASIBLE:
        return Solution(status=Status.INFEASIBLE)
    # CP-SAT's bound is a float near an integer: an integer objective is at least its ceiling, less rounding.
    bound = int(
        np.ceil(solver.best_objective_bound - 1e-6 * max(1.0, abs(solver.best_objective_bound)) ** 0.5)
    )
    if status == cp_model.UNKNOWN:
        return Solution(status=Status.UNKNOWN, bound_ns=max(0, bound) * (unit if least_bytes else 1))
    chosen = sorted((k for k in range(n) if solver.boolean_value(z[k])), key=lambda k: columns.source[k])
    before, need = 0, 0
    for k in chosen:
        need = max(need, before + int(peak[k]))
        before += int(held[k])
    need = max(need, before + int(turn[chosen[-1]]))
    return Solution(
        status=Status.OPTIMAL if status == cp_model.OPTIMAL else Status.FEASIBLE,
        runs=tuple(_spell(problem, columns, k) for k in chosen),
        time_ns=sum(int(spent[k]) for k in chosen),
        peak_bytes=need,
        bound_ns=max(0, bound) * (unit if least_bytes else 1),
    )


def _hint(problem: _Problem, columns: _Columns, budget: int) -> list[int]:
    """Columns of one fastest schedule within `budget` by the staircases: the warm start."""
    by_source: dict[Node, list[int]] = {}
    for k, source in enumerate(columns.source):
        by_source.setdefault(source, []).append(k)
    out: list[int] = []
    node: Node = (0, True)
    rest = budget
    while node[0] < problem.candidates.size:
        goal = value_at(*problem.staircases.nodes[node], rest)
        for k in by_source.get(node, ()):
            after = problem.staircases.nodes[columns.target[k]]
            if columns.peak[k] <= rest and columns.time[k] + value_at(*after, rest - columns.held[k]) == goal:
                out.append(k)
                rest -= columns.held[k]
                node = columns.target[k]
                break
        else:
            return []
    return out
