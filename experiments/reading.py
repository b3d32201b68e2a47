"""Selections and ratios of the records of `experiments.alternatives.measure`, for tables and figures."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import rich.box
from rich.table import Table

from experiments.alternatives import RECOMPUTING, ratio
from mwplan.common.errors import ArgumentError

Row = dict[str, Any]
Record = dict[str, Any]

PLAIN = ("backprop", "backprop_scan")
#: Methods that every figure draws alike.
FAMILIES = {
    "backpropagation": (PLAIN, "#c1121f", "o"),
    "jax.checkpoint on every layer": (("checkpoint_each", "checkpoint_scan"), "#8d99ae", "v"),
    "Chen's segments": (("chen", "chen_scan"), "#bc6c25", "^"),
    "Equinox's checkpointed scan": (("equinox",), "#7b2cbf", "P"),
    "best recomputation, jax.checkpoint": (("rotor_checkpoint", "recompute_checkpoint"), "#e9a03b", "s"),
    "best recomputation, mwplan": (("recompute",), "#606c38", "D"),
    "inversion": (("invert",), "#ff70a6", "<"),
    "pure moonwalk": (("moonwalk",), "#00a896", ">"),
    "pure fragments": (("fragment",), "#83c5be", "X"),
    "plan": (("plan",), "#2a6f97", "*"),
}
ALTERNATIVES = tuple(name for label, (names, _, _) in FAMILIES.items() if label != "plan" for name in names)


def ran(record: Record, methods: Iterable[str], max_error: float | None = None) -> list[Row]:
    """The rows of these methods that were compiled and are accurate enough.

    Their measured error may be twice `max_error` more than that of float32 backpropagation, which is itself
    inexact, most where rounding flips kinks.
    """
    names = set(methods)
    compiled = [row for row in record["rows"] if "total_bytes" in row]
    own = min((row["error"] for row in compiled if row["method"] in PLAIN and row["error"]), default=0.0)
    limit = None if max_error is None else 2 * max_error + own
    return [
        row
        for row in compiled
        if row["method"] in names and (limit is None or row.get("error") is None or row["error"] <= limit)
    ]


def fitting(record: Record, methods: Iterable[str], budget: int, max_error: float | None = None) -> list[Row]:
    """The rows of these methods whose measured total bytes fit `budget`, whatever they were planned for."""
    return [row for row in ran(record, methods, max_error) if row["total_bytes"] <= budget]


def median(row: Row) -> float:
    """Median seconds a step."""
    return statistics.median(row["seconds"])


def fastest(rows: Sequence[Row]) -> Row | None:
    """The row of least median time; None if none was timed."""
    timed = [row for row in rows if row.get("seconds")]
    return min(timed, key=median) if timed else None


def smallest(rows: Sequence[Row]) -> Row | None:
    """The row of least total bytes."""
    return min(rows, key=lambda row: row["total_bytes"]) if rows else None


def relative(row: Row, base: Row) -> float:
    """Time of `row` over that of `base`, from the same rounds; 1 where they are one program."""
    if row.get("program") is not None and row.get("program") == base.get("program"):
        return 1.0
    return ratio(row["seconds"], base["seconds"])


def over(record: Record, row: Row, base: Row) -> float:
    """As `relative`, where `row` may have run in more rounds than `base`: all rounds of `row` count.

    With `m` the geometric mean of all programs that ran as often as `row`, it is `row / m` in the rounds of
    `row`, times `m / base` in the rounds that both ran in.
    """
    rounds = len(row["seconds"])
    if rounds <= len(base["seconds"]):
        return relative(row, base)
    peers = [other["seconds"] for other in record["rows"] if len(other.get("seconds") or ()) == rounds]
    mean = [statistics.geometric_mean(times) for times in zip(*peers)]
    return ratio(row["seconds"], mean) * ratio(mean, base["seconds"])


def best_recomputation(record: Record, seconds: float) -> Row | None:
    """The row of least total bytes that stores or recomputes, and nothing else, within `seconds` a step."""
    return smallest(
        [row for row in ran(record, (*PLAIN, *RECOMPUTING)) if row["seconds"] and median(row) <= seconds]
    )


def mib(size: float) -> str:
    """Bytes in MiB, as tables print them."""
    return f"{size / 2**20:.2f}"


def within(one: Record, limit: float, max_error: float) -> dict[str, Any]:
    """The least total bytes of a plan and of a recomputation within `limit` times backpropagation's time, and
    at any time.

    Pure moonwalk and pure inversion count as plans, because the planner could choose them.
    """
    base = fastest(ran(one, PLAIN))
    if base is None:
        raise ArgumentError("backpropagation was not timed at this point: nothing to compare with")
    most = limit * median(base)
    plans = ran(one, ("plan", "moonwalk", "fragment", "invert"), max_error)
    plan = smallest([row for row in plans if row["seconds"] and median(row) <= most])
    other = best_recomputation(one, most)
    least = [smallest(rows) for rows in (plans, ran(one, RECOMPUTING))]
    sizes = [row and row["total_bytes"] for row in (plan, other, *least)]
    return {
        "model": one["point"]["network"]["model"],
        "depth": one["point"]["network"]["depth"],
        "backprop_bytes": base["total_bytes"],
        "plan_bytes": sizes[0],
        "recomputation": other["method"] if other else None,
        "recomputation_bytes": sizes[1],
        "ratio": sizes[0] / sizes[1] if sizes[0] and sizes[1] else None,
        "temporaries_ratio": plan["temporary_bytes"] / other["temporary_bytes"] if plan and other else None,
        "least_plan_bytes": sizes[2],
        "least_recomputation_bytes": sizes[3],
    }


def limits_table(limits: Sequence[dict[str, Any]], limit: float) -> Table:
    """The results of `within` as a table."""

    def size(value: int | None) -> str:
        return "" if value is None else mib(value)

    made = Table(
        title=f"memory within {limit:g} times backpropagation's time (MiB); pure moonwalk and inversion "
        "count as plans",
        box=rich.box.SIMPLE,
    )
    for name in (
        "model",
        "depth",
        "backprop",
        "plan",
        "recomputation",
        "by",
        "plan / recomputation",
        "least plan",
        "least recomputation",
    ):
        made.add_column(name, justify="left" if name in ("model", "by") else "right")
    for r in limits:
        made.add_row(
            r["model"],
            str(r["depth"]),
            size(r["backprop_bytes"]),
            size(r["plan_bytes"]),
            size(r["recomputation_bytes"]),
            r["recomputation"] or "",
            "" if r["ratio"] is None else f"{r['ratio']:.2f}",
            size(r["least_plan_bytes"]),
            size(r["least_recomputation_bytes"]),
        )
    return made
