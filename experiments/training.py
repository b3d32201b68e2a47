"""Real training within a budget that backpropagation exceeds: `python -m experiments.training`.

Networks of the zoo on data that scikit-learn bundles, each trained twice at once (`mwplan.app.side_by_side`):
by plain backpropagation and by a plan, from the same start on the same batches. The budget is the larger of
`fraction` of backpropagation's temporaries and 1.25 of the least feasible. Writes results/training/:
records.jsonl (loss and time of every step, reports, gradient errors against float64), summary.json,
training.png.
"""

from __future__ import annotations

import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rich.box
import seaborn as sns
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from experiments import record, sweep, zoo
from experiments.alternatives import RECOMPUTATION
from mwplan import planning
from mwplan.app import side_by_side
from mwplan.common.plots import BACKPROP, LIMIT, PLAN, png
from mwplan.common.serial import write_atomically
from mwplan.plans.profiles import Profile
from mwplan.plans.schedule import Strategy


@dataclass(frozen=True)
class Config:
    """Sizes. `depths`, `widths`, `resolutions`, `batches`: one for each of `models`; `rate`: Adam's, decaying
    to 0 along a cosine; `checks`: comparisons with float64, spread evenly from the first step to the last;
    `patience`: steps between two plans, at least."""

    models: tuple[str, ...] = ("revnet", "gpt")
    depths: tuple[int, ...] = (24, 6)
    widths: tuple[int, ...] = (16, 64)
    resolutions: tuple[int, ...] = (16, 64)
    batches: tuple[int, ...] = (128, 16)
    steps: int = 150
    rate: float = 2e-3
    fraction: float = 0.12
    max_error: float = 1e-4
    checks: int = 6
    patience: int = 20
    repeats: int = 3
    seed: int = 0
    executor: str = "processes"
    workers: int = 1
    out: Path = record.RESULTS / "training"


def points(config: Config) -> list[sweep.Point]:
    """One a model."""
    shared = {
        k: getattr(config, k)
        for k in ("steps", "rate", "fraction", "max_error", "checks", "patience", "repeats", "seed")
    }
    sizes = zip(config.depths, config.widths, config.resolutions, config.batches, strict=True)
    return [
        {"model": model, "depth": depth, "width": width, "resolution": resolution, "batch": batch, **shared}
        for model, (depth, width, resolution, batch) in zip(config.models, sizes, strict=True)
    ]


def measure(point: sweep.Point) -> dict[str, Any]:
    """Trains one model both ways."""
    import optax

    names = ("model", "depth", "width", "resolution", "batch", "seed")
    config = zoo.Config(**{name: point[name] for name in names})
    chain, _, _, loss = zoo.build(config)
    everything = zoo.data(config)
    steps, max_error = point["steps"], point["max_error"]
    redone: list[float | None] = []

    def budget(profile: Profile, backprop: int) -> int:
        least = planning.frontier(profile, max_error=max_error).least_bytes or 0
        chosen = max(profile.fixed_bytes + int(point["fraction"] * backprop), int(1.25 * least))
        redo = planning.frontier(profile, max_error=max_error, allowed=RECOMPUTATION)
        fits = redo.least_bytes is not None and redo.least_bytes <= chosen
        redone.append(redo.at(chosen).time_ns / 1e9 if fits else None)
        return chosen

    last = max(1, point["checks"] - 1)
    task = side_by_side.Task(
        chain=chain,
        loss=loss,
        batch=side_by_side.shuffled(everything.x, everything.labels, config.batch, config.seed),
        steps=steps,
        optimizer=optax.adam(optax.cosine_decay_schedule(point["rate"], steps)),
        budget=budget,
        max_error=max_error,
        checks=tuple(round(k * steps / last) for k in range(point["checks"])),
        patience=point["patience"],
        repeats=point["repeats"],
    )
    got = side_by_side.train(task, say=lambda text: print(f"{point['model']}: {text}", file=sys.stderr))
    schedule = got.fitted.schedule
    return {
        "budget_bytes": got.budget_bytes,
        "fixed_bytes": schedule.fixed_bytes,
        "predicted_temporary_bytes": schedule.peak_bytes,
        "planned_temporary_bytes": got.fitted.temporary_bytes,
        "plain_temporary_bytes": got.backprop_temporary_bytes,
        "predicted_seconds": schedule.time_ns / 1e9,
        "recomputation_predicted_seconds": redone[0],
        "predicted_error": schedule.error,
        "strategies": {s.value: schedule.strategies.count(s) for s in Strategy},
        "status": schedule.status.value,
        "attempts": len(got.fitted.attempts),
        "ratio": got.ratio,
        "planned_losses": got.planned.losses,
        "plain_losses": got.plain.losses,
        "planned_seconds": got.planned.seconds,
        "plain_seconds": got.plain.seconds,
        "discrepancies": got.discrepancies,
        "replans": got.replans,
        "checks": [{name: getattr(one, name) for name in one.__slots__} for one in got.checks],
    }


