"""Memory against depth, and the deepest network that fits a budget: `python -m experiments.memory_vs_depth`.

Two sweeps for each model. First backpropagation alone at `reference` blocks. Its memory (total bytes:
parameters, gradients, input, temporaries; the smaller of its two forms), times each of `multiples`, is a
budget. Then every method at every depth and budget. Beyond `unrolled` blocks methods that unroll the chain
are left out; their scans, which compile in seconds, stand for them. Every point also times backpropagation
at the reference depth, in the same rounds, so that times a block compare. Writes results/memory_vs_depth/:
records.jsonl (finished points; run again to go on), a summary and a figure a model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rich.box
import seaborn as sns
from matplotlib.figure import Figure
from rich.table import Table

from experiments import alternatives, reading, record, sweep, zoo
from experiments.reading import PLAIN, Record, Row
from mwplan.common.plots import png
from mwplan.common.serial import write_atomically


@dataclass(frozen=True)
class Config:
    """Sizes. `layers`: longest chain that is planned (more blocks are joined); `rounds`, `seconds`: of timing
    at each point; `limit`: how many times backpropagation's time plans and recomputations may take in
    the second table."""

    models: tuple[str, ...] = ("revnet", "lipschitz")
    depths: tuple[int, ...] = (32, 64, 128, 512)
    reference: int = 32
    multiples: tuple[float, ...] = (0.5, 1.0)
    unrolled: int = 32
    layers: int = 512
    width: int = 16
    batch: int = 64
    resolution: int = 32
    rounds: int = 5
    seconds: float = 40.0
    max_error: float = 1e-4
    limit: float = 1.7
    thin: float = 0.02
    repeats: int = 3
    seed: int = 0
    executor: str = "processes"
    workers: int = 1
    out: Path = record.RESULTS / "memory_vs_depth"


#: times of backpropagation's from here on are left out of the figure
SLOWEST = 4.0
UNROLLED = ("backprop", "checkpoint_each", "chen", "rotor_checkpoint", "recompute_checkpoint")


def network(config: Config, model: str, depth: int) -> zoo.Config:
    """The network of one point."""
    sizes = {"width": config.width, "batch": config.batch, "resolution": config.resolution}
    group = zoo.joined(depth, config.layers)
    return zoo.Config(model=model, depth=depth, group=group, seed=config.seed, **sizes)


def run(config: Config) -> dict[str, list[Record]]:
    """All records by model: the reference first, then one a depth."""
    path = config.out / "records.jsonl"
    how: dict[str, Any] = {"executor": config.executor, "workers": config.workers}
    plain = alternatives.Study(methods=PLAIN, rounds=0, check=False)
    points = [alternatives.point(network(config, model, config.reference), plain) for model in config.models]
    references = sweep.run(points, alternatives.measure, path, title="references", **how)
    points = []
    for model, reference in zip(config.models, references):
        budgets = budgets_of(config, reference)
        for depth in config.depths:
            methods = [m for m in alternatives.METHODS if depth <= config.unrolled or m not in UNROLLED]
            study = alternatives.Study(
                methods=tuple(methods),
                budgets=budgets,
                rounds=config.rounds,
                seconds=config.seconds,
                yardstick=config.reference,
                max_error=config.max_error,
                thin=config.thin,
                repeats=config.repeats,
            )
            points.append(alternatives.point(network(config, model, depth), study))
    found = iter(sweep.run(points, alternatives.measure, path, title="depths", **how))
    return {
        model: [reference, *(next(found) for _ in config.depths)]
        for model, reference in zip(config.models, references)
    }


def budgets_of(config: Config, reference: Record) -> tuple[int, ...]:
    """The budgets: multiples of backpropagation's memory at the reference depth."""
    least = min(row["total_bytes"] for row in reading.ran(reference, PLAIN))
    return tuple(int(multiple * least) for multiple in config.multiples)


def per_block(one: Record, row: Row, reference: int) -> float:
    """Time a block over backpropagation's at the reference depth (the faster of its two forms), from the same
    rounds."""
    yard = min(one["yardstick"], key=reading.median)
    return alternatives.ratio(row["seconds"], yard["seconds"]) * reference / one["point"]["network"]["depth"]


