"""What a solver returns and the executor runs: plain values, no JAX.

A schedule is a sequence of runs that covers the chain; a RECOMPUTE run holds an inner sequence, to any depth.
"""

from __future__ import annotations

import dataclasses
import enum
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from mwplan.common import serial
from mwplan.common.errors import ArgumentError
from mwplan.common.sizes import show_bytes, show_ns

SCHEMA = 3


class Strategy(enum.Enum):
    """The way chosen for one layer.

    >>> profile = mw.estimate(mw.Chain([jnp.tanh] * 8), jnp.ones((256, 64)), device="h100")
    >>> schedule = mw.plan(profile, budget="1MiB", allowed={mw.Strategy.STORE})
    >>> set(schedule.strategies)
    {<Strategy.STORE: 'store'>}
    """

    STORE = "store"
    RECOMPUTE = "recompute"
    FRAGMENT = "fragment"
    VIJP = "vijp"
    INVERT = "invert"
    OFFLOAD = "offload"


#: one strategy or several, by themselves or by name
Choice = Strategy | str | Iterable[Strategy | str]


def as_strategy(value: Strategy | str, argument: str) -> Strategy:
    """A strategy from itself or its name, in any case. Raises `ArgumentError`, which lists the names, for
    anything else."""
    try:
        return Strategy(value.lower() if isinstance(value, str) else value)
    except ValueError:
        names = ", ".join(f'"{strategy.value}"' for strategy in Strategy)
        raise ArgumentError(
            f"`{argument}` names {value!r}, which is no strategy: the names are {names}"
        ) from None


def as_strategies(values: Choice, argument: str) -> frozenset[Strategy]:
    """`values` as a set. Raises as `as_strategy`."""
    some = [values] if isinstance(values, (str, Strategy)) else values
    if not isinstance(some, Iterable):
        raise ArgumentError(f"`{argument}={values!r}` must be a `Strategy`, or several")
    return frozenset(as_strategy(value, argument) for value in some)


def check_allowed(allowed: Choice) -> frozenset[Strategy]:
    """`allowed`, strategies or their names, as a set. Raises `ArgumentError` if it is empty or holds
    something else."""
    chosen = as_strategies(allowed, "allowed")
    if not chosen:
        raise ArgumentError("`allowed` is empty: it must hold at least one strategy")
    return chosen


class RunKind(enum.Enum):
    """How consecutive layers are handled together (docs/accounting.md).

    >>> [kind.value for kind in mw.RunKind][:2]
    ['store', 'moonwalk']
    """

    STORE = "store"
    MOONWALK = "moonwalk"
    RECOMPUTE = "recompute"
    INVERT = "invert"
    OFFLOAD = "offload"


#: of one layer each
SINGLE = (RunKind.STORE, RunKind.OFFLOAD)


class Status(enum.Enum):
    """What was proved about a solution.

    OPTIMAL: no schedule of the plan space is better. FEASIBLE: it fits, and `gap` says how far from proof.
    INFEASIBLE: proved that nothing fits. UNKNOWN: the time limit came before any plan or proof.

    >>> mw.Status("optimal")
    <Status.OPTIMAL: 'optimal'>
    """

    OPTIMAL = "optimal"
    FEASIBLE = "feasible"
    INFEASIBLE = "infeasible"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """The layers `start+1 .. stop`, handled together.

    `options`: for STORE and OFFLOAD the one option's name; for MOONWALK and INVERT one name a layer, from the
    input on; for RECOMPUTE empty. `inner`: for RECOMPUTE the runs that cover `(start, stop]` when it is
    re-executed, else empty.

    >>> mw.Run(kind=mw.RunKind.STORE, start=0, stop=1, options=("vjp",)).stop
    1
    """

    kind: RunKind
    start: int
    stop: int
    options: tuple[str, ...] = ()
    inner: tuple[Run, ...] = ()

    def __post_init__(self) -> None:
        size = self.stop - self.start
        if self.start < 0 or size < 1:
            raise ArgumentError(f"a run must cover at least one layer, got ({self.start}, {self.stop}]")
        if self.kind is RunKind.RECOMPUTE:
            if self.options or not self.inner:
                raise ArgumentError("a RECOMPUTE run has inner runs and no options of its own")
            check_cover(self.inner, self.start, self.stop)
        else:
            want = 1 if self.kind in SINGLE else size
            if self.inner or len(self.options) != want or (self.kind in SINGLE and size != 1):
                raise ArgumentError(
                    f"a {self.kind.name} run over ({self.start}, {self.stop}] needs one option a layer and "
                    "no inner runs, "
                    f"got options={self.options}"
                )


