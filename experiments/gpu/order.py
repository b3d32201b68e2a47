"""Which points there are, in which order: the next may depend on what the last ones gave."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterator, Sequence
from typing import Any

from rich.console import Console

from experiments import alternatives, sweep, zoo
from experiments.gpu.config import Config
from experiments.gpu.runner import Clock, OutOfTimeError, Runner

Steps = Generator[sweep.Point, dict[str, Any], None]


def _sizes(config: Config, model: str, depth: int) -> dict[str, Any]:
    text = {"resolution": config.length, "width": config.text_width, "batch": config.text_batch}
    sizes = {"resolution": config.resolution, "width": config.width, "batch": config.batch}
    made = zoo.Config(
        model=model, depth=depth, group=zoo.joined(depth, config.layers), seed=config.seed,
        **(text if model == "gpt" else sizes),
    )  # fmt: skip
    return dataclasses.asdict(made)


def _common(config: Config) -> dict[str, Any]:
    return {name: getattr(config, name) for name in ("max_error", "thin", "repeats", "rounds")}


def ladder(config: Config, method: str) -> Steps:
    """Growing depths until memory runs out; then halfway between the last that ran and the first that did
    not, `refine` times."""
    limit = round(config.pool_gib * 2**30)

    def points(depth: int) -> Generator[sweep.Point, dict[str, Any], bool]:
        network = _sizes(config, config.model, depth)
        shared = {"model": config.model, "depth": depth, "network": network, **_common(config)}
        point = {"kind": "step", "method": method, "pool_bytes": limit, **shared}
        if method in alternatives.BUDGETED:
            sizes = [int(share * limit) for share in config.shares]
            planned = yield {"kind": "plan", "budgets": sizes, **shared}
            if not planned["ran"] or not planned["schedules"][method]:
                return False
            point["schedules"] = planned["schedules"][method]
        return bool((yield point)["ran"])

    good, bad = 0, 0
    for depth in config.depths:
        if not (yield from points(depth)):
            bad = depth
            break
        good = depth
    for _ in range(config.refine if bad else 0):
        depth = (good + bad) // 2
        if depth in (good, bad):
            break
        if (yield from points(depth)):
            good = depth
        else:
            bad = depth


def swept(config: Config, models: Sequence[str]) -> Steps:
    """Budgets at fixed depth."""
    for model in models:
        yield {
            "kind": "budgets",
            "model": model,
            "depth": config.yard,
            "network": _sizes(config, model, config.yard),
            **_common(config),
            "budgets": config.budgets,
        }


def calibrated(config: Config) -> Steps:
    """Steps to hold the model of the device against."""
    for model, depth in config.calibrated:
        yield {
            "kind": "calibration",
            "model": model,
            "depth": depth,
            "network": _sizes(config, model, depth) | {"group": 0},
            "shares": list(config.calibrated_shares),
            "rounds": config.rounds,
            "repeats": config.repeats,
        }


def offloaded(config: Config) -> Steps:
    """One network with its residuals in the host's memory."""
    model = config.others[0]
    network = _sizes(config, model, config.yard)
    yield {"kind": "offload", "model": model, "depth": config.yard, "network": network, **_common(config)}


def precise(config: Config) -> Steps:
    """Errors against depth."""
    for matmul in ("highest", None):
        for blocks in config.blocks:
            for kind in config.kinds if matmul else config.kinds[:1]:
                yield {
                    "kind": "precision",
                    "matmul": matmul,
                    "blocks": blocks,
                    "chain": {
                        "kind": kind,
                        "depth": blocks,
                        "steps": 0,
                        "tolerances": [1e-3, 1e-4],
                        "width": config.features,
                        "batch": config.rows,
                        "repeats": config.repeats,
                        "seed": config.seed,
                    },
                }


def order(config: Config) -> Iterator[Steps]:
    """Generators of points, one after the other."""
    yield calibrated(config)
    yield together([ladder(config, method) for method in config.methods])
    yield offloaded(config)
    yield swept(config, config.others[:1])
    yield precise(config)
    yield swept(config, config.others[1:])


def together(parts: list[Steps]) -> Steps:
    """Points of several generators in turns."""
    waiting: list[tuple[Steps, dict[str, Any] | None]] = [(part, None) for part in parts]
    while waiting:
        part, answer = waiting.pop(0)
        try:
            point = next(part) if answer is None else part.send(answer)
        except StopIteration:
            continue
        answer = yield point
        waiting.append((part, answer))


def run(config: Config, console: Console) -> tuple[list[dict[str, Any]], bool]:
    """All finished records in their order, and whether none is missing."""
    runner = Runner(config, Clock(60 * config.minutes), console)
    found: list[dict[str, Any]] = []
    try:
        for steps in order(config):
            answer: dict[str, Any] | None = None
            while True:
                try:
                    point = next(steps) if answer is None else steps.send(answer)
                except StopIteration:
                    break
                answer = runner(point)
                found.append(answer)
    except OutOfTimeError:
        console.print("the time is up: call again to go on")
        return list({one["key"]: one for one in found}.values()), False
    return list({one["key"]: one for one in found}.values()), True