def summary(one: dict[str, Any]) -> dict[str, Any]:
    """What one training run says: bytes in total, times, errors, the distance of the curves."""
    planned, plain = one["planned_losses"], one["plain_losses"]
    fixed, checks, redo = one["fixed_bytes"], one["checks"], one["recomputation_predicted_seconds"]
    return {
        "model": one["point"]["model"],
        "depth": one["point"]["depth"],
        "backprop_bytes": fixed + one["plain_temporary_bytes"],
        "budget_bytes": one["budget_bytes"],
        "predicted_bytes": fixed + one["predicted_temporary_bytes"],
        "planned_bytes": fixed + one["planned_temporary_bytes"],
        "temporaries_ratio": one["planned_temporary_bytes"] / one["plain_temporary_bytes"],
        "strategies": {k: v for k, v in one["strategies"].items() if v},
        "time_ratio": one["ratio"],
        "recomputation_over_plan_predicted": redo and redo / one["predicted_seconds"],
        "seconds": statistics.median(one["planned_seconds"][1:]),
        "worst_report": max(one["discrepancies"]),
        "predicted_error": one["predicted_error"],
        "worst_gradient_error": max(c["planned"] for c in checks),
        "worst_gradient_error_of_backprop": max(c["plain"] for c in checks),
        "replans": one["replans"],
        "first_loss": plain[0],
        "planned_loss": statistics.mean(planned[-10:]),
        "plain_loss": statistics.mean(plain[-10:]),
        "median_loss_distance": statistics.median(abs(a - b) / b for a, b in zip(planned, plain)),
    }


def table(rows: list[dict[str, Any]]) -> Table:
    """The summary for people, one column a model."""
    made = Table(title="trained within a budget, beside backpropagation", box=rich.box.SIMPLE)
    made.add_column("")
    for row in rows:
        made.add_column(f"{row['model']}, {row['depth']} blocks", justify="right")

    def mib(row: dict[str, Any], name: str) -> str:
        return f"{row[name] / 2**20:.2f} MiB"

    def number(value: float | None) -> str:
        return "does not fit" if value is None else f"{value:.2f}"

    for label, show in (
        ("backpropagation, total", lambda r: mib(r, "backprop_bytes")),
        ("budget", lambda r: mib(r, "budget_bytes")),
        ("plan, predicted", lambda r: mib(r, "predicted_bytes")),
        ("plan, measured", lambda r: mib(r, "planned_bytes")),
        ("temporaries / backpropagation's", lambda r: f"{r['temporaries_ratio']:.2f}"),
        ("strategies", lambda r: ", ".join(f"{v} {k.lower()}" for k, v in r["strategies"].items())),
        ("step / backpropagation's", lambda r: f"{r['time_ratio']:.2f}"),
        ("step", lambda r: f"{r['seconds'] * 1e3:.0f} ms"),
        (
            "best recomputation / plan, predicted time",
            lambda r: number(r["recomputation_over_plan_predicted"]),
        ),
        ("predicted error", lambda r: f"{r['predicted_error']:.1e}"),
        ("largest reported error", lambda r: f"{r['worst_report']:.1e}"),
        ("largest gradient error to float64", lambda r: f"{r['worst_gradient_error']:.1e}"),
        ("the same of backpropagation", lambda r: f"{r['worst_gradient_error_of_backprop']:.1e}"),
        ("planned again", lambda r: str(len(r["replans"]))),
        ("loss at the start", lambda r: f"{r['first_loss']:.3f}"),
        ("loss of the last 10 steps", lambda r: f"{r['planned_loss']:.3f}"),
        ("the same of backpropagation", lambda r: f"{r['plain_loss']:.3f}"),
        ("median distance of the losses", lambda r: f"{r['median_loss_distance']:.1%}"),
    ):
        made.add_row(label, *(show(row) for row in rows))
    return made


