"""The demo: a convolutional classifier, trained on handwritten digits within a budget that backpropagation
exceeds.

It is `mwplan.app.side_by_side` for one task. Needs the `example` extra (optax, scikit-learn).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mwplan import planning
from mwplan.app import side_by_side
from mwplan.app.side_by_side import Outcome, Progress, Task, shuffled
from mwplan.app.telling import as_the_budget_shrinks, reach, side_by_side_rows
from mwplan.app.train_result import PlanRow, TrainConfig, TrainResult
from mwplan.common import serial
from mwplan.common.errors import ArgumentError, MwplanError
from mwplan.common.sizes import parse_bytes
from mwplan.compilers.compiling import jit
from mwplan.fitting.fitted import Fitted
from mwplan.layers import Conv2D, Dense, Flatten, MaxMin, SpaceToDepth
from mwplan.network.chain import Chain
from mwplan.planning import RECOMPUTATION, Frontier
from mwplan.plans.profiles import Profile
from mwplan.plans.schedule import Schedule, Strategy
from mwplan.report import page

#: The default budget leaves room for this share of backpropagation's temporaries,
BUDGET_FRACTION = 0.15
#: and at least so many times the least bytes that any schedule needs.
LEAST_FACTOR = 1.4
#: Budgets whose plans are shown.
ROWS = 14
#: Timed runs of each operation.
REPEATS = 3


@dataclass(frozen=True)
class Digits:
    """scikit-learn's bundled handwritten digits, 8x8, scaled to mean 0 and variance 1, split with a fixed
    seed."""

    train_x: Float[np.ndarray, "train 8 8 1"]
    train_y: Int[np.ndarray, " train"]
    test_x: Float[np.ndarray, "test 8 8 1"]
    test_y: Int[np.ndarray, " test"]


def digits(seed: int = 0) -> Digits:
    """Loads and splits the data: 1437 to train on, 360 to test."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise MwplanError('the digits need scikit-learn: pip install -e ".[example]"') from error
    x, y = load_digits(return_X_y=True)
    x = ((x - x.mean()) / x.std()).astype(np.float32).reshape(-1, 8, 8, 1)
    train_x, test_x, train_y, test_y = train_test_split(
        x, y.astype(np.int32), test_size=0.2, random_state=seed, stratify=y
    )
    return Digits(train_x, train_y, test_x, test_y)


def digits_network(key: Array, depth: int = 16) -> Chain:
    """A convolutional classifier of 8x8 images: a 3x3 stem; `depth` blocks of 1x1 convolutions at 8x8,
    `depth` more at 4x4; a dense head. All blocks end in MaxMin.

    The stem widens 1 channel to 16 and so is not submersive; the convolution between the stages halves the
    channels, so that it cannot be inverted, but is; so are the rest, and orthogonal at the start.
    """
    keys = iter(jax.random.split(key, 2 * depth + 3))
    layers: list[Any] = [Conv2D.init(next(keys), 1, 16, 3), MaxMin()]
    for _ in range(depth):
        layers += [Conv2D.init(next(keys), 16, 16, 1), MaxMin()]
    layers += [SpaceToDepth((2, 2)), Conv2D.init(next(keys), 64, 32, 1), MaxMin()]
    for _ in range(depth):
        layers += [Conv2D.init(next(keys), 32, 32, 1), MaxMin()]
    return Chain([*layers, Flatten(3), Dense.init(next(keys), 512, 10)])


def cross_entropy(logits: Float[Array, "*batch classes"], labels: Int[Array, "*batch"]) -> Float[Array, ""]:
    """Mean softmax cross entropy over all leading axes: of examples, or of the tokens of each."""
    import optax

    mean: Array = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return mean


