"""Very deep chains: compile time at depth 1,000, and a step in a hundredth of backpropagation's memory at
depth 10,000: `python -m experiments.deep`.

Blocks of a convolution and MaxMin, stacked. Weights are near orthogonal ones, so that activations keep their
size.

- At `compiled` blocks: the seconds that it takes to trace and compile a planned step (at a quarter of
  backpropagation's temporaries, or the least feasible) and backpropagation as one `lax.scan`, in turns.
- At `depth` blocks: a step whose temporaries are at most `fraction` of those of the scanned backpropagation.
  It is planned, compiled and run, and its gradient compared.

Each part is kept once it is done. Writes results/deep/.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import seaborn as sns
from matplotlib.figure import Figure
from rich.table import Table

import mwplan as mw
from experiments import record, sweep
from mwplan import layers as L
from mwplan.common.plots import png
from mwplan.common.serial import write_atomically
from mwplan.plans import tape


@dataclass(frozen=True)
class Config:
    """Sizes. `turns`: compilations of each; `thin`: as in `mw.frontier`; `regular`: as in `mw.plan`, for the
    deep step, because plans of many different runs compile for minutes."""

    compiled: int = 1000
    depth: int = 10_000
    fraction: float = 0.01
    batch: int = 4
    size: int = 16
    channels: int = 8
    turns: int = 7
    repeats: int = 3
    thin: float = 0.02
    regular: float = 0.01
    seed: int = 0
    executor: str = "processes"
    workers: int = 1
    out: Path = record.RESULTS / "deep"


def block(key: jax.Array, channels: int) -> L.Sequential:
    """A convolution, an orthogonal matrix in its middle and little around it, and MaxMin."""
    keys = jax.random.split(key)
    conv = L.Conv2D.init(keys[0], channels, channels, 3, padding="CIRCULAR")
    middle = jax.random.orthogonal(keys[1], channels)
    weight = 1e-3 * conv.weight.at[1, 1].set(0) + jnp.zeros_like(conv.weight).at[1, 1].set(middle)
    return L.Sequential((L.Conv2D(weight, conv.bias, padding="CIRCULAR"), L.MaxMin()))


def network(point: sweep.Point) -> tuple[mw.Chain, Any]:
    """`depth` blocks, and an input."""
    key = jax.random.key(point["seed"])
    x = jax.random.normal(key, (point["batch"], point["size"], point["size"], point["channels"]))
    blocks = jax.vmap(lambda key: block(key, point["channels"]))(jax.random.split(key, point["depth"]))
    return mw.Chain([mw.Stack.of(blocks, point["depth"])]), x


def loss(y: Any) -> Any:
    """A weighted mean square."""
    return jnp.mean(y**2 * jnp.linspace(0.5, 1.5, y.shape[-1]))


def scanned(chain: mw.Chain, x: Any) -> Any:
    """The same network as one scan, for backpropagation."""
    (stack,) = chain.parts

    def step(x: Any, blocks: Any) -> Any:
        for one in blocks:
            x = one(x)
        return x, None

    return jax.lax.scan(step, x, stack.block)[0]


def timed(make: Callable[[], Any]) -> tuple[float, Any]:
    """The seconds that a call takes, and its result."""
    start = time.perf_counter()
    made = jax.block_until_ready(make())
    return time.perf_counter() - start, made


def backpropagation(chain: mw.Chain, x: Any) -> Any:
    """Its gradient step, compiled."""
    return mw.jit(jax.value_and_grad(lambda c, x: loss(scanned(c, x)))).lower(chain, x).compile()


def measure(point: sweep.Point) -> dict[str, Any]:
    """The figures of one of the two parts, `compile` and `run`."""
    return {"compile": compilation, "run": execution}[point["part"]](point)


def compilation(point: sweep.Point) -> dict[str, Any]:
    """Seconds to trace and compile, in turns after one of each that is not counted, and CPU seconds, which
    other processes disturb less."""
    chain, x = network(point)
    profile = mw.profile(chain, x, repeats=point["repeats"])
    temporaries = mw.temporaries(backpropagation(chain, x))
    frontier = mw.frontier(profile, thin=point["thin"])
    schedule = frontier.at(max(profile.fixed_bytes + temporaries // 4, frontier.least_bytes or 0))

    def planned() -> Any:
        return mw.jit(mw.value_and_grad(loss, schedule)).lower(chain, x).compile()

    made = planned()
    ways: dict[str, Callable[[], Any]] = {
        "planned": planned,
        "backpropagation": lambda: backpropagation(chain, x),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(point["turns"]):
        for name, way in ways.items():
            before = time.process_time()
            seconds[name].append(timed(way)[0])
            cpu[name].append(time.process_time() - before)
    return {
        "compile_seconds": seconds,
        "compile_ratio": _ratio(seconds),
        "compile_cpu_seconds": cpu,
        "compile_cpu_ratio": _ratio(cpu),
        "loops": tape.loops(schedule.runs),
        "quarter_predicted_bytes": schedule.peak_bytes,
        "quarter_measured_bytes": mw.temporaries(made),
        "quarter_backpropagation_bytes": temporaries,
    }


def _ratio(samples: dict[str, list[float]]) -> float:
    return statistics.median(a / b for a, b in zip(samples["planned"], samples["backpropagation"]))


def execution(point: sweep.Point) -> dict[str, Any]:
    """A step in a fraction of backpropagation's temporaries, and its gradient."""
    chain, x = network(point)
    plain = backpropagation(chain, x)
    room = int(point["fraction"] * mw.temporaries(plain))
    profiling, profile = timed(lambda: mw.profile(chain, x, repeats=point["repeats"]))
    budget = profile.fixed_bytes + room
    options = {"thin": point["thin"], "regular": point["regular"]}
    fitting, found = timed(lambda: mw.fit(loss, chain, x, budget=budget, profile=profile, **options))
    jax.block_until_ready(found.step(chain, x))
    taken, ((_, report), grads) = timed(lambda: found.step(chain, x))
    jax.block_until_ready(plain(chain, x))
    plain_taken, (_, truth) = timed(lambda: plain(chain, x))
    difference = optax.tree.norm(jax.tree.map(jnp.subtract, grads, truth))
    return {
        "fixed_bytes": profile.fixed_bytes,
        "backpropagation_bytes": mw.temporaries(plain),
        "room_bytes": room,
        "predicted_bytes": found.schedule.peak_bytes,
        "measured_bytes": found.temporary_bytes,
        "run_loops": tape.loops(found.schedule.runs),
        "attempts": len(found.attempts),
        "last_compile_seconds": found.attempts[-1].compile_seconds,
        "profile_seconds": profiling,
        "fit_seconds": fitting,
        "step_seconds": taken,
        "backpropagation_step_seconds": plain_taken,
        "gradient_error": float(difference / optax.tree.norm(truth)),
        "reported": float(report.worst),
    }


