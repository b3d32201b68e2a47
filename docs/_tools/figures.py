"""The drawings of the documentation: `python docs/_tools/figures.py` writes docs/figures/*.svg.

Diagrams are drawn by hand. What shows bytes over time is the ledger's replay of schedules that the planner
found, for a small network of orthogonal layers estimated on an H100: the same on every machine.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Patch, Rectangle

import mwplan as mw
from mwplan.layers import MaxMin, OrthogonalDense

FOLDER = Path(__file__).parents[1] / "figures"
#: Colours of the sweeps: F forward, R reverse and ordinary backward, M the second forward, the loss.
FORWARD, REVERSE, SECOND, TURN, KEPT = "#2a6f97", "#c1121f", "#2a9d8f", "#555555", "#e9c46a"
SWEEPS = {
    "forward": FORWARD,
    "turn": TURN,
    "backward": REVERSE,
    "reverse": REVERSE,
    "rebuild": SECOND,
    "advance": SECOND,
}
LEGEND = {
    FORWARD: "forward (F), also again",
    TURN: "the loss",
    REVERSE: "backward, reverse (R)",
    SECOND: "forward again, rebuilding cotangents (M)",
}


def network() -> tuple[mw.Chain, jax.ShapeDtypeStruct]:
    """Twelve orthogonal layers, each behind a MaxMin: they can be stored, recomputed, rebuilt, inverted."""
    keys = jax.random.split(jax.random.key(0), 12)
    layers = [f for key in keys for f in (OrthogonalDense.init(key, 64, 64), MaxMin())]
    return mw.Chain(layers), jax.ShapeDtypeStruct((16384, 64), jnp.float32)


def arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], color: str, **more: Any) -> None:
    """An arrow between two points."""
    style = {"arrowstyle": "-|>", "mutation_scale": 11, "lw": 1.6, "shrinkA": 0, "shrinkB": 0} | more
    ax.add_patch(FancyArrowPatch(start, end, color=color, **style))


def box(ax: Axes, x: float, y: float, text: str, *, color: str = "#f1f1f1", width: float = 1.0) -> None:
    """A layer."""
    ax.add_patch(Rectangle((x, y), width, 0.6, facecolor=color, edgecolor="#333333", lw=1))
    ax.text(x + width / 2, y + 0.3, text, ha="center", va="center", fontsize=10)


def blank(figure: Figure, **grid: Any) -> Axes:
    """Axes without a frame."""
    ax = figure.subplots(**grid)
    ax.set_axis_off()
    return ax


def sweeps() -> Figure:
    """F, R and M over a run of four layers."""
    figure = Figure(figsize=(9, 5.6), layout="constrained")
    ax = blank(figure)
    ax.set(xlim=(-2.6, 10.2), ylim=(-7.4, 1.5))
    rows = {
        "F, forward": (0.0, FORWARD, "x", "keeps only what the reverse sweep needs: $q_l$"),
        "R, reverse": (
            -3.0,
            REVERSE,
            "ct",
            "takes the cotangents to the run's start; keeps the fragments $c_l$",
        ),
        "M, forward again": (-6.0, SECOND, "x", "rebuilds activations and cotangents; takes the gradients"),
    }
    for title, (y, color, letter, says) in rows.items():
        ax.text(-2.5, y + 0.3, title, va="center", fontsize=11, color=color, weight="bold")
        ax.text(0.1, y + 1.15, says, va="center", fontsize=10)
        for at in range(4):
            x = 1.0 + 2.3 * at
            box(ax, x, y, f"layer {at + 1}")
            here, there = (x - 1.25, y + 0.3), (x - 0.05, y + 0.3)
            arrow(ax, *((there, here) if letter == "ct" else (here, there)), color)
            name = f"$\\overline{{x}}_{at}$" if letter == "ct" else f"$x_{at}$"
            ax.text(x - 0.65, y + 0.5, name, ha="center", fontsize=10)
            if title[0] == "M":
                box(ax, x + 0.95, y - 1.15, f"$c_{at + 1}$", color=KEPT, width=0.5)
                arrow(ax, (x + 1.2, y - 0.55), (x + 0.95, y), KEPT)
                ax.text(
                    x - 0.65, y - 0.12, f"$\\overline{{x}}_{at}$", ha="center", fontsize=10, color=REVERSE
                )
                arrow(ax, (x + 0.2, y), (x + 0.2, y - 0.6), color)
                ax.text(x + 0.1, y - 0.95, f"gradient {at + 1}", ha="center", fontsize=9)
            else:
                arrow(ax, (x + 0.5, y), (x + 0.5, y - 0.55), KEPT)
                kept = "q" if title[0] == "F" else "c"
                box(ax, x + 0.25, y - 1.15, f"${kept}_{at + 1}$", color=KEPT, width=0.5)
        end = (1.0 + 2.3 * 3 + 1.05, y + 0.3), (1.0 + 2.3 * 3 + 1.85, y + 0.3)
        if letter == "ct":
            arrow(ax, end[1], end[0], color)
        elif title[0] == "F":
            arrow(ax, *end, color)
    return figure


def fragment() -> Figure:
    """What a wide layer erases of a cotangent, and how a vijp restores it."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    ax = blank(figure)
    ax.set(xlim=(-0.3, 14.6), ylim=(-1.3, 4.6), aspect="equal")

    def column(x: float, colors: list[str], title: str) -> None:
        for at, color in enumerate(colors):
            ax.add_patch(Rectangle((x, 3 - 0.6 * at), 0.9, 0.6, facecolor=color, edgecolor="white", lw=1.5))
        ax.text(x + 0.45, 3.95, title, ha="center", fontsize=10)

    seen, erased = REVERSE, KEPT
    column(0.6, [seen] * 4 + [erased] * 2, "$\\overline{y}$, output's cotangent")
    arrow(ax, (1.8, 2.7), (5.6, 2.7), REVERSE)
    ax.text(3.7, 2.95, "vjp: $\\overline{x} = \\overline{y} J^{\\top}$", ha="center", fontsize=10)
    column(5.9, [seen] * 4, "$\\overline{x}$, input's cotangent")
    arrow(ax, (1.8, 0.3), (11.9, 0.3), KEPT)
    ax.text(6.9, -0.3, "kept: the fragment, the part that $J^{\\top}$ erases", ha="center", fontsize=10)
    arrow(ax, (7.0, 2.7), (11.9, 2.7), SECOND)
    ax.text(9.5, 2.95, "vijp: solves for $\\overline{y}$", ha="center", fontsize=10)
    column(12.1, [seen] * 4 + [erased] * 2, "$\\overline{y}$, rebuilt")
    ax.text(
        7.1,
        -1.1,
        "Submersive layers erase nothing. What a ReLU erases, the data decides: the whole cotangent is kept.",
        ha="center",
        fontsize=9,
    )
    return figure


