"""Every way a user has to take the same gradient, on the same chain: as functions, compiled and measured side
by side.

| method | what it is |
|---|---|
| `backprop`, `backprop_scan` | plain `jax.grad`; with `lax.scan` over repeated blocks |
| `checkpoint_each`, `checkpoint_scan` | `jax.checkpoint` on every layer; on every repeated block of a scan |
| `chen`, `chen_scan` | square-root segments, unrolled and as nested scans |
| `recompute` | the optimal persistent plan (STORE and RECOMPUTE, exact bytes, any depth), run by `mw.apply` |
| `recompute_checkpoint` | the optimal persistent plan of nested `jax.checkpoint` |
| `rotor_checkpoint` | rotor's own plan, bytes in 500 slots, as nested `jax.checkpoint` |
| `equinox` | Equinox's checkpointed scan over repeated blocks |
| `invert` | RevNet-style inversion wherever a layer allows it |
| `moonwalk`, `fragment` | moonwalk runs everywhere, with the smallest fragments or the largest |
| `plan` | the schedule of `mw.frontier`, or a faster one of those that `mw.fit(tune=...)` tries |

The scans take the parameters of repeated blocks stacked, and so do the schedules of chains too long to be
unrolled. On CPU the convolutions of scans are in the layout that XLA runs fast in loops, ours and the rivals'
(`mwplan.network.canonical`): JAX's own is up to 60 times slower there. Methods that take a budget plan again
with less where the compiled step exceeds it, the plan and its rivals alike.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import mwplan as mw
from experiments import zoo
from mwplan import planning
from mwplan.app.side_by_side import relative_error
from mwplan.common import trees
from mwplan.common.errors import InfeasibleError, MwplanError
from mwplan.compilers.compiling import temporaries
from mwplan.execution import execute, heap
from mwplan.execution.execute import Arrangement
from mwplan.execution.interpret import Detours
from mwplan.fitting import fitting
from mwplan.network.canonical import canonical
from mwplan.plans import tape
from mwplan.plans.profiles import Profile
from mwplan.plans.schedule import Run, RunKind, Schedule, Solution, Strategy
from mwplan.solvers import baselines, rotor
from mwplan.solvers import problem as solvers

PyTree = Any
Step = Callable[[mw.Chain, Any, Any], tuple[Any, Any]]
Network = Callable[[mw.Chain, Any], Any]

RECOMPUTATION = frozenset({Strategy.STORE, Strategy.RECOMPUTE})
#: STORE options that `jax.checkpoint` can express, and their policies.
POLICIES: dict[str, Callable[..., Any] | None] = {
    "vjp": None,
    "products": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "nothing": jax.checkpoint_policies.nothing_saveable,
    "input": jax.checkpoint_policies.nothing_saveable,
}


#: Programs that need more than so many times the largest budget asked for are compiled, for their memory, and
#: not run.
MOST = 8
#: Schedules of stacked chains with more different loops than these are not compiled.
MOST_LOOPS = 150
#: Of schedules with more, this share of the time may be lost for fewer.
LOSS = 1.0
#: Programs whose step takes so many times the median of all, and a second or more, are timed once, in the
#: warm-up.
SLOW = 6
#: Seconds after which each part of the trial that chooses among plans ends, and rounds of its first part,
#: that of all plans.
TRIAL, FIRST = 90.0, 3
#: Programs at most so many times as slow as the fastest for the same budget tie with it: more rounds decide.
#: In the last part of the trial.
TIE, CLOSE = 1.1, 1.05


class NotApplicableError(MwplanError):
    """A method does not apply to a chain; the message says why."""


@dataclass(frozen=True)
class Problem:
    """One network with what planning needs: `max_error` for rebuilt cotangents, `thin` as in `mw.frontier`,
    timed runs of each operation of the profile.

    Schedules of chains with more than `unroll` innermost layers are run stacked.
    """

    chain: mw.Chain
    x: Any
    labels: Any
    loss: Callable[[Any, Any], Any]
    max_error: float = 1e-4
    thin: float = 0.0
    repeats: int = 5
    unroll: int = zoo.UNROLL

    @functools.cached_property
    def profile(self) -> Profile:
        """Measured on this device when first asked for."""
        return mw.profile(self.chain, self.x, repeats=self.repeats)

    @property
    def fixed_bytes(self) -> int:
        """Parameters, gradients and input."""
        return 2 * trees.nbytes(trees.parameters(self.chain)) + trees.nbytes(self.x)

    @property
    def most_loops(self) -> float:
        """How many different loops a schedule may have: infinite for chains that are run unrolled."""
        return math.inf if len(_flat(self.chain)) <= self.unroll else MOST_LOOPS

    @functools.cached_property
    def stacked(self) -> mw.Chain:
        """The chain with repeated layers stacked."""
        return mw.stack(self.chain, self.x)

    @functools.cached_property
    def flat(self) -> mw.Chain:
        """The innermost layers, with repeated blocks stacked."""
        return mw.stack(mw.Chain(_flat(self.chain)), self.x)

    def frontier(self, allowed: Iterable[Strategy] = frozenset(Strategy)) -> mw.Frontier:
        """The frontier, solved once for each set of strategies; that of a long chain thinned even where
        `thin` is 0, or it would take hours."""
        return _frontier(self.profile, self.max_error, frozenset(allowed), self._thin)

    @property
    def asked(self) -> solvers.Problem:
        """What baselines are asked."""
        return solvers.Problem(profile=self.profile, max_error=self.max_error)

    @functools.cached_property
    def by_hand(self) -> list[Schedule]:
        """The schedules of `planning.baseline_schedules`, the same at every budget."""
        return planning.baseline_schedules(
            self.profile, max_error=self.max_error, allowed=planning.EVERY_STRATEGY
        )

    @functools.cached_property
    def _thin(self) -> float:
        return max(self.thin, planning.default_thin(self.profile))


@functools.lru_cache(maxsize=64)
def _frontier(profile: Profile, max_error: float, allowed: frozenset[Strategy], thin: float) -> mw.Frontier:
    return mw.frontier(profile, max_error=max_error, allowed=allowed, thin=thin)


@dataclass(frozen=True)
class Way:
    """A method made for one chain and budget: the network, to be differentiated, and the schedule behind it
    if any.

    `chain`, whose parameters the network takes: the problem's, or that with blocks stacked. Two ways with
    equal `key` are the same program. `loops`: whether the network is a loop, whose convolutions need another
    layout on CPU than JAX gives them: as schedules of ours have it.
    """

    network: Network
    chain: mw.Chain
    schedule: Schedule | None
    key: Any
    loops: bool = False

    def step(self, loss: Callable[[Any, Any], Any]) -> Step:
        """`(chain, x, labels) -> (loss, gradients)`."""

        def step(chain: mw.Chain, x: Any, labels: Any) -> tuple[Any, Any]:
            return jax.value_and_grad(lambda net: loss(self.network(net, x), labels))(chain)

        return canonical(step) if self.loops and jax.default_backend() == "cpu" else step


# -- plain functions
# ---------------------------------------------------------------------------------------------------


def _flat(layers: Iterable[Any]) -> tuple[Any, ...]:
    """The layers, `Sequential`s taken apart."""
    return tuple(
        part for one in layers for part in (one.layers if isinstance(one, mw.layers.Sequential) else (one,))
    )


def _through(layers: Sequence[Any], x: Any) -> Any:
    return functools.reduce(lambda value, one: one(value), layers, x)


_checkpointed = jax.checkpoint(_through)


def backprop(problem: Problem, budget: int | None) -> Way:
    """Plain backpropagation."""
    return Way(lambda chain, x: chain(x), problem.chain, None, "backprop")


def checkpoint_each(problem: Problem, budget: int | None) -> Way:
    """`jax.checkpoint` around every layer."""

    def network(chain: mw.Chain, x: Any) -> Any:
        return functools.reduce(lambda value, one: _checkpointed([one], value), _flat(chain), x)

    return Way(network, problem.chain, None, "checkpoint_each")


def chen(problem: Problem, budget: int | None) -> Way:
    """About sqrt(L) segments of equal length over the innermost layers; all but the last recomputed."""

    def network(chain: mw.Chain, x: Any) -> Any:
        layers = _flat(chain)
        count = max(1, round(math.sqrt(len(layers))))
        cuts = [round(k * len(layers) / count) for k in range(count + 1)]
        for start, stop in itertools.pairwise(cuts[:-1]):
            x = _checkpointed(layers[start:stop], x)
        return _through(layers[cuts[-2] :], x)

    return Way(network, problem.chain, None, "chen")


Scan = Callable[[Callable[[Any, Any], Any], Any, Any, int], Any]


def _scanned(name: str, problem: Problem, scan: Scan, key: Any = None) -> Way:
    """`scan(block, x, stacked blocks, count)` over each stretch of repeated blocks, other layers in
    between."""
    if not any(isinstance(part, mw.Stack) for part in problem.flat.parts):
        raise NotApplicableError("no block of this chain repeats")

    def network(chain: mw.Chain, x: Any) -> Any:
        for part in chain.parts:
            if isinstance(part, mw.Stack):
                x = scan(lambda x, block: _through(block, x), x, part.block, part.depth)
            else:
                x = part(x)
        return x

    return Way(network, problem.flat, None, (name, key), loops=True)


def _scan(block: Callable[[Any, Any], Any], x: Any, stacked: Any) -> Any:
    return jax.lax.scan(lambda x, one: (block(x, one), None), x, stacked)[0]


def backprop_scan(problem: Problem, budget: int | None) -> Way:
    """Plain backpropagation through a scan."""
    return _scanned("backprop_scan", problem, lambda block, x, stacked, count: _scan(block, x, stacked))


def checkpoint_scan(problem: Problem, budget: int | None) -> Way:
    """A scan whose body is `jax.checkpoint`ed."""

    def scan(block: Callable[[Any, Any], Any], x: Any, stacked: Any, count: int) -> Any:
        return _scan(jax.checkpoint(block), x, stacked)

    return _scanned("checkpoint_scan", problem, scan)


def chen_scan(problem: Problem, budget: int | None) -> Way:
    """A scan over checkpointed segments, each a scan over about sqrt(count) blocks; what is left over is
    stored."""

    def scan(block: Callable[[Any, Any], Any], x: Any, stacked: Any, count: int) -> Any:
        size = max(1, round(math.sqrt(count)))
        whole = (count - 1) // size  # the last segment is stored
        segments = jax.tree.map(
            lambda leaf: leaf[: whole * size].reshape(whole, size, *leaf.shape[1:]), stacked
        )
        x = _scan(jax.checkpoint(lambda x, segment: _scan(block, x, segment)), x, segments)
        return _scan(block, x, jax.tree.map(lambda leaf: leaf[whole * size :], stacked))

    return _scanned("chen_scan", problem, scan)


def equinox(problem: Problem, budget: int | None) -> Way:
    """Equinox's checkpointed scan; as many checkpoints as the budget has room for, its own choice without a
    budget."""
    try:
        import equinox.internal as eqxi
    except ImportError as error:
        raise NotApplicableError('needs Equinox: pip install "mwplan[equinox]"') from error
    carried, longest, x = 0, 0, trees.struct(problem.x)
    for part in problem.flat.parts:
        if isinstance(part, mw.Stack):
            carried, longest = carried + trees.nbytes(x), max(longest, part.depth)
        x = jax.eval_shape(part, x)
    checkpoints = None
    if budget is not None:
        room = budget - problem.fixed_bytes
        checkpoints = room // max(1, carried)
        if checkpoints < 1:
            raise InfeasibleError("not one checkpoint fits", budget_bytes=budget)

    def scan(block: Callable[[Any, Any], Any], x: Any, stacked: Any, count: int) -> Any:
        def body(x: Any, one: Any) -> tuple[Any, None]:
            return block(x, one), None

        use = None if checkpoints is None else min(checkpoints, count)
        return eqxi.scan(body, x, stacked, kind="checkpointed", checkpoints=use)[0]

    return _scanned("equinox", problem, scan, None if checkpoints is None else min(checkpoints, longest))


# -- schedules
# ---------------------------------------------------------------------------------------------------------


def applied(
    problem: Problem, schedule: Schedule, arrangement: Arrangement = 0, *, stacked: bool = False
) -> Way:
    """A schedule of the problem's profile, run by `mw.apply`; `stacked`: on the chain as `mw.stack` makes it,
    which long chains are anyway."""
    unrolled = problem.most_loops == math.inf and not stacked
    count = tape.loops(schedule.runs)
    if count > (math.inf if unrolled else MOST_LOOPS):
        raise NotApplicableError(
            f"a step of about {count} different loops, which takes many minutes to compile"
        )
    chain = problem.chain if unrolled else problem.stacked
    network = functools.partial(mw.apply, schedule, arrangement=arrangement)
    return Way(network, chain, schedule, (schedule.runs, arrangement, unrolled))


def _baseline(problem: Problem, solution: Solution, kind: RunKind, what: str) -> Way:
    assert solution.runs is not None
    if not any(run.kind is kind for run in solution.runs):
        raise NotApplicableError(f"no layer of this chain {what} within max_error={problem.max_error}")
    return applied(problem, planning.scheduled(problem.profile, solution, problem.max_error))


def invert(problem: Problem, budget: int | None) -> Way:
    """Inversion wherever a layer allows it, storing elsewhere."""
    solution = baselines.all_invert(problem.asked)
    return _baseline(problem, solution, RunKind.INVERT, "can be inverted")


def moonwalk(problem: Problem, budget: int | None) -> Way:
    """Moonwalk runs as long as the error allows, with the smallest fragments."""
    solution = baselines.all_moonwalk(problem.asked)
    return _baseline(problem, solution, RunKind.MOONWALK, "has a vijp or a fragment")


def fragment(problem: Problem, budget: int | None) -> Way:
    """Moonwalk runs with the largest fragments."""
    solution = baselines.all_fragment(problem.asked)
    return _baseline(problem, solution, RunKind.MOONWALK, "has a fragment")


def _at(frontier: mw.Frontier, budget: int | None, *, most_loops: float = math.inf) -> Schedule:
    """The frontier's schedule, or one that loses more time and has no more different loops than that, if
    there is one."""
    at = budget if budget is not None else frontier.points[-1][0]
    schedule = frontier.at(at)
    if tape.loops(schedule.runs) > most_loops:
        return min(schedule, frontier.at(at, regular=LOSS), key=lambda one: tape.loops(one.runs))
    return schedule


def plan(
    problem: Problem, budget: int | None, *, allowed: frozenset[Strategy] = planning.EVERY_STRATEGY
) -> Way:
    """The fastest schedule of the allowed strategies that fits; without a budget, the fastest of all."""
    return applied(problem, _at(problem.frontier(allowed), budget, most_loops=problem.most_loops))


def recompute(problem: Problem, budget: int | None) -> Way:
    """The fastest schedule of STORE and RECOMPUTE runs that fits."""
    return applied(problem, _at(problem.frontier(RECOMPUTATION), budget, most_loops=problem.most_loops))


def nested_checkpoint(runs: Sequence[Run]) -> Network:
    """A schedule of STORE and RECOMPUTE runs as nested `jax.checkpoint`s."""

    def run_all(runs: Sequence[Run], layers: Sequence[Any], at: int, x: Any) -> Any:
        for run in runs:
            own = layers[run.start - at : run.stop - at]
            if run.kind is RunKind.RECOMPUTE:
                x = jax.checkpoint(functools.partial(run_all, run.inner, at=run.start))(own, x=x)
            else:
                policy = POLICIES[run.options[0]]
                x = jax.checkpoint(_through, policy=policy)(own, x) if policy else _through(own, x)
        return x

    return lambda chain, x: run_all(runs, chain.layers, 0, x)


def _expressible(profile: Profile) -> Profile:
    """The profile with the STORE options that `jax.checkpoint` can express."""
    layers = [
        dataclasses.replace(
            layer, store=tuple(o for o in layer.store if o.name in POLICIES), moonwalk=(), invert=()
        )
        for layer in profile.layers
    ]
    return dataclasses.replace(profile, layers=tuple(layers))


def recompute_checkpoint(problem: Problem, budget: int | None) -> Way:
    """The fastest plan of what `jax.checkpoint` can express, as nested `jax.checkpoint`s."""
    profile = _expressible(problem.profile)
    schedule = _at(_frontier(profile, problem.max_error, RECOMPUTATION, problem.thin), budget)
    return Way(nested_checkpoint(schedule.runs), problem.chain, schedule, ("nested", schedule.runs))


def rotor_checkpoint(problem: Problem, budget: int | None) -> Way:
    """rotor's plan as nested `jax.checkpoint`s."""
    if budget is None:
        raise NotApplicableError("rotor plans for one budget: give one")
    profile = _expressible(problem.profile)
    room = budget - profile.fixed_bytes
    solution = rotor.rotor(solvers.Problem(profile=profile, budget_bytes=room)) if room > 0 else None
    if solution is None or solution.runs is None:
        raise InfeasibleError("rotor finds nothing that fits", budget_bytes=budget)
    schedule = planning.scheduled(profile, solution, problem.max_error)
    return Way(nested_checkpoint(schedule.runs), problem.chain, schedule, ("nested", schedule.runs))


