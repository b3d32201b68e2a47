"""Memory against depth, budgets and precision on a GPU, within minutes: `python -m experiments.gpu`
(`--small`: toy sizes, for the CPU).

Every point runs in a fresh process, since an allocator's peak cannot be reset, and stops with the clock
(`minutes`): what is finished is kept, and a second call goes on. The pool of the device's memory is capped
before JAX starts, so that what does not fit fails as it would on a smaller card. In order of value:

- **ladder**: each method at growing depths within a pool of `pool_gib`, until one runs out of memory. Methods
  that plan do so for `shares` of the pool, the next where one runs out. Of each step: the allocator's peak
  (`memory_stats()`; null where a backend has none) beside XLA's `memory_analysis()`, time, compilation;
- **offload**: every layer's residuals in the host's memory, beside every layer stored: bytes in both
  memories, times, and what the copies got a second;
- **budgets**: at fixed depth, methods interleaved in one process, errors against float64, as
  `experiments.budget_sweep`;
- **precision**: as `experiments.precision`, at full float32 precision and at JAX's default, which on a GPU
  rounds the products' operands.

Writes results/gpu/: records.jsonl, summary.json, figures. Needs the packages of pyproject.toml's dependencies
and the `example` extra; of the dependencies not OR-tools and typer, which it does without. Equinox, where it
is there, gives rows of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import rich.box
import seaborn as sns
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import mwplan as mw
from experiments import alternatives, budget_sweep, precision, reading, record, sweep, zoo
from mwplan.app.side_by_side import relative_error
from mwplan.common.plots import BACKPROP, LIMIT, PLAN, png
from mwplan.common.serial import write_atomically
from mwplan.plans.schedule import SINGLE, Run, Schedule

ROOT = Path(__file__).resolve().parent.parent
SHORTEST = 15.0  # seconds: with less left, no point is begun


@dataclass(frozen=True)
class Config:
    """Sizes of the default run; `layers`: longest chain that is planned; `yard`: depth of the budgets'
    network; `kinds`, `blocks`, ... `rows`: of precision; `per_point`: seconds after which a point counts as
    failed."""

    minutes: float = 9.0
    per_point: float = 170.0
    model: str = "revnet"
    pool_gib: float = 8.0
    shares: tuple[float, ...] = (0.92, 0.8, 0.65)
    depths: tuple[int, ...] = (16, 64, 256, 512)
    methods: tuple[str, ...] = ("backprop_scan", "plan", "recompute", "checkpoint_scan")
    refine: int = 1
    width: int = 64
    batch: int = 256
    resolution: int = 64
    layers: int = 64
    others: tuple[str, ...] = ("revnet", "gpt")
    yard: int = 16
    budgets: int = 4
    length: int = 512
    text_width: int = 512
    text_batch: int = 8
    kinds: tuple[str, ...] = ("maxmin", "ordinary")
    blocks: tuple[int, ...] = (16, 64)
    features: int = 256
    rows: int = 4096
    rounds: int = 5
    repeats: int = 3
    max_error: float = 1e-4
    thin: float = 0.02
    seed: int = 0
    out: Path = record.RESULTS / "gpu"


@dataclass(frozen=True)
class Small(Config):
    """Toy sizes."""

    per_point: float = 600.0
    minutes: float = 60.0
    pool_gib: float = 0.004
    depths: tuple[int, ...] = (4, 8)
    methods: tuple[str, ...] = ("backprop_scan", "plan")
    refine: int = 0
    width: int = 8
    batch: int = 64
    resolution: int = 16
    others: tuple[str, ...] = ("mlp",)
    yard: int = 3
    budgets: int = 2
    kinds: tuple[str, ...] = ("slope_0.8",)
    blocks: tuple[int, ...] = (4,)
    features: int = 32
    rows: int = 128
    rounds: int = 3
    repeats: int = 1


# -- one point, in a process of its own
# --------------------------------------------------------------------------------


def measure(point: sweep.Point) -> dict[str, Any]:
    """The point's work; running out of memory is a result. `memory`: the pool's limit and the process's peak,
    in bytes, or null."""
    matmul = point.get("matmul")
    try:
        with jax.default_matmul_precision(matmul) if matmul else contextlib.nullcontext():
            kinds = {"plan": plan, "step": step, "offload": offload, "budgets": budgets, "precision": errors}
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
    ways: list[Callable[[], alternatives.Way]]
    if schedules:
        ways = [lambda s=s: alternatives.applied(problem, s) for s in schedules]  # type: ignore[misc]
    else:
        ways = [lambda: alternatives.METHODS[point["method"]](problem, None)]
    reasons: list[str] = []
    for make in ways:
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
        way = alternatives.Way(functools.partial(mw.apply, Schedule(runs=runs)), chain, None, runs)
        found[kind.value] = _run(point, problem, way, grads)
    store, away = found["store"], found["offload"]
    more = statistics.median(away["seconds"]) - statistics.median(store["seconds"])
    gradients = [jax.tree.leaves(got) for _, got in grads]
    return found | {
        "link_bytes_per_s": 2 * away["host_bytes"] / more if more > 0 else None,
        "gradient_difference": relative_error(*reversed(gradients))[0],
    }


def _run(
    point: sweep.Point, problem: alternatives.Problem, way: alternatives.Way, keep: list[Any] | None = None
) -> dict[str, Any]:
    """Bytes and times of one step; what it returned goes into `keep`."""
    before = pool()["peak_bytes"]
    args = (way.chain, problem.x, problem.labels)
    start = time.perf_counter()
    executable = mw.jit(way.step(problem.loss)).lower(*args).compile()
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
    if way.schedule is not None:
        made["predicted_temporary_bytes"] = way.schedule.peak_bytes
        made["predicted_seconds"] = way.schedule.time_ns / 1e9
        made["strategies"] = {s.value: way.schedule.strategies.count(s) for s in mw.Strategy}
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


# -- all points
# --------------------------------------------------------------------------------------------------------


class Clock:
    """Seconds left."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """May be below 0."""
        return self.end - time.monotonic()


class OutOfTimeError(Exception):
    """The clock has run down; finished points are kept."""


class Runner:
    """Computes points in processes of their own and keeps them."""

    def __init__(self, config: Config, clock: Clock, console: Console) -> None:
        self.config, self.clock, self.console = config, clock, console
        self.records = sweep.Records(config.out / "records.jsonl")
        self.known = self.records.read()
        self.total = _device_bytes()

    def __call__(self, point: sweep.Point) -> dict[str, Any]:
        """The point's record. Raises `OutOfTimeError`."""
        key = sweep.key(point)
        if key not in self.known:
            if self.clock.left < SHORTEST:
                raise OutOfTimeError
            self.known[key] = {"key": key, "point": point, **self._compute(point)}
            if not self.known[key].get("crashed"):  # a bug is no measurement: the next call tries again
                with self.records.appending() as append:
                    append(self.known[key])
        return self.known[key]

    def _compute(self, point: sweep.Point) -> dict[str, Any]:
        name = " ".join(
            str(point[k]) for k in ("kind", "model", "method", "depth", "blocks", "matmul") if point.get(k)
        )
        with (
            self.console.status(f"{name}; {self.clock.left:.0f} s left"),
            tempfile.TemporaryDirectory() as folder,
        ):
            path = Path(folder) / "record.json"
            limit = min(self.config.per_point, self.clock.left)
            code = "import sys; from experiments.gpu import child; child(*sys.argv[1:])"
            start = time.monotonic()
            process = subprocess.Popen(
                [sys.executable, "-c", code, json.dumps(point), str(path)],
                cwd=ROOT,
                env=self._environment(point),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            try:
                _, said = process.communicate(timeout=limit)
            except subprocess.TimeoutExpired as error:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
                if limit < self.config.per_point:
                    raise OutOfTimeError from error
                return {"ran": False, "reason": f"took more than {limit:.0f} s"}
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)
                raise
            took = time.monotonic() - start
            if path.exists():
                found: dict[str, Any] = json.loads(path.read_text())
                outcome = "" if found["ran"] else f": {found['reason'][:90]}"
            else:
                # A signal's status is negative: killed for memory, perhaps. A positive one is an exception.
                found = {
                    "ran": False,
                    "crashed": process.returncode > 0,
                    "reason": f"exit status {process.returncode}: {said[-600:]}",
                }
                outcome = f": {found['reason']}"
            self.console.print(f"{name}: {took:.0f} s{outcome}", markup=False, highlight=False)
            return found

    def _environment(self, point: sweep.Point) -> dict[str, str]:
        share = min(0.92, point["pool_bytes"] / self.total) if point.get("pool_bytes") else 0.92
        env = {"XLA_PYTHON_CLIENT_PREALLOCATE": "true", "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{share:.5f}"}
        return (
            os.environ | env | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        )


