"""How deep: compile time at depth 1,000, and a hundredth of backpropagation's memory at depth 10,000: `python -m experiments.deep`.

A block of a convolution and MaxMin, stacked, its weights near an orthogonal one so that activations keep their size. First, at `compiled` blocks, the seconds that tracing and
compiling take of a planned step (at a quarter of backpropagation's temporaries, or the least that is feasible) and of backpropagation as one `lax.scan`, in turns. Then, at `depth` blocks, a step whose
temporaries are at most `fraction` of those that the scanned backpropagation needs: planned, compiled, run, and its gradient compared. Writes results/deep/.
"""

from __future__ import annotations

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
from rich.console import Console
from rich.table import Table

import mwplan as mw
from experiments import record, sweep
from mwplan import layers as L
from mwplan.plots import png
from mwplan.serial import write_atomically


@dataclass(frozen=True)
class Config:
    """Sizes. `turns`: compilations of each; `thin`: as in `mw.frontier`."""

    compiled: int = 1000
    depth: int = 10_000
    fraction: float = 0.01
    batch: int = 4
    size: int = 16
    channels: int = 8
    turns: int = 3
    repeats: int = 3
    thin: float = 0.02
    seed: int = 0
    out: Path = record.RESULTS / "deep"


def block(key: jax.Array, channels: int) -> L.Sequential:
    """A convolution, an orthogonal matrix in its middle and little around it, and MaxMin."""
    keys = jax.random.split(key)
    conv = L.Conv2D.init(keys[0], channels, channels, 3, padding="CIRCULAR")
    middle = jax.random.orthogonal(keys[1], channels)
    weight = 1e-3 * conv.weight.at[1, 1].set(0) + jnp.zeros_like(conv.weight).at[1, 1].set(middle)
    return L.Sequential((L.Conv2D(weight, conv.bias, padding="CIRCULAR"), L.MaxMin()))


def network(config: Config, depth: int) -> tuple[mw.Chain, Any]:
    """`depth` blocks, and an input."""
    key = jax.random.key(config.seed)
    x = jax.random.normal(key, (config.batch, config.size, config.size, config.channels))
    return mw.Chain([mw.Stack.init(lambda key: block(key, config.channels), key, depth)]), x


def loss(y: Any) -> Any:
    """A weighted mean square."""
    return jnp.mean(y**2 * jnp.linspace(0.5, 1.5, y.shape[-1]))


def scanned(chain: mw.Chain, x: Any) -> Any:
    """The same network as one scan: what backpropagation is taken through."""
    (stack,) = chain.parts

    def step(x: Any, blocks: Any) -> Any:
        for one in blocks:
            x = one(x)
        return x, None

    return jax.lax.scan(step, x, stack.block)[0]


def timed(make: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what was made."""
    start = time.perf_counter()
    made = jax.block_until_ready(make())
    return time.perf_counter() - start, made


def backpropagation(chain: mw.Chain, x: Any) -> Any:
    """Its gradient step, compiled."""
    return mw.jit(jax.value_and_grad(lambda c, x: loss(scanned(c, x)))).lower(chain, x).compile()


def measure(config: Config, say: Callable[[str], None]) -> dict[str, Any]:
    """All figures."""
    chain, x = network(config, config.compiled)
    profile = mw.profile(chain, x, repeats=config.repeats)
    temporaries = mw.temporaries(backpropagation(chain, x))
    frontier = mw.frontier(profile, thin=config.thin)
    schedule = frontier.at(max(profile.fixed_bytes + temporaries // 4, frontier.least_bytes or 0))
    seconds: dict[str, list[float]] = {"planned": [], "backpropagation": []}
    for _ in range(config.turns):
        seconds["planned"].append(
            timed(lambda: mw.jit(mw.value_and_grad(loss, schedule)).lower(chain, x).compile())[0]
        )
        seconds["backpropagation"].append(timed(lambda: backpropagation(chain, x))[0])
    say(f"depth {config.compiled}: compiled in {min(seconds['planned']):.1f} s, backpropagation in {min(seconds['backpropagation']):.1f} s")  # fmt: skip

    chain, x = network(config, config.depth)
    plain = backpropagation(chain, x)
    room = int(config.fraction * mw.temporaries(plain))
    planning, profile = timed(lambda: mw.profile(chain, x, repeats=config.repeats))
    fitting, found = timed(
        lambda: mw.fit(
            loss, chain, x, budget=profile.fixed_bytes + room, profile=profile, thin=config.thin, say=say
        )
    )
    jax.block_until_ready(found.step(chain, x))
    taken, ((_, report), grads) = timed(lambda: found.step(chain, x))
    plain_taken, (_, truth) = timed(lambda: plain(chain, x))
    return {
        "compile_seconds": seconds,
        "compile_ratio": min(seconds["planned"]) / min(seconds["backpropagation"]),
        "quarter": {"predicted": schedule.peak_bytes, "backpropagation": temporaries},
        "fixed_bytes": profile.fixed_bytes,
        "backpropagation_bytes": mw.temporaries(plain),
        "room_bytes": room,
        "predicted_bytes": found.schedule.peak_bytes,
        "measured_bytes": found.temporary_bytes,
        "attempts": len(found.attempts),
        "profile_seconds": planning,
        "fit_seconds": fitting,
        "step_seconds": taken,
        "backpropagation_step_seconds": plain_taken,
        "gradient_error": float(
            optax.tree.norm(jax.tree.map(jnp.subtract, grads, truth)) / optax.tree.norm(truth)
        ),
        "reported": float(report.worst),
    }


def draw(figures: dict[str, Any]) -> Figure:
    """Compile times and temporaries, planned beside backpropagation's."""
    sns.set_theme(style="whitegrid", context="paper")
    figure = Figure(figsize=(7, 3), layout="constrained")
    compile_axes, memory = figure.subplots(1, 2)
    names, colors = ["backpropagation", "planned"], ["#6c757d", "#2a6f97"]
    compile_axes.bar(names, [min(figures["compile_seconds"][name]) for name in names], color=colors)
    compile_axes.set(ylabel="trace and compile, s", title=f"depth {figures['config']['compiled']:,}")
    sizes = [figures["backpropagation_bytes"] / 2**20, figures["measured_bytes"] / 2**20]
    bars = memory.bar(names, sizes, color=colors)
    memory.bar_label(bars, [f"{size:,.3g} MiB" for size in sizes])
    memory.set(ylabel="temporaries, MiB", yscale="log", title=f"depth {figures['config']['depth']:,}")
    return figure


def main(config: Config) -> dict[str, Any]:
    """Measures, prints, draws and saves."""
    console = Console()
    figures = {"config": sweep.plain(config), **measure(config, console.print)}
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
