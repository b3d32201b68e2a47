"""What barriers cost, compiled for a device that need not be here: `python -m experiments.barriers`.

For each network: backpropagation, `jax.checkpoint` on every layer under three policies, and plans from the
largest budget to small ones, each plan with every policy of barriers. Temporaries are the compiler's; times
are modelled from the kernels that it made (`mw.targets`). Needs the target's compiler
(`pip install 'mwplan[targets]'`) and no device. Writes results/barriers/.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import rich.box
from rich.progress import track
from rich.table import Table

import mwplan as mw
from experiments import record, zoo
from mwplan import layers as ml
from mwplan import targets
from mwplan.common.sizes import show_bytes
from mwplan.execution import barriers
from mwplan.execution.barriers import APART, DONE, NONE, Around, Barriers


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which networks, at which shares of the way from the least budget to the largest useful one."""

    target: str = "h200"
    networks: tuple[str, ...] = ("gpt", "resnet", "mlp", "maxmin", "revnet")
    policies: tuple[str, ...] = ("apart", "untied", "planned")
    checkpoints: tuple[str, ...] = ("checkpoint", "checkpoint, dots", "checkpoint, dots without batch")
    shares: tuple[float, ...] = (1.0, 0.5, 0.25, 0.1, 0.0)
    depth: int = 0  # of each network its own, by default
    out: Path = record.RESULTS / "barriers"


#: Policies by name: those of every operation apart, which all platforms had before; none; and what may lie
#: between them.
POLICIES: dict[str, Barriers] = {
    "apart": Barriers(forward=APART, backward=APART),
    "untied": barriers.UNTIED,
    "loose": barriers.LOOSE,
    "done": Barriers(forward=NONE, backward=DONE),
    "done_forward": Barriers(forward=DONE, backward=DONE),
    "begun": Barriers(forward=NONE, backward=Around(arguments=True, results=False)),
    "backward_apart": Barriers(forward=NONE, backward=APART),
    "inverse_done": Barriers(forward=NONE, backward=DONE, inverse=DONE),
}


def maxmin(depth: int, width: int = 64, resolution: int = 32, batch: int = 256) -> zoo.Model:
    """MaxMin and 1x1 convolutions with orthogonal matrices: light operations, where a kernel more is seen."""
    keys = jax.random.split(jax.random.key(0), depth + 1)
    layers: list[Any] = [ml.SpaceToDepth((2, 2)), ml.PadChannels(width - 4)]
    for key in keys[1:]:
        kernel = jax.nn.initializers.orthogonal()(key, (1, 1, width, width))
        layers += [ml.MaxMin(), ml.Conv2D(kernel, jnp.zeros(width))]
    head = [zoo.LastMean(), ml.Dense.init(keys[0], width, zoo.CLASSES)]
    data = zoo.build(zoo.Config(model="mlp", depth=1, width=8, resolution=resolution, batch=batch))
    return zoo.Model(mw.Chain([*layers, *head]), data.x, data.labels, data.loss)


def _zoo(depth: int, **sizes: Any) -> zoo.Model:
    return zoo.build(zoo.Config(depth=depth, **sizes))


