"""How fast the planner is, how good, and how others fare: `python -m experiments.solver_scaling`.

`experiments.solver_chains` are the chains, `experiments.solver_cases` what is measured. Every case is one
record in results/solver_scaling/records.jsonl, appended as soon as it is known: run again to go on where it
stopped. Times are wall-clock and CPU seconds of this process; where others use the machine only the latter
means much. `--vary FIELD` measures one field of `mwplan.solvers.tuning.Tuning` instead, or `all` of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
from importlib import metadata
from pathlib import Path

from rich.progress import Progress
from rich.table import Table

from experiments import record
from experiments.solver_cases import Config, cases
from experiments.solver_report import draw, summary
from experiments.solver_tuning import CASES, vary


def main(config: Config) -> None:
    """Does what is not done yet, then writes the table and the figure."""
    console = record.console()
    config.out.mkdir(parents=True, exist_ok=True)
    path = config.out / "records.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {json.dumps([row["part"], row["key"]]) for row in rows}
    todo = [case for case in cases(config) if json.dumps([case[0], case[1]]) not in done]
    about = {
        **record.provenance(),
        "cpu": platform.processor() or platform.machine(),
        "ortools": metadata.version("ortools"),
    }
    with Progress(console=console) as progress:
        task = progress.add_task("solving", total=len(todo))
        for part, key, call in todo:
            progress.update(task, description=f"{part} {key['size']}")
            row = {"part": part, "key": key, **call(), "commit": about["commit"], "dirty": about["dirty"]}
            rows.append(row)
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            progress.advance(task)
    settings = {
        k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(config).items() if k != "out"
    }
    lines = summary(rows)
    record.save(config.out / "summary.json", {"about": about, "config": settings, "table": lines})
    table = Table(title="planner: speed and quality (medians over seeds)")
    for name in ("what", "layers", "figure"):
        table.add_column(name, justify="right" if name == "layers" else "left")
    for line in lines:
        table.add_row(*map(str, line))
    console.print(table)
    draw(rows).savefig(config.out / "solver_scaling.png", dpi=150)
    console.print(f"wrote {config.out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Config.out)
    parser.add_argument("--thin", type=float, default=Config.thin)
    parser.add_argument("--vary", choices=["all", *CASES], help="measure a field of `Tuning` instead")
    parser.add_argument("--repeats", type=int, default=3, help="of each value, with --vary")
    arguments = parser.parse_args()
    if arguments.vary:
        vary(list(CASES) if arguments.vary == "all" else [arguments.vary], arguments.repeats)
    else:
        main(Config(out=arguments.out, thin=arguments.thin))