Method = Callable[[Problem, "int | None"], Way]
#: Methods that are what they are, whatever the budget, and those that plan for one.
FIXED: dict[str, Method] = {
    "backprop": backprop,
    "backprop_scan": backprop_scan,
    "checkpoint_each": checkpoint_each,
    "checkpoint_scan": checkpoint_scan,
    "chen": chen,
    "chen_scan": chen_scan,
    "invert": invert,
    "moonwalk": moonwalk,
    "fragment": fragment,
}
BUDGETED: dict[str, Method] = {
    "equinox": equinox,
    "rotor_checkpoint": rotor_checkpoint,
    "recompute_checkpoint": recompute_checkpoint,
    "recompute": recompute,
    "plan": plan,
}
METHODS = FIXED | BUDGETED
#: Methods that keep and recompute, and do nothing else.
RECOMPUTING = (
    "checkpoint_each",
    "checkpoint_scan",
    "chen",
    "chen_scan",
    "equinox",
    "rotor_checkpoint",
    "recompute_checkpoint",
    "recompute",
)


# -- measuring
# ---------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Compiled:
    """A compiled step with its arguments.

    `temporary_bytes` by `memory_analysis()`; `compile_seconds`, tracing included; `seconds`, one sample a
    step; `error`, `worst_error`, see `relative_error`; `found`: what the one run of a very slow step gave.
    """

    way: Way
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


