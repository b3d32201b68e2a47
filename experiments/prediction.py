"""Predicted against measured memory and time of whole compiled steps: `python -m experiments.prediction`.

Random heterogeneous chains with activations of at least 4 MiB, each at three budgets between the least
feasible and what the fastest schedule needs. Every second chain is planned without RECOMPUTE, so that all
kinds of runs occur. Compared are:

- temporaries of the schedule that `mw.plan` chose, compiled, with its predicted peak (with and without
  fragmentation) and with the budget;
- the same of the schedule that `mw.fit` settled on, and the step's time with the predicted one;
- at one budget a chain, the arrays alive at every event of a traced step with the ledger's.

Beside them, on the same chains, the overhead where there is nothing to save: the schedule that stores every
layer against plain `jax.value_and_grad`, and the run-time report against the same step without it, in
interleaved rounds. Writes results/prediction/.

With `--layers` instead a table of the layers that people write (`experiments.layer_kinds`), with `--target`
for a device that is not here.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, LogLocator, NullFormatter
from rich.table import Table

import mwplan as mw
from experiments import layer_kinds, record, sweep
from mwplan import layers as L
from mwplan.app.side_by_side import relative_error
from mwplan.common.plots import png
from mwplan.common.serial import write_atomically
from mwplan.plans.schedule import Run, RunKind, Schedule, Strategy, walk


@dataclass(frozen=True)
class Config:
    """Sizes. `budgets`: fractions of the way from the least feasible temporaries to the fastest schedule's;
    `rounds`: of timing. `layers`: kinds of layers instead, `kinds` or all, for `target` or this device."""

    chains: int = 40
    budgets: tuple[float, ...] = (0.03, 0.25, 0.7)
    shortest: int = 5
    longest: int = 10
    batch: int = 64
    size: int = 32
    channels: int = 16
    rounds: int = 5
    repeats: int = 3
    max_error: float = 1e-4
    seed: int = 0
    executor: str = "processes"
    workers: int = 1
    layers: bool = False
    target: str = ""
    kinds: tuple[str, ...] = ("",)
    out: Path = record.RESULTS / "prediction"


def random_chain(config: dict[str, Any], seed: int) -> tuple[mw.Chain, Any]:
    """Layers of every family on images, a convolution first; a stride of 2 quadruples the channels, so that
    no activation is smaller than the input.

    What lies before the first parameters would not be differentiated at all: XLA drops it, and the plan would
    be off by it.
    """
    rng = random.Random(seed)
    keys = iter(jax.random.split(jax.random.key(seed), 40))
    channels = config["channels"]
    strided = False
    made: list[Any] = []
    for _ in range(rng.randint(config["shortest"], config["longest"])):
        kind = rng.choice(
            [
                "conv",
                "conv",
                "circular",
                "act",
                "act",
                "act",
                "smooth",
                "norm",
                "coupling",
                "channels",
                "stride",
            ]
        )
        if (kind == "stride" and strided) or not made:
            kind = "conv"
        match kind:
            case "conv" | "circular":
                padding = "SAME" if kind == "conv" else "CIRCULAR"
                made.append(
                    L.Conv2D.init(next(keys), channels, channels, rng.choice([1, 3]), padding=padding)
                )
            case "act":
                made.append(rng.choice([L.MaxMin(), L.LeakyReLU(0.5), L.LeakyReLU(0.8), L.ReLU()]))
            case "smooth":
                made.append(rng.choice([jnp.tanh, jax.nn.gelu, jnp.sin]))
            case "norm":
                norm: Any = rng.choice([L.LayerNorm, L.RMSNorm])
                made.append(norm.init(None, channels))
            case "coupling":
                half = channels // 2
                f, g = (L.Conv2D.init(next(keys), half, half, 3) for _ in range(2))
                made.append(L.Coupling(f, g))
            case "channels":
                made.append(L.Dense.init(next(keys), channels, channels))
            case "stride":
                made.append(L.Conv2D.init(next(keys), channels, 4 * channels, 2, stride=2, padding="VALID"))
                channels, strided = 4 * channels, True
    x = jax.random.normal(next(keys), (config["batch"], config["size"], config["size"], config["channels"]))
    return mw.Chain(made), x


def loss(y: Any) -> Any:
    """A weighted mean square: its own gradient needs no memory beside the output and the cotangent, which the
    ledger counts.

    The weights differ from channel to channel: unweighted it is the same for all outputs of a normalisation,
    and its gradient nothing but rounding.
    """
    return jnp.mean(y**2 * jnp.linspace(0.5, 1.5, y.shape[-1]))


def seconds(steps: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Times of each, in interleaved rounds after a warm-up."""
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            jax.block_until_ready(step())
            if i:
                taken[name].append(time.perf_counter() - start)
    return taken