def one_kind(profile: mw.Profile, *allowed: str) -> mw.Schedule:
    """The least-memory schedule of some strategies."""
    frontier = mw.frontier(profile, allowed=frozenset(map(mw.Strategy, allowed)))
    return frontier.at(frontier.least_bytes)


def draw_bytes(ax: Axes, profile: mw.Profile, schedule: mw.Schedule) -> None:
    """Live bytes at each event, coloured by sweep."""
    events = mw.replay(profile, schedule.runs).events
    sizes = [one.live_bytes / 2**20 for one in events]
    colors = [SWEEPS[one.sweep] for one in events]
    ax.bar(range(len(sizes)), sizes, width=1.0, color=colors, edgecolor=colors, lw=0.4)
    ax.margins(x=0.01)
    ax.spines[["top", "right"]].set_visible(False)


def strategies() -> Figure:
    """Live bytes over the step by each strategy alone."""
    chain, x = network()
    profile = mw.estimate(chain, x, device="h100")
    kinds = {
        "STORE: every layer's residuals": one_kind(profile, "store"),
        "RECOMPUTE: nested, at its least memory": one_kind(profile, "store", "recompute"),
        "VIJP: one moonwalk run, F R M": one_kind(profile, "vijp"),
        "INVERT: activations rebuilt on the way back": one_kind(profile, "invert"),
    }
    figure = Figure(figsize=(9, 7.6), layout="constrained")
    plots = figure.subplots(len(kinds), 1, sharey=True)
    best = min(schedule.time_ns for schedule in kinds.values())
    for ax, (title, schedule) in zip(plots, kinds.items()):
        draw_bytes(ax, profile, schedule)
        peak = schedule.peak_bytes / 2**20
        ax.set_title(
            f"{title} (peak {peak:.0f} MiB, time {schedule.time_ns / best:.2f})", fontsize=10, loc="left"
        )
        ax.set_ylabel("MiB alive", fontsize=9)
    plots[-1].set_xlabel("operation of the step")
    figure.legend(
        handles=[Patch(color=color, label=text) for color, text in LEGEND.items()],
        loc="outside lower center", ncols=4, frameon=False, fontsize=8,
    )  # fmt: skip
    return figure


