"""Figures. Colours and labels live here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes

PLAN, BACKPROP, LIMIT = "#2a6f97", "#c1121f", "#555555"


def new_axes() -> Axes:
    """Axes on a figure of its own, independent of any interactive backend."""
    from matplotlib.figure import Figure

    return Figure(figsize=(6, 4), layout="constrained").subplots()


def plot_frontier(points: Sequence[tuple[int, int]], ax: Axes | None = None, **line: Any) -> Axes:
    """Least time against memory: what is on or above the line is feasible."""
    ax = new_axes() if ax is None else ax
    style = {"color": PLAN, "where": "post", "label": "frontier"} | line
    ax.step([need / 2**20 for need, _ in points], [time / 1e6 for _, time in points], **style)
    ax.set(xlabel="device memory of the step (MiB)", ylabel="predicted time of a step (ms)")
    return ax
