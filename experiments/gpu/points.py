"""The work of one point, in a process of its own."""

from __future__ import annotations

import contextlib
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

import mwplan as mw
from experiments import alternatives, precision, record, sweep, zoo
from experiments.gpu import calibration
from mwplan.app.side_by_side import relative_error
from mwplan.plans.schedule import SINGLE, Run, Schedule


def measure(point: sweep.Point) -> dict[str, Any]:
    """The point's work; running out of memory is a result. `memory`: the pool's limit and the process's peak,
    in bytes, or null."""
    matmul = point.get("matmul")
    try:
        with jax.default_matmul_precision(matmul) if matmul else contextlib.nullcontext():
            kinds = {
                "calibration": calibration.measure, "plan": plan, "step": step, "offload": offload,
                "budgets": budgets, "precision": errors,
            }  # fmt: skip
            found = kinds[point["kind"]](point)
    except Exception as error:
        if not ran_out(error):
            raise
        found = {"ran": False, "reason": _short(error)}
    return {**found, "memory": pool()}


def ran_out(error: Exception) -> bool:
    """Whether an error says that memory ran out."""
    return isinstance(error, MemoryError) or any(
        text in str(error) for text in ("RESOURCE_EXHAUSTED", "Out of memory", "out of memory")
    )


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:300]}"


def pool() -> dict[str, int | None]:
    """What the allocator says of itself."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return {"limit_bytes": stats.get("bytes_limit"), "peak_bytes": stats.get("peak_bytes_in_use")}


def _problem(point: sweep.Point) -> alternatives.Problem:
    made = zoo.build(zoo.Config(**point["network"]))
    # Stacked: every repetition unrolled would be a program to compile for minutes.
    return alternatives.Problem(*made, point["max_error"], point["thin"], point["repeats"], unroll=0)


def plan(point: sweep.Point) -> dict[str, Any]:
    """Profiles one network and plans for each of the budgets; schedules as JSON."""
    problem = _problem(point)
    start = time.perf_counter()
    profile = problem.profile
    profiled = time.perf_counter() - start
    made: dict[str, list[str]] = {}
    for name, allowed in (("plan", frozenset(mw.Strategy)), ("recompute", alternatives.RECOMPUTATION)):
        frontier = problem.frontier(allowed)
        least = frontier.least_bytes
        fitting = [size for size in point["budgets"] if least is not None and least <= size]
        made[name] = [frontier.at(size).to_json() for size in fitting]
    return {"ran": True, "profile_seconds": profiled, "fixed_bytes": profile.fixed_bytes, "schedules": made}


def step(point: sweep.Point) -> dict[str, Any]:
    """One method's step: compiled, run, timed. Of several schedules the first that fits the pool."""
    problem = _problem(point)
    schedules = [Schedule.from_json(text) for text in point.get("schedules", ())]
    candidates: list[Callable[[], alternatives.Candidate]]
    if schedules:
        candidates = [lambda s=s: alternatives.applied(problem, s) for s in schedules]  # type: ignore[misc]
    else:
        candidates = [lambda: alternatives.METHODS[point["method"]](problem, None)]
    reasons: list[str] = []
    for make in candidates:
        try:
            return {"ran": True, "reasons": reasons, **_run(point, problem, make())}
        except Exception as error:
            if not ran_out(error):
                raise
            reasons.append(_short(error))
    return {"ran": False, "reason": reasons[-1], "reasons": reasons, "fixed_bytes": problem.fixed_bytes}


def offload(point: sweep.Point) -> dict[str, Any]:
    """Every layer stored, and every layer offloaded, by the same rule; how far apart the gradients are,
    relative."""
    problem = _problem(point)
    chain = mw.unstack(problem.chain)  # OFFLOAD runs are written out
    found: dict[str, Any] = {"ran": True}
    grads: list[Any] = []
    for kind in SINGLE:
        runs = tuple(Run(kind=kind, start=i, stop=i + 1, options=("vjp",)) for i in range(len(chain)))
        candidate = alternatives.Candidate(
            functools.partial(mw.apply, Schedule(runs=runs)), chain, None, runs
        )
        found[kind.value] = _run(point, problem, candidate, grads)
    store, offloaded = found["store"], found["offload"]
    more = statistics.median(offloaded["seconds"]) - statistics.median(store["seconds"])
    gradients = [jax.tree.leaves(got) for _, got in grads]
    return found | {
        "link_bytes_per_s": 2 * offloaded["host_bytes"] / more if more > 0 else None,
        "gradient_difference": relative_error(*reversed(gradients))[0],
    }


def _run(
    point: sweep.Point,
    problem: alternatives.Problem,
    candidate: alternatives.Candidate,
    keep: list[Any] | None = None,
) -> dict[str, Any]:
    """Bytes and times of one step; what it returned goes into `keep`."""
    before = pool()["peak_bytes"]
    args = (candidate.chain, problem.x, problem.labels)
    start = time.perf_counter()
    executable = mw.jit(candidate.step(problem.loss)).lower(*args).compile()
    seconds = time.perf_counter() - start
    compiled = pool()["peak_bytes"]
    temporary = mw.temporaries(executable)
    first = jax.block_until_ready(executable(*args))
    if keep is not None:
        keep.append(first)
    del first
    samples = []
    for _ in range(point["rounds"]):
        start = time.perf_counter()
        jax.block_until_ready(executable(*args))
        samples.append(time.perf_counter() - start)
    made = {
        "temporary_bytes": temporary,
        "host_bytes": executable.memory_analysis().host_temp_size_in_bytes,
        "fixed_bytes": problem.fixed_bytes,
        "total_bytes": problem.fixed_bytes + temporary,
        "allocator": {"before": before, "compiled": compiled, "ran": pool()["peak_bytes"]},
        "compile_seconds": seconds,
        "seconds": samples,
    }
    if candidate.schedule is not None:
        made["predicted_temporary_bytes"] = candidate.schedule.peak_bytes
        made["predicted_seconds"] = candidate.schedule.time_ns / 1e9
        made["strategies"] = {s.value: candidate.schedule.strategies.count(s) for s in mw.Strategy}
    return made


SWEPT = (
    "backprop_scan", "checkpoint_scan", "chen_scan", "equinox", "invert", "recompute", "plan",
)  # fmt: skip


def budgets(point: sweep.Point) -> dict[str, Any]:
    """`alternatives.measure` with what compiles quickly."""
    study = alternatives.Study(
        methods=SWEPT,
        budgets=point["budgets"],
        rounds=point["rounds"],
        max_error=point["max_error"],
        thin=point["thin"],
        repeats=point["repeats"],
        try_settings=False,
    )
    return {
        "ran": True,
        **alternatives.measure(alternatives.point(zoo.Config(**point["network"]), study), unroll=0),
    }


def errors(point: sweep.Point) -> dict[str, Any]:
    """`precision.measure`."""
    return {"ran": True, **precision.measure(point["chain"])}


def child(point: str, path: str) -> None:
    """Entry of a point's process: computes it and writes its record."""
    made = json.loads(point)
    start = time.perf_counter()
    found = measure(made)
    wall = time.perf_counter() - start
    Path(path).write_text(json.dumps({"provenance": record.provenance(), "wall_seconds": wall, **found}))
