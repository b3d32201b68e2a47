"""Networks and schedules that several tests use."""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import mwplan as mw
from mwplan.layers import Conv2D, Dense, Flatten, LeakyReLU, MaxMin
from mwplan.network import rules
from mwplan.network.chain import boundaries
from mwplan.plans.schedule import SINGLE, Run, RunKind


def mlp(depth: int = 3, width: int = 8, seed: int = 0) -> mw.Chain:
    """Dense layers with leaky ReLU between them; every layer submersive."""
    keys = jax.random.split(jax.random.key(seed), depth)
    layers: list[Any] = []
    for key in keys:
        layers += [Dense.init(key, width, width), LeakyReLU(0.7)]
    return mw.Chain(layers)


def tanh(x: Any) -> Any:
    """A layer without rules: a chain knows `jnp.tanh` itself for what it is."""
    return jnp.tanh(x)


def small_cnn(seed: int = 0) -> mw.Chain:
    """A convolutional classifier with layers of every kind: widening, halo, order, strided, plain
    functions."""
    a, b, c, d = jax.random.split(jax.random.key(seed), 4)
    return mw.Chain(
        [
            Conv2D.init(a, 1, 4, 3),
            tanh,
            Conv2D.init(b, 4, 4, 3),
            MaxMin(),
            Conv2D.init(c, 4, 8, 2, stride=2, padding="VALID"),
            LeakyReLU(0.5),
            Flatten(3),
            Dense.init(d, 128, 5),
        ]
    )


def alike(kind: RunKind, option: str, depth: int) -> tuple[Run, ...]:
    """`depth` layers by one option: each by itself, or in one run."""
    if kind in SINGLE:
        return tuple(Run(kind=kind, start=i, stop=i + 1, options=(option,)) for i in range(depth))
    if kind is RunKind.RECOMPUTE:
        return (Run(kind=kind, start=0, stop=depth, inner=alike(RunKind.STORE, option, depth)),)
    return (Run(kind=kind, start=0, stop=depth, options=(option,) * depth),)


def random_runs(
    rng: random.Random, chain: mw.Chain, x: Any, start: int = 0, stop: int | None = None, depth: int = 0
) -> tuple[Run, ...]:
    """A random valid schedule over `(start, stop]`: any runs, any options, nested up to three levels."""
    structs = boundaries(chain, x)
    stop = len(chain) if stop is None else stop
    runs = []
    at = start
    while at < stop:
        end = rng.randint(at + 1, stop)
        kind = rng.choice(list(RunKind))
        names: list[str] = []
        if kind in SINGLE:
            end = at + 1
            names = [rng.choice([r.name for r in rules.store_rules(chain[at], structs[at])])]
        elif kind is RunKind.RECOMPUTE:
            if depth == 3:
                continue
            inner = random_runs(rng, chain, x, at, end, depth + 1)
            runs.append(Run(kind=kind, start=at, stop=end, inner=inner))
            at = end
            continue
        else:
            find = rules.vijp_rules if kind is RunKind.MOONWALK else rules.invert_rules
            for layer in range(at, end):
                offered = [
                    r.name for r in find(chain[layer], structs[layer]) if not isinstance(r, rules.Unavailable)
                ]
                if not offered:
                    end = layer
                    break
                names.append(rng.choice(offered))
            if end == at:
                continue
        runs.append(Run(kind=kind, start=at, stop=end, options=tuple(names)))
        at = end
    return tuple(runs)


def relative_error(got: Any, want: Any) -> float:
    """The largest relative distance over the leaves."""
    worst = 0.0
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        size = np.linalg.norm(b)
        worst = max(worst, float(np.linalg.norm(a - b) / size) if size else float(np.linalg.norm(a)))
    return worst


def mean_square(y: Any, target: Any = 0.0) -> jax.Array:
    """A scalar loss with a cotangent that is neither constant nor symmetric."""
    weights = jnp.arange(1, y.size + 1, dtype=y.dtype).reshape(y.shape) / y.size
    return jnp.mean(weights * (y - target) ** 2)


def store_all(chain: mw.Chain) -> tuple[Run, ...]:
    """Every layer stored by `jax.vjp`."""
    return tuple(Run(kind=RunKind.STORE, start=i, stop=i + 1, options=("vjp",)) for i in range(len(chain)))


def segments(chain: mw.Chain, size: int) -> tuple[Run, ...]:
    """Recomputed segments of `size` layers, stored inside."""
    inner = store_all(chain)
    cuts: Sequence[int] = range(0, len(chain), size)
    return tuple(
        Run(kind=RunKind.RECOMPUTE, start=s, stop=min(s + size, len(chain)), inner=inner[s : s + size])
        for s in cuts
    )


@functools.cache
def fewest(pieces: int, slots: int) -> tuple[int, int]:
    """The fewest pieces recomputed with room for `slots` RECOMPUTE runs at once, and how many the first of
    them covers."""
    if pieces == 1:
        return 0, 0
    if slots == 0:
        return 1 << 60, 1
    return min(
        (
            (first + fewest(first, slots)[0] + fewest(pieces - first, slots - 1)[0], first)
            for first in reversed(range(1, pieces))
        ),
        key=lambda found: found[0],
    )


def binomial(size: int, length: int, slots: int, option: str, start: int = 0) -> tuple[Run, ...]:
    """The schedule of fewest steps for identical layers in stored pieces of `length`, the first maybe
    shorter."""
    pieces = -(-size // length)
    cuts = [start, *(start + size - k * length for k in reversed(range(pieces)))]

    def made(first: int, stop: int, slots: int) -> tuple[Run, ...]:
        if stop - first == 1:
            layers = range(cuts[first], cuts[stop])
            return tuple(Run(kind=RunKind.STORE, start=i, stop=i + 1, options=(option,)) for i in layers)
        middle = first + fewest(stop - first, slots)[1]
        inner = made(first, middle, slots)
        run = Run(kind=RunKind.RECOMPUTE, start=cuts[first], stop=cuts[middle], inner=inner)
        return run, *made(middle, stop, slots - 1)

    return made(0, pieces, slots)


def with_round_times(profile: mw.Profile) -> mw.Profile:
    """`profile` with times by rule, products the dearest, and memory that costs none: plans no longer depend
    on how busy the machine was."""
    times = {"forward_ns": 2, "backward_ns": 4, "reverse_ns": 2, "rebuild_ns": 3}

    def one(layer: Any) -> Any:
        unit = 20_000 if layer.parameter_bytes else 1000

        def fixed(costs: Any) -> Any:
            known = {f.name: unit * times[f.name] for f in dataclasses.fields(costs) if f.name in times}
            return dataclasses.replace(costs, **known)

        options = {kind: tuple(map(fixed, getattr(layer, kind))) for kind in ("store", "moonwalk", "invert")}
        return dataclasses.replace(fixed(layer), **options)

    return dataclasses.replace(profile, layers=tuple(map(one, profile.layers)), first_touch_mib_ns=0)
