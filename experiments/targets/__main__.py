"""The command line of `experiments.targets`."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments import record, sweep
from experiments import targets as described
from experiments.targets import reading, study
from mwplan import targets
from mwplan.common.plots import png
from mwplan.common.serial import write_atomically


@dataclass(frozen=True)
class Config:
    """`networks`, of `experiments.targets.networks`; `shares`, of the way from the least feasible temporaries
    to the fastest plan's; `fast`, 1 for a subset."""

    networks: tuple[str, ...] = (
        "gpt",
        "gpt-bf16",
        "resnet50",
        "resnet50-bf16",
        "vit-b",
        "revnet",
        "lipschitz",
    )
    targets: tuple[str, ...] = ("h200", "v5e")
    shares: tuple[float, ...] = (1.0, 0.6, 0.3, 0.15, 0.05, 0.0)
    fast: int = 0
    out: Path = record.RESULTS / "targets"


FAST: dict[str, Any] = {"networks": ("gpt",), "targets": ("h200",), "shares": (0.3, 0.05, 1.0)}


def main(config: Config) -> None:
    """Computes what is missing, prints, draws and saves."""
    console = record.console()
    if config.fast:
        config = dataclasses.replace(config, **FAST)
    path = config.out / "records.jsonl"
    rows = reading.read(path)
    for target in config.targets:
        if not targets.installed(target):
            why = targets.plugins.missing(targets.DEVICES[target])
            console.print(f"left out {target}: {why}", markup=False)
            continue
        for point in study.points(config.networks, target, config.shares):
            if reading.key(dataclasses.asdict(point)) in {reading.key(row) for row in rows}:
                continue
            console.print(
                f"{point.network} for {point.target}: {point.method} {max(0, point.share):.0%}", markup=False
            )
            row = dataclasses.asdict(point) | study.compute(point) | {"commit": record.provenance()["commit"]}
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:  # whole lines: what a kill leaves of the last is not read
                file.write(json.dumps(row) + "\n")
            rows.append(row)
    for text in reading.tables(rows):
        console.print(text)
    record.save(
        config.out / "targets.json", {"config": sweep.plain(config), "summary": reading.summary(rows)}
    )
    write_atomically(config.out / "table.md", reading.markdown(rows))
    write_atomically(config.out / "targets.png", png(reading.draw(rows)))
    console.print(f"wrote {config.out}")


if __name__ == "__main__":
    main(sweep.parse(Config, described.__doc__))
