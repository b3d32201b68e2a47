"""Runs, prints, draws and saves."""

from __future__ import annotations

import json

from matplotlib.figure import Figure
from rich.console import Console

from experiments import budget_sweep, precision, reading, sweep
from experiments.gpu import calibration
from experiments.gpu.config import Config
from experiments.gpu.order import run
from experiments.gpu.reports import (
    comparable,
    deepest,
    draw_ladder,
    draw_peaks,
    laddered,
    offload_table,
    table,
)
from mwplan.common.plots import png
from mwplan.common.serial import write_atomically


def main(config: Config) -> None:
    """Runs what is missing while there is time, prints, draws and saves."""
    console = Console()
    found, whole = run(config, console)
    held = calibration.flat(found)
    if held:
        console.print(calibration.table(held))
        console.print("measured times are modelled ones times", calibration.rates(held))
    rows = laddered(config, found)
    console.print(table(rows))
    swept_records = [one for one in found if one["point"]["kind"] == "budgets" and one["ran"]]
    compared = [(comparable(config, one), one) for one in swept_records]
    limits = [reading.within(one, how.limit, how.max_error) for how, one in compared]
    budget_rows = [row for how, one in compared for row in budget_sweep.compare(how, one)]
    exact = [
        {"point": one["point"]["chain"], "matmul": one["point"]["matmul"], "rows": one["rows"]}
        for one in found
        if one["point"]["kind"] == "precision" and one["ran"]
    ]
    for made in budget_sweep.tables(budget_sweep.Config(), budget_rows, limits) if swept_records else []:
        console.print(made)
    for matmul in ("highest", None):
        if mine := [one for one in exact if one["matmul"] == matmul]:
            console.print(f"products at {matmul or 'default'} precision")
            console.print(precision.table(mine))
    offloads = [one for one in found if one["point"]["kind"] == "offload"]
    for one in offloads:
        console.print(offload_table(one) if one["ran"] else one["reason"])
    data = {
        "provenance": found[0].get("provenance") if found else None,
        "config": sweep.plain(config),
        "complete": whole,
        "calibration": held,
        "rates": calibration.rates(held),
        "ladder": rows,
        "deepest": deepest(rows),
        "budgets": budget_rows,
        "limits": limits,
        "offload": [
            {
                k: one.get(k)
                for k in (
                    "point",
                    "ran",
                    "reason",
                    "store",
                    "offload",
                    "link_bytes_per_s",
                    "gradient_difference",
                )
            }
            for one in offloads
        ],
        "precision": [
            {"matmul": one["matmul"], "kind": one["point"]["kind"], "depth": one["point"]["depth"], **row}
            for one in exact
            for row in one["rows"]
        ],
    }
    write_atomically(config.out / "summary.json", json.dumps(data, indent=1) + "\n")
    figures: dict[str, Figure] = {}
    if rows:
        figures["ladder"] = draw_ladder(config, rows)
    if any(row["allocator_peak_bytes"] for row in rows):
        figures["peaks"] = draw_peaks(rows)
    for how, one in compared:
        network = one["point"]["network"]
        figures[f"{network['model']}_{network['depth']}"] = budget_sweep.draw(how, one)
    if full := [one for one in exact if one["matmul"] == "highest"]:
        figures["precision"] = precision.draw(full)
    for name, figure in figures.items():
        write_atomically(config.out / f"{name}.png", png(figure))
    console.print(f"wrote {config.out}")
