"""Estimated against measured profiles of this CPU: `python -m experiments.estimate`.

Small networks of every family are profiled twice: by `mw.profile`, and by `mw.estimate` for a `mw.Device`
described by the sustained rates of this machine (a large product, a large sum, many small products). Compared
are:

- bytes that must be equal; workspaces, relative to the layer's activations; ratios of times;
- at several budgets, the plan made from the estimate, replayed on the measured profile, with the plan made
  from the measured profile.

The findings about the model of programs hold for other devices. How far those stay below their published
rates is not measured here. Writes results/estimate/.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import rich.box
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import mwplan as mw
from experiments import record, sweep, zoo
from mwplan.common.plots import png
from mwplan.common.serial import write_atomically
from mwplan.plans.profiles import LayerProfile


@dataclass(frozen=True)
class Config:
    """Sizes. `budgets`: fractions of the way from the least feasible temporaries to the fastest schedule's,
    both of the measured profile."""

    models: tuple[str, ...] = ("strided", "resnet", "revnet", "mlp", "gpt")
    depth: int = 4
    width: int = 64
    batch: int = 64
    resolution: int = 32
    budgets: tuple[float, ...] = (0.1, 0.3, 0.6, 1.0)
    repeats: int = 3
    max_error: float = 1e-4
    seed: int = 0
    out: Path = record.RESULTS / "estimate"


def seconds(call: Callable[[], Any], rounds: int = 9) -> float:
    """Median time of a call after a warm-up."""
    jax.block_until_ready(call())
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(call())
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def here() -> mw.Device:
    """This machine by its sustained rates: a product of 2048 x 2048, a sum of two arrays of 64 MiB, products
    of 4 x 4 in a row."""
    n = 2048
    square, large, small = jnp.ones((n, n)), jnp.ones((2**24,)), jnp.eye(4)
    product = jax.jit(lambda a: a @ a)
    flop = 2 * n**3 / seconds(lambda: product(square))
    # Writing the result to memory that is touched for the first time costs what a program that reuses its
    # memory does not pay: donated, the result lies over an operand.
    into = jax.jit(lambda a, b: a + b, donate_argnums=0)
    state = [jnp.zeros_like(large)]

    def accumulate() -> Any:
        state[0] = into(state[0], large)
        return state[0]

    traffic = 3 * large.nbytes / seconds(accumulate)
    few, many = (jax.jit(lambda a, k=k: functools.reduce(lambda b, _: a @ b, range(k), a)) for k in (8, 264))
    launch = 1e9 * (seconds(lambda: many(small), 101) - seconds(lambda: few(small), 101)) / 256
    return mw.Device(
        name="here",
        half_flop_per_s=flop,
        tf32_flop_per_s=flop,
        float32_flop_per_s=flop,
        float64_flop_per_s=flop / 2,
        bytes_per_s=traffic,
        launch_ns=max(0.0, launch),
        memory_bytes=2**33,
    )


def pairs(estimated: mw.Profile, measured: mw.Profile) -> Iterator[dict[str, Any]]:
    """Every figure of every distinct layer's options, estimated and measured; `activation`: bytes of the
    layer's input and output."""
    seen = set()
    for i, (a, b) in enumerate(zip(estimated.layers, measured.layers, strict=True)):
        activation = sum(measured.activation_bytes[i : i + 2])
        if (b, activation) in seen:
            continue
        seen.add((b, activation))
        for where, one, other in options(a, b):
            for field in dataclasses.fields(one):
                if field.name.endswith(("_bytes", "_ns")):
                    got, want = getattr(one, field.name), getattr(other, field.name)
                    yield {
                        "layer": b.name,
                        "option": where,
                        "field": field.name,
                        "estimated": got,
                        "measured": want,
                        "activation": activation,
                    }


def options(a: LayerProfile, b: LayerProfile) -> Iterator[tuple[str, Any, Any]]:
    """The options that both have."""
    for kind in ("store", "moonwalk", "invert"):
        others = {o.name: o for o in getattr(b, kind)}
        for one in getattr(a, kind):
            if one.name in others:
                yield f"{kind} {one.name}", one, others[one.name]


def transfer(config: Config, estimated: mw.Profile, measured: mw.Profile) -> Iterator[dict[str, Any]]:
    """Plans from the estimate, replayed on the measured profile, beside the plans from that: peak over the
    budget, and time over the best."""
    best = mw.frontier(measured, max_error=config.max_error)
    guess = mw.frontier(estimated, max_error=config.max_error)
    low, high = best.least_bytes or 0, best.points[-1][0]
    for fraction in config.budgets:
        total = int(low + fraction * (high - low))
        row: dict[str, Any] = {"fraction": fraction, "room": total - measured.fixed_bytes}
        want = best.at(total)
        row["best_ns"] = want.time_ns
        try:
            schedule = guess.at(total)
        except mw.InfeasibleError:
            yield row | {"ns": None, "peak": None}
            continue
        replay = mw.replay(measured, schedule.runs)
        yield row | {
            "ns": replay.time_ns,
            "peak": replay.peak_bytes,
            "said_ns": schedule.time_ns,
            "said_peak": schedule.peak_bytes,
        }