def draw(figures: dict[str, Any]) -> Figure:
    """Compile times and temporaries, planned beside backpropagation's."""
    sns.set_theme(style="whitegrid", context="paper")
    figure = Figure(figsize=(7, 3), layout="constrained")
    compile_axes, memory = figure.subplots(1, 2)
    names, colors = ["backpropagation", "planned"], ["#6c757d", "#2a6f97"]
    compile_axes.bar(
        names, [statistics.median(figures["compile_seconds"][name]) for name in names], color=colors
    )
    compile_axes.set(ylabel="trace and compile, s", title=f"depth {figures['config']['compiled']:,}")
    sizes = [figures["backpropagation_bytes"] / 2**20, figures["measured_bytes"] / 2**20]
    bars = memory.bar(names, sizes, color=colors)
    memory.bar_label(bars, [f"{size:,.3g} MiB" for size in sizes])
    memory.set(ylabel="temporaries, MiB", yscale="log", title=f"depth {figures['config']['depth']:,}")
    return figure


def main(config: Config) -> dict[str, Any]:
    """Measures what is missing, prints, draws and saves."""
    console = record.console()
    shared = ("batch", "size", "channels", "repeats", "thin", "seed")
    own = {"compile": ("turns",), "run": ("fraction", "regular")}
    points = [
        {"part": part, "depth": depth, **{name: getattr(config, name) for name in (*shared, *own[part])}}
        for part, depth in (("compile", config.compiled), ("run", config.depth))
    ]
    found = sweep.run(
        points,
        measure,
        config.out / "records.jsonl",
        executor=config.executor,
        workers=config.workers,
        title="depth",
        console=console,
    )
    figures = {
        k: v
        for one in found
        for k, v in one.items()
        if k not in ("key", "point", "provenance", "wall_seconds")
    }
    figures["config"] = sweep.plain(config)
    table = Table("figure", "value", title="depth", title_justify="left")
    for name, value in figures.items():
        if isinstance(value, (int, float)):
            table.add_row(name, f"{value:_}" if isinstance(value, int) else f"{value:.3g}")
    console.print(table)
    record.save(config.out / "deep.json", figures)
    write_atomically(config.out / "deep.png", png(draw(figures)))
    return figures


if __name__ == "__main__":
    main(sweep.parse(Config, __doc__))