def check_cover(runs: Sequence[Run], start: int, stop: int) -> None:
    """Raises `ArgumentError` unless `runs`, in order, cover the layers `start+1..stop` exactly once."""
    at = start
    for run in runs:
        if run.start != at:
            raise ArgumentError(
                f"runs must follow one another: expected one from {at}, got ({run.start}, {run.stop}]"
            )
        at = run.stop
    if at != stop:
        raise ArgumentError(f"runs must cover ({start}, {stop}], got up to {at}")


def walk(runs: Sequence[Run]) -> Iterator[Run]:
    """All runs, outer before inner, in order of position."""
    left = list(reversed(runs))
    while left:
        run = left.pop()
        yield run
        left += reversed(run.inner)


def nesting(runs: Sequence[Run]) -> int:
    """How many RECOMPUTE runs stand inside one another at most."""
    levels, inner = 0, [run for run in runs if run.inner]
    while inner:
        levels += 1
        inner = [one for run in inner for one in run.inner if one.inner]
    return levels


def allow_nesting(levels: int) -> None:
    """Raises Python's limit on calls within calls, for good, where so many RECOMPUTE runs inside one another
    would exceed it."""
    sys.setrecursionlimit(max(sys.getrecursionlimit(), 1_000 + 20 * levels))


def shifted(run: Run, by: int) -> Run:
    """The same run `by` layers further on."""
    inner = tuple(shifted(one, by) for one in run.inner)
    return dataclasses.replace(run, start=run.start + by, stop=run.stop + by, inner=inner)


