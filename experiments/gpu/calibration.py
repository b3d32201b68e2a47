"""How far the model of a device is off: the same steps compiled without it, compiled for it, and run."""

from __future__ import annotations

import concurrent.futures as cf
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import rich.box
from rich.table import Table
from scipy.optimize import nnls

import mwplan as mw
from experiments import sweep, zoo
from experiments.barriers import alternatives
from mwplan import targets

#: What modelled times are made of.
SHARES = ("arithmetic", "traffic", "launches")


def measure(point: sweep.Point) -> dict[str, Any]:
    """Backpropagation, `jax.checkpoint` on every layer, and plans of one network, in one process.

    The smallest step runs first: the allocator's peak cannot be reset, but what a larger step adds to it is
    its own. `allocated_bytes`: what the step took beside what was there, null where nothing was added."""
    model = zoo.build(zoo.Config(**point["network"]))
    args = (model.chain, model.x, model.labels)
    device = targets.attached().device
    start = time.perf_counter()
    profile = _profile(model, device, point["repeats"])
    profiled = time.perf_counter() - start
    frontier = mw.frontier(profile)
    steps = dict(_steps(model, frontier, point["shares"]))
    with cf.ThreadPoolExecutor(8) as pool:
        made = dict(zip(steps, pool.map(lambda one: _compiled(one[0], args), steps.values())))
        apart = dict(zip(steps, pool.map(lambda one: _apart(one[0], args, device), steps.values())))
    rows = []
    for name in sorted(steps, key=lambda name: int(made[name].temporary_bytes)):
        compiled, schedule = made[name], steps[name][1]
        row = {"program": name, **_figures(compiled, "attached"), **apart[name]}
        if schedule is not None:
            row |= {"predicted_bytes": schedule.peak_bytes, "predicted_ns": schedule.time_ns}
        rows.append({**row, **_run(compiled.executable, args, point["rounds"])})
    return {"ran": True, "source": profile.source, "profile_seconds": profiled, "rows": rows}


def _profile(model: zoo.Model, device: mw.Device | None, repeats: int) -> mw.Profile:
    """By the device's compiler where its figures are known; else measured."""
    if device is not None and targets.installed(device):
        return mw.estimate(model.chain, model.x, device=device)
    return mw.profile(model.chain, model.x, repeats=repeats)


def _steps(
    model: zoo.Model, frontier: mw.Frontier, shares: list[float]
) -> Iterator[tuple[str, tuple[Callable[..., Any], mw.Schedule | None]]]:
    for name, step in alternatives(model):
        yield name, (step, None)
    least, most = (frontier.points[at][0] for at in (0, -1))
    for share in shares:
        schedule = frontier.at(round(least + share * (most - least)))
        yield f"plan {share:.2f}", (mw.value_and_grad(model.loss, schedule), schedule)


def _compiled(step: Callable[..., Any], args: tuple[Any, ...]) -> targets.Compiled:
    return targets.compile(step, *args, cached=False)


def _apart(step: Callable[..., Any], args: tuple[Any, ...], device: mw.Device | None) -> dict[str, Any]:
    """The step compiled as if the device were not there; why not, where it cannot be."""
    if device is None:
        return {"apart": "the device's figures are not known"}
    try:
        return _figures(targets.compile(step, *args, target=device, cached=False), "apart")
    except (mw.MwplanError, RuntimeError) as error:
        return {"apart": f"{type(error).__name__}: {str(error)[:200]}"}


def _figures(compiled: targets.Compiled, where: str) -> dict[str, Any]:
    known = compiled.device is not None
    return {
        f"{where}_bytes": compiled.temporary_bytes,
        f"{where}_ns": compiled.modelled_ns if known else None,
        f"{where}_shares_ns": compiled.shares_ns if known else None,
        f"{where}_kernels": compiled.launches,
    }


def _run(executable: Any, args: tuple[Any, ...], rounds: int) -> dict[str, Any]:
    """Times of a compiled step, and what it adds to the allocator's peak."""
    before = _memory()
    jax.block_until_ready(executable(*args))
    after = _memory()
    samples = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(executable(*args))
        samples.append(time.perf_counter() - start)
    added = before is not None and after is not None and after[1] > before[1]
    stats = executable.memory_analysis()
    return {
        "output_bytes": int(stats.output_size_in_bytes),
        "allocated_bytes": after[1] - before[0] if added and after and before else None,
        "seconds": samples,
    }


def _memory() -> tuple[int, int] | None:
    """Bytes in use, and their peak so far; None where the backend does not say."""
    stats = jax.local_devices()[0].memory_stats()
    return None if stats is None else (int(stats["bytes_in_use"]), int(stats["peak_bytes_in_use"]))


def flat(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a step, of the records of all networks."""
    rows = []
    for one in found:
        if one["point"]["kind"] != "calibration" or not one["ran"]:
            continue
        for row in one["rows"]:
            allocated = row["allocated_bytes"]
            seconds = statistics.median(row["seconds"])
            modelled = row["attached_ns"]
            rows.append(
                {
                    "model": one["point"]["model"],
                    "depth": one["point"]["depth"],
                    **row,
                    "seconds": seconds,
                    "over_modelled": 1e9 * seconds / modelled if modelled else None,
                    "allocated_over_compiled": allocated / (row["attached_bytes"] + row["output_bytes"])
                    if allocated
                    else None,
                }
            )
    return rows


def rates(rows: list[dict[str, Any]]) -> dict[str, float] | None:
    """By what modelled arithmetic, traffic and launches have to be multiplied so that their sums are the
    measured times, in the sense of least squares of ratios (each at least 0); `rms`: of what is left. None
    where no modelled time is known."""
    known = [row for row in rows if row["attached_shares_ns"]]
    if not known:
        return None
    parts = np.array([[row["attached_shares_ns"].get(name, 0.0) for name in SHARES] for row in known])
    measured = np.array([1e9 * row["seconds"] for row in known])
    factors, left = nnls(parts / measured[:, None], np.ones(len(known)))
    return {**dict(zip(SHARES, map(float, factors))), "rms": float(left) / len(known) ** 0.5}


def table(rows: list[dict[str, Any]]) -> Table:
    """The steps for people: megabytes and milliseconds."""
    made = Table(title="steps compiled without the device, for it, and run", box=rich.box.SIMPLE)
    names = (
        "network", "program", "MiB: predicted", "compiled apart", "compiled", "allocated / compiled",
        "ms: modelled apart", "modelled", "measured", "measured / modelled",
    )  # fmt: skip
    for name in names:
        made.add_column(name, justify="left" if name in ("network", "program") else "right")

    def number(value: float | None, scale: float, form: str) -> str:
        return "-" if value is None else f"{value / scale:{form}}"

    for row in rows:
        sizes = [row.get(name) for name in ("predicted_bytes", "apart_bytes", "attached_bytes")]
        made.add_row(
            f"{row['model']} {row['depth']}",
            row["program"],
            *(number(size, 2**20, ".1f") for size in sizes),
            number(row["allocated_over_compiled"], 1, ".3f"),
            *(number(row.get(name), 1e6, ".2f") for name in ("apart_ns", "attached_ns")),
            number(row["seconds"], 1e-3, ".2f"),
            number(row["over_modelled"], 1, ".2f"),
        )
    return made