def accuracy(chain: Chain, x: Any, labels: Any) -> float:
    """Fraction of right answers."""
    return float((jnp.argmax(jit(lambda net, x: net(x))(chain, x), axis=-1) == labels).mean())


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A training run: what was measured, the step that it ended with, and the frontier that its plan is
    of."""

    result: TrainResult
    fitted: Fitted
    frontier: Frontier


def frontiers(profile: Profile, max_error: float, allowed: frozenset[Strategy]) -> tuple[Frontier, Frontier]:
    """Every budget at once: of the allowed strategies, and of storing and recomputing alone."""
    every = planning.frontier(profile, max_error=max_error, allowed=allowed)
    return every, planning.frontier(profile, max_error=max_error, allowed=RECOMPUTATION)


def plan_rows(every: Frontier, alone: Frontier, most_bytes: int) -> tuple[PlanRow, ...]:
    """The plans at `ROWS` budgets from `most_bytes` to the least feasible, spread evenly by ratio, as the
    frontiers have them: fragmentation not counted."""
    if every.least_bytes is None:
        return ()
    ratio = max(1.0, most_bytes / every.least_bytes)
    rows: list[PlanRow] = []
    for k in range(ROWS):
        budget = math.ceil(every.least_bytes * ratio ** (1 - k / (ROWS - 1)))
        found = every.bare(budget)
        fits = alone.least_bytes is not None and alone.least_bytes <= budget
        rows.append(
            PlanRow(
                budget_bytes=budget,
                time_ns=found.time_ns,
                recomputation_ns=alone.bare(budget).time_ns if fits else None,
                strategies=found.strategies,
            )
        )
    return tuple(rows)


def train(config: TrainConfig, progress: Progress, say: Callable[[str], None]) -> Trained:
    """Profiles, plans, and trains twice. `progress` and `say` are callbacks for reports.

    Raises `InfeasibleError` for a budget that no schedule fits.
    """
    try:
        import optax
    except ImportError as error:
        raise MwplanError('training needs optax: pip install -e ".[example]"') from error
    data = digits(config.seed)
    if config.batch > len(data.train_x):
        raise ArgumentError(f"`batch={config.batch}` is more than the {len(data.train_x)} training images")
    steps_per_epoch = len(data.train_x) // config.batch
    total = config.epochs * steps_per_epoch
    allowed = frozenset(Strategy) - frozenset(config.forbid)

    def budget(profile: Profile, backprop: int) -> int:
        every, alone = frontiers(profile, config.max_error, allowed)
        stored = everything_stored(profile, config.max_error)
        rows = plan_rows(every, alone, profile.fixed_bytes + backprop)
        say(as_the_budget_shrinks(rows, stored.time_ns, profile.fixed_bytes))
        say(reach(every.points, alone.points, stored.time_ns, profile.fixed_bytes))
        if config.budget is not None:
            return parse_bytes(config.budget)
        least = every.least_bytes or 0
        return max(profile.fixed_bytes + int(BUDGET_FRACTION * backprop), int(LEAST_FACTOR * least))

    chain = digits_network(jax.random.key(config.seed), config.depth)
    task = Task(
        chain=chain,
        loss=cross_entropy,
        batch=shuffled(data.train_x, data.train_y, config.batch, config.seed),
        steps=total,
        optimizer=optax.adam(optax.cosine_decay_schedule(config.learning_rate, total)),
        budget=budget,
        max_error=config.max_error,
        allowed=allowed,
        checks=(0, total),
        patience=steps_per_epoch,
        repeats=REPEATS,
        rival=RECOMPUTATION,
    )
    got = side_by_side.train(task, progress, say)
    every, alone = frontiers(got.fitted.profile, config.max_error, allowed)
    result = _result(config, got, (every, alone), data, versions=(jax, np, optax))
    return Trained(result=result, fitted=got.fitted, frontier=every)


def everything_stored(profile: Profile, max_error: float) -> Schedule:
    """Backpropagation, as predicted."""
    stored = planning.baseline_schedules(profile, max_error=max_error, allowed=frozenset({Strategy.STORE}))
    return stored[0]


def _result(
    config: TrainConfig,
    got: Outcome,
    frontiers: tuple[Frontier, Frontier],
    data: Digits,
    versions: tuple[Any, ...],
) -> TrainResult:
    """What was measured, as plain values."""
    fitted, first, last = got.fitted, got.checks[0], got.checks[-1]
    profile, (every, alone) = fitted.profile, frontiers
    return TrainResult(
        config=config,
        device=profile.device,
        versions=tuple(f"{m.__name__} {m.__version__}" for m in versions),
        layers=tuple(layer.name for layer in profile.layers),
        schedule=fitted.schedule,
        budget_bytes=got.budget_bytes,
        fixed_bytes=fitted.schedule.fixed_bytes,
        predicted_temporary_bytes=fitted.schedule.peak_bytes,
        measured_temporary_bytes=fitted.temporary_bytes,
        backprop_temporary_bytes=got.backprop_temporary_bytes,
        predicted_step_seconds=fitted.schedule.time_ns / 1e9,
        planned_step_seconds=got.timed[1],
        backprop_step_seconds=got.timed[0],
        planned_compile_seconds=fitted.attempts[-1].compile_seconds,
        backprop_compile_seconds=got.backprop_compile_seconds,
        gradient_error_first=first.planned_worst,
        gradient_error_last=last.planned_worst,
        backprop_error_first=first.plain_worst,
        backprop_error_last=last.plain_worst,
        accuracy_planned=accuracy(got.planned.chain, data.test_x, data.test_y),
        accuracy_plain=accuracy(got.plain.chain, data.test_x, data.test_y),
        losses_planned=tuple(got.planned.losses),
        losses_plain=tuple(got.plain.losses),
        discrepancies=got.discrepancies,
        replans=got.replans,
        frontier=every.points,
        recomputation=alone.points,
        plans=plan_rows(every, alone, profile.fixed_bytes + got.backprop_temporary_bytes),
        backprop_predicted_ns=everything_stored(profile, config.max_error).time_ns,
        recomputation_temporary_bytes=None if got.rival is None else got.rival.temporary_bytes,
        recomputation_step_seconds=None if got.rival is None else got.timed[2],
    )


def write(trained: Trained, folder: Path) -> tuple[Path, ...]:
    """Writes `training.json`, `training.png` and, where plotly is installed, the report `plan.html` into
    `folder`, each whole or not at all."""
    from mwplan.app.figures import training_figure

    folder = Path(folder)
    files = folder / "training.json", folder / "training.png", folder / "plan.html"
    serial.write_atomically(files[0], trained.result.to_json())
    serial.write_atomically(files[1], training_figure(trained.result))
    try:
        page.plotly()
    except MwplanError:
        return files[:2]
    trained.fitted.report(
        files[2],
        frontier=trained.frontier,
        title=f"Training {len(trained.result.layers)} layers on handwritten digits",
        measured=side_by_side_rows(trained.result),
    )
    return files