def draw(found: list[dict[str, Any]]) -> Figure:
    """One row a model: loss curves, errors over the steps, memory."""
    sns.set_theme(style="whitegrid", context="paper")
    figure = Figure(figsize=(11, 3.2 * len(found)), layout="constrained")
    rows = figure.subplots(len(found), 3, squeeze=False, width_ratios=(3, 3, 2))
    for (curves, errors, bars), one in zip(rows, found):
        point, checks = one["point"], one["checks"]
        curves.plot(one["plain_losses"], color=BACKPROP, lw=2.5, alpha=0.45, label="backpropagation")
        curves.plot(one["planned_losses"], color=PLAN, lw=1, label="plan")
        curves.set(xlabel="step", ylabel="training loss", yscale="log")
        curves.set_title(
            f"{point['model']}, {point['depth']} blocks: {one['ratio']:.2f} of backpropagation's time"
        )
        at = [c["step"] for c in checks]
        reports = [
            value or float("nan") for value in one["discrepancies"]
        ]  # 0, of plans that rebuild nothing, has no place on the axis
        errors.plot(reports, color=PLAN, lw=0.8, label="reported by the step")
        errors.plot(
            at, [c["planned"] for c in checks], "o-", ms=4, lw=1, color="#606c38", label="gradient, plan"
        )
        errors.plot(
            at,
            [c["plain"] for c in checks],
            "x:",
            ms=5,
            lw=1,
            color=BACKPROP,
            label="gradient, backpropagation",
        )
        errors.axhline(point["max_error"], color=LIMIT, lw=0.8, ls="--", label="max_error")
        for ax in (curves, errors):
            for number, step in enumerate(one["replans"]):
                ax.axvline(step, color=LIMIT, lw=0.8, ls=":", label=None if number else "planned again")
        errors.set(xlabel="step", ylabel="relative error", yscale="log")
        sizes = (
            ("plain_temporary_bytes", BACKPROP),
            ("predicted_temporary_bytes", "#a9d6e5"),
            ("planned_temporary_bytes", PLAN),
        )
        drawn = bars.bar(
            ["backprop.", "predicted", "plan"],
            [one[name] / 2**20 for name, _ in sizes],
            color=[c for _, c in sizes],
        )
        bars.bar_label(drawn, fmt="%.1f", label_type="center", bbox={"fc": "white", "ec": "none", "pad": 1})
        bars.axhline(
            (one["budget_bytes"] - one["fixed_bytes"]) / 2**20, color=LIMIT, ls="--", lw=1, label="budget"
        )
        bars.set(ylabel="temporaries (MiB)")
        for ax in (curves, errors, bars):
            ax.legend(fontsize=7)
    return figure


def main(config: Config) -> None:
    """Trains what is missing, prints, draws and saves."""
    console = Console()
    found = sweep.run(
        points(config),
        measure,
        config.out / "records.jsonl",
        executor=config.executor,
        workers=config.workers,
        title="networks",
    )
    rows = [summary(one) for one in found]
    console.print(table(rows))
    record.save(config.out / "summary.json", {"config": sweep.plain(config), "rows": rows})
    write_atomically(config.out / "training.png", png(draw(found)))
    console.print(f"wrote {config.out}")


if __name__ == "__main__":
    main(sweep.parse(Config, __doc__))
