"""Error against depth, without restarts: `python -m experiments.growth`.

Five studies, each one run in float32 over the whole chain, written to results/growth/:

- `orthogonal`: MaxMin with orthogonal convolutions, depth 512;
- `unsafe`: leaky ReLU of slope 0.3 with orthogonal dense layers, depth 64, no fragments;
- `ordinary`: a He-initialised MLP (width 256, slope 0.8, depth 256, 30% fragments), and a He-initialised SAME
  convolutional chain (slope 0.8, depth 64, the smallest fraction whose measured growth keeps the predicted
  error within the tolerance);
- `training`: how the MLP's error grows over 200 steps of SGD with momentum, at two learning rates, with its
  initial basis and with a refresh every 50, with 30% and with 50% fragments;
- `library`: predicted and measured errors of every family of layers and every option that carries an error
  from layer to layer, in moonwalk runs of 8, 16, 32 and 64 layers, and of every inverse in INVERT runs of
  those lengths. Predictions are made as for a plan: errors are measured at white cotangents, for up to 8 of
  the layers that are alike, and the largest counts for all.

A depth counts layers with parameters; each is followed by its activation.
"""

from __future__ import annotations

import os  # before JAX: LAPACK's own threads fight with XLA's

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import rich.box
from matplotlib.figure import Figure
from rich.progress import track
from rich.table import Table

from experiments import record
from experiments.families import Family, families
from mwplan import layers as ml
from mwplan.network import rules
from mwplan.profiling import growth, visiting

TOLERANCE = 1e-4


@dataclass(frozen=True)
class Config:
    """Sizes of the studies."""

    width: int = 256
    batch: int = 128
    depth: int = 256
    conv_depth: int = 64
    channels: int = 32
    length: int = 64
    orthogonal_depth: int = 512
    steps: int = 200
    every: int = 25
    refresh: int = 50
    seed: int = 0
    out: Path = record.RESULTS / "growth"


def options(layers: list[Any], x: Any, prefer: str | None) -> list[rules.VijpRule]:
    """Each layer's option `prefer`, or its first."""
    chosen = []
    for one in layers:
        own = [r for r in rules.vijp_rules(one, x) if isinstance(r, rules.VijpRule)]
        chosen.append(next((r for r in own if r.name == prefer), own[0]))
        x = jax.eval_shape(one, x)
    return chosen


def follow(name: str, layers: list[Any], x: Any, prefer: str | None, key: Any) -> dict[str, Any]:
    """One run followed, as plain values."""
    got = growth.follow(layers, options(layers, x, prefer), x, None, key)
    return {
        "name": name,
        "option": prefer or "first",
        "layers": len(layers),
        "growth": max(got.growth),
        "predicted_error": max(got.predicted),
        "measured_error": max(got.measured),
        "gradient_error": got.gradient,
        "worst_gradient_error": got.worst_gradient,
        "predicted": got.predicted,
        "measured": got.measured,
    }


def chain(block: Callable[[Any], list[Any]], depth: int, key: Any) -> list[Any]:
    """`depth` blocks with keys of their own."""
    return [one for k in jax.random.split(key, depth) for one in block(k)]


def mlp(config: Config) -> tuple[list[Any], Any]:
    """The He-initialised MLP and its input."""
    key = jax.random.key(config.seed)
    layers = chain(
        lambda k: [ml.Dense.he(k, config.width, config.width, slope=0.8), ml.LeakyReLU(0.8)],
        config.depth,
        key,
    )
    return layers, jax.random.normal(jax.random.key(config.seed + 1), (config.batch, config.width))


def orthogonal(config: Config) -> list[dict[str, Any]]:
    """MaxMin with orthogonal convolutions."""
    x = jax.random.normal(jax.random.key(config.seed + 1), (4, 8, 8, 16))
    key = jax.random.key(config.seed)
    made = []
    blocks: dict[str, Callable[[Any], list[Any]]] = {
        "MaxMin, Cayley convolutions": lambda k: [ml.OrthogonalConv.init(k, 16, 16), ml.MaxMin()],
        "MaxMin, delta-orthogonal SAME convolutions": lambda k: [ml.Conv2D.init(k, 16, 16), ml.MaxMin()],
    }
    for name, block in blocks.items():
        made.append(follow(name, chain(block, config.orthogonal_depth, key), x, None, key))
    return made


def unsafe(config: Config) -> list[dict[str, Any]]:
    """Slope 0.3 without fragments."""
    key = jax.random.key(config.seed)
    x = jax.random.normal(jax.random.key(config.seed + 1), (config.batch, config.width))
    layers = chain(lambda k: [ml.Dense.init(k, config.width, config.width), ml.LeakyReLU(0.3)], 64, key)
    return [follow("slope 0.3, orthogonal dense, no fragments", layers, x, None, key)]


