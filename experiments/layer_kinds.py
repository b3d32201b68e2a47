"""Predicted and compiled temporaries for the layers that people write: `python -m experiments.prediction
--layers`, for a device that is not here with `--target h200`.

One chain of eight layers a kind, most of them products and that kind in turn, at activations of 4 MiB. Three
schedules of each: everything stored, half of that, and the least of all, as `mw.plan` makes them, compiled as
single steps (no `mw.fit`). Nothing is run for a target. Writes results/prediction/layers.jsonl."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.table import Table

import mwplan as mw
from experiments import record, sweep
from mwplan import layers as L
from mwplan import targets
from mwplan.network.layer import layer, static
from mwplan.planning.schedules import baseline_schedules
from mwplan.plans.schedule import Schedule, Strategy

WIDTH, BATCH, TIME, HEADS = 128, 64, 128, 4
X = jax.ShapeDtypeStruct((BATCH, TIME, WIDTH), jnp.float32)
IMAGES = jax.ShapeDtypeStruct((BATCH, 16, 16, 64), jnp.float32)
NODES = jax.ShapeDtypeStruct((BATCH * TIME, WIDTH), jnp.float32)
TOKENS = jax.ShapeDtypeStruct((BATCH, TIME), jnp.int32)


@layer
class Weighted:
    """`function(weights, x)`: a layer of one's own."""

    weights: Any
    function: Callable[[Any, Any], Any] = static()

    def __call__(self, x: Any) -> Any:
        """Applies the function."""
        return self.function(self.weights, x)


def normal(key: Any, *shape: int) -> Any:
    """Weights of about unit gain."""
    return jax.random.normal(key, shape) / math.sqrt(math.prod(shape[:-1]))


def attention(weights: Any, x: Any) -> Any:
    """Self-attention of `HEADS` heads, without a library."""
    inward, outward = weights
    batch, time, width = x.shape
    q, k, v = (
        one.reshape(batch, time, HEADS, -1).transpose(0, 2, 1, 3) for one in jnp.split(x @ inward, 3, axis=-1)
    )
    scores = q @ k.swapaxes(-1, -2) / math.sqrt(width / HEADS)
    mixed = jax.nn.softmax(scores, axis=-1) @ v
    return mixed.transpose(0, 2, 1, 3).reshape(batch, time, width) @ outward


def lstm(weights: Any, x: Any) -> Any:
    """An LSTM over the time axis, a `lax.scan`."""
    inward, recurrent, bias = weights

    def cell(state: Any, x: Any) -> Any:
        h, c = state
        i, f, g, o = jnp.split(x @ inward + h @ recurrent + bias, 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    zeros = jnp.zeros((x.shape[0], x.shape[-1]), x.dtype)
    return jax.lax.scan(cell, (zeros, zeros), x.swapaxes(0, 1))[1].swapaxes(0, 1)


def convolved(weights: Any, x: Any) -> Any:
    """A convolution with a bias."""
    kernel, bias = weights
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers) + bias


def largest(x: Any) -> Any:
    """Keeps the 16 largest of each row."""
    return x * (x >= jax.lax.top_k(x, 16)[0][..., -1:])


def top_values(x: Any) -> Any:
    """The rows' halves of largest values and where they were, as wide as before."""
    values, index = jax.lax.top_k(x, x.shape[-1] // 2)
    return jnp.concatenate([values, values * jnp.cos(index)], axis=-1)


def messages(x: Any) -> Any:
    """A step of message passing: every node adds what its neighbours send."""
    count = x.shape[0]
    source, target = jnp.arange(2 * count) % count, (jnp.arange(2 * count) * 7 + 3) % count
    return jax.ops.segment_sum(jnp.tanh(x[source]), target, count)


def normed(weights: Any, x: Any) -> Any:
    """A layer norm, written by hand."""
    scale, shift = weights
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(variance + 1e-5) * scale + shift


def root_normed(scale: Any, x: Any) -> Any:
    """An RMS norm, written by hand."""
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale


def pooled(x: Any) -> Any:
    """The mean and the largest of 3x3 neighbours."""
    window, ones = (1, 3, 3, 1), (1, 1, 1, 1)
    mean = jax.lax.reduce_window(x, 0.0, jax.lax.add, window, ones, "SAME") / 9
    return mean + jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, ones, "SAME")