def measure(point: dict[str, Any]) -> dict[str, Any]:
    """One chain."""
    chain, x = random_chain(point, point["chain"])
    profile = mw.profile(chain, x, repeats=point["repeats"])
    allowed = set(Strategy) - ({Strategy.RECOMPUTE} if point["chain"] % 2 else set())
    frontier = mw.frontier(profile, max_error=point["max_error"], allowed=allowed)
    plain = mw.jit(jax.value_and_grad(lambda c, x: loss(c(x)))).lower(chain, x).compile()
    truth = plain(chain, x)[1]
    rows = []
    if frontier.least_bytes is not None:
        low, high = frontier.least_bytes, frontier.points[-1][0]
        for fraction in point["budgets"]:
            budget = int(low + fraction * (high - low))
            rows.append(
                at_budget(point, chain, x, profile, frontier, budget, allowed, truth) | {"fraction": fraction}
            )
    traced = traced_errors(chain, x, profile, frontier, rows)
    return {
        "layers": [layer.name for layer in profile.layers],
        "activation_bytes": max(profile.activation_bytes),
        "rows": rows,
        "traced": traced,
        "overhead": overhead(point, chain, x, profile, frontier, plain),
    }


def at_budget(
    point: dict[str, Any], chain: mw.Chain, x: Any, profile: mw.Profile, frontier: mw.Frontier, budget: int,
    allowed: set[Strategy], truth: Any,
) -> dict[str, Any]:  # fmt: skip
    """What one budget gives, planned and fitted."""
    schedule = frontier.at(budget)
    row: dict[str, Any] = {
        "budget": budget - profile.fixed_bytes,
        "kinds": "".join(s.name[0] for s in schedule.strategies),
        "predicted": schedule.peak_bytes,
        "foreseen": max(schedule.packed_bytes, schedule.peak_bytes),
        "error": schedule.error,
        "measured": mw.temporaries(mw.jit(mw.value_and_grad(loss, schedule)).lower(chain, x).compile()),
    }
    try:
        found = mw.fit(
            loss, chain, x, budget=budget, profile=profile, max_error=point["max_error"], allowed=allowed
        )
    except mw.InfeasibleError:
        return row | {"fitted": None}
    row["fitted"] = {
        "predicted": found.schedule.peak_bytes,
        "measured": found.temporary_bytes,
        "attempts": len(found.attempts),
    }
    (_, report), grads = found.step(chain, x)
    row["gradient_error"] = relative_error(jax.tree.leaves(grads), jax.tree.leaves(truth))[0]
    row["reported"] = float(report.worst)
    loss_part = mw.jit(jax.value_and_grad(loss)).lower(chain(x)).compile()
    y = chain(x)
    taken = seconds({"step": lambda: found.step(chain, x), "loss": lambda: loss_part(y)}, point["rounds"])
    row["seconds"] = statistics.median(taken["step"]) - statistics.median(taken["loss"])
    row["predicted_seconds"] = found.schedule.time_ns / 1e9
    return row


