"""What sets of kept values are worth, compiled for a device that need not be here: `python -m
experiments.kept`.

For each network: backpropagation, `jax.checkpoint` on every layer under three policies, and plans at the same
budgets from two profiles: with all that a layer may keep (`mwplan.profiling.trades`), and with what
`jax.checkpoint` alone offers: all, products, nothing, and the layers' own rules. Temporaries are the
compiler's; times are modelled from the kernels that it made (`mw.targets`). Needs the target's compiler
(`pip install 'mwplan[targets]'`) and no device. Writes results/kept/.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rich.box
from rich.progress import track
from rich.table import Table

import mwplan as mw
from experiments import record
from experiments.barriers import NETWORKS, alternatives, compared, figures
from mwplan import targets
from mwplan.common.sizes import show_bytes
from mwplan.network.kept import PREFIX

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which networks of `experiments.barriers`, at which shares of the way from the least budget to the
    largest useful one; `depth` 0: of each network its own."""

    target: str = "h200"
    networks: tuple[str, ...] = ("gpt", "resnet", "maxmin")
    shares: tuple[float, ...] = (1.0, 0.5, 0.25, 0.1, 0.0)
    depth: int = 0
    out: Path = record.RESULTS / "kept"


def without(profile: mw.Profile) -> mw.Profile:
    """The profile without sets of kept values."""
    return dataclasses.replace(
        profile,
        layers=tuple(
            dataclasses.replace(
                one, store=tuple(option for option in one.store if not option.name.startswith(PREFIX))
            )
            for one in profile.layers
        ),
    )


def network(name: str, config: Config) -> tuple[list[Row], list[Row]]:
    """All programs of one network, and what its layers may keep."""
    usual, make = NETWORKS[name]
    depth = config.depth or usual
    model = make(depth)
    args = (model.chain, model.x, model.labels)
    rows: list[Row] = []

    def add(program: str, step: Callable[..., Any], **more: Any) -> None:
        made = targets.compile(step, *args, target=config.target)
        rows.append({"network": name, "depth": depth, "program": program, **more, **figures(made)})
        print(
            f"{name} {program}: {show_bytes(made.temporary_bytes)}, {made.modelled_ns / 1e6:.3f} ms",
            flush=True,
        )

    for program, step in alternatives(model):
        add(program, step)
    profile = mw.estimate(model.chain, model.x, device=config.target)
    kinds = {"sets": mw.frontier(profile), "checkpoint": mw.frontier(without(profile))}
    least, most = (kinds["sets"].points[at][0] for at in (0, -1))
    for share in config.shares:
        budget = round(least + share * (most - least))
        for kind, frontier in kinds.items():
            try:
                schedule = frontier.at(budget)
            except mw.InfeasibleError:
                continue
            add(
                f"plan {share:.2f}, {kind}",
                mw.value_and_grad(model.loss, schedule),
                kind=kind,
                share=share,
                budget_bytes=schedule.budget_bytes,
                predicted_bytes=schedule.peak_bytes,
                predicted_ns=schedule.time_ns,
                options=[list(run.options) or run.kind.value for run in schedule.runs],
            )
    return [compared(row, rows, plan="kind") for row in rows], offered(profile)


def offered(profile: mw.Profile) -> list[Row]:
    """The STORE options of each distinct layer."""
    distinct = {id(one): one for one in profile.layers}
    return [
        {"layer": one.name, **dataclasses.asdict(option)} for one in distinct.values() for option in one.store
    ]


def table(rows: list[Row]) -> Table:
    """The rows for people."""
    made = Table(box=rich.box.SIMPLE)
    made.add_column("network")
    made.add_column("program")
    for name in ("temporaries", "of predicted", "modelled", "of the best alternative that fits", "kernels"):
        made.add_column(name, justify="right")
    for row in rows:
        predicted, ratio = row.get("predicted_bytes"), row.get("over_best_alternative")
        made.add_row(
            f"{row['network']} {row['depth']}",
            row["program"],
            show_bytes(row["temporary_bytes"]),
            f"{row['temporary_bytes'] / predicted:.3f}" if predicted else "",
            f"{row['modelled_ns'] / 1e6:.3f} ms",
            f"{ratio:.3f}" if ratio else "",
            str(row["kernels"]),
        )
    return made


def main(config: Config) -> None:
    """Compiles, prints, and writes what each network gave as soon as it is known."""
    found: list[Row] = []
    for name in track(config.networks, description="networks"):
        rows, options = network(name, config)
        found += rows
        settings = {**dataclasses.asdict(config), "out": str(config.out.name), "networks": [name]}
        path = config.out / f"{config.target}_{name}_{rows[0]['depth']}.json"
        record.save(path, {"config": settings, "rows": rows, "options": options})
    record.console().print(table(found))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default=Config.target)
    parser.add_argument("--networks", nargs="+", default=Config.networks, choices=NETWORKS)
    parser.add_argument("--shares", nargs="+", type=float, default=Config.shares)
    parser.add_argument("--depth", type=int, default=Config.depth)
    given = parser.parse_args()
    main(
        Config(
            target=given.target,
            networks=tuple(given.networks),
            shares=tuple(given.shares),
            depth=given.depth,
        )
    )
