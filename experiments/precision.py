"""Gradient error against depth and `max_error`: `python -m experiments.precision`.

Chains of blocks, dense or convolutional, each kind with another growth of errors. For each kind and depth:
pure Moonwalk (one run as long as it can be, whatever the error), and the least-memory schedule without
recomputation at each of several `max_error`. Of each: temporaries, predicted error of the rebuilt cotangent,
what the step itself reported, and the true error of the parameter gradients against float64 backpropagation.
A second sweep trains one network by SGD with the schedule made before the first step, and follows the same
three errors. Writes results/precision/.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import rich.box
import seaborn as sns
from matplotlib.figure import Figure
from rich.table import Table

import mwplan as mw
from experiments import alternatives, record, sweep
from mwplan import layers as ml
from mwplan import planning
from mwplan.app.side_by_side import relative_error
from mwplan.common.plots import png
from mwplan.common.serial import write_atomically
from mwplan.compilers.compiling import temporaries
from mwplan.plans.schedule import Schedule, Strategy
from mwplan.solvers import baselines
from mwplan.solvers.problem import Problem


@dataclass(frozen=True)
class Config:
    """Sizes. `depths` count blocks; `trained`, kinds that are also followed over `steps` of training, at
    `train_depth`, checked `every` so many steps."""

    kinds: tuple[str, ...] = ("slope_0.3", "slope_0.8", "maxmin", "ordinary", "conv")
    depths: tuple[int, ...] = (8, 16, 32, 64)
    tolerances: tuple[float, ...] = (1e-2, 1e-3, 1e-4, 1e-5)
    trained: tuple[str, ...] = ("slope_0.8", "ordinary")
    train_depth: int = 32
    steps: int = 200
    every: int = 20
    rate: float = 0.02
    width: int = 64
    batch: int = 512
    repeats: int = 2
    seed: int = 0
    executor: str = "processes"
    workers: int = 1
    out: Path = record.RESULTS / "precision"


def _dense(slope: float) -> Callable[[Any, int], list[Any]]:
    return lambda key, width: [ml.Dense.init(key, width, width), ml.LeakyReLU(slope)]


BLOCKS: dict[str, Callable[[Any, int], list[Any]]] = {
    "slope_0.3": _dense(0.3),
    "slope_0.8": _dense(0.8),
    "maxmin": lambda key, width: [ml.OrthogonalDense.init(key, width, width), ml.MaxMin()],
    "ordinary": lambda key, width: [ml.Dense.he(key, width, width, slope=0.8), ml.LeakyReLU(0.8)],
    "conv": lambda key, width: [ml.Conv1D.init(key, width // 4, width // 4), ml.LeakyReLU(0.8)],
}
#: errors from here on are left out of the figure: no digit is right
WORTHLESS = 10.0
NAMES = {
    "slope_0.3": "orthogonal dense, slope 0.3",
    "slope_0.8": "orthogonal dense, slope 0.8",
    "maxmin": "orthogonal dense, MaxMin",
    "ordinary": "He dense, slope 0.8",
    "conv": "delta-orthogonal 1D convolutions, slope 0.8",
}


def loss(y: Any, target: Any) -> Any:
    """Mean square distance of the normalised output from the target: deep networks' scales vary."""
    return jnp.mean((y / jnp.sqrt(jnp.mean(y**2)) - target) ** 2)