def traced_errors(
    chain: mw.Chain, x: Any, profile: mw.Profile, frontier: mw.Frontier, rows: list[dict[str, Any]]
) -> dict[str, int] | None:
    """At the middle budget: events, and those whose live arrays are not what the ledger says."""
    if not rows:
        return None
    schedule = frontier.at(rows[len(rows) // 2]["budget"] + profile.fixed_bytes)
    timeline = mw.trace(schedule, chain, x, loss, profile=profile)
    wrong = sum(event.array_bytes != event.predicted_array_bytes for event in timeline.events)
    return {"events": len(timeline.events), "wrong": wrong}


def overhead(
    point: dict[str, Any], chain: mw.Chain, x: Any, profile: mw.Profile, frontier: mw.Frontier, plain: Any
) -> dict[str, Any]:
    """Store-all against plain, and a schedule with a moonwalk or invert run with and without its report."""
    runs = tuple(
        Run(
            kind=RunKind.STORE,
            start=i,
            stop=i + 1,
            options=(min(layer.store, key=lambda o: o.forward_ns + o.backward_ns).name,),
        )
        for i, layer in enumerate(profile.layers)
    )
    store = (
        mw.jit(jax.value_and_grad(lambda c, x: loss(mw.apply(Schedule(runs=runs), c, x))))
        .lower(chain, x)
        .compile()
    )
    steps = {"plain": lambda: plain(chain, x), "store": lambda: store(chain, x)}
    reporting = None
    for total, _ in frontier.points:
        candidate = frontier.at(total)
        if any(run.kind in (RunKind.MOONWALK, RunKind.INVERT) for run in walk(candidate.runs)):
            reporting = candidate
            break
    if reporting is not None:
        with_report = mw.jit(mw.value_and_grad(loss, reporting)).lower(chain, x).compile()
        without = (
            mw.jit(jax.value_and_grad(lambda c, x: loss(mw.apply(reporting, c, x)))).lower(chain, x).compile()
        )
        steps |= {"reported": lambda: with_report(chain, x), "silent": lambda: without(chain, x)}
    taken = seconds(steps, 2 * point["rounds"])

    def ratio(a: str, b: str) -> float | None:
        return statistics.median(p / q for p, q in zip(taken[a], taken[b])) if a in taken else None

    return {
        "store_time": ratio("store", "plain"),
        "store_bytes": mw.temporaries(store) / mw.temporaries(plain),
        "report_time": ratio("reported", "silent"),
    }


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures: medians and worst cases over all chains and budgets."""
    rows = [row for one in found for row in one["rows"]]
    fits = [row for row in rows if row["fitted"]]
    off = [abs(row["measured"] / row["predicted"] - 1) for row in rows]
    foreseen = [abs(row["measured"] / row["foreseen"] - 1) for row in rows]
    above = [row for row in rows if row["measured"] > 1.02 * row["budget"]]
    fit_off = [abs(row["fitted"]["measured"] / row["fitted"]["predicted"] - 1) for row in fits]
    times = [abs(row["seconds"] / row["predicted_seconds"] - 1) for row in fits]
    traced = [one["traced"] for one in found if one["traced"]]
    costs = [one["overhead"] for one in found]
    reports = [c["report_time"] for c in costs if c["report_time"] is not None]
    return {
        "chains": len(found),
        "schedules": len(rows),
        "memory error, mw.fit: median": statistics.median(fit_off),
        "memory error, mw.fit: largest": max(fit_off),
        "mw.fit above the budget": sum(row["fitted"]["measured"] > row["budget"] for row in fits),
        "mw.fit, refused: nothing compiled fits": len(rows) - len(fits),
        "memory error, mw.plan alone: median": statistics.median(off),
        "memory error, mw.plan alone: largest": max(off),
        "memory error, mw.plan alone, with fragmentation: median": statistics.median(foreseen),
        "memory error, mw.plan alone, with fragmentation: largest": max(foreseen),
        "mw.plan alone above the budget by more than 2%": len(above),
        "of these, predicted as such": sum(row["foreseen"] > 1.02 * row["budget"] for row in above),
        "time error: median": statistics.median(times),
        "gradient error: largest": max(row["gradient_error"] for row in fits),
        "report: largest": max(row["reported"] for row in fits),
        "traced events": sum(t["events"] for t in traced),
        "traced events off the ledger": sum(t["wrong"] for t in traced),
        "store-all / plain, time: median": statistics.median(c["store_time"] for c in costs),
        "store-all / plain, bytes: median": statistics.median(c["store_bytes"] for c in costs),
        "step with report / without, time: median": statistics.median(reports) if reports else None,
    }


def draw(found: list[dict[str, Any]]) -> Figure:
    """Measured against predicted, memory and time, of what `mw.fit` returns; memory of plans as they are
    beside it."""
    sns.set_theme(style="whitegrid", context="paper")
    figure = Figure(figsize=(8, 3.8), layout="constrained")
    memory, times = figure.subplots(1, 2)
    rows = [row for one in found for row in one["rows"]]
    marks = {"STORE and RECOMPUTE only": ("#c1121f", "o"), "with FRAGMENT, VIJP or INVERT": ("#2a6f97", "^")}
    for label, (color, marker) in marks.items():
        some = [row for row in rows if (set(row["kinds"]) <= {"S", "R"}) == (marker == "o")]
        fitted = [row["fitted"] for row in some if row["fitted"]]
        pairs = [(one["predicted"] / 2**20, one["measured"] / 2**20) for one in fitted]
        memory.plot(*zip(*pairs), ls="", marker=marker, color=color, ms=4, alpha=0.7, label=label)
        timed = [(row["predicted_seconds"] * 1e3, row["seconds"] * 1e3) for row in some if row["fitted"]]
        times.plot(*zip(*timed), ls="", marker=marker, color=color, ms=4, alpha=0.7, label=label)
    bare = [(row["predicted"] / 2**20, row["measured"] / 2**20) for row in rows]
    memory.plot(
        *zip(*bare),
        ls="",
        marker="o",
        mfc="none",
        color="#888888",
        ms=6,
        mew=0.6,
        label="by mw.plan alone",
        zorder=1,
    )
    for ax, unit in ((memory, "temporaries, MiB"), (times, "step without the loss, ms")):
        low, high = ax.get_xlim()
        ax.plot([low, high], [low, high], color="#444444", lw=0.8)
        ax.set(xlabel=f"predicted ({unit})", ylabel="measured", xscale="log", yscale="log")
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(math.inf, math.inf)))
            axis.set_minor_formatter(NullFormatter())
    memory.legend(fontsize=7)
    return figure


def main(config: Config) -> None:
    """Runs what is missing, prints, draws and saves."""
    if config.layers:
        kinds = tuple(filter(None, config.kinds))
        path = config.out / "layers.jsonl"
        layer_kinds.main(kinds, config.target, path, executor=config.executor, workers=config.workers)
        return
    console = record.console()
    other = ("chains", "layers", "target", "kinds")
    points = [
        {k: v for k, v in sweep.plain(config).items() if k not in other} | {"chain": config.seed + i}
        for i in range(config.chains)
    ]
    found = sweep.run(
        points,
        measure,
        config.out / "records.jsonl",
        executor=config.executor,
        workers=config.workers,
        title="chains",
    )
    figures = summary(found)
    table = Table("figure", "value", title="predicted against measured", title_justify="left")
    for name, value in figures.items():
        table.add_row(name, str(value) if isinstance(value, int) or value is None else f"{value:.3g}")
    console.print(table)
    record.save(config.out / "summary.json", {"config": sweep.plain(config), "figures": figures})
    write_atomically(config.out / "prediction.png", png(draw(found)))
    console.print(f"wrote {config.out}")


if __name__ == "__main__":
    main(sweep.parse(Config, __doc__))
