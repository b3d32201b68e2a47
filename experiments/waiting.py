"""How long one waits for a profile and a plan: `python -m experiments.waiting`.

Each row is three fresh processes: a profile with nothing kept on disk (cold), the same profile again, now
kept (warm), and so the estimate for each target whose compiler is installed. Seconds of the CPU count all
threads and say what a busy machine would otherwise hide; seconds of the clock are beside them. The start of
JAX, the network and its weights are not counted. A row goes on to say how long the frontier of plans took.

Writes results/waiting/.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rich.box
from rich.table import Table

import mwplan as mw
from experiments import record, sweep, zoo
from mwplan.targets import installed

#: Each network, as large as it is trained: `gpt`, the sizes of GPT-2 small.
SIZES: dict[str, dict[str, int]] = {
    "gpt": {"depth": 12, "width": 768, "batch": 4, "resolution": 256},
    "resnet": {"depth": 16, "width": 64, "batch": 64, "resolution": 32},
    "revvit": {"depth": 12, "width": 192, "batch": 32, "resolution": 32},
    "lipschitz": {"depth": 12, "width": 32, "batch": 64, "resolution": 16},
}


@dataclass(frozen=True)
class Config:
    """`models`, some of `SIZES`; `targets`, the devices to estimate for."""

    models: tuple[str, ...] = tuple(SIZES)
    targets: tuple[str, ...] = ("h200", "v5e")
    seed: int = 0
    out: Path = record.RESULTS / "waiting"


def clocked(call: Callable[[], Any]) -> tuple[Any, float, float]:
    """What a call returns, its seconds of all threads' CPU time, and those of the clock."""
    cpu, clock = time.process_time(), time.perf_counter()
    found = call()
    return found, time.process_time() - cpu, time.perf_counter() - clock


def one(model: str, target: str) -> dict[str, float]:
    """Of one network: seconds of its profile (`target` "here") or estimate, and of its frontier."""
    made = zoo.build(zoo.Config(model=model, **SIZES[model]))
    if target == "here":
        profile, cpu, clock = clocked(lambda: mw.profile(made.chain, made.x, progress=False))
    else:
        profile, cpu, clock = clocked(lambda: mw.estimate(made.chain, made.x, device=target, progress=False))
    _, plan_cpu, plan_clock = clocked(lambda: mw.frontier(profile))
    return {"cpu_s": cpu, "clock_s": clock, "plan_cpu_s": plan_cpu, "plan_clock_s": plan_clock}


def cut() -> dict[str, float]:
    """Of a GPT of 60 blocks as a function: how many operations it has, and seconds to trace and cut it."""
    made = zoo.build(zoo.Config(model="gpt", depth=60, width=32, batch=2, resolution=16))

    def loss(net: mw.Chain, x: Any) -> Any:
        return made.loss(net(x), made.labels)

    mw.cut(loss, made.chain, made.x)  # JAX's own caches
    found, cpu, clock = clocked(lambda: mw.cut(loss, made.chain, made.x))
    return {"operations": len(found.flow.steps), "pieces": len(found), "cpu_s": cpu, "clock_s": clock}


def fresh(model: str, target: str, cache: str) -> dict[str, float]:
    """`one` in a process of its own, with what is on disk in `cache`."""
    command = [sys.executable, "-m", "experiments.waiting", "--one", model, target]
    env = os.environ | {"XDG_CACHE_HOME": cache}
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{run.stderr}")
    found: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    return found


def main(config: Config) -> None:
    """Measures, prints and saves."""
    console = record.console()
    rows = []
    for model in config.models:
        for target in ("here", *config.targets):
            if target != "here" and not installed(target):
                console.print(f"{model} for {target}: left out, its compiler is not installed")
                continue
            with tempfile.TemporaryDirectory() as cache, console.status(f"{model}, {target}"):
                cold, warm = (fresh(model, target, cache) for _ in range(2))
            rows.append({"model": model, "target": target, "cold": cold, "warm": warm})
    console.print(table(rows))
    long = cut()
    console.print(
        f"a function of {long['operations']} operations is traced and cut into {long['pieces']} pieces in "
        f"{long['cpu_s']:.2f} s of processor time, {long['clock_s']:.2f} s by the clock"
    )
    sizes = {model: SIZES[model] for model in config.models}
    settings = sweep.plain(config)
    record.save(config.out / "waiting.json", {"config": settings, "sizes": sizes, "rows": rows, "cut": long})
    console.print(f"wrote {config.out}")


def table(rows: list[dict[str, Any]]) -> Table:
    """A line a network and device."""
    made = Table(title="seconds until there is a plan", title_justify="left", box=rich.box.SIMPLE)
    made.add_column("network")
    made.add_column("device")
    for column in ("cold, CPU", "cold, clock", "warm, CPU", "warm, clock", "frontier, CPU"):
        made.add_column(column, justify="right")
    for row in rows:
        figures = [row[turn][unit] for turn in ("cold", "warm") for unit in ("cpu_s", "clock_s")]
        figures.append(row["cold"]["plan_cpu_s"])
        made.add_row(row["model"], row["target"], *(f"{figure:.1f}" for figure in figures))
    return made


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(one(*sys.argv[2:])))
    else:
        main(sweep.parse(Config, __doc__))