def settings() -> dict[str, dict[str, Any]]:
    """Compiler options under which every way without a schedule of ours is compiled; the leanest result
    counts."""
    own = mw.compiler_options()
    if jax.default_backend() != "cpu":
        return {"default": own}
    return {"default": own, "sequential": own | {"xla_cpu_enable_concurrency_optimized_scheduler": False}}


class Bench:
    """Ways to take one gradient, compiled; equal programs are compiled, run and checked once."""

    def __init__(
        self, problem: Problem, *, try_settings: bool = True, attempts: int = 4, tune: int = 12
    ) -> None:
        self.problem = problem
        self.settings = settings() if try_settings else {"default": mw.compiler_options()}
        self.attempts = attempts
        self.tune = tune
        self.programs: dict[Any, Compiled] = {}
        self.rows: list[tuple[dict[str, Any], Compiled | None]] = []
        self.plans: dict[int, list[Compiled]] = {}
        self.idle: int | None = None

    def compile(self, way: Way) -> Compiled:
        """The way's program, under the leanest setting; schedules of ours have one setting."""
        if way.key not in self.programs:
            ours = way.schedule is not None and way.key[0] == way.schedule.runs
            made = [
                self._compiled(way, name, options)
                for name, options in self.settings.items()
                if name == "default" or not ours
            ]
            self.programs[way.key] = min(made, key=lambda one: one.temporary_bytes)
        return self.programs[way.key]

    def _compiled(self, way: Way, setting: str, options: dict[str, Any]) -> Compiled:
        args = (way.chain, self.problem.x, self.problem.labels)
        start = time.perf_counter()
        executable = mw.jit(way.step(self.problem.loss), compiler_options=options).lower(*args).compile()
        seconds = time.perf_counter() - start
        return Compiled(way, executable, args, temporaries(executable), seconds, setting)

    def add(self, name: str, budget: int | None) -> Compiled | None:
        """Compiles a method so that the step fits the budget, planning again with less while it does not;
        notes a row for it.

        None where it does not apply or nothing fits: the row says why.
        """
        row: dict[str, Any] = {"method": name, "budget_bytes": budget}
        made = self._fitted(row, METHODS[name], budget)
        self.rows.append((row, made))
        if name == "plan" and budget is not None:
            self.plans[len(self.rows) - 1] = self._plans(made, budget)
        return made

    def _plans(self, made: Compiled | None, budget: int) -> list[Compiled]:
        """The programs that `mw.fit(tune=...)` would choose among at a budget, that of all strategies first,
        of the chain as it is and, where its blocks repeat, stacked: but those for less of the budget, which
        are the plans of other rows."""
        problem = self.problem

        def fits(one: Compiled) -> bool:
            return one.temporary_bytes + problem.fixed_bytes <= budget

        fewer = [functools.partial(plan, allowed=some) for some in planning.NARROWER]
        found = [made, *(self._fitted({}, method, budget) for method in fewer)]
        kept = [one for one in found if one is not None]
        schedules = [one.way.schedule for one in kept if one.way.schedule is not None]
        ways = [applied(problem, one) for one in problem.by_hand]
        ways += [
            applied(problem, one, way)
            for way in (mw.UNTIED, mw.LOOSE)
            for one in (*schedules, *problem.by_hand)
        ]
        if problem.most_loops == math.inf and any(
            isinstance(part, mw.Stack) for part in problem.stacked.parts
        ):
            for one, way in itertools.product((*schedules, *problem.by_hand), (0, mw.LOOSE)):
                with contextlib.suppress(NotApplicableError):
                    ways.append(applied(problem, one, way, stacked=True))
        for some in ways:
            made = self.compile(some)
            kept.append(made)
            if not fits(made) and not any(some.schedule is schedule for schedule in problem.by_hand):
                del self.programs[some.key]  # a process can hold some hundred programs
        return [one for one in dict.fromkeys(kept) if fits(one)]

    def tune_plans(self) -> None:
        """Takes for each `plan` the fastest, in a trial of its own whose samples are not kept, of what was
        planned for its budget or less: by all strategies, without vijps, without inverses, by recomputation
        alone, by hand, tied, untied, loose and stacked. As `mw.fit(tune=...)` of the chain and of `mw.stack`
        of it."""
        every = list(dict.fromkeys(one for several in self.plans.values() for one in several))
        interleave(every, FIRST, TRIAL)
        within = {
            at: [one for k, more in self.plans.items() if self._budget(k) <= self._budget(at) for one in more]
            for at in self.plans
        }
        for limit in (TIE, CLOSE):
            interleave(ties(within.values(), limit), self.tune, TRIAL, again=True)
        for at, choice in within.items():
            if choice:
                tied = ties([choice])
                self.rows[at] = self.rows[at][0], tied[fitting.quickest([one.seconds for one in tied])]
                self.rows[at][0]["timed_plans"] = len(set(choice))
                self.rows[at][0].pop("reason", None)
        for one in every:
            one.seconds = []

    def _budget(self, at: int) -> Any:
        """What row `at` was asked for."""
        return self.rows[at][0]["budget_bytes"]

    def settle(self, rounds: int, seconds: float) -> None:
        """More rounds for the plans, and for what ties at a budget with the fastest that fits it."""
        fixed, at_all = self.problem.fixed_bytes, self.run_at_all()
        asked = {self._budget(k) for k in self.plans}
        fits = ([one for one in at_all if one.temporary_bytes + fixed <= budget] for budget in sorted(asked))
        plans = [self.rows[k][1] for k in self.plans]
        tied = list(
            dict.fromkeys([*ties(fits), *(one for one in plans if one is not None and one in at_all)])
        )
        if len(tied) > 1:
            interleave(tied, rounds, seconds, again=True)

    def _fitted(self, row: dict[str, Any], method: Method, budget: int | None) -> Compiled | None:
        """The method's program that fits, or None; the row is told how it went."""
        asked = budget
        made: Compiled | None = None
        try:
            for attempt in range(1, self.attempts + 1):
                row["attempts"] = attempt
                made = self.compile(method(self.problem, asked))
                if asked is None or budget is None:
                    break
                excess = made.temporary_bytes + self.problem.fixed_bytes - budget
                if excess > 0 and (arranged := self._arranged(made.way, budget)) is not None:
                    made, excess = arranged, 0
                if excess <= 0:
                    break
                made, asked = None, asked - excess
                if asked <= 0:
                    break
            if made is None:
                row["reason"] = f"above the budget when compiled, {row['attempts']} times"
        except NotApplicableError as error:
            row["reason"] = str(error)
        except InfeasibleError as error:
            row |= {"reason": str(error), "least_bytes": error.least_bytes}
        return made

    def _arranged(self, way: Way, budget: int) -> Compiled | None:
        """The schedule's program with detours by which it fits, as `mw.fit` makes it; None where there is
        none, and for ways that are no schedules of ours."""
        schedule, args = way.schedule, (way.chain, self.problem.x, self.problem.labels)
        if schedule is None or way.key[:2] != (schedule.runs, 0) or not execute.can_be_arranged(way.chain):
            return None
        room, stacked = budget - self.problem.fixed_bytes, not way.key[2]

        def with_(detours: Detours) -> Way:
            return applied(self.problem, schedule, detours, stacked=stacked)

        def lower(detours: Detours) -> Any:
            return mw.jit(with_(detours).step(self.problem.loss)).lower(*args)

        start = time.perf_counter()
        for detours, executable, last in heap.arrangements(lower, room):
            if last and temporaries(executable) <= room:
                one, seconds = with_(detours), time.perf_counter() - start
                return self.programs.setdefault(
                    one.key, Compiled(one, executable, args, temporaries(executable), seconds, "default")
                )
        return None

    def check(self) -> None:
        """Gradient errors of the programs in use against float64 backpropagation."""
        truth = float64_gradients(self.problem)
        for one in self.run_at_all():
            found, one.found = one.found or one.run(), None
            one.error, one.worst_error = relative_error(innermost(found[1]), truth)

    def run_at_all(self) -> list[Compiled]:
        """Those of `used` that need no more than `idle` bytes."""
        most = math.inf if self.idle is None else self.idle - self.problem.fixed_bytes
        return [one for one in self.used() if one.temporary_bytes <= most]

    def used(self) -> list[Compiled]:
        """The programs that rows stand on, each once."""
        return list(dict.fromkeys(one for _, one in self.rows if one is not None))

    def records(self) -> list[dict[str, Any]]:
        """One record a row, plain values: bytes, seconds, errors, and what the solver said."""
        fixed = self.problem.fixed_bytes
        programs = self.used()
        made = []
        for row, one in self.rows:
            out = {"fixed_bytes": fixed, "layers": len(self.problem.chain), **row}
            if one is not None:
                out |= {
                    "program": programs.index(one),
                    "temporary_bytes": one.temporary_bytes,
                    "total_bytes": fixed + one.temporary_bytes,
                    "compile_seconds": one.compile_seconds,
                    "setting": one.setting,
                    "seconds": one.seconds,
                    "error": one.error,
                    "worst_error": one.worst_error,
                }
                if one.way.schedule is not None:
                    out |= _of_schedule(one.way.schedule)
                    for name, way in (("untied", mw.UNTIED), ("loose", mw.LOOSE)):
                        out[name] = one.way.key[:2] == (one.way.schedule.runs, way)
                    out["arranged"] = isinstance(one.way.key[1], Detours)
                    out["stacked"] = one.way.chain is self.problem.stacked
            made.append(out)
        return made


