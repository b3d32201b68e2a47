"""The table and the figure of the solvers' records."""

from __future__ import annotations

import statistics
from typing import Any

from matplotlib.figure import Figure

Rows = list[dict[str, Any]]
Line = tuple[str, int, str]


def summary(rows: Rows) -> list[Line]:
    """What, layers, figure."""
    out: list[Line] = []
    groups: dict[tuple[str, bool, int], Rows] = {}
    for row in rows:
        groups.setdefault((row["part"], row["key"]["submersive"], row["key"]["size"]), []).append(row)
    for (part, submersive, size), members in sorted(groups.items()):
        kind = "submersive" if submersive else "store and recompute"
        each = [r for m in members for r in m.get("rows", ())]
        if part == "host":
            out += [(f"{what}, {kind}", size, found) for what, found in _host(each)]
        elif part == "quality":
            out += [(f"{what}, {kind}", size, found) for what, found in _quality(each)]
        else:
            out.append((f"{part}, {kind}", size, _figure(part, members, each)))
    return out


def _figure(part: str, members: Rows, each: Rows) -> str:
    """The figure of one part's cases of one size."""
    if part == "identical_loss":
        least = members[0]["least_over_exact"]
        return f"{members[0]['measured']:.2%} measured; smallest needs {least:.2f} times the least"
    if part == "deep_loss":
        losses = ", ".join(
            "none" if r["loss"] is None else f"{r['loss']:.1%} at {r['over_least']:g} times the least"
            for r in each
        )
        return f"{losses}; smallest needs {members[0]['least_over_general']:.2f} times the least"
    if part == "loss":
        measured, proved = (max(m[k] for m in members) for k in ("measured", "proved"))
        return f"{measured:.2%} measured, {proved:.2%} proved, at worst"
    if part == "proof":
        wall = statistics.median(r["wall_s"] for r in each)
        proved = sum(r["status"] == "optimal" for r in each)
        return f"{wall:.2f} s median, {proved} of {len(each)} optimal"
    if part == "unrestricted":
        gaps = [1 - r["operations"] / r["runs"] for r in each if r["status"] == "optimal"]
        better = sum(g > 0 for g in gaps)
        return (
            f"runs give away something at {better} of {len(gaps)} points, "
            f"at most {max(gaps, default=0.0):.1%}; {len(each) - len(gaps)} not proved"
        )
    wall, cpu = (statistics.median(m[k] for m in members) for k in ("wall_s", "cpu_s"))
    return f"{wall:.2f} s wall, {cpu:.2f} s CPU"


def _host(each: Rows) -> list[tuple[str, str]]:
    """What memory on the host buys."""
    out = []
    for share in sorted({r["share"] for r in each}):
        some = [r for r in each if r["share"] == share]
        wall, over = (statistics.median(r[k] for r in some) for k in ("wall_s", "over_frontier"))
        proved, gap = sum(r["status"] == "optimal" for r in some), max(r["gap"] for r in some)
        found = (
            f"{over:.2f} of the time, {wall:.2f} s median, "
            f"{proved} of {len(some)} optimal (gap at most {gap:.1%})"
        )
        out.append((f"least budget, 1/{1 / share:.0f} of residuals on the host", found))
    return out


def _quality(each: Rows) -> list[tuple[str, str]]:
    """How much longer the plans of others take."""
    out = []
    for name in ("recomputation", "rotor", "greedy", "greedy_recomputation"):
        base = "recomputation" if name in ("rotor", "greedy_recomputation") else "optimum"
        ratios = [r[name] / r[base] - 1 for r in each if r[name]]
        found = f"+{statistics.median(ratios):.1%} median, +{max(ratios):.1%} worst" if ratios else "none"
        found += f"; no plan at {len(each) - len(ratios)} of {len(each)} budgets"
        over = "best recomputation" if base == "recomputation" else "optimum"
        out.append((f"{name} over {over}", found))
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
