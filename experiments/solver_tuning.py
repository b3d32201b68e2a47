"""What each field of `mwplan.solvers.tuning.Tuning` is worth: solved with other values beside its own.

`CASES` says which chain a field matters for. Its own value and another are solved by turns, and the medians
of their CPU seconds compared, so that what else the machine does falls on both; `slower` is the largest
relative time of schedules at any budget of the field's own frontier that the other's reaches, `least` the
relative least bytes.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.table import Table

from experiments import record
from experiments.solver_cases import timed
from experiments.solver_chains import chain, deep, identical
from mwplan.plans.profiles import Profile
from mwplan.solvers.frontier import Frontier, solve_frontier
from mwplan.solvers.problem import Problem
from mwplan.solvers.tuning import TUNING, Tuning

OUT = record.RESULTS / "solver_scaling" / "tuning.jsonl"
#: chains, and the loss of time aimed at
CHAINS: dict[str, tuple[Callable[[], Profile], float]] = {
    "exact": (lambda: chain(0, 60, submersive=False), 0.0),
    "exact, submersive": (lambda: chain(0, 40, submersive=True), 0.0),
    "thinned": (lambda: chain(0, 80, submersive=False), 0.01),
    "thinned, submersive": (lambda: chain(0, 50, submersive=True), 0.01),
    "identical": (lambda: identical(500, submersive=False), 0.01),
    "identical, submersive": (lambda: identical(500, submersive=True), 0.01),
    "deep": (lambda: deep(300, submersive=False), 0.01),
}
#: for each field that seconds or losses say something of: its chain, and other values
CASES: dict[str, tuple[str, tuple[Any, ...]]] = {
    "threads": ("exact, submersive", (1, 2)),
    "nodes_together": ("exact, submersive", (8, 256)),
    "groups_most": ("exact", (8_000, 128_000)),
    "groups_least": ("exact", (1_000, 16_000)),
    "rows_together": ("exact", (16, 256)),
    "room_rows": ("exact", (1_000,)),
    "room_points": ("exact", (4,)),
    "staircase_cells": ("exact, submersive", (128, 2048)),
    "table_points": ("exact, submersive", (64, 1024)),
    "table_levels": ("exact, submersive", (32, 512)),
    "sweep_block": ("exact, submersive", (8, 128)),
    "cell_levels": ("exact", ((16, 1), (4, 1), (64, 16, 4, 1))),
    "cells": ("exact", (96, 192, 768)),
    "cells_identical": ("identical", (256, 4096)),
    "short_layers": ("thinned", (1, 16)),
    "merge_share": ("thinned, submersive", (0.25, 4.0)),
    "merge_share_no_moonwalk": ("thinned", (0.5, 4.0)),
    "thinning_share": ("thinned", (0.125, 2.0)),
    "top_share": ("thinned", (0.025, 0.4)),
    "label_share": ("thinned, submersive", (0.175, 2.8)),
    "identical_merge_share": ("identical", (1 / 6, 2.0)),
    "identical_thinning_share": ("identical", (1 / 12, 1.0)),
    "identical_label_share": ("identical, submersive", (1 / 24, 2 / 3)),
    "identical_run_share": ("identical, submersive", (0.25, 4.0)),
    "near_layers": ("deep", (0,)),
    "length_bits": ("identical", (5, 7)),
    "longest_run": ("identical, submersive", (64, 500)),
    "recompute_share": ("identical", (8, 128)),
}


def vary(fields: list[str], repeats: int, out: Path = OUT) -> None:
    """Measures some fields, appends each comparison to the file as soon as it is known, and prints all."""
    table = Table(title="tuning: other values relative to a field's own")
    for name in ("field", "chain", "own", "other", "CPU seconds", "slower at most", "least bytes"):
        table.add_column(name)
    commit = record.provenance()["commit"]
    for name in fields:
        for row in _field(name, repeats):
            with out.open("a") as file:
                file.write(json.dumps({**row, "repeats": repeats, "commit": commit}) + "\n")
            figures = (f"{row['seconds']:.2f}", f"{row['slower']:+.2%}", f"{row['least']:.3f}")
            table.add_row(row["field"], row["chain"], str(row["own"]), str(row["other"]), *figures)
    record.console().print(table)


def _field(name: str, repeats: int) -> Iterator[dict[str, Any]]:
    where, others = CASES[name]
    make, thin = CHAINS[where]
    profile, own = make(), getattr(TUNING, name)
    for other in others:
        tuning = dataclasses.replace(TUNING, **{name: other})
        row = {"field": name, "chain": where, "own": own, "other": other}
        yield {**row, **_compared(profile, thin, tuning, repeats)}


def _compared(profile: Profile, thin: float, other: Tuning, repeats: int) -> dict[str, float]:
    """One tuning against the default."""
    seconds: list[float] = []
    for _ in range(repeats):
        (mine, a), (theirs, b) = (
            timed(functools.partial(solve_frontier, Problem(profile=profile, thin=thin, tuning=tuning)))
            for tuning in (TUNING, other)
        )
        seconds.append(b["cpu_s"] / a["cpu_s"])
    return {"seconds": statistics.median(seconds), **_losses(mine, theirs)}


def _losses(mine: Frontier, theirs: Frontier) -> dict[str, float]:
    """How much slower `theirs` is at worst, where both reach, and its least bytes."""
    slower = -1.0
    for need, ns in mine.points:
        got = min((t for n, t in theirs.points if n <= need), default=None)
        slower = slower if got is None else max(slower, got / ns - 1)
    return {"slower": slower, "least": theirs.points[0][0] / mine.points[0][0]}
