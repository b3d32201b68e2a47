"""The figure of a training run."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogFormatter

from mwplan.app.train_result import TrainResult
from mwplan.common.plots import BACKPROP, LIMIT, PLAN, png
from mwplan.common.sizes import show_bytes
from mwplan.report.palette import RECOMPUTATION, STRATEGIES

_MIB = 2**20


def training_figure(result: TrainResult) -> bytes:
    """Time against memory with the three measured steps, the plans of all budgets by layer, loss curves, and
    the memory of the steps beside the budget; a PNG."""
    figure = Figure(figsize=(12.5, 8.6), layout="constrained")
    axes = figure.subplots(2, 2, width_ratios=(3, 2), height_ratios=(1, 1))
    (trade, curves), (plans, bars) = axes
    _trade(trade, result)
    _plans(plans, result)
    _curves(curves, result)
    _bars(bars, result)
    for ax in (trade, curves, bars):
        ax.spines[["top", "right"]].set_visible(False)
    memory = result.measured_temporary_bytes / result.backprop_temporary_bytes
    time = result.planned_step_seconds / result.backprop_step_seconds
    figure.suptitle(
        f"{len(result.layers)} layers trained in {memory:.2f} of backpropagation's temporaries, "
        f"at {time:.2f} of its time a gradient",
        fontsize=13,
    )
    return png(figure)


def _trade(ax: Axes, result: TrainResult) -> None:
    """Time against memory: as predicted, and the steps that were measured."""
    fixed, plain = result.fixed_bytes, result.backprop_predicted_ns
    top = 2.2
    for points, color, style, name in (
        (result.recomputation, RECOMPUTATION, "--", "recomputation alone, predicted"),
        (result.frontier, PLAN, "-", "all strategies, predicted"),
    ):
        ax.step(
            [(total - fixed) / _MIB for total, _ in points],
            [ns / plain for _, ns in points],
            where="post", color=color, ls=style, lw=2, label=name,
        )  # fmt: skip
    measured = [("backpropagation", result.backprop_temporary_bytes, 1.0, BACKPROP, "s")]
    if result.recomputation_temporary_bytes is not None and result.recomputation_step_seconds is not None:
        seconds = result.recomputation_step_seconds / result.backprop_step_seconds
        measured.append(
            ("recomputation alone", result.recomputation_temporary_bytes, seconds, RECOMPUTATION, "^")
        )
    seconds = result.planned_step_seconds / result.backprop_step_seconds
    measured.append(("plan", result.measured_temporary_bytes, seconds, PLAN, "D"))
    for name, size, time, color, marker in measured:
        ax.plot(
            size / _MIB, time, marker, ms=9, color=color, mec="black", ls="", label=f"{name}, measured",
            zorder=3,
        )  # fmt: skip
        top = max(top, 1.1 * time)
    ax.axvline((result.budget_bytes - fixed) / _MIB, color=LIMIT, ls=":", lw=1.2, label="budget")
    ax.set_xscale("log")
    for formatter in (ax.xaxis.set_major_formatter, ax.xaxis.set_minor_formatter):
        formatter(LogFormatter(minor_thresholds=(2, 0.8)))
    ax.set(xlabel="temporaries of a gradient step (MiB)", ylabel="time / backpropagation's", ylim=(0, top))
    ax.set_title("memory against time", fontsize=11)
    ax.legend(frameon=False, fontsize=8)


def _plans(ax: Axes, result: TrainResult) -> None:
    """A row a budget, a cell a layer; the trained plan below, in a frame."""
    rows = [(one.budget_bytes, one.strategies) for one in result.plans]
    rows.append((result.budget_bytes, result.schedule.strategies))
    count, small = len(result.layers), 5.5 if len(result.layers) > 60 else 6.5
    for at, (_, strategies) in enumerate(rows):
        y = at + (0.6 if at == len(rows) - 1 else 0)
        for layer, strategy in enumerate(strategies):
            look = STRATEGIES[strategy]
            ax.add_patch(Rectangle((layer, y), 1, 1, fc=look.color, ec="white", lw=0.5))
            ax.text(
                layer + 0.5, y + 0.5, look.letter, ha="center", va="center", fontsize=small, color=look.ink
            )
    end = len(rows) - 1 + 0.6
    ax.add_patch(Rectangle((0, end), count, 1, fc="none", ec="black", lw=2))
    names = [f"{show_bytes(budget - result.fixed_bytes)}" for budget, _ in rows]
    names[-1] = f"trained: {names[-1]}"
    places = [*(at + 0.5 for at in range(len(rows) - 1)), end + 0.5]
    ax.set_yticks(places, names, fontsize=8)
    ax.set(xlim=(0, count), ylim=(end + 1.1, 0), xlabel="layer, from the input", ylabel="temporaries")
    used = [s for s in STRATEGIES if any(s in strategies for _, strategies in rows)]
    legend = ", ".join(f"{STRATEGIES[s].letter} {s.value}" for s in used)
    ax.set_title(f"the plan as the budget shrinks: {legend}", fontsize=11)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)


def _curves(ax: Axes, result: TrainResult) -> None:
    ax.plot(result.losses_plain, color=BACKPROP, lw=3, alpha=0.45, label="backpropagation")
    ax.plot(result.losses_planned, color=PLAN, lw=1, label="planned")
    for number, step in enumerate(result.replans):
        ax.axvline(step, color=LIMIT, lw=0.8, ls=":", label=None if number else "planned again")
    ax.set(xlabel="step", ylabel="training loss (cross entropy)", yscale="log")
    ax.set_title(
        f"test accuracy {result.accuracy_planned:.1%} planned, {result.accuracy_plain:.1%} backpropagation",
        fontsize=11,
    )
    ax.legend(frameon=False)


def _bars(ax: Axes, result: TrainResult) -> None:
    rows = [("back-\npropagation", result.backprop_temporary_bytes, BACKPROP)]
    if result.recomputation_temporary_bytes is not None:
        rows.append(("recompu-\ntation alone", result.recomputation_temporary_bytes, RECOMPUTATION))
    rows += [
        ("plan\npredicted", result.predicted_temporary_bytes, "#a9d6e5"),
        ("plan\nmeasured", result.measured_temporary_bytes, PLAN),
    ]
    drawn = ax.bar(
        [name for name, _, _ in rows], [size / _MIB for _, size, _ in rows], color=[c for *_, c in rows]
    )
    ax.bar_label(
        drawn, fmt="%.1f", label_type="center", color="black", bbox={"fc": "white", "ec": "none", "pad": 1}
    )
    room = (result.budget_bytes - result.fixed_bytes) / _MIB
    ax.axhline(room, color=LIMIT, ls="--", lw=1, label=f"budget {room:.1f}")
    ax.legend(frameon=False)
    ax.set(ylabel="temporaries of a gradient step (MiB)")
    ax.set_title("memory", fontsize=11)