def _of_schedule(schedule: Schedule) -> dict[str, Any]:
    """What a schedule predicts and what was proved of it."""
    return {
        "predicted_temporary_bytes": schedule.peak_bytes,
        "predicted_seconds": schedule.time_ns / 1e9,
        "predicted_error": schedule.error,
        "max_error": schedule.max_error,
        "solver": schedule.solver,
        "status": schedule.status.value,
        "gap": schedule.gap if schedule.bound_ns else None,
        "strategies": {s.value: schedule.strategies.count(s) for s in Strategy},
        "runs": len(schedule.runs),
    }


def interleave(
    programs: Sequence[Compiled], rounds: int, seconds: float = math.inf, *, again: bool = False
) -> None:
    """Runs the programs `rounds` times in turn, each round from another one on, after one warm-up; stops
    after `seconds`, but not before 3 rounds, or 2 where one takes longer than that. Those slower than `SLOW`
    times the median of all are not run again after the warm-up, which is then their sample. `again`: of
    programs that were run before, further rounds."""

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
    """Of each group's programs, of those that were run most often, the fastest and those at most `limit`
    times as slow."""
    found: list[Compiled] = []
    for group in groups:
        most = max((len(one.seconds) for one in group), default=0)
        medians = {one: statistics.median(one.seconds) for one in group if most and len(one.seconds) == most}
        found += [one for one, median in medians.items() if median <= limit * min(medians.values())]
    return list(dict.fromkeys(found))


