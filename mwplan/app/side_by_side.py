"""Trains one network twice at once, by plain backpropagation and within a budget.

Both runs have the same start and the same batches, and take their steps in turn. Where the report of a
planned step exceeds `max_error`, the weights are profiled as they are then, and the step is planned again.
Needs optax (the `example` extra).
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from mwplan.common import trees
from mwplan.common.errors import InfeasibleError
from mwplan.compilers.compiling import jit, temporaries
from mwplan.fitting import fitting
from mwplan.fitting.fitted import Fitted
from mwplan.network.chain import Chain
from mwplan.planning import EVERY_STRATEGY
from mwplan.plans.profiles import Profile
from mwplan.plans.schedule import Strategy
from mwplan.profiling import measure

PyTree = Any


@runtime_checkable
class Progress(Protocol):
    """A callback for the progress of a training run."""

    def __call__(self, phase: str, done: int, total: int, /) -> None:
        """Called when `done` of `total` steps of `phase` are finished."""


def silent(phase: str, done: int, total: int) -> None:
    """Ignores progress."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is trained.

    - `chain`: the network with the weights that both runs start from.
    - `loss(chain(x), labels)`: a scalar.
    - `batch(step)`: that step's `(x, labels)`, all of one shape.
    - `steps`, `optimizer`: how many steps, and an optimizer of optax.
    - `budget(profile, temporary_bytes)`: device bytes of the gradient step, from the profile and
      backpropagation's temporaries.
    - `max_error`, `allowed`, `tune`: as in `mw.fit`; `repeats`: as in `mw.profile`.
    - `checks`: steps before which both gradients are compared with float64, at the planned run's weights, on
      batch 0; `steps` stands for the end.
    - `patience`: the least number of steps between two plans.
    - `rival`: strategies of which another step within the budget is made, and timed in turn with the two
      after the training, for `rounds`.
    """

    chain: Chain
    loss: Callable[[Any, Any], Any]
    batch: Callable[[int], tuple[Any, Any]]
    steps: int
    optimizer: Any
    budget: Callable[[Profile, int], int]
    max_error: float = 1e-4
    allowed: frozenset[Strategy] = EVERY_STRATEGY
    checks: tuple[int, ...] = ()
    patience: int = 1
    repeats: int = 5
    tune: int = 0
    rival: frozenset[Strategy] | None = None
    rounds: int = 9


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """Relative distances of both gradients from float64 backpropagation: all together, and the largest of any
    parameter."""

    step: int
    planned: float
    planned_worst: float
    plain: float
    plain_worst: float


@dataclass
class Curve:
    """One of the two runs: weights, the compiled gradient step, and one loss and time (of gradient and
    update) a step."""

    chain: Chain
    state: Any
    gradient: Any
    losses: list[float] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)

    @property
    def median_seconds(self) -> float:
        """The median step without the first, which compiles."""
        return statistics.median(self.seconds[1:] or self.seconds)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What was measured. `fitted`: the last plan, with its compiled gradient step; `rival`, that of the
    `rival` strategies, None where none fits or none was asked for; `timed`, median seconds of gradients
    computed in turn: plain, planned and, where there is one, the rival's; `replans`: the steps after which it
    was planned again."""

    fitted: Fitted
    rival: Fitted | None
    timed: tuple[float, ...]
    budget_bytes: int
    backprop_temporary_bytes: int
    backprop_compile_seconds: float
    planned: Curve
    plain: Curve
    discrepancies: tuple[float, ...]
    replans: tuple[int, ...]
    checks: tuple[Check, ...]

    @property
    def ratio(self) -> float:
        """The median over the steps, the first left out, of planned over plain time."""
        pairs = list(zip(self.planned.seconds, self.plain.seconds))
        return statistics.median(a / b for a, b in pairs[1:] or pairs)


def train(task: Task, progress: Progress = silent, say: Callable[[str], None] = lambda text: None) -> Outcome:
    """Profiles, plans, and trains twice. `progress` and `say` are callbacks for reports.

    Raises `InfeasibleError` for a budget that no schedule fits, at the start or with weights that were
    trained for a while.
    """
    session = _Session(task, progress, say)
    for step in range(task.steps):
        session.check(step)
        session.advance(step)
        if session.must_replan(step):
            session.replan(step)
        progress("training, plain and planned", step + 1, task.steps)
    session.check(task.steps)
    return session.outcome()


