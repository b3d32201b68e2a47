"""How fast the planner is, how good, and how others fare: `python -m experiments.solver_scaling`.

Random heterogeneous chains: activations of 2 to 40 MiB, forwards of 0.1 to 1 ms, two STORE options;
`submersive` chains have four moonwalk options a layer besides (fragments of 0, 10 and 30%, and whole
cotangents, with growth from 5 down to 0). Identical chains repeat one such layer. Every case is one record in
results/solver_scaling/records.jsonl, appended as soon as it is known: run again to go on where it stopped.
Times are wall-clock and CPU seconds of this process; where others use the machine only the latter means much.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.progress import Progress
from rich.table import Table

from experiments import record
from mwplan.plans.ledger import replay
from mwplan.plans.profiles import LayerProfile, MoonwalkOption, Profile, StoreOption
from mwplan.plans.schedule import Strategy
from mwplan.solvers import baselines, integer_program, rotor, unrestricted
from mwplan.solvers.frontier import Frontier, Tables, solve_frontier
from mwplan.solvers.runs import ALL_STRATEGIES, Candidates

RECOMPUTATION = frozenset({Strategy.STORE, Strategy.RECOMPUTE})


@dataclass(frozen=True)
class Config:
    """Chain lengths and seeds of each part; `thin` is the loss aimed at where the frontier is not exact."""

    seeds: tuple[int, ...] = (0, 1, 2)
    exact: tuple[int, ...] = (20, 50, 100)
    exact_submersive: tuple[int, ...] = (20, 40, 60, 100)
    thinned: tuple[int, ...] = (20, 50, 100)
    long: tuple[int, ...] = (200, 300)
    one_level: tuple[int, ...] = (300, 1_000)
    identical: tuple[int, ...] = (100, 1_000, 10_000)
    deep: tuple[int, ...] = (512, 1_024)
    quality: tuple[int, ...] = (10, 20, 40, 60)
    host: tuple[int, ...] = (60, 100)
    unrestricted: tuple[int, ...] = (2, 3)
    budgets: int = 10
    thin: float = 0.01
    slots: int = 500
    out: Path = record.RESULTS / "solver_scaling"


def chain(seed: int, size: int, *, submersive: bool) -> Profile:
    """One random chain, as the module's docstring says."""
    rng = random.Random(seed)
    mib = 1 << 20
    activation = [int(rng.uniform(2, 40) * mib) // 4 * 4 for _ in range(size + 1)]
    layers = []
    for at in range(size):
        forward, out = int(rng.uniform(1, 10) * 1e5), activation[at + 1]
        lean = StoreOption(
            name="input",
            residual_bytes=0,
            keeps_input=True,
            keeps_output=False,
            forward_ns=forward,
            backward_ns=3 * forward,
        )
        full = dataclasses.replace(
            lean, name="all", residual_bytes=int(out * rng.uniform(0.5, 2)) // 4 * 4, backward_ns=2 * forward
        )
        moonwalk = []
        for name, share, growth in (
            ("f0", 0.0, rng.uniform(2, 5)),
            ("f10", 0.1, rng.uniform(1.2, 2)),
            ("f30", 0.3, rng.uniform(0.8, 1)),
            ("whole", 1.0, 0.0),
        ):
            moonwalk.append(
                MoonwalkOption(
                    name=name, residual_bytes=out // 32, keeps_input=False, keeps_output=False,
                    fragment_bytes=int(out * share), fragment_is_cotangent=share == 1.0, forward_ns=forward,
                    reverse_ns=forward, rebuild_ns=int(forward * (1 if share == 1 else 1.3 + share)),
                    growth=growth, local_error=0.0 if share == 1 else 2e-6,
                )
            )  # fmt: skip
        layers.append(
            LayerProfile(
                name="layer",
                forward_ns=forward,
                store=(full, lean),
                moonwalk=tuple(moonwalk) if submersive else (),
            )
        )
    counts = tuple(activation)
    return Profile(
        layers=tuple(layers), activation_bytes=counts, cotangent_bytes=counts, sweep_cotangent_bytes=counts
    )


def identical(size: int, *, submersive: bool) -> Profile:
    """`size` times the first layer of a random chain."""
    first = chain(0, 1, submersive=submersive)
    counts = (first.activation_bytes[1],) * (size + 1)
    return Profile(
        layers=first.layers * size,
        activation_bytes=counts,
        cotangent_bytes=counts,
        sweep_cotangent_bytes=counts,
    )


def deep(size: int, *, submersive: bool) -> Profile:
    """Two random layers, `size` identical ones, two random layers."""
    ends, body = chain(1, 4, submersive=submersive), identical(size, submersive=submersive)
    counts = (*ends.activation_bytes[:2], *body.activation_bytes, *ends.activation_bytes[3:])
    return Profile(
        layers=ends.layers[:2] + body.layers + ends.layers[2:],
        activation_bytes=counts,
        cotangent_bytes=counts,
        sweep_cotangent_bytes=counts,
    )


def timed(call: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What `call` returns, and the seconds it took."""
    wall, cpu = time.perf_counter(), time.process_time()
    out = call()
    return out, {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}


def budgets(frontier: Frontier, count: int) -> list[int]:
    """`count` budgets from the least to the most that any point needs, evenly spaced by ratio."""
    low, high = frontier.points[0][0], frontier.points[-1][0]
    return [int(low * (high / low) ** (k / (count - 1))) for k in range(count)]


def speed(profile: Profile, thin: float, depth: int | None) -> dict[str, Any]:
    """One frontier, and the ledger's word on three of its points."""
    frontier, seconds = timed(partial(solve_frontier, profile, thin=thin, max_recompute_depth=depth))
    points = frontier.points
    confirmed = 0
    for need, ns in (points[0], points[len(points) // 2], points[-1]):
        found = replay(profile, frontier.at(need).runs or ())
        confirmed += (found.peak_bytes, found.time_ns) == (need, ns)
    return {**seconds, "points": len(points), "confirmed": confirmed}


def loss(profile: Profile, thin: float) -> dict[str, Any]:
    """What thinning loses, measured against the exact frontier at every budget, and what it proves about
    that."""
    exact, thinned = solve_frontier(profile), solve_frontier(profile, thin=thin)
    worst = 0.0
    for need, ns in exact.points:
        got = min((t for n, t in thinned.points if n <= need), default=None)
        worst = max(worst, float("inf") if got is None else got / ns - 1)
    return {"measured": worst, "proved": thinned.loss()}


def identical_loss(profile: Profile, thin: float) -> dict[str, Any]:
    """What thinning loses on identical layers, at budgets that both reach, and how much more memory its
    leanest schedule takes."""
    exact, thinned = solve_frontier(profile), solve_frontier(profile, thin=thin)
    least = thinned.points[0][0]
    worst = max(
        min(t for n, t in thinned.points if n <= need) / ns - 1 for need, ns in exact.points if need >= least
    )
    return {"measured": worst, "least_over_exact": least / exact.points[0][0]}


def deep_loss(profile: Profile, thin: float) -> dict[str, Any]:
    """What tables of the identical layers alone lose at multiples of the least bytes, against general tables
    thinned to a fifth of the loss."""
    candidates = Candidates(profile, loss=thin / 30)
    general = Tables(candidates, None, loss=thin / 20)
    best = Frontier(profile, general, max_error=1e-4, allowed=ALL_STRATEGIES, thin=thin / 5).points
    found = solve_frontier(profile, thin=thin).points
    rows = []
    for times in (1.25, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0):
        budget = int(best[0][0] * times)
        got = min((t for n, t in found if n <= budget), default=None)
        ratio = None if got is None else got / min(t for n, t in best if n <= budget) - 1
        rows.append({"over_least": times, "loss": ratio})
    return {"rows": rows, "least_over_general": found[0][0] / best[0][0]}


def proof(profile: Profile, count: int) -> dict[str, Any]:
    """The integer program at `count` budgets, the frontier being known."""
    frontier = solve_frontier(profile)
    rows = []
    for budget in budgets(frontier, count):
        solution, seconds = timed(
            partial(integer_program.solve, profile, budget, frontier=frontier, time_limit_s=60.0)
        )
        row = {
            "status": solution.status.value,
            "objective": solution.time_ns,
            "bound": solution.bound_ns,
            **seconds,
        }
        rows.append({**row, "budget": budget, **dict(solution.stats)})
    return {"rows": rows}


def host(profile: Profile) -> dict[str, Any]:
    """The least budget of all with memory on the host beside it, at 20 GB/s: shares of what all layers could
    send there."""
    profile = profile.offloading(2e10)
    frontier = solve_frontier(profile)
    budget = frontier.points[0][0]
    every = sum(max(o.host_bytes for o in layer.offload) for layer in profile.layers if layer.offload)
    rows = []
    for share in (32, 16, 8, 4):
        call = partial(
            integer_program.solve,
            profile,
            budget,
            host_bytes=every // share,
            frontier=frontier,
            time_limit_s=60.0,
        )
        solution, seconds = timed(call)
        row = {"share": 1 / share, "status": solution.status.value, "gap": solution.gap, **seconds}
        rows.append({**row, "over_frontier": solution.time_ns / frontier.points[0][1]})
    return {"rows": rows}


def quality(profile: Profile, config: Config) -> dict[str, Any]:
    """Time over the optimum's, at ten budgets: rotor with slots, greedy, and recomputation alone at its
    best."""
    every, recompute = solve_frontier(profile), solve_frontier(profile, allowed=RECOMPUTATION)
    rows = []
    for budget in budgets(recompute, config.budgets):
        best, persistent = every.at(budget), recompute.at(budget)
        slotted, seconds = timed(partial(rotor.rotor, profile, budget, config.slots))
        rough = baselines.greedy(profile, budget)
        rough_recompute = baselines.greedy(profile, budget, allowed=RECOMPUTATION)
        rows.append(
            {
                "budget": budget,
                "optimum": best.time_ns,
                "recomputation": persistent.time_ns,
                "rotor": slotted.time_ns if slotted.runs else None,
                "rotor_cpu_s": seconds["cpu_s"],
                "greedy": rough.time_ns if rough.runs else None,
                "greedy_recomputation": rough_recompute.time_ns if rough_recompute.runs else None,
            }
        )
    leanest = (every.least_bytes, recompute.least_bytes)
    plans = {
        f.__name__: {"bytes": s.peak_bytes, "ns": s.time_ns}
        for f in (
            baselines.store_all,
            baselines.recompute_each,
            baselines.chen_sqrt,
            baselines.all_moonwalk,
            baselines.all_fragment,
        )
        for s in [f(profile)]
    }
    return {"rows": rows, "least_bytes": leanest, "plans": plans}


def structure(profile: Profile) -> dict[str, Any]:
    """What the run structure gives away: the frontier's points against single operations in any order, at
    most as many."""
    frontier = solve_frontier(profile)
    rows = []
    for need, ns in frontier.points[:: max(1, len(frontier.points) // 4)]:
        steps = unrestricted.steps_of(frontier.at(need).runs or ()) + 1
        found, _ = unrestricted.solve_unrestricted(profile, need, steps, time_limit_s=20.0)
        row = {"budget": need, "runs": ns, "operations": found.time_ns, "bound": found.bound_ns}
        rows.append({**row, "status": found.status.value, "steps": steps})
    return {"rows": rows}


def cases(config: Config) -> Iterator[tuple[str, dict[str, Any], Callable[[], dict[str, Any]]]]:
    """Part, what identifies the case, and how to do it."""
    for seed in config.seeds:
        for submersive, sizes in ((False, config.exact), (True, config.exact_submersive)):
            for size in sizes:
                profile = chain(seed, size, submersive=submersive)
                key = {"size": size, "submersive": submersive, "seed": seed}
                yield "exact", key, partial(speed, profile, 0.0, None)
        for submersive in (False, True):
            for size in config.thinned:
                profile = chain(seed, size, submersive=submersive)
                key = {"size": size, "submersive": submersive, "seed": seed}
                yield "thinned", key, partial(speed, profile, config.thin, None)
                if size <= 50:
                    yield "loss", key, partial(loss, profile, config.thin)
        for submersive in (False, True):
            for size in config.quality:
                profile = chain(seed, size, submersive=submersive)
                key = {"size": size, "submersive": submersive, "seed": seed}
                yield "quality", key, partial(quality, profile, config)
        profile = chain(seed, 100, submersive=False)
        key = {"size": 100, "submersive": False, "seed": seed}
        yield "proof", key, partial(proof, profile, 5)
        yield "rotor", key, partial(rotor_alone, profile, config)
        for size in config.host:
            key = {"size": size, "submersive": False, "seed": seed}
            yield "host", key, partial(host, chain(seed, size, submersive=False))
        for size in config.unrestricted:
            profile = chain(seed, size, submersive=True)
            key = {"size": size, "submersive": True, "seed": seed}
            yield "unrestricted", key, partial(structure, profile)
    for size in config.one_level:
        profile = chain(0, size, submersive=False)
        key = {"size": size, "submersive": False, "seed": 0}
        yield "one_level", key, partial(speed, profile, config.thin, 1)
    for size in config.long:
        profile = chain(0, size, submersive=False)
        key = {"size": size, "submersive": False, "seed": 0}
        yield "thinned", key, partial(speed, profile, config.thin, None)
    key = {"size": 250, "submersive": False, "seed": 0}
    yield "identical_loss", key, partial(identical_loss, identical(250, submersive=False), config.thin)
    for submersive in (False, True):
        key = {"size": 160, "submersive": submersive, "seed": 0}
        yield "deep_loss", key, partial(deep_loss, deep(160, submersive=submersive), config.thin)
        for size in config.deep:
            key = {"size": size, "submersive": submersive, "seed": 0}
            yield "deep", key, partial(speed, deep(size, submersive=submersive), config.thin, None)
        for size in config.identical:
            profile = identical(size, submersive=submersive)
            key = {"size": size, "submersive": submersive, "seed": 0}
            yield "identical", key, partial(speed, profile, config.thin, None)


def rotor_alone(profile: Profile, config: Config) -> dict[str, Any]:
    """rotor's recurrence for one budget, a third of what plain backpropagation needs."""
    budget = baselines.store_all(profile).peak_bytes // 3
    solution, seconds = timed(partial(rotor.rotor, profile, budget, config.slots))
    return {**seconds, "ns": solution.time_ns, "slots": config.slots}


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


def summary(rows: list[dict[str, Any]]) -> list[tuple[str, int, str]]:
    """What, layers, figure."""
    out: list[tuple[str, int, str]] = []
    groups: dict[tuple[str, bool, int], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["part"], row["key"]["submersive"], row["key"]["size"]), []).append(row)
    for (part, submersive, size), members in sorted(groups.items()):
        kind = "submersive" if submersive else "store and recompute"
        if part in ("exact", "thinned", "one_level", "identical", "deep", "rotor"):
            wall, cpu = (statistics.median(m[k] for m in members) for k in ("wall_s", "cpu_s"))
            out.append((f"{part}, {kind}", size, f"{wall:.2f} s wall, {cpu:.2f} s CPU"))
        elif part == "identical_loss":
            found = (
                f"{members[0]['measured']:.2%} measured; "
                f"leanest needs {members[0]['least_over_exact']:.2f} times the least"
            )
            out.append((f"{part}, {kind}", size, found))
        elif part == "deep_loss":
            each = members[0]["rows"]
            losses = ", ".join(
                "none" if r["loss"] is None else f"{r['loss']:.1%} at {r['over_least']:g} times the least"
                for r in each
            )
            least = members[0]["least_over_general"]
            out.append((f"{part}, {kind}", size, f"{losses}; leanest needs {least:.2f} times the least"))
        elif part == "loss":
            measured, proved = (max(m[k] for m in members) for k in ("measured", "proved"))
            out.append((f"{part}, {kind}", size, f"{measured:.2%} measured, {proved:.2%} proved, at worst"))
        elif part == "proof":
            each = [r for m in members for r in m["rows"]]
            wall = statistics.median(r["wall_s"] for r in each)
            proved = sum(r["status"] == "optimal" for r in each)
            out.append((f"{part}, {kind}", size, f"{wall:.2f} s median, {proved} of {len(each)} optimal"))
        elif part == "host":
            each = [r for m in members for r in m["rows"]]
            for share in sorted({r["share"] for r in each}):
                some = [r for r in each if r["share"] == share]
                wall, over = (statistics.median(r[k] for r in some) for k in ("wall_s", "over_frontier"))
                proved, gap = sum(r["status"] == "optimal" for r in some), max(r["gap"] for r in some)
                found = (
                    f"{over:.2f} of the time, {wall:.2f} s median, "
                    f"{proved} of {len(some)} optimal (gap at most {gap:.1%})"
                )
                out.append((f"least budget, 1/{1 / share:.0f} of residuals on the host, {kind}", size, found))
        elif part == "unrestricted":
            each = [r for m in members for r in m["rows"]]
            gaps = [1 - r["operations"] / r["runs"] for r in each if r["status"] == "optimal"]
            better = sum(g > 0 for g in gaps)
            found = (
                f"runs give away something at {better} of {len(gaps)} points, "
                f"at most {max(gaps, default=0.0):.1%}"
            )
            out.append((f"{part}, {kind}", size, f"{found}; {len(each) - len(gaps)} not proved"))
        else:
            each = [r for m in members for r in m["rows"]]
            for name in ("recomputation", "rotor", "greedy", "greedy_recomputation"):
                base = "recomputation" if name in ("rotor", "greedy_recomputation") else "optimum"
                ratios = [r[name] / r[base] - 1 for r in each if r[name]]
                found = (
                    f"+{statistics.median(ratios):.1%} median, +{max(ratios):.1%} worst" if ratios else "none"
                )
                over = "best recomputation" if base == "recomputation" else "optimum"
                what = f"{name} over {over}, {kind}"
                out.append(
                    (what, size, f"{found}; no plan at {len(each) - len(ratios)} of {len(each)} budgets")
                )
    return out


def draw(rows: list[dict[str, Any]]) -> Figure:
    """Seconds against layers, and the gaps of heuristics against budget."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for part, submersive, colour in (
        ("exact", False, "#01497c"), ("exact", True, "#b5838d"), ("thinned", False, "#61a5c2"),
        ("thinned", True, "#e5989b"), ("identical", False, "#e9c46a"), ("identical", True, "#f4a261"),
        ("one_level", False, "#588157"),
    ):  # fmt: skip
        sizes = sorted(
            {r["key"]["size"] for r in rows if r["part"] == part and r["key"]["submersive"] == submersive}
        )
        seconds = [
            statistics.median(
                r["cpu_s"] for r in rows
                if r["part"] == part and (r["key"]["size"], r["key"]["submersive"]) == (size, submersive)
            )
            for size in sizes
        ]  # fmt: skip
        label = f"{part}, {'submersive' if submersive else 'store and recompute'}"
        left.plot(sizes, seconds, "o-", color=colour, label=label)
    left.set(xlabel="layers", ylabel="CPU seconds for the whole frontier", xscale="log", yscale="log")
    left.legend(fontsize=7)
    for name, base, colour in (
        ("greedy", "optimum", "#c1121f"),
        ("rotor", "recomputation", "#01497c"),
        ("recomputation", "optimum", "#588157"),
    ):
        points: dict[int, list[float]] = {}
        for row in rows:
            if row["part"] == "quality" and row["key"]["submersive"]:
                for k, r in enumerate(row["rows"]):
                    if r[name]:
                        points.setdefault(k, []).append(100 * (r[name] / r[base] - 1))
        points = dict(sorted(points.items()))
        label = f"{name} over {'best recomputation' if base == 'recomputation' else base}"
        right.plot(
            list(points), [statistics.median(v) for v in points.values()], "o-", color=colour, label=label
        )
    right.set(
        xlabel="budget, from the least of recomputation (0) to the most", ylabel="extra time, % (median)"
    )
    right.legend(fontsize=7)
    return figure


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Config.out)
    parser.add_argument("--thin", type=float, default=Config.thin)
    arguments = parser.parse_args()
    main(Config(out=arguments.out, thin=arguments.thin))