def ratio(seconds: Sequence[float], base: Sequence[float]) -> float:
    """Median over the rounds of the ratio of two interleaved programs' times."""
    return statistics.median(a / b for a, b in zip(seconds, base))


def float64_gradients(problem: Problem) -> list[np.ndarray]:
    """Backpropagation in float64, through a scan where blocks repeat."""
    with jax.enable_x64(True):

        def wide(leaf: Any) -> Any:
            return (
                jnp.asarray(np.asarray(leaf), jnp.float64)
                if jnp.issubdtype(leaf.dtype, jnp.floating)
                else leaf
            )

        chain, x = jax.tree.map(wide, (problem.chain, problem.x))
        wider = dataclasses.replace(problem, chain=chain, x=x)
        way = backprop(wider, None)
        with contextlib.suppress(NotApplicableError):
            way = backprop_scan(wider, None)
        _, grads = mw.jit(way.step(problem.loss))(way.chain, x, problem.labels)
        return [np.asarray(leaf) for leaf in innermost(grads)]


def innermost(grads: mw.Chain) -> list[Any]:
    """The gradients of all layers in turn, whether they came stacked or not."""
    return jax.tree.leaves(jax.device_get(grads).layers)


# -- one point of a sweep
# ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """What to measure on one network.

    `methods`, each at every one of `budgets` (total bytes; a count spaces that many evenly by ratio, from the
    least feasible to what the fastest schedule or backpropagation needs); those without a budget once.
    `limits`: with such a count, the least budgets are added within which the plan, and the best
    recomputation, are predicted to take at most so many times the time of storing every layer, fresh memory
    included. `rounds` of interleaved runs, fewer after `seconds`; then `ties` rounds more of those that tie
    at a budget with the fastest, again fewer after `seconds`. `yardstick`: depth of a second network that
    backpropagation is timed on in the same rounds; 0 for none. `check`: gradients against float64.
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
        "yardstick": [{"method": one.way.key, "seconds": one.seconds} for one in measures],
    }


def _spaced(count: int, points: Sequence[tuple[int, int]], bench: Bench) -> list[int]:
    plain = [
        one.temporary_bytes + bench.problem.fixed_bytes
        for row, one in bench.rows
        if one and row["method"] == "backprop"
    ]
    low = math.ceil(1.03 * points[0][0])  # the compiler leaves holes between buffers
    high = max([points[-1][0], *plain])
    return [math.ceil(low * (high / low) ** (k / max(1, count - 1))) for k in range(count)]


def _within(limits: Sequence[float], problem: Problem) -> list[int]:
    stored = mw.replay(problem.profile, baselines.store_all(problem.asked).runs or ())
    base = stored.time_ns + stored.fresh_ns
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
            made.way = dataclasses.replace(made.way, key=name)
    return bench.used()