_COMPILING = "planning and compiling"


class _Session:
    """The two runs, while they train: what is compiled, and what was measured so far."""

    def __init__(self, task: Task, progress: Progress, say: Callable[[str], None]) -> None:
        self.task, self.progress, self.say = task, progress, say
        self.example = task.batch(0)

        def plain_gradient(net: Chain, x: Any, labels: Any) -> Any:
            return jax.value_and_grad(lambda net: task.loss(net(x), labels))(net)

        profile = self._profile(task.chain)
        steps = 2 if task.rival is None else 3
        progress(_COMPILING, 0, steps)
        start = time.perf_counter()
        self.backprop = jit(plain_gradient).lower(task.chain, *self.example).compile()
        self.backprop_compile_seconds = time.perf_counter() - start
        progress(_COMPILING, 1, steps)
        self.budget = task.budget(profile, temporaries(self.backprop))
        self.fitted = self._fit(task.chain, profile, task.allowed)
        say(str(self.fitted.schedule))
        progress(_COMPILING, 2, steps)
        self.rival = self._rival(profile)
        progress(_COMPILING, steps, steps)

        @jit
        def update(net: Chain, state: Any, grads: Any) -> tuple[Any, Any]:
            import optax

            updates, state = task.optimizer.update(grads, state, net)
            return optax.apply_updates(net, updates), state

        self.update = update
        state = task.optimizer.init(task.chain)
        self.plain = Curve(task.chain, state, self.backprop)
        self.planned = Curve(task.chain, state, self.fitted.step)
        self.truth = _Truth(task.loss)
        self.discrepancies: list[float] = []
        self.replans: list[int] = []
        self.checks: list[Check] = []

    def _profile(self, net: Chain) -> Profile:
        """The chain's costs, with its weights as they are."""
        return measure.profile(
            net,
            self.example[0],
            repeats=self.task.repeats,
            progress=lambda done, total, what: self.progress(what, done, total),
        )

    def _rival(self, profile: Profile) -> Fitted | None:
        """The step of the rival strategies within the budget, if there is one."""
        if self.task.rival is None:
            return None
        if self.task.rival.issuperset(self.fitted.schedule.strategies):
            return self.fitted
        try:
            return self._fit(self.task.chain, profile, self.task.rival)
        except InfeasibleError:
            return None

    def _fit(self, net: Chain, profile: Profile, allowed: frozenset[Strategy]) -> Fitted:
        """The step within the budget."""
        task = self.task
        found = fitting.fit(
            task.loss,
            net,
            *self.example,
            budget=self.budget,
            profile=profile,
            max_error=task.max_error,
            allowed=allowed,
            tune=task.tune,
            say=self.say,
        )
        assert isinstance(found, Fitted)  # no device but the attached one was named
        return found

    def check(self, step: int) -> None:
        """Compares both gradients with float64, where the task asks for it before this step."""
        if step not in self.task.checks:
            return
        args = (self.planned.chain, *self.example)
        (whole, worst), (plain_whole, plain_worst) = self.truth.errors(
            [self.fitted.step(*args)[1], self.backprop(*args)[1]], *args
        )
        self.checks.append(
            Check(step=step, planned=whole, planned_worst=worst, plain=plain_whole, plain_worst=plain_worst)
        )

    def advance(self, step: int) -> None:
        """One step of each run, on the same batch."""
        batch = self.task.batch(step)
        for run in (self.plain, self.planned):
            start = time.perf_counter()
            value, grads = run.gradient(run.chain, *batch)
            run.chain, run.state = jax.block_until_ready(self.update(run.chain, run.state, grads))
            run.seconds.append(time.perf_counter() - start)
            run.losses.append(float(value if run is self.plain else value[0]))
            if run is self.planned:
                self.discrepancies.append(float(value[1].worst))

    def must_replan(self, step: int) -> bool:
        """Whether the last report exceeds `max_error` (NaN does), `patience` steps after the last plan."""
        waited = not self.replans or step - self.replans[-1] >= self.task.patience
        return waited and not self.discrepancies[-1] <= self.task.max_error

    def replan(self, step: int) -> None:
        """Profiles the weights as they are, and plans again."""
        limit = self.task.max_error
        self.say(
            f"step {step}: a run's cotangent is off by {self.discrepancies[-1]:.1e}, above {limit:.0e}: "
            "profiling the weights as they are now, and planning again"
        )
        self.replans.append(step)
        try:
            profile = self._profile(self.planned.chain)
            self.fitted = self._fit(self.planned.chain, profile, self.task.allowed)
        except InfeasibleError as error:
            raise InfeasibleError(
                f"after step {step} no schedule keeps `max_error={limit}` within the budget any more: "
                f"{error}",
                budget_bytes=self.budget,
                least_bytes=error.least_bytes,
            ) from error
        self.planned.gradient = self.fitted.step

    def timed(self) -> tuple[float, ...]:
        """`Outcome.timed`, at the weights that the planned run ends with."""
        steps = [self.backprop, self.fitted.step]
        steps += [] if self.rival is None else [self.rival.step]
        seconds: list[list[float]] = [[] for _ in steps]
        for _ in range(self.task.rounds + 1):
            for step, samples in zip(steps, seconds):
                start = time.perf_counter()
                jax.block_until_ready(step(self.planned.chain, *self.example))
                samples.append(time.perf_counter() - start)
        return tuple(statistics.median(samples[1:]) for samples in seconds)

    def outcome(self) -> Outcome:
        """All of it, as plain values."""
        return Outcome(
            fitted=self.fitted,
            rival=self.rival,
            timed=self.timed(),
            budget_bytes=self.budget,
            backprop_temporary_bytes=temporaries(self.backprop),
            backprop_compile_seconds=self.backprop_compile_seconds,
            planned=self.planned,
            plain=self.plain,
            discrepancies=tuple(self.discrepancies),
            replans=tuple(self.replans),
            checks=tuple(self.checks),
        )