def problem(point: dict[str, Any]) -> alternatives.Problem:
    """The chain of one point, each block a layer, with random input and target."""
    kind, depth, width = point["kind"], point["depth"], point["width"]
    keys = jax.random.split(jax.random.key(point["seed"]), depth + 2)
    chain = mw.Chain([ml.Sequential(tuple(BLOCKS[kind](key, width))) for key in keys[:depth]])
    shape = (point["batch"] // 16, 64, width // 4) if kind == "conv" else (point["batch"], width)
    x, target = (jax.random.normal(key, shape) for key in keys[depth:])
    return alternatives.Problem(chain, x, target, loss, repeats=point["repeats"])


def errors(
    this: alternatives.Problem, schedule: Schedule, truth: list[Any], step: Any = None
) -> dict[str, Any]:
    """Predicted, reported and true errors of one schedule, with its bytes."""
    step = step or compiled(this, schedule)
    (_, report), grads = step(this.chain, this.x, this.labels)
    whole, worst = relative_error(alternatives.innermost(grads), truth)
    return {
        "predicted_error": _finite(schedule.error),
        "reported_error": _finite(float(report.worst)),
        "error": _finite(whole),
        "worst_error": _finite(worst),
        "predicted_bytes": schedule.peak_bytes,
        "temporary_bytes": temporaries(step),
        "predicted_seconds": schedule.time_ns / 1e9,
        "fragments": schedule.strategies.count(Strategy.FRAGMENT),
        "runs": len(schedule.runs),
    }


def compiled(this: alternatives.Problem, schedule: Schedule) -> Any:
    """The step with its report."""
    return mw.jit(mw.value_and_grad(loss, schedule)).lower(this.chain, this.x, this.labels).compile()


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def schedules(this: alternatives.Problem, tolerances: list[float]) -> list[tuple[str, Schedule]]:
    """Pure Moonwalk, and the least-memory schedule without recomputation for each tolerance."""
    pure = baselines.all_moonwalk(Problem(profile=this.profile, max_error=math.inf))
    made = [("pure moonwalk", planning.scheduled(this.profile, pure, math.inf))] if pure.runs else []
    for tolerance in tolerances:
        frontier = mw.frontier(
            this.profile, max_error=tolerance, allowed=set(Strategy) - {Strategy.RECOMPUTE}
        )
        if frontier.least_bytes is not None:
            made.append((f"max_error {tolerance:.0e}", frontier.at(frontier.least_bytes)))
    return made


def measure(point: dict[str, Any]) -> dict[str, Any]:
    """One kind and depth; with `steps`, followed over training."""
    this = problem(point)
    if point["steps"]:
        return {"rows": follow(point, this)}
    truth = alternatives.float64_gradients(this)
    rows = [{"name": name, **errors(this, s, truth)} for name, s in schedules(this, point["tolerances"])]
    plain = mw.jit(jax.value_and_grad(lambda net: loss(net(this.x), this.labels))).lower(this.chain).compile()
    whole, worst = relative_error(alternatives.innermost(plain(this.chain)[1]), truth)
    rows.append(
        {
            "name": "backpropagation",
            "error": whole,
            "worst_error": worst,
            "temporary_bytes": temporaries(plain),
        }
    )
    return {"rows": rows}


def follow(point: dict[str, Any], this: alternatives.Problem) -> list[dict[str, Any]]:
    """Errors over training by plain SGD on gradients of unit length at most, with the schedules of step 0."""
    import dataclasses

    import optax

    chosen = [(name, s, compiled(this, s)) for name, s in schedules(this, [point["tolerances"][0]])]
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(point["rate"], momentum=0.9))
    chain, state = this.chain, optimizer.init(this.chain)

    @mw.jit
    def update(chain: Any, state: Any) -> Any:
        value, grads = jax.value_and_grad(lambda net: loss(net(this.x), this.labels))(chain)
        updates, state = optimizer.update(grads, state, chain)
        return optax.apply_updates(chain, updates), state, value

    rows = []
    for at in range(point["steps"] + 1):
        if at % point["every"] == 0:
            now = dataclasses.replace(this, chain=chain)
            truth = alternatives.float64_gradients(now)
            rows += [{"name": name, "step": at, **errors(now, s, truth, step)} for name, s, step in chosen]
        chain, state, value = update(chain, state)
        if at % point["every"] == 0:
            for row in rows[-len(chosen) :]:
                row["loss"] = float(value)
    return rows


def points(config: Config) -> list[dict[str, Any]]:
    """The sweep over depths, then the training runs."""
    sizes = {k: getattr(config, k) for k in ("width", "batch", "repeats", "seed")}
    made: list[dict[str, Any]] = [
        {"kind": kind, "depth": depth, "steps": 0, "tolerances": list(config.tolerances), **sizes}
        for kind in config.kinds
        for depth in config.depths
    ]
    training = {"steps": config.steps, "every": config.every, "rate": config.rate, "tolerances": [1e-4]}
    return made + [
        {"kind": kind, "depth": config.train_depth, **training, **sizes} for kind in config.trained
    ]