def ordinary(config: Config) -> list[dict[str, Any]]:
    """He-initialised networks."""
    key = jax.random.key(config.seed)
    layers, x = mlp(config)
    made = [follow("He MLP, slope 0.8", layers, x, "cokernel_30", key)]
    image = jax.random.normal(key, (8, config.length, config.channels))
    block = functools.partial(_conv_block, config, jax.ShapeDtypeStruct(image.shape, image.dtype))
    layers = chain(block, config.conv_depth, key)
    for option in ("cokernel_10", "cokernel_20", "cokernel_30", "cokernel_50"):
        errors = [
            growth.measure(one, rule, image, key)
            for one, rule in zip(layers[:2], options(layers[:2], image, option))
        ]
        if growth.predict(errors * config.conv_depth)[-1] < TOLERANCE:
            made.append(follow("He SAME convolutions, slope 0.8", layers, image, option, key))
            break
    return made


def _conv_block(config: Config, struct: Any, key: Any) -> list[Any]:
    made = ml.Conv1D.he(key, config.channels, config.channels, slope=0.8).with_basis(struct)
    return [made, ml.LeakyReLU(0.8)]


def training(config: Config) -> list[dict[str, Any]]:
    """The MLP's run, before and while it learns a fixed random target by SGD with momentum."""
    layers, x = mlp(config)
    target = jax.random.normal(jax.random.key(config.seed + 2), x.shape)

    def loss(layers: list[Any]) -> Any:
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers[::2])

        def body(carry: Any, one: Any) -> Any:
            return jax.checkpoint(lambda c, d: layers[1](d(c)))(carry, one), None

        y, _ = jax.lax.scan(body, x, stacked)
        # Activations of a deep He network have unit scale to a factor: the loss is taken of the normalised
        # output.
        return jnp.mean((y / jnp.sqrt(jnp.mean(y**2)) - target) ** 2)

    @jax.jit
    def step(layers: list[Any], momentum: list[Any], rate: float) -> Any:
        value, grads = jax.value_and_grad(loss)(layers)
        size = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(grads)))
        momentum = jax.tree.map(lambda m, g: 0.9 * m + g * jnp.minimum(1.0, 1.0 / size), momentum, grads)
        return jax.tree.map(lambda p, m: p - rate * m, layers, momentum), momentum, value

    made = []
    for rate in (0.05, 0.005):
        for refresh in (0, config.refresh):
            now, momentum = layers, jax.tree.map(jnp.zeros_like, layers)
            for at in range(config.steps + 1):
                if refresh and at and at % refresh == 0:
                    now = ml.refresh(now)
                if at % config.every == 0:
                    moved = [
                        jnp.linalg.norm(a.weight - b.weight) / jnp.linalg.norm(b.weight)
                        for a, b in zip(now[::2], layers[::2])
                    ]
                    extra = {
                        "rate": rate,
                        "step": at,
                        "refresh": refresh,
                        "loss": float(loss(now)),
                        "moved": float(max(moved)),
                    }
                    for option in ("cokernel_30", "cokernel_50"):
                        row = follow("He MLP", now, x, option, jax.random.key(config.seed)) | extra
                        made.append({k: v for k, v in row.items() if k not in ("predicted", "measured")})
                now, momentum, _ = step(now, momentum, rate)
    return made


def library(config: Config) -> list[dict[str, Any]]:
    """Predicted and measured errors of every family, in runs of 8 to 64 layers."""
    made = []
    for name, family in track(families().items(), "library"):
        for layers in (8, 16, 32, 64):
            made.append(one_run(name, family, layers, config.seed))
    return made