def reporting_runs(runs: Sequence[Run]) -> tuple[Run, ...]:
    """The runs that rebuild something, inner ones too, and so can be compared with the truth."""
    return tuple(run for run in walk(runs) if run.kind in (RunKind.MOONWALK, RunKind.INVERT))


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """What a solver claims. The ledger recomputes time, peak and error of `runs` before anybody uses them.

    `runs` is None unless `status` is OPTIMAL or FEASIBLE. `time_ns`, `peak_bytes` (temporaries), `error`: of
    `runs`. `bound_ns`: no schedule within the budget is faster. `least_bytes`: the least temporaries with
    which any schedule exists, where the solver knows it. `stats`: name and value pairs for people.
    """

    status: Status
    runs: tuple[Run, ...] | None = None
    time_ns: int = 0
    peak_bytes: int = 0
    error: float = 0.0
    bound_ns: int = 0
    least_bytes: int | None = None
    solver: str = ""
    stats: tuple[tuple[str, float], ...] = ()

    @property
    def gap(self) -> float:
        """(objective - bound) / objective, 0 when proved optimal."""
        return 0.0 if self.time_ns == 0 else max(0.0, (self.time_ns - self.bound_ns) / self.time_ns)


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """A plan for one chain: runs, what they are predicted to cost, and what was proved.

    Bytes:

    - `peak_bytes`: predicted temporaries: what is alive at once, and `Profile.table_bytes`;
    - `packed_bytes`: the same with the predicted fragmentation (`mwplan.plans.packing`), at least
      `peak_bytes`; 0 where the profile knows too little of workspaces, or the chain is long;
    - `fixed_bytes`: parameters, input and gradients; `input_bytes`: the input alone, 0 if unknown;
    - `stored_bytes`: temporaries of plain backpropagation where all that `jax.vjp` keeps is an array
      (compilers make some of it again within kernels); 0 if unknown;
    - `budget_bytes`: the total asked for; `least_bytes`: the least feasible total;
    - `host_bytes`: predicted bytes in the host's memory, at most.

    Time and error: `time_ns` is predicted, without the loss; `error` is the predicted relative error of
    cotangents and gradients, `max_error` the tolerance. For people: `strategies` of each layer, outermost;
    `binding`, the event of the peak; `next_gain`, what a little more memory would buy.

    `fingerprint`: that of the profile; `apply` refuses another chain. `report_scales`: `(a, b)` for each of
    `reporting_runs`. Where the run-time report finds a difference `d`, the gradients are predicted to be
    wrong by `hypot(a d, sqrt(b d))`, the second part from kinks; empty for `(1, 0)` throughout.

    >>> store = tuple(mw.Run(kind=mw.RunKind.STORE, start=i, stop=i + 1, options=("vjp",)) for i in range(2))
    >>> schedule = mw.Schedule(runs=store)  # by hand: nothing is predicted
    >>> mw.apply(schedule, mw.Chain([jnp.sin, jnp.cos]), jnp.zeros(3)).tolist()
    [1.0, 1.0, 1.0]
    """

    runs: tuple[Run, ...]
    strategies: tuple[Strategy, ...] = ()
    fingerprint: str = ""
    status: Status = Status.FEASIBLE
    budget_bytes: int | None = None
    fixed_bytes: int = 0
    input_bytes: int = 0
    peak_bytes: int = 0
    packed_bytes: int = 0
    stored_bytes: int = 0
    host_bytes: int = 0
    time_ns: int = 0
    bound_ns: int = 0
    error: float = 0.0
    max_error: float = 1e-4
    least_bytes: int | None = None
    binding: str = ""
    next_gain: str = ""
    report_scales: tuple[tuple[float, float], ...] = ()
    solver: str = ""
    stats: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        if not self.runs:
            raise ArgumentError("`runs` is empty: a schedule covers at least one layer")
        check_cover(self.runs, 0, self.runs[-1].stop)
        if self.report_scales and len(self.report_scales) != len(reporting_runs(self.runs)):
            raise ArgumentError(
                f"`report_scales` has {len(self.report_scales)} entries: one for each MOONWALK and INVERT "
                "run, or none"
            )

    def __len__(self) -> int:
        return self.runs[-1].stop

    @property
    def total_bytes(self) -> int:
        """Predicted device bytes of the whole gradient step: fixed part and temporaries."""
        return self.fixed_bytes + self.peak_bytes

    @property
    def counts(self) -> dict[Strategy, int]:
        """How many layers have each strategy that is used."""
        return {s: self.strategies.count(s) for s in Strategy if s in self.strategies}

    @property
    def gap(self) -> float:
        """(time - bound) / time, 0 when proved optimal."""
        return 0.0 if self.time_ns == 0 else max(0.0, (self.time_ns - self.bound_ns) / self.time_ns)

    def __str__(self) -> str:
        return describe(self)

    def to_json(self) -> str:
        """This schedule as JSON with a schema number."""
        allow_nesting(nesting(self.runs))
        return serial.dump(self, kind="schedule", schema=SCHEMA)

    @classmethod
    def from_json(cls, text: str) -> Schedule:
        """Reads what `to_json` wrote. Raises `FileFormatError` on anything else."""
        allow_nesting(text.count(RunKind.RECOMPUTE.name))
        return serial.load(text, cls, kind="schedule", schema=SCHEMA)


#: one for each strategy, in strips
LETTERS = {
    Strategy.STORE: "S",
    Strategy.RECOMPUTE: "R",
    Strategy.FRAGMENT: "F",
    Strategy.VIJP: "V",
    Strategy.INVERT: "I",
    Strategy.OFFLOAD: "O",
}


