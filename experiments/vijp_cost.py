"""What each rule costs beside a forward pass: `python -m experiments.vijp_cost`.

For every layer and option: the time of forward, input vjp (with its fragment), parameter vjp and vijp, as
ratios to the plain forward of the same layer, and what is kept, as fractions of the output activation. Writes
results/vijp_cost/.
"""

from __future__ import annotations

import os  # before JAX: see below

# LAPACK's own threads fight with XLA's: a left inverse of 256 x 256 took 16 ms with two of them and 0.8 ms
# with one, on two cores.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import dataclasses
import statistics
import time
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
from mwplan import layers as ml
from mwplan.common import trees
from mwplan.network import operator, rules


@dataclass(frozen=True)
class Config:
    """Sizes and samples. `batch` examples; `width` features of dense layers, `channels` on `side` x `side`
    images."""

    batch: int = 1024
    width: int = 256
    channels: int = 32
    side: int = 16
    samples: int = 9
    seed: int = 0
    out: Path = record.RESULTS / "vijp_cost"


OPERATIONS = ("forward", "input_vjp", "parameter_vjp", "vijp")


def cases(config: Config) -> list[tuple[str, Any, tuple[int, ...]]]:
    """Name, layer, and shape of the input."""
    c, w, n = config.channels, config.width, config.side
    key = jax.random.key(config.seed)
    flat, image, line = (config.batch, w), (config.batch // 8, n, n, c), (config.batch // 8, n * n, c)
    shape = jax.ShapeDtypeStruct
    branch = ml.Sequential((ml.Dense.init(key, w // 2, w // 2), ml.Smooth("gelu")))
    return [
        ("Dense", ml.Dense.init(key, w, w), flat),
        ("Dense He", ml.Dense.he(key, w, w), flat),
        ("Dense wide", ml.Dense.init(key, w, 2 * w), flat),
        ("OrthogonalDense", ml.OrthogonalDense.init(key, w, w), flat),
        ("Conv1D k3", ml.Conv1D.he(key, c, c).with_basis(shape(line, jnp.float32)), line),
        ("Conv2D k3", ml.Conv2D.he(key, c, c).with_basis(shape(image, jnp.float32)), image),
        ("Conv2D k3 circular", ml.Conv2D.init(key, c, c, padding="CIRCULAR"), image),
        ("Conv2D k3 s2", ml.Conv2D.init(key, c, c, stride=2, padding=1), image),
        ("Conv2D k3 s2, twice the channels", ml.Conv2D.init(key, c, 2 * c, stride=2, padding=1), image),
        ("Conv2D 1x1", ml.Conv2D.init(key, c, c, 1), image),
        ("OrthogonalConv k3", ml.OrthogonalConv.init(key, c, c), image),
        ("LeakyReLU", ml.LeakyReLU(0.5), image),
        ("Smooth gelu 0.3", ml.Smooth("gelu", 0.3), image),
        ("MaxMin", ml.MaxMin(), image),
        ("GroupSort 4", ml.GroupSort(4), image),
        ("ReLU", ml.ReLU(), image),
        ("MaxPool", ml.MaxPool((2, 2)), image),
        ("AveragePool", ml.AveragePool((2, 2)), image),
        ("LayerNorm", ml.LayerNorm.init(None, w), flat),
        ("RMSNorm", ml.RMSNorm.init(None, w), flat),
        ("Coupling", ml.Coupling(branch, branch), flat),
        (
            "Residual",
            ml.Residual(ml.Sequential((ml.Dense(0.01 * jax.random.normal(key, (w, w))), ml.Smooth("tanh")))),
            flat,
        ),
        ("SpaceToDepth", ml.SpaceToDepth((2, 2)), image),
    ]


def compiled(layer: Any, rule: rules.VijpRule, x: Any, key: Any) -> dict[str, Callable[[], Any]]:
    """Each operation, compiled and warm, ready to be called."""
    forward = jax.jit(rule.forward)
    y, kept = forward(layer, x)
    ct_out = jax.random.normal(key, y.shape, trees.working_dtype(y.dtype))
    reverse = jax.jit(rule.reverse)
    ct_in, fragment = reverse(layer, kept, ct_out)
    gradient, rebuild, plain = (
        jax.jit(rules.parameter_gradient),
        jax.jit(rule.rebuild),
        jax.jit(lambda one, x: one(x)),
    )
    made: dict[str, Callable[[], Any]] = {
        "plain": lambda: plain(layer, x),
        "forward": lambda: forward(layer, x),
        "input_vjp": lambda: reverse(layer, kept, ct_out),
        "vijp": lambda: rebuild(layer, x, ct_in, fragment),
    }
    if trees.parameters(layer):
        made["parameter_vjp"] = lambda: gradient(layer, x, ct_out)
    for call in made.values():
        jax.block_until_ready(call())
    return made


def sample(calls: dict[str, Callable[[], Any]], samples: int) -> dict[str, list[int]]:
    """Nanoseconds of each call, interleaved."""
    times: dict[str, list[int]] = {name: [] for name in calls}
    for _ in range(samples):
        for name, call in calls.items():
            start = time.perf_counter_ns()
            jax.block_until_ready(call())
            times[name].append(time.perf_counter_ns() - start)
    return times


def main(config: Config) -> None:
    """Measures, prints and saves."""
    console = record.console()
    rows: list[dict[str, Any]] = []
    every = [
        (name, layer, shape, rule)
        for name, layer, shape in cases(config)
        for rule in rules.vijp_rules(layer, jax.ShapeDtypeStruct(shape, jnp.float32))
        if isinstance(rule, rules.VijpRule) and "+refine" not in rule.name
    ]
    for name, layer, shape, rule in track(every, description="measuring", console=console):
        x = jax.random.normal(jax.random.key(config.seed + 1), shape)
        times = sample(compiled(layer, rule, x, jax.random.key(config.seed + 2)), config.samples)
        explained = operator.explain(layer, jax.ShapeDtypeStruct(shape, jnp.float32))
        way = next(w for w in explained.ways if w.strategy in ("VIJP", "FRAGMENT") and w.option == rule.name)
        rows.append(
            {
                "layer": name,
                "option": rule.name,
                "nanoseconds": times,
                "output_bytes": explained.output_bytes,
                "residual_bytes": way.residual_bytes,
                "fragment_bytes": way.fragment_bytes,
                "shares": way.shares,
            }
        )
    settings = {
        k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(config).items() if k != "out"
    }
    record.save(config.out / "vijp_cost.json", {"config": settings, "rows": rows})
    console.print(table(rows))
    draw(rows).savefig(config.out / "vijp_cost.png", dpi=150)
    console.print(f"wrote {config.out}/vijp_cost.json and .png")


def ratio(row: dict[str, Any], operation: str) -> float | None:
    """Median time of an operation over that of the plain forward, or None where there is none."""
    times = row["nanoseconds"]
    return (
        statistics.median(times[operation]) / statistics.median(times["plain"])
        if operation in times
        else None
    )


def table(rows: list[dict[str, Any]]) -> Table:
    """One line an option."""
    made = Table(
        title="time over that of the layer's plain forward; bytes over its output", box=rich.box.SIMPLE
    )
    made.add_column("layer")
    made.add_column("option")
    for column in ("plain µs", *(o.replace("_", " ") for o in OPERATIONS), "residuals", "fragment"):
        made.add_column(column, justify="right")
    made.add_column("shares")
    for row in rows:
        ratios = [ratio(row, o) for o in OPERATIONS]
        kept = [f"{100 * row[k] / row['output_bytes']:.1f}%" for k in ("residual_bytes", "fragment_bytes")]
        made.add_row(
            row["layer"], row["option"], f"{statistics.median(row['nanoseconds']['plain']) / 1e3:.0f}",
            *("" if r is None else f"{r:.2f}" for r in ratios), *kept, row["shares"],
        )  # fmt: skip
    return made


def draw(rows: list[dict[str, Any]]) -> Figure:
    """Time of the vijp against the bytes that are kept for it."""
    figure = Figure(figsize=(9, 0.2 * len(rows) + 1), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    labels = [f"{row['layer']}: {row['option']}" for row in rows]
    at = range(len(rows))
    left.barh(at, [ratio(row, "vijp") for row in rows], color="#2a6f97")
    left.set(xlabel="vijp time / forward time", xscale="log")
    left.set_yticks(at, labels, fontsize=6)
    left.axvline(1, color="#555555", linewidth=0.8)
    residual = [100 * row["residual_bytes"] / row["output_bytes"] for row in rows]
    right.barh(at, residual, color="#a9d6e5", label="input residuals")
    right.barh(
        at,
        [100 * row["fragment_bytes"] / row["output_bytes"] for row in rows],
        left=residual,
        color="#e9c46a",
        label="fragment",
    )
    right.set(xlabel="kept, % of the output activation")
    right.legend(fontsize=7)
    right.invert_yaxis()
    return figure


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for field in dataclasses.fields(Config):
        kind = Path if field.name == "out" else int
        parser.add_argument(f"--{field.name}", type=kind, default=field.default)
    main(Config(**vars(parser.parse_args())))
