"""Time against memory at fixed depth: `python -m experiments.budget_sweep`.

For each model, the frontier as predicted and every method as measured, at budgets spaced evenly by ratio from
the least feasible to backpropagation's memory. The plan is compared with the fastest alternative whose
measured memory fits the same budget. Writes results/budget_sweep/: records.jsonl (finished points; run again
to go on), summary.json, a figure a model.

The deep 1-Lipschitz network: `--models lipschitz --depth 512 --budgets 3 --limit 1.7`. A second table states
the least memory in which a plan, and a recomputation, take at most `limit` times backpropagation's time. For
deep chains budgets are added at which they are predicted to take that, or three quarters of it. Deep chains
are stacked, and methods that unroll them are left out. Chains of more than `layers` blocks are planned with
blocks joined.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rich.box
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter
from rich.table import Table

from experiments import alternatives, reading, record, sweep, zoo
from experiments.memory_vs_depth import SLOWEST, UNROLLED
from experiments.reading import ALTERNATIVES, PLAIN, Record
from mwplan.common.plots import png
from mwplan.common.serial import write_atomically


@dataclass(frozen=True)
class Config:
    """Sizes: `resolution` of images, `length` of signals, `text` characters; `layers`: longest chain that is
    planned; `rounds`, `seconds`: of timing at each point, `ties`: rounds more where programs tie (not for
    long chains, which run stacked); `limit`: see the module."""

    models: tuple[str, ...] = tuple(zoo.MODELS)
    depth: int = 16
    budgets: int = 6
    layers: int = 512
    width: int = 32
    batch: int = 32
    resolution: int = 32
    length: int = 2048
    text: int = 128
    rounds: int = 7
    seconds: float = 40.0
    ties: int = 21
    max_error: float = 1e-4
    thin: float = 0.0
    limit: float = 1.7
    repeats: int = 5
    seed: int = 0
    executor: str = "processes"
    workers: int = 1
    out: Path = record.RESULTS / "budget_sweep"


def point(config: Config, model: str) -> sweep.Point:
    """One model's point."""
    resolution = {"fragmental": config.length, "gpt": config.text}.get(model, config.resolution)
    group = zoo.joined(config.depth, config.layers)
    # An example of the MLP is one row where those of the others are hundreds: with their sizes there would be
    # nothing to plan.
    wider, more = (8, 64) if model == "mlp" else (1, 1)
    slower = 6 if model == "revvit" else 1  # a round of its programs takes half a minute
    network = zoo.Config(
        model=model,
        depth=config.depth,
        width=wider * config.width,
        batch=more * config.batch,
        resolution=resolution,
        group=group,
        seed=config.seed,
    )
    methods = tuple(m for m in alternatives.METHODS if group == 0 or m not in UNROLLED)
    study = alternatives.Study(
        methods=methods, budgets=config.budgets, limits=(0.75 * config.limit, config.limit) if group else (),
        rounds=config.rounds, seconds=slower * config.seconds, ties=0 if group else config.ties,
        max_error=config.max_error, thin=config.thin, repeats=config.repeats,
    )  # fmt: skip
    return alternatives.point(network, study)


def compare(config: Config, one: Record) -> list[dict[str, Any]]:
    """One row a budget: the plan and the fastest alternative that fits, and the ratio of their times in the
    same rounds."""
    base = reading.fastest(reading.ran(one, PLAIN))
    rows = []
    for budget in sorted({row["budget_bytes"] for row in one["rows"] if row["budget_bytes"] is not None}):
        fits = reading.fitting(one, ALTERNATIVES, budget, config.max_error)
        plan = next(row for row in one["rows"] if row["method"] == "plan" and row["budget_bytes"] == budget)
        ran = "total_bytes" in plan
        rival = reading.fastest(fits)
        if ran and rival:  # some were run in more rounds than others: only those of both compare
            rival = max((row for row in fits if row["seconds"]), key=lambda row: reading.relative(plan, row))
        rows.append(
            {
                "model": one["point"]["network"]["model"],
                "budget_bytes": budget,
                "plan_bytes": plan["total_bytes"] if ran else None,
                "predicted_bytes": plan["fixed_bytes"] + plan["predicted_temporary_bytes"] if ran else None,
                "plan_over_backprop": reading.over(one, plan, base) if ran and base else None,
                "predicted_seconds": plan.get("predicted_seconds"),
                "seconds": reading.median(plan) if ran else None,
                "best_alternative": rival["method"] if rival else None,
                "plan_over_alternative": reading.relative(plan, rival) if ran and rival else None,
                "error": plan.get("error"),
                "status": plan.get("status"),
                "reason": plan.get("reason"),
            }
        )
    return rows