#: functions without weights, each between two products
FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
    "softmax": jax.nn.softmax,
    "top_k mask": largest,
    "top_k values": top_values,
    "gather": lambda x: jnp.tanh(x[..., (jnp.arange(WIDTH) * 5) % WIDTH]),
    "zeros.at.set": lambda x: jnp.zeros_like(x).at[..., jnp.arange(0, WIDTH, 2)].set(jnp.tanh(x[..., ::2])),
    "x.at.set": lambda x: x.at[..., jnp.arange(0, WIDTH, 2)].set(jnp.tanh(x[..., 1::2])),
    "x.at.add": lambda x: x.at[..., jnp.arange(0, WIDTH, 2)].add(jnp.tanh(x[..., 1::2])),
    "take_along_axis": lambda x: jnp.take_along_axis(jnp.tanh(x), jnp.argsort(x, axis=-1), axis=-1),
    "sort": lambda x: jnp.sort(x, axis=-1),
    "cumsum": lambda x: jnp.cumsum(jnp.tanh(x), axis=1) / TIME,
    "map": lambda x: jax.lax.map(lambda row: jnp.tanh(row) * row.mean(), x),
}

#: layers with weights, four of them between products
LAYERS: dict[str, Callable[[Any], Any]] = {
    "layer norm": lambda key: Weighted((jnp.ones(WIDTH), jnp.zeros(WIDTH)), normed),
    "mw LayerNorm": lambda key: L.LayerNorm.init(key, WIDTH),
    "rms norm": lambda key: Weighted(jnp.ones(WIDTH), root_normed),
    "glu": lambda key: Weighted(normal(key, WIDTH, 2 * WIDTH), lambda w, x: jax.nn.glu(x @ w)),
    "residual tanh": lambda key: Weighted(normal(key, WIDTH, WIDTH), lambda w, x: x + jnp.tanh(x @ w)),
    "mlp block": lambda key: Weighted(
        (normal(key, WIDTH, 4 * WIDTH), normal(key, 4 * WIDTH, WIDTH)),
        lambda w, x: x + jax.nn.gelu(x @ w[0]) @ w[1],
    ),
    "attention": lambda key: Weighted((normal(key, WIDTH, 3 * WIDTH), normal(key, WIDTH, WIDTH)), attention),
    "lstm": lambda key: Weighted(
        (normal(key, WIDTH, 4 * WIDTH), normal(key, WIDTH, 4 * WIDTH), jnp.zeros(4 * WIDTH)), lstm
    ),
    "map of products": lambda key: Weighted(
        normal(key, WIDTH, WIDTH), lambda w, x: jax.lax.map(lambda row: jnp.tanh(row @ w), x)
    ),
}

#: whole chains
CHAINS: dict[str, tuple[Callable[[Any], list[Any]], Any]] = {
    "convolution, bias": (
        lambda keys: [
            one
            for key in keys[:4]
            for one in (Weighted((normal(key, 3, 3, 64, 64), jnp.zeros(64)), convolved), jax.nn.relu)
        ],
        IMAGES,
    ),
    "pooling": (
        lambda keys: [one for key in keys[:4] for one in (L.Dense.init(key, 64, 64), pooled)],
        IMAGES,
    ),
    "embedding": (
        lambda keys: [
            Weighted(normal(keys[0], 512, WIDTH), lambda table, tokens: table[tokens]),
            *(one for key in keys[1:5] for one in (L.Dense.init(key, WIDTH, WIDTH), jnp.tanh)),
        ],
        TOKENS,
    ),
    "segment_sum": (
        lambda keys: [one for key in keys[:4] for one in (L.Dense.init(key, WIDTH, WIDTH), messages)],
        NODES,
    ),
}
KINDS = (*FUNCTIONS, *LAYERS, *CHAINS)
SHARES = {"everything stored": 1.0, "half": 0.5, "least": 0.0}


