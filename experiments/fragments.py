"""Block recursion against halo against whole cotangents, for one-dimensional convolutions:
`python -m experiments.fragments`.

One convolution of three taps, stride 1, on signals of each length: each option's fragment as a fraction of
the layer's output, its local error and growth, and the time of the reverse sweep and of the rebuild over the
layer's plain forward, from interleaved rounds. Two kinds of weights: `dominant`, whose first tap is
orthogonal and the others small, so that substitution within a block is stable; and `ordinary`,
He-initialised, where it is not: the error then grows with the block. Writes results/fragments/: records.jsonl
(finished points; run again to go on), summary.json, a figure.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import rich.box
import seaborn as sns
from matplotlib.figure import Figure
from rich.table import Table

from experiments import record, sweep, vijp_cost
from mwplan import layers as ml
from mwplan.common.plots import png
from mwplan.common.serial import write_atomically
from mwplan.network import operator, rules
from mwplan.profiling import growth


@dataclass(frozen=True)
class Config:
    """Sizes: `samples` of a signal batch in all, so that every length is the same work."""

    lengths: tuple[int, ...] = (1024, 4096, 16384, 65536)
    weights: tuple[str, ...] = ("dominant", "ordinary")
    channels: int = 16
    samples: int = 131072
    rounds: int = 9
    seed: int = 0
    executor: str = "processes"
    workers: int = 1
    out: Path = record.RESULTS / "fragments"


def convolution(weights: str, channels: int, key: Any) -> ml.Conv1D:
    """Three taps that look at the present and the future, so that whole blocks are rebuilt from a few known
    positions."""
    first, rest = jax.random.split(key)
    if weights == "dominant":
        lead = jax.nn.initializers.orthogonal()(first, (1, channels, channels))
        others = 0.1 / math.sqrt(channels) * jax.random.normal(rest, (2, channels, channels))
        kernel = jnp.concatenate([lead, others])
    else:
        kernel = jax.random.normal(first, (3, channels, channels)) * math.sqrt(2 / (3 * channels))
    return ml.Conv1D(kernel, jnp.zeros((channels,)))


def measure(point: dict[str, Any]) -> dict[str, Any]:
    """Every option of one convolution at one length."""
    key = jax.random.key(point["seed"])
    layer = convolution(point["weights"], point["channels"], key)
    shape = (max(1, point["samples"] // point["length"]), point["length"], point["channels"])
    x = jax.random.normal(jax.random.fold_in(key, 1), shape)
    explained = operator.explain(layer, x)
    rows = []
    for rule in rules.vijp_rules(layer, x):
        if not isinstance(rule, rules.VijpRule):
            continue
        way = next(
            (w for w in explained.ways if w.option == rule.name and w.strategy in ("VIJP", "FRAGMENT")), None
        )
        local, grown = growth.measure(layer, rule, x, jax.random.fold_in(key, 2))
        times = vijp_cost.sample(vijp_cost.compiled(layer, rule, x, key), point["rounds"])
        plain = times["plain"]
        rows.append(
            {
                "option": rule.name,
                "fragment": ((way and way.fragment_bytes) or 0) / explained.output_bytes,
                "local_error": local if math.isfinite(local) else None,
                "growth": grown if math.isfinite(grown) else None,
                "plain_ns": statistics.median(plain),
                "reverse": statistics.median(a / b for a, b in zip(times["input_vjp"], plain)),
                "rebuild": statistics.median(a / b for a, b in zip(times["vijp"], plain)),
            }
        )
    return {"rows": rows}


def table(found: list[dict[str, Any]]) -> Table:
    """One line an option, weights and length."""
    made = Table(
        title="options of a convolution of three taps; times over its plain forward's", box=rich.box.SIMPLE
    )
    for name in ("weights", "length", "option", "fragment", "local error", "growth", "reverse", "rebuild"):
        made.add_column(name, justify="left" if name in ("weights", "option") else "right")

    def number(value: float | None) -> str:
        return "not finite" if value is None else f"{value:.1e}"

    for one in found:
        for row in one["rows"]:
            made.add_row(
                one["point"]["weights"],
                str(one["point"]["length"]),
                row["option"],
                f"{100 * row['fragment']:.2f}%",
                number(row["local_error"]),
                number(row["growth"]),
                f"{row['reverse']:.2f}",
                f"{row['rebuild']:.2f}",
            )
    return made


def draw(found: list[dict[str, Any]]) -> Figure:
    """Rebuild time and local error against the fragment's size: marks are options, colours lengths, columns
    weights."""
    sns.set_theme(style="whitegrid", context="paper")
    kinds = list(dict.fromkeys(one["point"]["weights"] for one in found))
    figure = Figure(figsize=(4.5 * len(kinds), 6.5), layout="constrained")
    grid = figure.subplots(2, len(kinds), squeeze=False, sharex=True)
    every = [row for one in found for row in one["rows"]]
    names = sorted(
        {row["option"] for row in every}, key=lambda n: -max(r["fragment"] for r in every if r["option"] == n)
    )
    marks = dict(zip(names, "os^DvPX*<>hpd" * 4))
    lengths = sorted({one["point"]["length"] for one in found})
    colors = dict(zip(lengths, sns.color_palette("viridis", len(lengths))))
    for column, kind in enumerate(kinds):
        for one in found:
            if one["point"]["weights"] != kind:
                continue
            for row in one["rows"]:
                style: dict[str, Any] = {
                    "marker": marks[row["option"]],
                    "ms": 5,
                    "ls": "",
                    "color": colors[one["point"]["length"]],
                }
                share = max(100 * row["fragment"], 1e-3)
                grid[0][column].plot([share], [row["rebuild"]], **style)
                if row["local_error"]:
                    grid[1][column].plot([share], [row["local_error"]], **style)
        grid[0][column].set(
            title=f"{kind} weights", ylabel="rebuild / plain forward", xscale="log", yscale="log"
        )
        grid[1][column].set(
            xlabel="fragment, % of the output", ylabel="local error", xscale="log", yscale="log"
        )
    for name in names:
        grid[0][-1].plot([], [], ls="", marker=marks[name], color="#555555", label=name)
    for length in lengths:
        grid[0][-1].plot([], [], lw=4, color=colors[length], label=f"length {length}")
    figure.legend(fontsize=7, loc="outside right center")
    return figure


def main(config: Config) -> None:
    """Runs what is missing, prints, draws and saves."""
    console = record.console()
    points = [
        {
            "weights": weights,
            "length": length,
            **{k: getattr(config, k) for k in ("channels", "samples", "rounds", "seed")},
        }
        for weights in config.weights
        for length in config.lengths
    ]
    found = sweep.run(
        points,
        measure,
        config.out / "records.jsonl",
        executor=config.executor,
        workers=config.workers,
        title="convolutions",
    )
    console.print(table(found))
    rows = [
        {**{k: one["point"][k] for k in ("weights", "length")}, **row} for one in found for row in one["rows"]
    ]
    record.save(config.out / "summary.json", {"config": sweep.plain(config), "rows": rows})
    write_atomically(config.out / "fragments.png", png(draw(found)))
    console.print(f"wrote {config.out}")


if __name__ == "__main__":
    main(sweep.parse(Config, __doc__))
