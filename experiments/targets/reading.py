"""Reads the records of `experiments.targets`: tables, a figure, and how far predictions are off."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import rich.box
from matplotlib.figure import Figure
from rich.table import Table

from mwplan.common.sizes import show_bytes, show_ns

Row = dict[str, Any]
COLUMNS = (
    "method",
    "temporaries",
    "compiled / predicted",
    "modelled time",
    "modelled / predicted",
    "moved",
    "kernels",
)


def key(row: Row) -> tuple[Any, ...]:
    """What point a row is of."""
    return row["network"], row["target"], row["method"], row["share"]


def read(path: Path) -> list[Row]:
    """The records of a file, the last of each point; without a last line that a kill left unfinished."""
    found: dict[tuple[Any, ...], Row] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        found[key(row)] = row
    return list(found.values())


def groups(rows: list[Row]) -> dict[tuple[str, str], list[Row]]:
    """Rows by network and target."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["network"], row["target"]), []).append(row)
    return found


def named(row: Row) -> str:
    """The method, with its budget."""
    return row["method"] if row["share"] < 0 else f"plan {row['share']:.0%}, {row['method']}"


def cells(row: Row) -> list[str]:
    """A row of a table; bad news too."""
    if "out_of_memory" in row:
        needed = row.get("needed_bytes")
        return [named(row), f"does not fit{f': {show_bytes(needed)}' if needed else ''}", "", "", "", "", ""]
    predicted = "predicted_bytes" in row
    return [
        named(row),
        show_bytes(row["temporary_bytes"]),
        f"{row['temporary_bytes'] / max(1, row['predicted_bytes']):.3f}" if predicted else "",
        show_ns(row["modelled_ns"]),
        f"{row['modelled_ns'] / max(1, row['predicted_ns']):.3f}" if predicted else "",
        show_bytes(row["moved_bytes"]),
        str(row["launches"]),
    ]


def tables(rows: list[Row]) -> Iterator[Table]:
    """A table of each network and target."""
    for (name, target), some in groups(rows).items():
        table = Table(title=f"{name} for {target}", title_justify="left", box=rich.box.SIMPLE)
        for column in COLUMNS:
            table.add_column(column, justify="left" if column == "method" else "right")
        for row in some:
            table.add_row(*cells(row))
        yield table


def markdown(rows: list[Row]) -> str:
    """The same as Markdown."""
    lines: list[str] = []
    for (name, target), some in groups(rows).items():
        lines += [f"## {name} for {target}", "", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
        lines += [f"| {' | '.join(cells(row))} |" for row in some]
        lines.append("")
    return "\n".join(lines)


def summary(rows: list[Row]) -> list[Row]:
    """For each target and arrangement, how far compiled steps are from what was predicted, and where
    `jax.checkpoint` is ahead."""
    found = []
    made = [row for row in rows if row["share"] >= 0 and "temporary_bytes" in row]
    for target in sorted({row["target"] for row in made}):
        for method in sorted({row["method"] for row in made}):
            some = [row for row in made if (row["target"], row["method"]) == (target, method)]
            if not some:
                continue
            off = sorted(row["temporary_bytes"] / max(1, row["predicted_bytes"]) for row in some)
            slow = sorted(row["modelled_ns"] / max(1, row["predicted_ns"]) for row in some)
            found.append(
                {
                    "target": target,
                    "method": method,
                    "points": len(some),
                    "bytes, compiled / predicted": [off[0], statistics.median(off), off[-1]],
                    "within 2%": sum(abs(one - 1) <= 0.02 for one in off) / len(off),
                    "time, modelled / predicted": [slow[0], statistics.median(slow), slow[-1]],
                    "beaten by an alternative": sum(beaten(row, rows) for row in some),
                }
            )
    return found


def beaten(row: Row, rows: list[Row]) -> bool:
    """Whether something that needs no planner takes no more memory, and less time."""
    return any(
        other["share"] < 0
        and (other["network"], other["target"]) == (row["network"], row["target"])
        and other.get("temporary_bytes", 1 << 62) <= row["temporary_bytes"]
        and other.get("modelled_ns", 1 << 62) < row["modelled_ns"]
        for other in rows
    )


#: What a figure calls a method where its name in the records says little, and how large its marks are: plans
#: of several arrangements may lie on one another.
LABELS = {
    "backprop": "backpropagation",
    "checkpoint": "jax.checkpoint, every layer",
    "dots_saveable": "jax.checkpoint, dots_saveable",
    "sqrt": "jax.checkpoint, square-root segments",
    "tied": "plan",
    "loose": "plan, residuals without barriers",
    "untied": "plan, no barriers",
}
MARKS = {"tied": 9, "loose": 4, "untied": 5}


def draw(rows: list[Row]) -> Figure:
    """Modelled time against compiled temporaries, a panel for each network and target."""
    panels = groups([row for row in rows if "temporary_bytes" in row])
    count = max(1, len(panels))
    across = min(3, count)
    figure = Figure(figsize=(4 * across, 3.2 * -(-count // across)), layout="constrained")
    for at, ((name, target), some) in enumerate(panels.items()):
        ax = figure.add_subplot(-(-count // across), across, at + 1)
        for method in dict.fromkeys(row["method"] for row in some):
            mine = sorted(
                (row["temporary_bytes"] / 2**30, row["modelled_ns"] / 1e6)
                for row in some
                if row["method"] == method
            )
            plan = any(row["share"] >= 0 for row in some if row["method"] == method)
            style: dict[str, Any] = {"marker": "x", "ls": "", "ms": 5}
            if plan:
                style = {"marker": "o", "ls": "-", "mfc": "none", "ms": MARKS.get(method, 4)}
            ax.plot(*zip(*mine), **style, label=LABELS.get(method, method))
        ax.set(title=f"{name}, {target}", xlabel="temporaries, compiled (GiB)", ylabel="modelled time (ms)")
        ax.legend(fontsize=6)
    return figure
