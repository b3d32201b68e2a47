"""Tables and figures of the points' records."""

from __future__ import annotations

import statistics
from typing import Any

import rich.box
import seaborn as sns
from matplotlib.figure import Figure
from rich.table import Table

from experiments import budget_sweep, reading
from experiments.gpu.config import Config
from mwplan.common.plots import BACKPROP, LIMIT, PLAN


def laddered(config: Config, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The ladder's steps, one row each."""
    rows = []
    for one in found:
        if one["point"]["kind"] != "step":
            continue
        peak = one.get("allocator", {}).get("ran")
        rows.append(
            {
                "model": one["point"]["model"],
                "method": one["point"]["method"],
                "depth": one["point"]["depth"],
                "ran": one["ran"],
                "limit_bytes": one.get("memory", {}).get("limit_bytes"),
                "total_bytes": one.get("total_bytes"),
                "allocator_peak_bytes": peak,
                "allocator_over_xla": peak / one["total_bytes"] if peak else None,
                "seconds": statistics.median(one["seconds"]) if one["ran"] else None,
                "compile_seconds": one.get("compile_seconds"),
                "shares_tried": 1 + len(one.get("reasons", ())) if one["ran"] else None,
                "reason": one.get("reason"),
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    """The ladder for people."""
    made = Table(title="steps within the capped pool", box=rich.box.SIMPLE)
    for name in ("method", "blocks", "XLA, MiB", "allocator's peak, MiB", "ratio", "s a step", "ms a block"):
        made.add_column(name, justify="left" if name == "method" else "right")

    def number(value: float | None, scale: float = 1.0, form: str = ".2f") -> str:
        return "-" if value is None else f"{value / scale:{form}}"

    for row in sorted(rows, key=lambda row: (row["method"], row["depth"])):
        sizes = (row["total_bytes"], row["allocator_peak_bytes"])
        made.add_row(
            row["method"],
            str(row["depth"]),
            *(number(size, 2**20, ".0f") for size in sizes),
            number(row["allocator_over_xla"]),
            number(row["seconds"], 1, ".3f") if row["ran"] else f"failed: {row['reason'] or ''}"[:50],
            number(row["seconds"], row["depth"] / 1e3),
        )
    return made


def draw_ladder(config: Config, rows: list[dict[str, Any]]) -> Figure:
    """Memory and time a block against depth; where memory ran out, a cross at the pool's limit."""
    sns.set_theme(style="whitegrid", context="paper")
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    limit = config.pool_gib * 1024
    for label, (names, color, marker) in reading.FAMILIES.items():
        mine = sorted((row for row in rows if row["method"] in names), key=lambda row: row["depth"])
        ran = [row for row in mine if row["ran"]]
        if not mine:
            continue
        at = [row["depth"] for row in ran]
        left.plot(at, [row["total_bytes"] / 2**20 for row in ran], color=color, marker=marker, label=label)
        peaks = [
            (row["depth"], row["allocator_peak_bytes"] / 2**20) for row in ran if row["allocator_peak_bytes"]
        ]
        if peaks:
            left.plot(*zip(*peaks), color=color, marker=marker, mfc="none", ls=":")
        failed = [row["depth"] for row in mine if not row["ran"]]
        left.plot(failed, [limit] * len(failed), "x", color=color, ms=8, mew=2)
        right.plot(at, [1e3 * row["seconds"] / row["depth"] for row in ran], color=color, marker=marker)
    left.axhline(limit, color=LIMIT, lw=0.8, ls="--")
    left.plot([], [], "o:", mfc="none", color=LIMIT, label="the allocator's peak")
    left.plot([], [], "x", color=LIMIT, label="did not run")
    left.set(xlabel="depth (blocks)", ylabel="device memory of the step (MiB)", xscale="log", yscale="log")
    right.set(xlabel="depth (blocks)", ylabel="time a block (ms)", xscale="log")
    left.set_title(f"{config.model} in a pool of {config.pool_gib:g} GiB")
    left.legend(fontsize=7)
    return figure


def draw_peaks(rows: list[dict[str, Any]]) -> Figure:
    """The allocator's peak against XLA's figure."""
    sns.set_theme(style="whitegrid", context="paper")
    figure = Figure(figsize=(5, 4.5), layout="constrained")
    ax = figure.subplots()
    pairs = [
        (r["total_bytes"] / 2**20, r["allocator_peak_bytes"] / 2**20, r["method"])
        for r in rows
        if r["allocator_peak_bytes"]
    ]
    for method, color in (("plan", PLAN), ("backprop_scan", BACKPROP), (None, LIMIT)):
        mine = [
            p for p in pairs if p[2] == method or (method is None and p[2] not in ("plan", "backprop_scan"))
        ]
        ax.plot([p[0] for p in mine], [p[1] for p in mine], "o", color=color, label=method or "others")
    ends = [min(p[0] for p in pairs), max(p[0] for p in pairs)]
    ax.plot(ends, ends, color=LIMIT, lw=0.8)
    ax.set(
        xlabel="fixed + temporaries by memory_analysis() (MiB)",
        ylabel="the allocator's peak (MiB)",
        xscale="log",
        yscale="log",
    )
    ax.legend()
    return figure


def deepest(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of each method: the deepest network that ran, the shallowest that did not, and why."""
    made: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == name]
        ran = max((row for row in mine if row["ran"]), key=lambda row: row["depth"], default=None)
        failed = min((row for row in mine if not row["ran"]), key=lambda row: row["depth"], default=None)
        made[name] = {
            "deepest": ran and ran["depth"],
            "seconds_a_block": ran and ran["seconds"] / ran["depth"],
            "failed_at": failed and failed["depth"],
            "reason": failed and failed["reason"],
        }
    return made


def offload_table(one: dict[str, Any]) -> Table:
    """The two steps of an offload point."""
    link = one["link_bytes_per_s"]
    made = Table(
        title=f"residuals of {one['point']['model']} in the host's memory: gradients "
        f"{one['gradient_difference']:.1e} apart, copies at "
        + ("no cost" if link is None else f"{link / 1e9:.1f} GB/s"),
        box=rich.box.SIMPLE,
    )
    for name in ("step", "device temporaries (MiB)", "host (MiB)", "ms"):
        made.add_column(name, justify="left" if name == "step" else "right")
    for name in ("store", "offload"):
        row = one[name]
        sizes = [reading.mib(row[key]) for key in ("temporary_bytes", "host_bytes")]
        made.add_row(name, *sizes, f"{1e3 * statistics.median(row['seconds']):.1f}")
    return made


def comparable(config: Config, one: dict[str, Any]) -> budget_sweep.Config:
    """How the rows of a record compare: errors up to backpropagation's own count, which rounded products may
    make larger than `max_error`."""
    own = [row["error"] for row in reading.ran(one, reading.PLAIN)]
    return budget_sweep.Config(max_error=max([config.max_error, *own]))
