"""One point: a network's step by one method, compiled for one target."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax

import mwplan as mw
from experiments.targets.networks import Shapes, network
from mwplan import targets
from mwplan.network.chain import Chain
from mwplan.planning.budgets import default_thin

#: How our plans' programs are written.
ARRANGEMENTS = {"tied": 0, "loose": mw.LOOSE, "untied": mw.UNTIED}
#: What one would do without a planner.
ALTERNATIVES = ("backprop", "checkpoint", "dots_saveable", "sqrt")


@dataclass(frozen=True, kw_only=True)
class Point:
    """A network's step for a target by a method; of plans `share`, of the way from the least feasible
    temporaries to the fastest plan's."""

    network: str
    target: str
    method: str
    share: float = -1.0


def points(networks: tuple[str, ...], target: str, shares: tuple[float, ...]) -> Iterator[Point]:
    """All points of a target, alternatives first."""
    for name in networks:
        for method in ALTERNATIVES:
            yield Point(network=name, target=target, method=method)
        for share in shares:
            for arrangement in ARRANGEMENTS:
                yield Point(network=name, target=target, method=arrangement, share=share)


def alternative(method: str, shapes: Shapes) -> Callable[..., Any]:
    """The loss by one of `ALTERNATIVES`, to be differentiated."""
    policy = jax.checkpoint_policies.dots_saveable if method == "dots_saveable" else None
    size = round(math.sqrt(len(shapes.chain))) if method == "sqrt" else 1

    def segment(layers: list[Any], x: Any) -> Any:
        return functools.reduce(lambda x, one: one(x), layers, x)

    def loss(chain: Chain, x: Any, labels: Any) -> Any:
        if method == "backprop":
            return shapes.loss(chain(x), labels)
        layers = list(chain)
        for at in range(0, len(layers), size):
            x = jax.checkpoint(segment, policy=policy)(layers[at : at + size], x)
        return shapes.loss(x, labels)

    return loss


@functools.cache
def planner(name: str, target: str) -> tuple[Shapes, mw.Profile, mw.Frontier, float]:
    """A network with its profile for the target, all its plans, and the seconds that these took."""
    shapes = network(name).shapes()
    start = time.perf_counter()
    profile = mw.estimate(shapes.chain, shapes.x, device=target)
    # As `mw.plan` does: an exact frontier of more than 128 layers takes ten minutes and more.
    frontier = mw.frontier(profile, thin=default_thin(profile))
    return shapes, profile, frontier, time.perf_counter() - start


def compute(point: Point) -> dict[str, Any]:
    """The record of a point."""
    found: dict[str, Any] = {}
    if point.share < 0:
        shapes = network(point.network).shapes()
        step = jax.value_and_grad(alternative(point.method, shapes), allow_int=True)
    else:
        shapes, profile, frontier, seconds = planner(point.network, point.target)
        low, high = frontier.points[0][0], frontier.points[-1][0]
        schedule = frontier.at(int(low + point.share * (high - low)) + 1)
        step = mw.value_and_grad(shapes.loss, schedule, arrangement=ARRANGEMENTS[point.method])
        found |= {
            "source": profile.source,
            "estimate_seconds": seconds,
            "strategies": {s.value: schedule.strategies.count(s) for s in set(schedule.strategies)},
            "predicted_bytes": schedule.peak_bytes,
            "predicted_ns": schedule.time_ns,
            "budget_bytes": schedule.budget_bytes,
        }
    start = time.perf_counter()
    try:
        made = targets.compile(step, shapes.chain, shapes.x, shapes.labels, target=point.target)
    except mw.TargetMemoryError as error:
        return found | {"out_of_memory": str(error), "needed_bytes": error.needed_bytes}
    return found | {
        "compile_seconds": time.perf_counter() - start,
        "compiler": made.compiler,
        "temporary_bytes": made.temporary_bytes,
        "total_bytes": made.total_bytes,
        "modelled_ns": made.modelled_ns,
        "shares_ns": made.shares_ns,
        "launches": made.launches,
        "moved_bytes": made.moved_bytes,
        "flop": made.flop,
    }