def study(config: Config, model: str, device: mw.Device) -> dict[str, Any]:
    """One network."""
    chain, x, _, _ = zoo.build(
        zoo.Config(
            model=model,
            depth=config.depth,
            width=config.width,
            batch=config.batch,
            resolution=config.resolution,
            seed=config.seed,
        )
    )
    start = time.perf_counter()
    estimated = mw.estimate(chain, x, device=device)
    middle = time.perf_counter()
    measured = mw.profile(chain, x, repeats=config.repeats)
    end = time.perf_counter()
    abstract = mw.estimate(jax.eval_shape(lambda c: c, chain), jax.eval_shape(lambda x: x, x), device=device)
    last = time.perf_counter()
    del abstract
    return {
        "model": model,
        "layers": len(chain),
        "seconds": {"profile": end - middle, "estimate": middle - start, "estimate, shapes": last - end},
        "same_positions": all(
            getattr(estimated, name) == getattr(measured, name)
            for name in ("activation_bytes", "cotangent_bytes", "sweep_cotangent_bytes", "fixed_bytes")
        ),
        "figures": list(pairs(estimated, measured)),
        "plans": list(transfer(config, estimated, measured)),
    }


EXACT = ("residual_bytes", "fragment_bytes")


def summary(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a network."""
    rows = []
    for one in found:
        figures = one["figures"]
        exact = [f for f in figures if f["field"] in EXACT]
        off = [
            abs(f["estimated"] - f["measured"]) / f["activation"]
            for f in figures
            if f["field"].endswith("workspace_bytes")
        ]
        # Below 50 us a measured time is mostly noise.
        times = [
            f["estimated"] / f["measured"]
            for f in figures
            if f["field"].endswith("_ns") and f["measured"] > 5e4 and f["estimated"]
        ]
        middle = statistics.median(times)
        plans = [p for p in one["plans"] if p["ns"] is not None]
        rows.append(
            {
                "network": one["model"],
                "bytes that must be equal": f"{sum(f['estimated'] == f['measured'] for f in exact)} of "
                f"{len(exact)}",
                "positions equal": one["same_positions"],
                "workspace off by, of activations: median": statistics.median(off),
                "90%": sorted(off)[int(0.9 * (len(off) - 1))],
                "time, estimated / measured: median": middle,
                "spread": math.exp(statistics.median(abs(math.log(t / middle)) for t in times)),
                "plan's time / best: worst": max((p["ns"] / p["best_ns"] for p in plans), default=None),
                "plan's peak / room: worst": max((p["peak"] / p["room"] for p in plans), default=None),
                "said infeasible": len(one["plans"]) - len(plans),
                "seconds, estimate": one["seconds"]["estimate"],
                "of shapes": one["seconds"]["estimate, shapes"],
                "profile": one["seconds"]["profile"],
            }
        )
    return rows


def draw(found: list[dict[str, Any]]) -> Figure:
    """Estimated against measured, workspaces and times."""
    figure = Figure(figsize=(8, 3.8), layout="constrained")
    memory, times = figure.subplots(1, 2)
    for ax, suffix, unit, label in (
        (memory, "workspace_bytes", 2**20, "workspace, MiB"),
        (times, "_ns", 1e6, "time, ms"),
    ):
        for one in found:
            points = [
                (f["measured"] / unit, f["estimated"] / unit)
                for f in one["figures"]
                if f["field"].endswith(suffix) and f["measured"] > 0 and f["estimated"] > 0
            ]
            if points:
                ax.plot(*zip(*points), ls="", marker="o", ms=3, alpha=0.6, label=one["model"])
        ends = ax.get_xlim()
        ax.set(xlabel=f"measured ({label})", ylabel="estimated", xscale="log", yscale="log")
        ax.plot((1e-3, ends[1]), (1e-3, ends[1]), color="#444444", lw=0.8)
    memory.legend(fontsize=7)
    return figure


def main(config: Config) -> None:
    """Measures, prints, draws and saves."""
    console = Console(width=150)
    device = here()
    console.print(device)
    found = []
    for model in config.models:
        console.print(f"profiling {model}")
        found.append(study(config, model, device))
    rows = summary(found)
    table = Table(title="estimated against measured", title_justify="left", box=rich.box.SIMPLE)
    table.add_column("")
    for row in rows:
        table.add_column(row["network"], justify="right")
    for name in list(rows[0])[1:]:
        table.add_row(
            name, *(f"{row[name]:.3g}" if isinstance(row[name], float) else str(row[name]) for row in rows)
        )
    console.print(table)
    data = {"config": sweep.plain(config), "device": dataclasses.asdict(device), "summary": rows}
    record.save(config.out / "estimate.json", data)
    write_atomically(config.out / "records.jsonl", "".join(json.dumps(one) + "\n" for one in found))
    write_atomically(config.out / "estimate.png", png(draw(found)))
    console.print(f"wrote {config.out}")


if __name__ == "__main__":
    main(sweep.parse(Config, __doc__))
