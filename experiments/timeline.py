"""One step's memory, event by event, and how the schedule changes as the budget shrinks:
`python -m experiments.timeline`.

For each model: the live bytes that the ledger predicts and those that `mw.trace` finds on the device, at a
budget `fraction` of the way from the least feasible to what the fastest schedule needs; and a map of the
strategies, layer by layer, at `budgets` spaced evenly by ratio. Writes results/timeline/.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import rich.box
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from rich.table import Table

import mwplan as mw
from experiments import record, sweep, zoo
from experiments.alternatives import Problem
from mwplan.common.plots import png
from mwplan.common.serial import write_atomically
from mwplan.plans.schedule import Strategy


@dataclass(frozen=True)
class Config:
    """Sizes, as in the other experiments."""

    models: tuple[str, ...] = ("lipschitz", "revnet", "gpt")
    depth: int = 12
    width: int = 32
    batch: int = 32
    resolution: int = 32
    fraction: float = 0.2
    budgets: int = 24
    max_error: float = 1e-4
    thin: float = 0.0
    repeats: int = 5
    seed: int = 0
    executor: str = "processes"
    workers: int = 1
    out: Path = record.RESULTS / "timeline"


COLORS = {
    Strategy.STORE: "#c1121f",
    Strategy.RECOMPUTE: "#e9c46a",
    Strategy.FRAGMENT: "#83c5be",
    Strategy.VIJP: "#2a6f97",
    Strategy.INVERT: "#ff70a6",
}


def measure(point: dict[str, Any]) -> dict[str, Any]:
    """One model: events of one step, and the strategies at every budget."""
    chain, x, labels, loss = zoo.build(zoo.Config(**point["network"]))
    problem = Problem(chain, x, labels, loss, point["max_error"], point["thin"], point["repeats"])
    frontier = problem.frontier()
    low, high = frontier.points[0][0], frontier.points[-1][0]
    budget = low + int(point["fraction"] * (high - low))
    schedule = frontier.at(budget)
    traced = mw.trace(schedule, chain, x, loss, labels, profile=problem.profile)
    events = [
        {
            "sweep": e.sweep,
            "layer": e.layer,
            "array_bytes": e.array_bytes,
            "predicted_array_bytes": e.predicted_array_bytes,
            "workspace_bytes": e.workspace_bytes,
            "time_ns": e.time_ns,
        }
        for e in traced.events
    ]
    order = list(Strategy)
    count = point["budgets"]
    rows = []
    for budget_bytes in (int(np.ceil(low * (high / low) ** (k / max(1, count - 1)))) for k in range(count)):
        found = frontier.at(budget_bytes)
        rows.append(
            {
                "budget_bytes": budget_bytes,
                "time_ns": found.time_ns,
                "status": found.status.value,
                "strategies": [order.index(s) for s in found.strategies],
            }
        )
    return {"budget_bytes": budget, "schedule": str(schedule), "events": events, "map": rows}


def draw(one: dict[str, Any]) -> Figure:
    """Left, arrays alive over the events of the step; right, strategies by layer and budget."""
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    at = range(len(one["events"]))
    predicted = [(e["predicted_array_bytes"] or 0) / 2**20 for e in one["events"]]
    measured = [e["array_bytes"] / 2**20 for e in one["events"]]
    left.fill_between(at, predicted, step="mid", color="#a9d6e5", label="predicted (ledger)")
    left.step(at, measured, where="mid", color="#2a6f97", lw=1, label="measured")
    network = one["point"]["network"]
    left.set(xlabel="operation of the step", ylabel="arrays alive (MiB)", ylim=(0, None))
    left.set_title(
        f"{network['model']}, {network['depth']} blocks, budget {one['budget_bytes'] / 2**20:.1f} MiB"
    )
    left.legend(fontsize=8, frameon=False)
    grid = np.array([row["strategies"] for row in one["map"]])
    colors = ListedColormap([COLORS[s] for s in Strategy])
    right.imshow(
        grid,
        aspect="auto",
        cmap=colors,
        vmin=-0.5,
        vmax=len(COLORS) - 0.5,
        origin="lower",
        interpolation="none",
    )
    ticks = np.linspace(0, len(grid) - 1, min(6, len(grid))).round().astype(int)
    right.set_yticks(ticks, [f"{one['map'][k]['budget_bytes'] / 2**20:.1f}" for k in ticks])
    right.set(xlabel="layer, from the input", ylabel="budget (MiB)", title="strategies as the budget shrinks")
    handles = [Patch(color=COLORS[s], label=s.value) for s in Strategy]
    figure.legend(handles=handles, fontsize=8, loc="outside right center", frameon=False)
    return figure


def main(config: Config) -> None:
    """Runs what is missing, prints, draws and saves."""
    sizes = {
        "depth": config.depth,
        "width": config.width,
        "batch": config.batch,
        "resolution": config.resolution,
    }
    points = [
        {
            "network": {"model": model, "seed": config.seed, **sizes},
            **{k: getattr(config, k) for k in ("fraction", "budgets", "max_error", "thin", "repeats")},
        }
        for model in config.models
    ]
    found = sweep.run(
        points,
        measure,
        config.out / "records.jsonl",
        executor=config.executor,
        workers=config.workers,
        title="models",
    )
    table = Table(title="arrays alive over one step (MiB)", box=rich.box.SIMPLE)
    for name in ("model", "events", "peak predicted", "peak measured", "largest difference"):
        table.add_column(name, justify="left" if name == "model" else "right")
    for one in found:
        pairs = [(e["predicted_array_bytes"] or 0, e["array_bytes"]) for e in one["events"]]
        peaks = [max(pair[k] for pair in pairs) for k in (0, 1)]
        apart = max(abs(a - b) for a, b in pairs)
        table.add_row(
            one["point"]["network"]["model"], str(len(pairs)), *(f"{v / 2**20:.3f}" for v in (*peaks, apart))
        )
        network = one["point"]["network"]
        write_atomically(config.out / f"{network['model']}_{network['depth']}.png", png(draw(one)))
    console = record.console()
    console.print(table)
    console.print(f"wrote {config.out}")


if __name__ == "__main__":
    main(sweep.parse(Config, __doc__))
