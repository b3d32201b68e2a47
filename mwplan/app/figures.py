"""The figure of a training run."""

from __future__ import annotations

from matplotlib.figure import Figure

from mwplan.app.train_result import TrainResult
from mwplan.common.plots import BACKPROP, LIMIT, PLAN, png


def training_figure(result: TrainResult) -> bytes:
    """Loss curves of plain and planned training, and the memory of their gradient steps beside the budget; a
    PNG."""
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