def strip(schedule: Schedule) -> str:
    """One letter a layer, from the input on, runs apart by `|`: "SS|VVFV|RRR"."""
    strategies = schedule.strategies or (None,) * len(schedule)
    letters = ["?" if s is None else LETTERS[s] for s in strategies]
    out = ""
    for before, run in zip((None, *schedule.runs), schedule.runs):
        stored = before is not None and before.kind in SINGLE and run.kind in SINGLE
        out += ("" if before is None or stored else "|") + "".join(letters[run.start : run.stop])
    return out


def _fragmentation(schedule: Schedule) -> list[str]:
    """A line on fragmentation, where some is predicted."""
    gaps = schedule.packed_bytes - schedule.peak_bytes
    share = gaps / max(1, schedule.peak_bytes)
    return [f"fragmentation    {show_bytes(gaps)} expected between buffers"] if share > 0.001 else []


def _backpropagation(schedule: Schedule) -> list[str]:
    """A line on what `jax.grad` would take, where that is known."""
    size = schedule.stored_bytes
    if not size:
        return []
    return [f"backpropagation  {show_bytes(size)} temporaries by prediction, with all that `jax.vjp` keeps"]


def proof(schedule: Schedule) -> str:
    """What is known of the schedule among all others for its budget, in words."""
    if schedule.status is Status.OPTIMAL:
        return "optimal: no schedule of the plan space is faster within the budget"
    if not schedule.bound_ns:
        return f"{schedule.status.value}: there is no bound on how much faster another might be"
    return f"{schedule.status.value}, at most {schedule.gap:.2%} above the optimum"


#: What the store options of every layer are called for people.
_KEPT = {"vjp": "all that `jax.vjp` keeps", "nothing": "their input alone"}


def kept(schedule: Schedule) -> str:
    """What the STORE runs keep, those within recomputed stretches too: how many of each option, the sets of
    values that were computed for the plan (`keep:...`) as one. "Their input alone": as `jax.checkpoint`."""
    options = [run.options[0] for run in walk(schedule.runs) if run.kind is RunKind.STORE]
    names = Counter("some values" if ":" in one else _KEPT.get(one, one) for one in options)
    return ", ".join(f"{name} {count}" for name, count in names.most_common())


def describe(schedule: Schedule) -> str:
    """The schedule for people: strip, predictions, proof, what binds and what more memory would buy."""
    legend = ", ".join(f"{LETTERS[s]} {s.value} {count}" for s, count in schedule.counts.items())
    lines = [
        f"{len(schedule)} layers: {legend or 'strategies not stated'}",
        *textwrap.wrap(strip(schedule), 96, initial_indent="  ", subsequent_indent="  "),
        *([f"stored ones keep {stored}"] if (stored := kept(schedule)) else []),
        f"predicted peak   {show_bytes(schedule.total_bytes)}"
        f" = {show_bytes(schedule.fixed_bytes)} fixed + {show_bytes(schedule.peak_bytes)} temporaries"
        + ("" if schedule.budget_bytes is None else f"; budget {show_bytes(schedule.budget_bytes)}"),
        *_fragmentation(schedule),
        *_backpropagation(schedule),
        *([f"host memory      {show_bytes(schedule.host_bytes)}"] if schedule.host_bytes else []),
        f"predicted time   {show_ns(schedule.time_ns)}",
        f"predicted error  {schedule.error:.1e} relative (tolerance {schedule.max_error:.0e})",
    ]
    lines.append(f"proof            {proof(schedule)}")
    if schedule.least_bytes is not None:
        lines.append(f"least budget     {show_bytes(schedule.least_bytes)}")
    if schedule.binding:
        lines.append(f"binding          {schedule.binding}")
    if schedule.next_gain:
        lines.append(f"more memory      {schedule.next_gain}")
    return "\n".join(lines)