class _Truth:
    """Float64 backpropagation, compiled once."""

    def __init__(self, loss: Callable[[Any, Any], Any]) -> None:
        self.gradient = jit(jax.grad(lambda net, x, labels: loss(net(x), labels)))

    def errors(self, gradients: Sequence[Any], *args: Any) -> list[tuple[float, float]]:
        """`relative_error` of each of the gradients at `args`."""
        with jax.enable_x64(True):
            chain, x, labels = args
            truth = self.gradient(*_float64((chain, x)), labels)
            return [relative_error(jax.tree.leaves(one), jax.tree.leaves(truth)) for one in gradients]


def _float64(tree: PyTree) -> PyTree:
    def wide(leaf: Any) -> Any:
        return jnp.asarray(np.asarray(leaf), jnp.float64) if trees.is_inexact(leaf) else leaf

    return jax.tree.map(wide, tree)


def relative_error(got: Sequence[Any], truth: Sequence[Any]) -> tuple[float, float]:
    """Relative distance of all gradients together, and the largest of any parameter (those whose true
    gradient is 0 left out)."""
    apart = [np.asarray(a, np.float64) - np.asarray(b) for a, b in zip(got, truth, strict=True)]
    lengths = [(float(np.linalg.norm(d)), float(np.linalg.norm(b))) for d, b in zip(apart, truth)]
    whole = math.hypot(*(d for d, _ in lengths)) / max(math.hypot(*(b for _, b in lengths)), 1e-300)
    return whole, max((d / b for d, b in lengths if b > 0), default=0.0)


def shuffled(x: Any, labels: Any, batch: int, seed: int) -> Callable[[int], tuple[Any, Any]]:
    """`batch(step)` for `Task`: whole batches of the examples, in an order that is new in each epoch and the
    same for each call with `seed`."""
    steps = len(x) // batch

    def at(step: int) -> tuple[Any, Any]:
        order = np.random.default_rng((seed, step // steps)).permutation(len(x))
        index = order[step % steps * batch :][:batch]
        return jnp.asarray(x[index]), jnp.asarray(labels[index])

    return at
