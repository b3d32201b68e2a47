"""The main job: train a convolutional classifier on handwritten digits within a budget that backpropagation exceeds.

Plain and planned training run side by side from the same start on the same batches, interleaved step by step, so that times
compare. Needs the `example` extra (optax, scikit-learn).
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mwplan import execute, fitting, measure, planning, serial
from mwplan.chain import Chain
from mwplan.compiling import jit, temporaries
from mwplan.errors import ArgumentError, InfeasibleError, MwplanError
from mwplan.layers import Conv2D, Dense, Flatten, LeakyReLU, MaxMin, SpaceToDepth
from mwplan.profiles import Profile
from mwplan.schedule import Schedule, Strategy
from mwplan.sizes import parse_bytes

SCHEMA = 1
#: Of backpropagation's temporaries: what the default budget leaves room for.
BUDGET_FRACTION = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """What to train and how. `budget`: device bytes of the gradient step; None leaves a fifth of the room
    that backpropagation's temporaries take, or a little more than the least feasible. The learning rate decays to 0 along a cosine."""

    budget: str | None = None
    max_error: float = 1e-4
    batch: int = 512
    epochs: int = 60
    learning_rate: float = 2e-3
    depth: int = 12
    seed: int = 0
    forbid: tuple[Strategy, ...] = ()

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("epochs", 1), ("depth", 1)):
            if getattr(self, name) < least:
                raise ArgumentError(f"`{name}={getattr(self, name)}` must be at least {least}")
        if self.budget is not None:
            parse_bytes(self.budget)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """What one training run measured: bytes, seconds, errors, losses, accuracies. One entry a step in the lists."""

    config: TrainConfig
    device: str
    versions: tuple[str, ...]
    layers: tuple[str, ...]
    schedule: Schedule
    budget_bytes: int
    fixed_bytes: int
    predicted_temporary_bytes: int
    measured_temporary_bytes: int
    backprop_temporary_bytes: int
    predicted_step_seconds: float
    planned_step_seconds: float
    backprop_step_seconds: float
    planned_compile_seconds: float
    backprop_compile_seconds: float
    gradient_error_first: float
    gradient_error_last: float
    backprop_error_first: float
    backprop_error_last: float
    accuracy_planned: float
    accuracy_plain: float
    losses_planned: tuple[float, ...]
    losses_plain: tuple[float, ...]
    discrepancies: tuple[float, ...]
    replans: tuple[int, ...]

    def to_json(self) -> str:
        """This result as JSON with a schema number."""
        return serial.dump(self, kind="training", schema=SCHEMA)

    @classmethod
    def from_json(cls, text: str) -> TrainResult:
        """Reads what `to_json` wrote."""
        return serial.load(text, cls, kind="training", schema=SCHEMA)


class Progress(Protocol):
    """Where the run says how far it is."""

    def __call__(self, phase: str, done: int, total: int, /) -> None:
        """`phase` is at `done` of `total`."""


@dataclass(frozen=True)
class Digits:
    """scikit-learn's bundled handwritten digits, 8x8, scaled to mean 0 and variance 1, split with a fixed seed."""

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
        raise MwplanError('the digits need scikit-learn: pip install "mwplan[example]"') from error
    x, y = load_digits(return_X_y=True)
    x = ((x - x.mean()) / x.std()).astype(np.float32).reshape(-1, 8, 8, 1)
    train_x, test_x, train_y, test_y = train_test_split(
        x, y.astype(np.int32), test_size=0.2, random_state=seed, stratify=y
    )
    return Digits(train_x, train_y, test_x, test_y)


