"""The demo: a convolutional classifier, trained on handwritten digits within a budget that backpropagation
exceeds.

It is `mwplan.app.side_by_side` for one task. Needs the `example` extra (optax, scikit-learn).
"""

from __future__ import annotations

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
from mwplan.app.side_by_side import Progress, Task, shuffled
from mwplan.app.train_result import TrainConfig, TrainResult
from mwplan.common import serial
from mwplan.common.errors import ArgumentError, MwplanError
from mwplan.common.sizes import parse_bytes
from mwplan.compilers.compiling import jit
from mwplan.layers import Conv2D, Dense, Flatten, LeakyReLU, MaxMin, SpaceToDepth
from mwplan.network.chain import Chain
from mwplan.plans.profiles import Profile
from mwplan.plans.schedule import Strategy

#: The default budget leaves room for this share of backpropagation's temporaries,
BUDGET_FRACTION = 0.2
#: and at least so many times the least bytes that any schedule needs
LEAST_FACTOR = 1.25
#: Rounds in which plans are timed in turn. A profile times single operations, which does not show how several
#: cores share the work of a whole step.
TUNE = 3


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


def digits_network(key: Array, depth: int = 12) -> Chain:
    """A convolutional classifier of 8x8 images: `depth` 3x3 blocks at 8x8, `depth` 1x1 blocks at 4x4, one
    strided, a dense head.

    The first convolution widens 1 channel to 16 and so is not submersive; the rest is.
    """
    keys = iter(jax.random.split(key, 2 * depth + 3))
    layers: list[Any] = [Conv2D.init(next(keys), 1, 16, 3), LeakyReLU(0.5)]
    for _ in range(depth):
        layers += [Conv2D.init(next(keys), 16, 16, 3), MaxMin()]
    layers.append(SpaceToDepth((2, 2)))
    for _ in range(depth):
        layers += [Conv2D.init(next(keys), 64, 64, 1), MaxMin()]
    layers += [Conv2D.init(next(keys), 64, 128, 2, stride=2, padding="VALID"), LeakyReLU(0.5)]
    layers += [Flatten(3), Dense.init(next(keys), 512, 10)]
    return Chain(layers)


def cross_entropy(logits: Float[Array, "*batch classes"], labels: Int[Array, "*batch"]) -> Float[Array, ""]:
    """Mean softmax cross entropy over all leading axes: of examples, or of the tokens of each."""
    import optax

    mean: Array = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return mean


def accuracy(chain: Chain, x: Any, labels: Any) -> float:
    """Fraction of right answers."""
    return float((jnp.argmax(jit(lambda net, x: net(x))(chain, x), axis=-1) == labels).mean())


def train(config: TrainConfig, progress: Progress, say: Callable[[str], None]) -> TrainResult:
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
        if config.budget is not None:
            return parse_bytes(config.budget)
        least = planning.frontier(profile, max_error=config.max_error, allowed=allowed).least_bytes or 0
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
        tune=TUNE,
    )
    got = side_by_side.train(task, progress, say)
    fitted, first, last = got.fitted, got.checks[0], got.checks[-1]
    return TrainResult(
        config=config,
        device=fitted.profile.device,
        versions=tuple(f"{m.__name__} {m.__version__}" for m in (jax, np, optax)),
        layers=tuple(layer.name for layer in fitted.profile.layers),
        schedule=fitted.schedule,
        budget_bytes=got.budget_bytes,
        fixed_bytes=fitted.schedule.fixed_bytes,
        predicted_temporary_bytes=fitted.schedule.peak_bytes,
        measured_temporary_bytes=fitted.temporary_bytes,
        backprop_temporary_bytes=got.backprop_temporary_bytes,
        predicted_step_seconds=fitted.schedule.time_ns / 1e9,
        planned_step_seconds=got.planned.median_seconds,
        backprop_step_seconds=got.plain.median_seconds,
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
    )


def write(result: TrainResult, folder: Path) -> tuple[Path, Path]:
    """Writes `training.json` and `training.png` into `folder`, each whole or not at all."""
    from mwplan.app.figures import training_figure

    folder = Path(folder)
    serial.write_atomically(folder / "training.json", result.to_json())
    serial.write_atomically(folder / "training.png", training_figure(result))
    return folder / "training.json", folder / "training.png"