def one_run(name: str, family: Family, count: int, seed: int = 0) -> dict[str, Any]:
    """A run of `count` layers, predicted as for a plan, and measured. The last block may be cut."""
    size = len(family.block(jax.random.key(seed)))
    blocks = max(1, count // size)
    layers = chain(family.block, blocks, jax.random.key(seed))
    x = jax.random.normal(jax.random.key(seed + 1), family.shape)
    keys, at = [i % size for i in range(len(layers))], x
    sampled = visiting.spread(list(keys), visiting.GROWTH_SAMPLES)
    rules_: list[Any] = []
    errors: list[list[tuple[float, ...]]] = [[] for _ in range(size)]
    key = jax.random.key(seed + 2)
    forward = jax.jit(lambda one, x: one(x))
    for i, one in enumerate(layers):
        if family.inverse:
            offered = [r for r in rules.invert_rules(one, at) if isinstance(r, rules.InvertRule)]
            rules_.append(next((r for r in offered if r.name == family.option), offered[-1]))
        else:
            rules_ += options([one], at, family.option)
        if i in sampled:
            test = growth.measure_inverse if family.inverse else growth.measure
            errors[keys[i]].append(test(one, rules_[-1], at, jax.random.fold_in(key, i)))
        at = forward(one, at)
    shared: list[Any] = [tuple(map(max, *e, e[0])) for e in errors]
    if family.inverse:
        growths = [growth.steady([e[1] for e in seen], blocks / len(seen)) for seen in errors]
        shared = [growth.InverseErrors(e[0], g, *e[2:]) for e, g in zip(shared, growths)]
        found = growth.follow_inverse(layers, rules_, x, None, key)
        predicted = growth.predict_inverse([shared[k] for k in keys])
        measured, gradient = max(found.activation, found.worst_gradient, found.cotangent), found.gradient
    else:
        followed = growth.follow(layers, rules_, x, None, key)
        predicted = max(growth.predict([shared[k] for k in keys]))
        measured, gradient = max(followed.measured), followed.gradient
    return {
        "name": name,
        "layers": len(layers),
        "growth": max(e[1] for e in shared),
        "predicted_error": predicted,
        "measured_error": measured,
        "gradient_error": gradient,
        "ratio": predicted / measured if measured else 1.0,
    }


STUDIES = {
    "orthogonal": orthogonal,
    "unsafe": unsafe,
    "ordinary": ordinary,
    "training": training,
    "library": library,
}


def main(config: Config, studies: list[str]) -> None:
    """Runs the studies, prints and saves."""
    console = record.console()
    for name in studies:
        with console.status(name):
            rows = STUDIES[name](config)
        settings = {k: v for k, v in dataclasses.asdict(config).items() if k != "out"}
        record.save(config.out / f"{name}.json", {"config": settings, "rows": rows})
        console.print(table(name, rows))
        draw(name, rows).savefig(config.out / f"{name}.png", dpi=150)
    console.print(f"wrote {config.out}")


def table(name: str, rows: list[dict[str, Any]]) -> Table:
    """One line a run."""
    made = Table(title=name, box=rich.box.SIMPLE)
    columns = [
        "name",
        "option",
        "layers",
        "growth",
        "predicted_error",
        "measured_error",
        "gradient_error",
        "worst_gradient_error",
    ]
    columns += ["rate", "step", "refresh", "loss", "moved", "ratio"]
    columns = [c for c in columns if c in rows[0]]
    for column in columns:
        made.add_column(column.replace("_", " "))
    for row in rows:
        made.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in (row[c] for c in columns)))
    return made


def draw(name: str, rows: list[dict[str, Any]]) -> Figure:
    """Errors against depth, predicted and measured; for training, against steps."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    ax = figure.subplots()
    if name == "training":
        runs = sorted({(row["rate"], row["option"], row["refresh"]) for row in rows})
        for rate, option, refresh in runs:
            mine = [
                row for row in rows if (row["rate"], row["option"], row["refresh"]) == (rate, option, refresh)
            ]
            label = f"rate {rate}, {option}, " + (f"refresh every {refresh}" if refresh else "initial basis")
            ax.plot(
                [r["step"] for r in mine],
                [r["worst_gradient_error"] for r in mine],
                "--" if refresh else "-",
                label=label,
            )
        ax.set(xlabel="training step", ylabel="worst relative error of a layer's gradient", yscale="log")
    elif name == "library":
        return _ratios(figure, ax, rows)
    else:
        for row in rows:
            at = range(1, len(row["measured"]) + 1)
            (line,) = ax.plot(
                at, [e or math.nan for e in row["measured"]], label=f"{row['name']} ({row['option']})"
            )
            ax.plot(
                at, [e or math.nan for e in row["predicted"]], ":", color=line.get_color(), label="predicted"
            )
        ax.set(
            xlabel="layers of the run, activations counted",
            ylabel="relative error of the cotangent",
            yscale="log",
        )
    ax.axhline(TOLERANCE, color="#555555", linewidth=0.8)
    ax.legend(fontsize=7)
    return figure


def _ratios(figure: Figure, ax: Any, rows: list[dict[str, Any]]) -> Figure:
    """Predicted over measured, a row a family, a mark a run."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    figure.set_size_inches(7, 0.17 * len(names) + 1)
    lengths = sorted({min((8, 16, 32, 64), key=lambda n: abs(n - row["layers"])) for row in rows})
    for n, mark, shade in zip(lengths, "osD^", ("#9ecae1", "#6baed6", "#3182bd", "#08306b")):
        mine = [row for row in rows if min(lengths, key=lambda m: abs(m - row["layers"])) == n]
        ax.plot(
            [r["ratio"] for r in mine],
            [names.index(r["name"]) for r in mine],
            mark,
            color=shade,
            markersize=4,
            label=f"{n} layers",
        )
    for at, style in ((0.5, ":"), (1, "-"), (2, ":")):
        ax.axvline(at, color="#555555", linewidth=0.8, linestyle=style, zorder=0)
    ax.set_yticks(range(len(names)), names, fontsize=6)
    ax.set_ylim(len(names), -1)
    ax.set(xlabel="predicted error / measured error", xscale="log")
    ax.legend(fontsize=7)
    return figure


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "studies", nargs="*", default=list(STUDIES), help=f"some of {', '.join(STUDIES)}; all by default"
    )
    for field in dataclasses.fields(Config):
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    args = vars(parser.parse_args())
    main(Config(**{k: v for k, v in args.items() if k != "studies"}), args["studies"])