def summary(config: Config, model: str, records: list[Record]) -> list[dict[str, Any]]:
    """For each budget and family of methods: the deepest network that fits, and its time a block; the plan's
    at twice the reference depth too."""
    reference, *depths = records
    rows = []
    for multiple, budget in zip(config.multiples, budgets_of(config, reference)):
        for label, (names, _, _) in reading.FAMILIES.items():
            # The reference itself fits its own memory; compiled again, it may need a little more.
            best = {config.reference: 1.0} if multiple >= 1 and {*PLAIN} & {*names} else {}
            for one in depths:
                row = reading.fastest(reading.fitting(one, names, budget, config.max_error))
                if row is not None:
                    best[one["point"]["network"]["depth"]] = per_block(one, row, config.reference)
            deepest = max(best, default=0)
            rows.append(
                {
                    "model": model,
                    "budget": multiple,
                    "budget_bytes": budget,
                    "method": label,
                    "deepest": deepest,
                    "depth_ratio": deepest / config.reference,
                    "time_per_block_at_deepest": best.get(deepest),
                    "time_per_block_at_twice": best.get(2 * config.reference),
                }
            )
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    """The summary for people."""
    made = Table(title="deepest network that fits multiples of backpropagation's memory at the reference "
                       "depth; time a block over backpropagation's there", box=rich.box.SIMPLE)  # fmt: skip
    for name in (
        "model",
        "x backprop",
        "MiB",
        "method",
        "deepest",
        "x reference",
        "time there",
        "time at twice the reference",
    ):
        made.add_column(name, justify="left" if name in ("model", "method") else "right")
    for row in rows:
        times = (row["time_per_block_at_deepest"], row["time_per_block_at_twice"])
        made.add_row(
            row["model"],
            f"{row['budget']:g}",
            reading.mib(row["budget_bytes"]),
            row["method"],
            str(row["deepest"]),
            f"{row['depth_ratio']:g}",
            *("" if t is None else f"{t:.2f}" for t in times),
        )
    return made


def draw(config: Config, model: str, records: list[Record]) -> Figure:
    """Left, the memory that each method needs at each depth (those with a budget at the least of theirs);
    right, time a block at the budget of 1."""
    sns.set_theme(style="whitegrid", context="paper")
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    reference, *depths = records
    for label, (names, color, marker) in reading.FAMILIES.items():
        memory, times = [], []
        for one in depths:
            depth = one["point"]["network"]["depth"]
            least = reading.smallest(reading.ran(one, names, config.max_error))
            if least is not None:
                memory.append((depth, least["total_bytes"] / 2**20))
            row = reading.fastest(
                reading.fitting(one, names, budgets_of(config, reference)[-1], config.max_error)
            )
            if row is not None:
                times.append((depth, per_block(one, row, config.reference)))
        style: dict[str, Any] = {
            "color": color,
            "marker": marker,
            "label": label,
            "zorder": 3 if label == "plan" else 2,
        }
        for ax, points in ((left, memory), (right, times)):
            if points:
                ax.plot(*zip(*points), **style)
    for multiple, budget in zip(config.multiples, budgets_of(config, reference)):
        left.axhline(budget / 2**20, color="#555555", lw=0.8, ls="--")
        left.annotate(f"budget {multiple:g}", (config.depths[0], budget / 2**20), fontsize=7, va="bottom")
    left.set(xlabel="depth (blocks)", ylabel="device memory of the step (MiB)", title=model)
    left.set(xscale="log", yscale="log")
    right.set(
        xlabel="depth (blocks)",
        ylabel=f"time a block / backpropagation's at {config.reference}",
        xscale="log",
    )
    right.set_title(
        f"within backpropagation's memory at depth {config.reference}, times {config.multiples[-1]:g}"
    )
    right.set_ylim(0, min(right.get_ylim()[1], SLOWEST))
    for ax in (left, right):
        ax.set_xticks(config.depths, [str(d) for d in config.depths])
        ax.minorticks_off()
    right.legend(*left.get_legend_handles_labels(), fontsize=7, ncols=2)
    return figure


def main(config: Config) -> None:
    """Runs what is missing, prints, draws and saves."""
    console = record.console()
    found = run(config)
    for model, records in found.items():
        rows = summary(config, model, records)
        console.print(table(rows))
        timed = [one for one in records[1:] if reading.fastest(reading.ran(one, PLAIN))]
        limits = [reading.within(one, config.limit, config.max_error) for one in timed]
        console.print(reading.limits_table(limits, config.limit))
        saved = {"config": sweep.plain(config), "rows": rows, "limits": limits}
        record.save(config.out / f"summary_{model}.json", saved)
        write_atomically(config.out / f"{model}.png", png(draw(config, model, records)))
    console.print(f"wrote {config.out}")


if __name__ == "__main__":
    main(sweep.parse(Config, __doc__))