def table(found: list[dict[str, Any]]) -> Table:
    """One line a schedule and depth; of training, the first check and the last."""
    made = Table(
        title="errors: predicted and reported of the cotangent, true of the gradients", box=rich.box.SIMPLE
    )
    for name in (
        "network",
        "blocks",
        "step",
        "schedule",
        "KiB",
        "predicted",
        "reported",
        "gradients",
        "worst layer",
    ):
        made.add_column(name, justify="left" if name in ("network", "schedule") else "right")

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.1e}"

    for one in found:
        ends = {0, one["point"]["steps"]}
        for row in one["rows"]:
            if row.get("step", 0) in ends:
                made.add_row(
                    one["point"]["kind"],
                    str(one["point"]["depth"]),
                    str(row.get("step", "")),
                    row["name"],
                    f"{row['temporary_bytes'] / 1024:.0f}",
                    *(
                        number(row.get(k))
                        for k in ("predicted_error", "reported_error", "error", "worst_error")
                    ),
                )
    return made


def draw(found: list[dict[str, Any]]) -> Figure:
    """One panel a kind: true errors against depth, solid, predicted, dotted; below, over training."""
    sns.set_theme(style="whitegrid", context="paper")
    deep = [one for one in found if not one["point"]["steps"]]
    trained = [one for one in found if one["point"]["steps"]]
    kinds = list(dict.fromkeys(one["point"]["kind"] for one in deep))
    panels = [(k, [o for o in deep if o["point"]["kind"] == k]) for k in kinds]
    panels += [(one["point"]["kind"], [one]) for one in trained]
    columns = min(4, len(panels))
    figure = Figure(figsize=(3.4 * columns, 3 * math.ceil(len(panels) / columns) + 0.4), layout="constrained")
    axes = list(figure.subplots(math.ceil(len(panels) / columns), columns, squeeze=False).flat)
    names = list(dict.fromkeys(row["name"] for one in found for row in one["rows"]))
    colors = dict(zip(names, sns.color_palette("colorblind", len(names))))
    for ax, (kind, records) in zip(axes, panels):
        training = bool(records[0]["point"]["steps"])
        for name in names:
            rows = [(one, row) for one in records for row in one["rows"] if row["name"] == name]
            at = [row["step"] if training else one["point"]["depth"] for one, row in rows]
            for field, style in (("error", "-o"), ("predicted_error", ":")):
                values = [row.get(field) or math.nan for _, row in rows]
                ax.plot(at, values, style, ms=3, lw=1, color=colors[name])
        ax.set(yscale="log", xlabel="training step" if training else "blocks")
        ax.set_title(f"{NAMES[kind]}{', trained' if training else ''}", fontsize=8)
        if not training:
            ax.set_xscale("log", base=2)
        if ax.get_ylim()[1] > WORTHLESS:
            ax.set_ylim(1e-7, WORTHLESS)
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    axes[0].set_ylabel("relative error of the gradients")
    for name in names:
        axes[0].plot([], [], color=colors[name], label=name)
    axes[0].plot([], [], ":", color="#555555", label="predicted")
    figure.legend(fontsize=8, loc="outside lower center", ncols=4)
    return figure


def main(config: Config) -> None:
    """Runs what is missing, prints, draws and saves."""
    console = record.console()
    found = sweep.run(
        points(config),
        measure,
        config.out / "records.jsonl",
        executor=config.executor,
        workers=config.workers,
        title="chains",
    )
    console.print(table(found))
    rows = [
        {**{k: one["point"][k] for k in ("kind", "depth", "steps")}, **row}
        for one in found
        for row in one["rows"]
    ]
    record.save(config.out / "summary.json", {"config": sweep.plain(config), "rows": rows})
    write_atomically(config.out / "precision.png", png(draw(found)))
    console.print(f"wrote {config.out}")


if __name__ == "__main__":
    main(sweep.parse(Config, __doc__))