def tables(config: Config, rows: list[dict[str, Any]], limits: list[dict[str, Any]]) -> list[Table]:
    """Both comparisons for people."""

    def size(value: int | None) -> str:
        return "" if value is None else reading.mib(value)

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}"

    first = Table(
        title="the plan and the fastest alternative within the same memory (MiB)", box=rich.box.SIMPLE
    )
    for name in (
        "model",
        "budget",
        "predicted",
        "measured",
        "time / backprop",
        "best alternative",
        "time / alternative",
        "error",
        "status",
    ):
        first.add_column(name, justify="left" if name in ("model", "best alternative", "status") else "right")
    for r in rows:
        first.add_row(
            r["model"],
            size(r["budget_bytes"]),
            size(r["predicted_bytes"]),
            size(r["plan_bytes"]),
            number(r["plan_over_backprop"]),
            r["best_alternative"] or "none fits",
            number(r["plan_over_alternative"]),
            "" if r["error"] is None else f"{r['error']:.1e}",
            r["reason"] or r["status"] or "",
        )
    return [first, reading.limits_table(limits, config.limit)]


def draw(config: Config, one: Record) -> Figure:
    """Measured time against measured memory, each method a series, what is slower than `SLOWEST` left out;
    the frontier as predicted, in backpropagation's predicted time."""
    sns.set_theme(style="whitegrid", context="paper")
    figure = Figure(figsize=(8.5, 4.5), layout="constrained")
    ax = figure.subplots()
    base = reading.fastest(reading.ran(one, PLAIN))
    assert base is not None
    quickest = min(ns for _, ns in one["frontier"])
    ax.step(
        [size / 2**20 for size, _ in one["frontier"]],
        [ns / quickest for _, ns in one["frontier"]],
        where="post",
        color="#2a6f97",
        lw=0.9,
        alpha=0.6,
        label="frontier, predicted / its fastest",
    )
    for label, (names, color, marker) in reading.FAMILIES.items():
        rows = sorted(reading.ran(one, names, config.max_error), key=lambda row: row["total_bytes"])
        if rows:
            ax.plot(
                [row["total_bytes"] / 2**20 for row in rows], [reading.over(one, row, base) for row in rows],
                marker=marker, color=color, label=label, ls="-" if label == "plan" else ":", lw=1,
                zorder=3 if label == "plan" else 2,
            )  # fmt: skip
    top = max(
        reading.over(one, row, base) for row in reading.ran(one, alternatives.METHODS, config.max_error)
    )
    ax.set_ylim(0, min(1.2 * top, SLOWEST))
    ax.set_xscale("log")
    for formatter in (ax.xaxis.set_major_formatter, ax.xaxis.set_minor_formatter):
        formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))
    ax.tick_params(axis="x", which="both", pad=4)
    network = one["point"]["network"]
    ax.set(xlabel="device memory of the step (MiB)", ylabel="time / backpropagation's")
    ax.set_title(f"{network['model']}, {network['depth']} blocks")
    ax.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))  # where it hides no point
    return figure


def main(config: Config) -> None:
    """Runs what is missing, prints, draws and saves."""
    console = record.console()
    points = [point(config, model) for model in config.models]
    found = sweep.run(
        points,
        alternatives.measure,
        config.out / "records.jsonl",
        executor=config.executor,
        workers=config.workers,
        title="models",
    )
    rows = [row for one in found for row in compare(config, one)]
    limits = [reading.within(one, config.limit, config.max_error) for one in found]
    for table in tables(config, rows, limits):
        console.print(table)
    record.save(
        config.out / f"summary_{config.depth}.json",
        {"config": sweep.plain(config), "budgets": rows, "limits": limits},
    )
    for one in found:
        network = one["point"]["network"]
        write_atomically(config.out / f"{network['model']}_{network['depth']}.png", png(draw(config, one)))
    console.print(f"wrote {config.out}")


if __name__ == "__main__":
    main(sweep.parse(Config, __doc__))
