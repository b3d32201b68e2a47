"""Figures. Colours and labels live here."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from mwplan.tracing import Timeline
    from mwplan.training import TrainResult

PLAN, BACKPROP, LIMIT = "#2a6f97", "#c1121f", "#555555"


def new_axes() -> Axes:
    """Axes on a figure of its own, independent of any interactive backend."""
    return Figure(figsize=(6, 4), layout="constrained").subplots()


def plot_frontier(points: Sequence[tuple[int, int]], ax: Axes | None = None, **line: Any) -> Axes:
    """Least time against memory: what is on or above the line is feasible."""
    ax = new_axes() if ax is None else ax
    style = {"color": PLAN, "where": "post", "label": "frontier"} | line
    ax.step([need / 2**20 for need, _ in points], [time / 1e6 for _, time in points], **style)
    ax.set(xlabel="device memory of the step (MiB)", ylabel="predicted time of a step (ms)")
    return ax


def plot_timeline(timeline: Timeline, ax: Axes | None = None) -> Axes:
    """Live bytes over the events of one step: measured as a line, the ledger's as an area behind it."""
    ax = new_axes() if ax is None else ax
    at = range(len(timeline.events))
    predicted = [
        e.predicted_array_bytes / 2**20 for e in timeline.events if e.predicted_array_bytes is not None
    ]
    if len(predicted) == len(timeline.events):
        ax.fill_between(at, predicted, step="mid", color="#a9d6e5", label="predicted (ledger)")
    ax.step(
        at, [e.array_bytes / 2**20 for e in timeline.events], where="mid", color=PLAN, lw=1, label="measured"
    )
    ax.set(xlabel="operation of the step", ylabel="arrays alive (MiB)", ylim=(0, None))
    ax.legend(frameon=False)
    return ax


def png(figure: Figure) -> bytes:
    """The figure as a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def plot_training(result: TrainResult) -> bytes:
    """Loss curves of plain and planned training, and the memory of their gradient steps beside the budget; a PNG."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    curves, bars = figure.subplots(1, 2, width_ratios=(3, 2))
    curves.plot(result.losses_plain, color=BACKPROP, lw=2.5, alpha=0.45, label="backpropagation")
    curves.plot(result.losses_planned, color=PLAN, lw=1, label="planned")
    for step in result.replans:
        curves.axvline(step, color=LIMIT, lw=0.8, ls=":", label="planned again")
    curves.set(xlabel="step", ylabel="training loss (cross entropy)", yscale="log")
    curves.set_title(
        f"test accuracy {result.accuracy_planned:.1%} planned, {result.accuracy_plain:.1%} backpropagation",
        fontsize=10,
    )
    curves.legend(frameon=False)
    rows = [
        ("backpropagation\nmeasured", result.backprop_temporary_bytes, BACKPROP),
        ("plan\npredicted", result.predicted_temporary_bytes, "#a9d6e5"),
        ("plan\nmeasured", result.measured_temporary_bytes, PLAN),
    ]
    drawn = bars.bar(
        [name for name, _, _ in rows], [size / 2**20 for _, size, _ in rows], color=[c for *_, c in rows]
    )
    bars.bar_label(
        drawn, fmt="%.1f", label_type="center", color="black", bbox={"fc": "white", "ec": "none", "pad": 1}
    )
    room = (result.budget_bytes - result.fixed_bytes) / 2**20
    bars.axhline(room, color=LIMIT, ls="--", lw=1, label=f"budget {room:.1f}")
    bars.legend(frameon=False)
    bars.set(ylabel="temporaries of one gradient step (MiB)")
    bars.set_title(
        f"{result.planned_step_seconds / result.backprop_step_seconds:.2f} x backpropagation's time a step",
        fontsize=10,
    )
    for ax in (curves, bars):
        ax.spines[["top", "right"]].set_visible(False)
    return png(figure)