#: Networks by name: their usual depth, and what makes one of a depth.
NETWORKS: dict[str, tuple[int, Callable[[int], zoo.Model]]] = {
    "gpt": (6, functools.partial(_zoo, model="gpt", width=512, resolution=512, batch=8)),
    "maxmin_large": (3, functools.partial(maxmin, batch=2048)),
    "resnet": (16, functools.partial(_zoo, model="resnet", width=64, resolution=32, batch=256)),
    "mlp": (16, functools.partial(_zoo, model="mlp", width=1024, resolution=32, batch=8192)),
    "maxmin": (16, maxmin),
    "revnet": (8, functools.partial(_zoo, model="revnet", width=128, resolution=32, batch=256)),
}
#: `jax.checkpoint` on every layer: its policies by name.
CHECKPOINTS = {
    "checkpoint": None,
    "checkpoint, dots": jax.checkpoint_policies.dots_saveable,
    "checkpoint, dots without batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def alternatives(
    model: zoo.Model, checkpoints: tuple[str, ...] = tuple(CHECKPOINTS)
) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Gradient steps without plans, by name; `checkpoints`, those of `CHECKPOINTS`."""

    def step(network: Callable[[Any, Any], Any]) -> Callable[..., Any]:
        return jax.value_and_grad(lambda chain, x, labels: model.loss(network(chain, x), labels))

    yield "backpropagation", step(lambda chain, x: chain(x))
    for name in checkpoints:

        def checkpointed(chain: Any, x: Any, policy: Any = CHECKPOINTS[name]) -> Any:
            for layer in chain:
                x = jax.checkpoint(lambda layer, x: layer(x), policy=policy)(layer, x)
            return x

        yield name, step(checkpointed)


def plans(model: zoo.Model, config: Config) -> Iterator[tuple[float, mw.Schedule]]:
    """The fastest schedules by the estimates for the target, from the largest budget on, each once."""
    gpu = targets.target_of(config.target).platform == "gpu"
    # For a TPU each operation by itself would be compiled for minutes: they are counted.
    priced = None if gpu else False
    frontier = mw.frontier(mw.estimate(model.chain, model.x, device=config.target, compiled=priced))
    budgets = frontier.table()["total_bytes"]
    least, most = int(budgets.iloc[0]), int(budgets.iloc[-1])
    seen = set()
    for share in config.shares:
        schedule = frontier.at(round(least + share * (most - least)))
        if schedule.runs not in seen:
            seen.add(schedule.runs)
            yield share, schedule


def figures(made: targets.Compiled) -> dict[str, Any]:
    """What is recorded of a compiled program."""
    return {
        "temporary_bytes": made.temporary_bytes,
        "modelled_ns": made.modelled_ns,
        "moved_bytes": made.moved_bytes,
        "kernels": made.launches,
    }


def network(name: str, config: Config) -> list[dict[str, Any]]:
    """All programs of one network, written as far as they are known."""
    usual, make = NETWORKS[name]
    depth = config.depth or usual
    model = make(depth)
    args = (model.chain, model.x, model.labels)
    rows: list[dict[str, Any]] = []
    settings = {**dataclasses.asdict(config), "out": str(config.out.name), "networks": [name]}

    def add(program: str, step: Callable[..., Any], **more: Any) -> None:
        made = targets.compile(step, *args, target=config.target)
        found = {**figures(made), "cycles": made.cycles}
        rows.append({"network": name, "depth": depth, "program": program, **more, **found})
        record.save(
            config.out / f"{config.target}_{name}.json",
            {"config": settings, "rows": [compared(row, rows) for row in rows]},
        )
        print(
            f"{name} {program}: {show_bytes(made.temporary_bytes)}, {made.modelled_ns / 1e6:.3f} ms",
            flush=True,
        )

    for program, step in alternatives(model, config.checkpoints):
        add(program, step)
    planned = {"cpu": "apart"}.get(targets.target_of(config.target).platform, "planned")
    for share, schedule in plans(model, config):
        for policy in config.policies:
            arrangement = 0 if policy == planned else POLICIES[policy]
            add(
                f"plan {share:.2f}",
                mw.value_and_grad(model.loss, schedule, arrangement=arrangement),
                policy=policy,
                share=share,
                predicted_bytes=schedule.peak_bytes,
                strategies=str(schedule).partition("\n")[0].partition(": ")[2],
            )
    return [compared(row, rows) for row in rows]


def compared(row: dict[str, Any], rows: list[dict[str, Any]], plan: str = "policy") -> dict[str, Any]:
    """`row`, and its modelled time over the fastest alternative's that takes no more bytes, if there is
    one; `plan`, the field that plans alone have."""
    if plan not in row:
        return row
    fits = [
        one["modelled_ns"]
        for one in rows
        if plan not in one and one["temporary_bytes"] <= row["temporary_bytes"]
    ]
    return {**row, "over_best_alternative": row["modelled_ns"] / min(fits) if fits else None}


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows for people."""
    made = Table(box=rich.box.SIMPLE)
    for name in (
        "network",
        "program",
        "barriers",
        "temporaries",
        "of predicted",
        "modelled",
        "moved",
        "kernels",
    ):
        made.add_column(name, justify="left" if name in ("network", "program", "barriers") else "right")
    made.add_column("of the best alternative that fits", justify="right")
    for row in rows:
        predicted, ratio = row.get("predicted_bytes"), row.get("over_best_alternative")
        made.add_row(
            f"{row['network']} {row['depth']}",
            row["program"],
            row.get("policy", ""),
            show_bytes(row["temporary_bytes"]),
            f"{row['temporary_bytes'] / predicted:.3f}" if predicted else "",
            f"{row['modelled_ns'] / 1e6:.3f} ms",
            show_bytes(row["moved_bytes"]),
            str(row["kernels"]),
            f"{ratio:.3f}" if ratio else "",
        )
    return made


def main(config: Config) -> None:
    """Compiles and prints."""
    rows: list[dict[str, Any]] = []
    for name in track(config.networks, description="networks"):
        rows += network(name, config)
    record.console().print(table(rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default=Config.target)
    parser.add_argument("--networks", nargs="+", default=Config.networks, choices=NETWORKS)
    parser.add_argument("--policies", nargs="+", default=Config.policies, choices=["planned", *POLICIES])
    parser.add_argument("--checkpoints", nargs="*", default=Config.checkpoints, choices=CHECKPOINTS)
    parser.add_argument("--shares", nargs="+", type=float, default=Config.shares)
    parser.add_argument("--depth", type=int, default=Config.depth)
    given = parser.parse_args()
    main(
        Config(
            target=given.target,
            networks=tuple(given.networks),
            policies=tuple(given.policies),
            checkpoints=tuple(given.checkpoints),
            shares=tuple(given.shares),
            depth=given.depth,
        )
    )