def network(kind: str, key: Any) -> mw.Chain:
    """The chain of a kind."""
    keys = jax.random.split(key, 8)
    if kind in CHAINS:
        return mw.Chain(CHAINS[kind][0](keys))
    made = []
    for product, own in zip(keys[:4], keys[4:]):
        made += [
            L.Dense.init(product, WIDTH, WIDTH),
            LAYERS[kind](own) if kind in LAYERS else FUNCTIONS[kind],
        ]
    return mw.Chain(made)


def input_of(kind: str) -> jax.ShapeDtypeStruct:
    """The shape that the chain takes."""
    return CHAINS[kind][1] if kind in CHAINS else X


def loss(y: Any) -> Any:
    """Its gradient needs nothing beside the output and the cotangent."""
    return jnp.mean(y**2)


def scheduled(profile: mw.Profile) -> dict[str, Schedule]:
    """The schedules that are compared, by name: those of half and of the least without the store-all one."""
    allowed = frozenset(Strategy)
    stored = baseline_schedules(profile, max_error=1e-4, allowed=allowed)[0]
    frontier = mw.frontier(profile)
    assert frontier.least_bytes is not None
    least = frontier.least_bytes
    half = max(least, profile.fixed_bytes + stored.peak_bytes // 2)
    return {"everything stored": stored, "half": frontier.at(half), "least": frontier.at(least)}


def measure(point: dict[str, Any]) -> dict[str, Any]:
    """One kind, on this device or for a target."""
    kind, target = point["kind"], point["target"]
    make, shape = functools.partial(network, kind), input_of(kind)
    x: Any = shape
    if target:
        chain: Any = jax.eval_shape(make, jax.random.key(0))
        profile = mw.estimate(chain, x, device=target)
    else:
        chain = make(jax.random.key(0))
        whole = shape.dtype == jnp.int32
        x = (
            jnp.zeros(shape.shape, shape.dtype)
            if whole
            else jax.random.normal(jax.random.key(1), shape.shape)
        )
        profile = mw.profile(chain, x, repeats=1)
    rows = {}
    for name, schedule in scheduled(profile).items():
        step = mw.value_and_grad(loss, schedule)
        compiled = (
            targets.compile(step, chain, x, target=target).temporary_bytes
            if target
            else mw.temporaries(mw.jit(step).lower(chain, x).compile())
        )
        rows[name] = {
            "runs": str(schedule).splitlines()[1].strip(),
            "predicted": schedule.peak_bytes,
            "foreseen": max(schedule.packed_bytes, schedule.peak_bytes),
            "compiled": compiled,
        }
    return {"activation_bytes": max(profile.activation_bytes), "rows": rows, "source": profile.source}


def table(found: list[dict[str, Any]]) -> Table:
    """How far each kind's schedules are off, the worst first."""
    shown = Table("kind", *SHARES, title="compiled / predicted temporaries", title_justify="left")

    def off(one: dict[str, Any]) -> float:
        return max(abs(row["compiled"] / row["predicted"] - 1) for row in one["rows"].values())

    for one in sorted(found, key=off, reverse=True):
        cells = [
            f"{row['compiled'] / 2**20:.1f} / {row['predicted'] / 2**20:.1f} MiB"
            f" {row['compiled'] / row['predicted'] - 1:+.1%}  {row['runs']}"
            for row in one["rows"].values()
        ]
        shown.add_row(one["point"]["kind"], *cells)
    return shown


def main(kinds: tuple[str, ...], target: str, path: Path, *, executor: str, workers: int) -> None:
    """Computes what is missing of `kinds` (none: all) for `target` ("": this device), and prints it."""
    points = [{"kind": kind, "target": target} for kind in kinds or KINDS]
    found = sweep.run(points, measure, path, executor=executor, workers=workers, title="kinds")
    console = record.console()
    console.print(table(found))
    console.print(f"wrote {path}")