def digits_network(key: Array, depth: int = 12) -> Chain:
    """A convolutional classifier of 8x8 images: `depth` 3x3 blocks at 8x8, `depth` 1x1 blocks at 4x4, one strided, a dense head.

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


def cross_entropy(logits: Float[Array, "batch classes"], labels: Int[Array, " batch"]) -> Float[Array, ""]:
    """Mean softmax cross entropy."""
    import optax

    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def gradient_error(grads: Any, chain: Chain, x: Any, labels: Any) -> float:
    """Relative distance of `grads` from float64 backpropagation at the same weights: the largest over the parameters."""
    got = jax.tree.leaves(grads)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(np.asarray(a), jnp.float64), (chain, x))
        truth = jit(jax.grad(lambda net, x: cross_entropy(net(x), labels)))(*wide)
        pairs = zip(got, jax.tree.leaves(truth))
        return max(float(np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b)) for a, b in pairs)


def accuracy(chain: Chain, x: Any, labels: Any) -> float:
    """Fraction of right answers."""
    return float((jnp.argmax(jit(lambda net, x: net(x))(chain, x), axis=-1) == labels).mean())


@dataclass
class _Training:
    """One of the two runs: its compiled step, weights and records."""

    step: Any
    chain: Chain
    state: Any
    losses: list[float] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)


def train(config: TrainConfig, progress: Progress, say: Callable[[str], None]) -> TrainResult:
    """Profiles, plans, and trains both ways. `progress` and `say` report to whoever watches.

    Raises `InfeasibleError` for a budget that no schedule fits.
    """
    try:
        import optax
    except ImportError as error:
        raise MwplanError('training needs optax: pip install "mwplan[example]"') from error
    data = digits(config.seed)
    if config.batch > len(data.train_x):
        raise ArgumentError(f"`batch={config.batch}` is more than the {len(data.train_x)} training images")
    chain = digits_network(jax.random.key(config.seed), config.depth)
    x, labels = jnp.asarray(data.train_x[: config.batch]), jnp.asarray(data.train_y[: config.batch])

    steps_per_epoch = len(data.train_x) // config.batch
    total = config.epochs * steps_per_epoch
    optimizer = optax.adam(optax.cosine_decay_schedule(config.learning_rate, total))
    compiled: dict[str, Any] = {}
    compile_seconds: dict[str, float] = {}

    def plain_gradient(net: Chain, x: Any, labels: Any) -> Any:
        return jax.value_and_grad(lambda net: cross_entropy(net(x), labels))(net)

    def planned_gradient(found: fitting.Fitted) -> Any:
        return execute.value_and_grad(cross_entropy, found.schedule, arrangement=found.arrangement)

    def compile_gradient(name: str, gradient: Any) -> None:
        start = time.perf_counter()
        compiled[name] = jit(gradient).lower(chain, x, labels).compile()
        compile_seconds[name] = time.perf_counter() - start

    compile_gradient("plain", plain_gradient)

    def profiled(net: Chain) -> Profile:
        return measure.profile(
            net, x, progress=lambda done, total, _: progress("profiling layers", done, total)
        )

    def fitted(net: Chain, profile: Profile, budget: int) -> fitting.Fitted:
        return fitting.fit(
            cross_entropy, net, x, labels,
            budget=budget, profile=profile, max_error=config.max_error, allowed=allowed, say=say,
        )  # fmt: skip

    allowed = frozenset(Strategy) - frozenset(config.forbid)
    profile = profiled(chain)
    if config.budget is None:
        least = planning.frontier(profile, max_error=config.max_error, allowed=allowed).least_bytes or 0
        room = int(BUDGET_FRACTION * temporaries(compiled["plain"]))
        budget = max(profile.fixed_bytes + room, int(1.25 * least))
    else:
        budget = parse_bytes(config.budget)
    found = fitted(chain, profile, budget)
    schedule, compiled["planned"] = found.schedule, found.step
    compile_seconds["planned"] = found.attempts[-1].compile_seconds
    say(str(schedule))

    def stepper(gradient: Any) -> Any:
        def step(net: Chain, state: Any, x: Any, labels: Any) -> tuple[Any, Any, Any]:
            value, grads = gradient(net, x, labels)
            updates, state = optimizer.update(grads, state, net)
            return optax.apply_updates(net, updates), state, value

        return jit(step)

    (_, _), grads = compiled["planned"](chain, x, labels)
    error_first = gradient_error(grads, chain, x, labels)
    plain_first = gradient_error(compiled["plain"](chain, x, labels)[1], chain, x, labels)

    state = optimizer.init(chain)
    plain = _Training(stepper(plain_gradient), chain, state)
    planned = _Training(stepper(planned_gradient(found)), chain, state)
    rng = np.random.default_rng(config.seed)
    discrepancies: list[float] = []
    replans: list[int] = []
    for step in range(total):
        if step % steps_per_epoch == 0:
            order = rng.permutation(len(data.train_x))
        at = (step % steps_per_epoch) * config.batch
        index = order[at : at + config.batch]
        batch = jnp.asarray(data.train_x[index]), jnp.asarray(data.train_y[index])
        for run in (plain, planned):
            start = time.perf_counter()
            run.chain, run.state, value = jax.block_until_ready(run.step(run.chain, run.state, *batch))
            run.seconds.append(time.perf_counter() - start)
            loss = value if run is plain else value[0]
            run.losses.append(float(loss))
            if run is planned:
                discrepancies.append(float(value[1].worst))
        if discrepancies[-1] > config.max_error and (not replans or step - replans[-1] >= steps_per_epoch):
            say(
                f"step {step}: a run's cotangent is off by {discrepancies[-1]:.1e}, above {config.max_error:.0e}: "
                "profiling the weights as they are now, and planning again"
            )
            replans.append(step)
            try:
                found = fitted(planned.chain, profiled(planned.chain), budget)
                schedule = found.schedule
            except InfeasibleError as error:
                raise InfeasibleError(
                    f"after step {step} no schedule keeps `max_error={config.max_error}` within the budget any more: {error}",
                    budget_bytes=budget,
                    least_bytes=error.least_bytes,
                ) from error
            planned.step = stepper(planned_gradient(found))
        progress("training, plain and planned", step + 1, total)
    (_, _), grads = jit(planned_gradient(found))(planned.chain, x, labels)
    _, plain_grads = compiled["plain"](planned.chain, x, labels)
    return TrainResult(
        config=config,
        device=profile.device,
        versions=tuple(f"{m.__name__} {m.__version__}" for m in (jax, np, optax)),
        layers=tuple(layer.name for layer in profile.layers),
        schedule=schedule,
        budget_bytes=budget,
        fixed_bytes=schedule.fixed_bytes,
        predicted_temporary_bytes=schedule.peak_bytes,
        measured_temporary_bytes=temporaries(compiled["planned"]),
        backprop_temporary_bytes=temporaries(compiled["plain"]),
        predicted_step_seconds=schedule.time_ns / 1e9,
        planned_step_seconds=_median(planned.seconds),
        backprop_step_seconds=_median(plain.seconds),
        planned_compile_seconds=compile_seconds["planned"],
        backprop_compile_seconds=compile_seconds["plain"],
        gradient_error_first=error_first,
        gradient_error_last=gradient_error(grads, planned.chain, x, labels),
        backprop_error_first=plain_first,
        backprop_error_last=gradient_error(plain_grads, planned.chain, x, labels),
        accuracy_planned=accuracy(planned.chain, data.test_x, data.test_y),
        accuracy_plain=accuracy(plain.chain, data.test_x, data.test_y),
        losses_planned=tuple(planned.losses),
        losses_plain=tuple(plain.losses),
        discrepancies=tuple(discrepancies),
        replans=tuple(replans),
    )


def _median(seconds: list[float]) -> float:
    """The median without the first call, which compiles."""
    return statistics.median(seconds[1:] or seconds)


def write(result: TrainResult, folder: Path) -> tuple[Path, Path]:
    """Writes `training.json` and `training.png` into `folder`, each whole or not at all."""
    from mwplan.plots import plot_training

    folder = Path(folder)
    serial.write_atomically(folder / "training.json", result.to_json())
    serial.write_atomically(folder / "training.png", plot_training(result))
    return folder / "training.json", folder / "training.png"