def schedule() -> Figure:
    """A mixed schedule over time: which layer works in which sweep, and the bytes alive.

    Some layers are pinned, so that all kinds of runs are seen; the planner chose the others' strategies."""
    chain, x = network()
    profile = mw.estimate(chain, x, device="h100")
    layers = range(1, len(profile) + 1)
    pins = dict.fromkeys(layers[:6], mw.Strategy.VIJP) | dict.fromkeys(layers[16:22], mw.Strategy.INVERT)
    pins |= dict.fromkeys(layers[8:13], mw.Strategy.RECOMPUTE)
    frontier = mw.frontier(profile)
    least, most = frontier.points[0][0], frontier.points[-1][0]
    found = mw.plan(profile, least + (most - least) // 2, pins=pins, frontier=frontier)
    events = mw.replay(profile, found.runs).events
    figure = Figure(figsize=(9, 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    for at, event in enumerate(events):
        layer = len(profile) + 1 if event.sweep == "turn" else event.layer
        upper.add_patch(Rectangle((at - 0.5, layer - 0.5), 1, 1, color=SWEEPS[event.sweep], lw=0))
    end = 0
    for run in found.runs:
        upper.axhline(run.stop + 0.5, color="#bbbbbb", lw=0.6)
        end = run.stop
        middle = (run.start + run.stop + 1) / 2
        upper.text(len(events) + 0.5, middle, run.kind.value, va="center", fontsize=8)
    upper.set(ylabel="layer, from the input", ylim=(0.5, end + 1.5), xlim=(-0.5, len(events) + 8))
    upper.axhline(end + 1.5, color="#bbbbbb", lw=0.6)
    upper.spines[["top", "right"]].set_visible(False)
    draw_bytes(lower, profile, found)
    lower.set(xlabel="operation of the step", ylabel="MiB alive")
    figure.legend(
        handles=[Patch(color=color, label=text) for color, text in LEGEND.items()],
        loc="outside lower center", ncols=4, frameon=False, fontsize=8,
    )  # fmt: skip
    return figure


FIGURES = {"sweeps": sweeps, "fragment": fragment, "strategies": strategies, "schedule": schedule}


def main(folder: Path = FOLDER) -> None:
    """Draws all of them."""
    # Text stays text, and the file the same from run to run.
    style = {"svg.fonttype": "none", "svg.hashsalt": "mwplan", "font.family": "sans-serif"}
    with matplotlib.rc_context(style):
        for name, draw in FIGURES.items():
            draw().savefig(folder / f"{name}.svg", metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
