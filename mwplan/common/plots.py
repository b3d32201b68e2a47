"""Figures of plain data. Colours and labels live here."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

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


def plot_timeline(
    measured_bytes: Sequence[int], predicted_bytes: Sequence[int | None], ax: Axes | None = None
) -> Axes:
    """Live bytes over the events of one step: measured as a line, the ledger's as an area behind it where all
    are known."""
    ax = new_axes() if ax is None else ax
    at = range(len(measured_bytes))
    predicted = [size / 2**20 for size in predicted_bytes if size is not None]
    if len(predicted) == len(measured_bytes):
        ax.fill_between(at, predicted, step="mid", color="#a9d6e5", label="predicted (ledger)")
    ax.step(at, [size / 2**20 for size in measured_bytes], where="mid", color=PLAN, lw=1, label="measured")
    ax.set(xlabel="operation of the step", ylabel="arrays alive (MiB)", ylim=(0, None))
    ax.legend(frameon=False)
    return ax


def png(figure: Figure) -> bytes:
    """The figure as a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()