def _device_bytes() -> int:
    """The first GPU's memory; 80 GiB where nobody says."""
    try:
        said = subprocess.run(
            ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"],
            capture_output=True, text=True, check=True, timeout=20,
        ).stdout  # fmt: skip
        return int(said.split()[0]) << 20
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return 80 << 30


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
    yield _together([ladder(config, method) for method in config.methods])
    yield offloaded(config)
    yield swept(config, config.others[:1])
    yield precise(config)
    yield swept(config, config.others[1:])


def _together(parts: list[Steps]) -> Steps:
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


# -- what one sees
# -----------------------------------------------------------------------------------------------------


def laddered(config: Config, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The ladder's steps, one row each."""
    rows = []
    for one in found:
        if one["point"]["kind"] != "step":
            continue
        peak = one.get("allocator", {}).get("ran")
        rows.append(
            {
                "model": one["point"]["model"],
                "method": one["point"]["method"],
                "depth": one["point"]["depth"],
                "ran": one["ran"],
                "limit_bytes": one.get("memory", {}).get("limit_bytes"),
                "total_bytes": one.get("total_bytes"),
                "allocator_peak_bytes": peak,
                "allocator_over_xla": peak / one["total_bytes"] if peak else None,
                "seconds": statistics.median(one["seconds"]) if one["ran"] else None,
                "compile_seconds": one.get("compile_seconds"),
                "shares_tried": 1 + len(one.get("reasons", ())) if one["ran"] else None,
                "reason": one.get("reason"),
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    """The ladder for people."""
    made = Table(title="steps within the capped pool", box=rich.box.SIMPLE)
    for name in ("method", "blocks", "XLA, MiB", "allocator's peak, MiB", "ratio", "s a step", "ms a block"):
        made.add_column(name, justify="left" if name == "method" else "right")

    def number(value: float | None, scale: float = 1.0, form: str = ".2f") -> str:
        return "-" if value is None else f"{value / scale:{form}}"

    for row in sorted(rows, key=lambda row: (row["method"], row["depth"])):
        sizes = (row["total_bytes"], row["allocator_peak_bytes"])
        made.add_row(
            row["method"],
            str(row["depth"]),
            *(number(size, 2**20, ".0f") for size in sizes),
            number(row["allocator_over_xla"]),
            number(row["seconds"], 1, ".3f") if row["ran"] else f"failed: {row['reason'] or ''}"[:50],
            number(row["seconds"], row["depth"] / 1e3),
        )
    return made


def draw_ladder(config: Config, rows: list[dict[str, Any]]) -> Figure:
    """Memory and time a block against depth; where memory ran out, a cross at the pool's limit."""
    sns.set_theme(style="whitegrid", context="paper")
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    limit = config.pool_gib * 1024
    for label, (names, color, marker) in reading.FAMILIES.items():
        mine = sorted((row for row in rows if row["method"] in names), key=lambda row: row["depth"])
        ran = [row for row in mine if row["ran"]]
        if not mine:
            continue
        at = [row["depth"] for row in ran]
        left.plot(at, [row["total_bytes"] / 2**20 for row in ran], color=color, marker=marker, label=label)
        peaks = [
            (row["depth"], row["allocator_peak_bytes"] / 2**20) for row in ran if row["allocator_peak_bytes"]
        ]
        if peaks:
            left.plot(*zip(*peaks), color=color, marker=marker, mfc="none", ls=":")
        failed = [row["depth"] for row in mine if not row["ran"]]
        left.plot(failed, [limit] * len(failed), "x", color=color, ms=8, mew=2)
        right.plot(at, [1e3 * row["seconds"] / row["depth"] for row in ran], color=color, marker=marker)
    left.axhline(limit, color=LIMIT, lw=0.8, ls="--")
    left.plot([], [], "o:", mfc="none", color=LIMIT, label="the allocator's peak")
    left.plot([], [], "x", color=LIMIT, label="did not run")
    left.set(xlabel="depth (blocks)", ylabel="device memory of the step (MiB)", xscale="log", yscale="log")
    right.set(xlabel="depth (blocks)", ylabel="time a block (ms)", xscale="log")
    left.set_title(f"{config.model} in a pool of {config.pool_gib:g} GiB")
    left.legend(fontsize=7)
    return figure


def draw_peaks(rows: list[dict[str, Any]]) -> Figure:
    """The allocator's peak against XLA's figure."""
    sns.set_theme(style="whitegrid", context="paper")
    figure = Figure(figsize=(5, 4.5), layout="constrained")
    ax = figure.subplots()
    pairs = [
        (r["total_bytes"] / 2**20, r["allocator_peak_bytes"] / 2**20, r["method"])
        for r in rows
        if r["allocator_peak_bytes"]
    ]
    for method, color in (("plan", PLAN), ("backprop_scan", BACKPROP), (None, LIMIT)):
        mine = [
            p for p in pairs if p[2] == method or (method is None and p[2] not in ("plan", "backprop_scan"))
        ]
        ax.plot([p[0] for p in mine], [p[1] for p in mine], "o", color=color, label=method or "others")
    ends = [min(p[0] for p in pairs), max(p[0] for p in pairs)]
    ax.plot(ends, ends, color=LIMIT, lw=0.8)
    ax.set(
        xlabel="fixed + temporaries by memory_analysis() (MiB)",
        ylabel="the allocator's peak (MiB)",
        xscale="log",
        yscale="log",
    )
    ax.legend()
    return figure


def deepest(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of each method: the deepest network that ran, the shallowest that did not, and why."""
    made: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == name]
        ran = max((row for row in mine if row["ran"]), key=lambda row: row["depth"], default=None)
        failed = min((row for row in mine if not row["ran"]), key=lambda row: row["depth"], default=None)
        made[name] = {
            "deepest": ran and ran["depth"],
            "seconds_a_block": ran and ran["seconds"] / ran["depth"],
            "failed_at": failed and failed["depth"],
            "reason": failed and failed["reason"],
        }
    return made


def offload_table(one: dict[str, Any]) -> Table:
    """The two steps of an offload point."""
    link = one["link_bytes_per_s"]
    made = Table(
        title=f"residuals of {one['point']['model']} in the host's memory: gradients "
        f"{one['gradient_difference']:.1e} apart, copies at "
        + ("no cost" if link is None else f"{link / 1e9:.1f} GB/s"),
        box=rich.box.SIMPLE,
    )
    for name in ("step", "device temporaries (MiB)", "host (MiB)", "ms"):
        made.add_column(name, justify="left" if name == "step" else "right")
    for name in ("store", "offload"):
        row = one[name]
        sizes = [reading.mib(row[key]) for key in ("temporary_bytes", "host_bytes")]
        made.add_row(name, *sizes, f"{1e3 * statistics.median(row['seconds']):.1f}")
    return made


def _compared(config: Config, one: dict[str, Any]) -> budget_sweep.Config:
    """How the rows of a record compare: errors up to backpropagation's own count, which rounded products may
    make larger than `max_error`."""
    own = [row["error"] for row in reading.ran(one, reading.PLAIN)]
    return budget_sweep.Config(max_error=max([config.max_error, *own]))


def main(config: Config) -> None:
    """Runs what is missing while there is time, prints, draws and saves."""
    console = Console()
    found, whole = run(config, console)
    rows = laddered(config, found)
    console.print(table(rows))
    swept_records = [one for one in found if one["point"]["kind"] == "budgets" and one["ran"]]
    compared = [(_compared(config, one), one) for one in swept_records]
    limits = [reading.within(one, how.limit, how.max_error) for how, one in compared]
    budget_rows = [row for how, one in compared for row in budget_sweep.compare(how, one)]
    exact = [
        {"point": one["point"]["chain"], "matmul": one["point"]["matmul"], "rows": one["rows"]}
        for one in found
        if one["point"]["kind"] == "precision" and one["ran"]
    ]
    for made in budget_sweep.tables(budget_sweep.Config(), budget_rows, limits) if swept_records else []:
        console.print(made)
    for matmul in ("highest", None):
        if mine := [one for one in exact if one["matmul"] == matmul]:
            console.print(f"products at {matmul or 'default'} precision")
            console.print(precision.table(mine))
    away = [one for one in found if one["point"]["kind"] == "offload"]
    for one in away:
        console.print(offload_table(one) if one["ran"] else one["reason"])
    data = {
        "provenance": found[0].get("provenance") if found else None,
        "config": sweep.plain(config),
        "complete": whole,
        "ladder": rows,
        "deepest": deepest(rows),
        "budgets": budget_rows,
        "limits": limits,
        "offload": [
            {
                k: one.get(k)
                for k in (
                    "point",
                    "ran",
                    "reason",
                    "store",
                    "offload",
                    "link_bytes_per_s",
                    "gradient_difference",
                )
            }
            for one in away
        ],
        "precision": [
            {"matmul": one["matmul"], "kind": one["point"]["kind"], "depth": one["point"]["depth"], **row}
            for one in exact
            for row in one["rows"]
        ],
    }
    write_atomically(config.out / "summary.json", json.dumps(data, indent=1) + "\n")
    figures: dict[str, Figure] = {}
    if rows:
        figures["ladder"] = draw_ladder(config, rows)
    if any(row["allocator_peak_bytes"] for row in rows):
        figures["peaks"] = draw_peaks(rows)
    for how, one in compared:
        network = one["point"]["network"]
        figures[f"{network['model']}_{network['depth']}"] = budget_sweep.draw(how, one)
    if full := [one for one in exact if one["matmul"] == "highest"]:
        figures["precision"] = precision.draw(full)
    for name, figure in figures.items():
        write_atomically(config.out / f"{name}.png", png(figure))
    console.print(f"wrote {config.out}")


if __name__ == "__main__":
    arguments = [one for one in sys.argv[1:] if one != "--small"]
    main(sweep.parse(Small if "--small" in sys.argv else Config, __doc__, arguments))
