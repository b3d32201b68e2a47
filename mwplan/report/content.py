"""What a report shows, as plain values for the page's script: figures of the ledger and words, no drawing."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mwplan.common.sizes import show_bytes, show_ns
from mwplan.plans.holdings import Holding, Kind, Moment
from mwplan.plans.ledger import moments, replay, strategies
from mwplan.plans.profiles import Profile
from mwplan.plans.schedule import LETTERS, Run, RunKind, Schedule, Status, reporting_runs
from mwplan.report import palette

#: Events that the drawing of a step's memory has at most: of a longer step each stands for several, and is
#: the one among them with the most alive.
MOST_EVENTS = 600
#: What is alive at the peak, named one by one; what is smaller is summed up.
MOST_HOLDINGS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledPeak:
    """A plan's compiled program: `temporary_bytes` that it takes, `by`, whose word that is; `alive`, what is
    alive at its peak, by role."""

    temporary_bytes: int
    by: str
    alive: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What a report is about.

    - `profile`, and `points`, the frontier's `(total bytes, ns)`; `schedules`, those to choose from, each
      with its budget, least first; `chosen`, the one shown at first.
    - `recomputation`, the frontier of STORE and RECOMPUTE alone; `backpropagation`, `(total bytes, ns)` of
      everything stored, as predicted.
    - `compiled`, of `chosen`, where it was compiled.
    - `title`; `measured`, rows of a table of what was measured, its header first.
    """

    profile: Profile
    points: tuple[tuple[int, int], ...]
    schedules: tuple[Schedule, ...]
    chosen: int
    recomputation: tuple[tuple[int, int], ...] = ()
    backpropagation: tuple[int, int] | None = None
    compiled: CompiledPeak | None = None
    title: str = ""
    measured: tuple[tuple[str, ...], ...] = ()


def content(subject: Subject) -> dict[str, Any]:
    """All of it as lists, texts and numbers. Cost: a replay of each schedule."""
    profile = subject.profile
    return {
        "title": subject.title or f"Memory plan of {len(profile)} layers",
        "profile": {
            "device": profile.device,
            "source": profile.source,
            "layers": [layer.name for layer in profile.layers],
            "fixed": profile.fixed_bytes,
            "beside": profile.beside_bytes,
        },
        "frontier": [list(point) for point in subject.points],
        "recomputation": [list(point) for point in subject.recomputation],
        "backpropagation": None if subject.backpropagation is None else list(subject.backpropagation),
        "plans": [_plan(profile, schedule) for schedule in subject.schedules],
        "chosen": subject.chosen,
        "compiled": None if subject.compiled is None else dataclasses.asdict(subject.compiled),
        "measured": [list(row) for row in subject.measured],
        "strategies": {
            look.letter: {**dataclasses.asdict(look), "name": strategy.value}
            for strategy, look in palette.STRATEGIES.items()
        },
        "kinds": [{**dataclasses.asdict(look), "name": kind.value} for kind, look in palette.KINDS.items()],
        "always": {**dataclasses.asdict(palette.ALWAYS), "name": "always there"},
        "lines": {
            "frontier": palette.FRONTIER,
            "recomputation": palette.RECOMPUTATION,
            "backpropagation": palette.BACKPROPAGATION,
        },
    }


def lanes(profile: Profile, runs: Sequence[Run]) -> list[list[tuple[str, str]]]:
    """For each layer, from the outermost run to the innermost, its strategy's letter and its option."""
    found: list[list[tuple[str, str]]] = []
    for run in runs:
        letters = [LETTERS[strategy] for strategy in strategies(profile, [run])]
        if run.kind is RunKind.RECOMPUTE:
            found += [[("R", ""), *inner] for inner in lanes(profile, run.inner)]
        else:
            options = run.options if len(run.options) == len(letters) else run.options * len(letters)
            found += [[pair] for pair in zip(letters, options)]
    return found


def _plan(profile: Profile, schedule: Schedule) -> dict[str, Any]:
    found = replay(profile, schedule.runs)
    alive = moments(profile, schedule.runs)
    at = max(range(len(alive)), key=lambda i: found.events[i].live_bytes)
    columns = _columns([event.live_bytes for event in found.events])
    return {
        "budget": schedule.budget_bytes or schedule.total_bytes,
        "total": schedule.total_bytes,
        "packed": schedule.fixed_bytes + max(schedule.packed_bytes, schedule.peak_bytes),
        "ns": schedule.time_ns,
        "error": schedule.error,
        "letters": "".join(LETTERS[s] for s in schedule.strategies),
        "lanes": lanes(profile, schedule.runs),
        "starts": [run.start for run in schedule.runs],
        "counts": {LETTERS[s]: n for s, n in schedule.counts.items()},
        "words": words(schedule),
        "events": {
            "of": len(alive),
            "shown": columns,
            "where": [str(found.events[i]) for i in columns],
            "sizes": [list(alive[i].sizes) for i in columns],
            "peak": columns.index(at),
        },
        "peak": {
            "where": str(found.binding),
            "bytes": found.peak_bytes,
            "saving": found.binding.saving_bytes,
            "rows": _rows(profile, alive[at]),
        },
    }


def _columns(live: Sequence[int]) -> list[int]:
    """The events to draw: all, or of each stretch the first one with the most alive."""
    width = -(-len(live) // MOST_EVENTS)
    stretches = (range(low, min(low + width, len(live))) for low in range(0, len(live), width))
    return [max(stretch, key=lambda i: live[i]) for stretch in stretches]


def _rows(profile: Profile, moment: Moment) -> list[list[Any]]:
    """What is alive: kind, words, bytes."""
    rows: list[list[Any]] = [
        [one.kind.value, described(profile, one), one.nbytes] for one in moment.holdings[:MOST_HOLDINGS]
    ]
    for kind in Kind:
        rest = [one.nbytes for one in moment.holdings[MOST_HOLDINGS:] if one.kind is kind]
        if rest:
            rows.append([kind.value, f"{len(rest)} more, smaller", sum(rest)])
    return rows


def described(profile: Profile, one: Holding) -> str:
    """Something alive, in words."""
    position = one.position
    layer = f"layer {position} ({profile.layers[position - 1].name})" if position else "the chain's input"
    of = f"the output of {layer}" if position else layer
    level = f", recomputed, level {one.depth}" if one.depth else ""
    match one.name:
        case "x":
            return of
        case "q":
            return f"residuals of {layer}{level}"
        case "fragment":
            return f"fragment of the cotangent of {of}{level}"
        case "workspace":
            return "of the operation that runs then"
        case "rebuilt":
            return f"rebuilt cotangent of {of}{level}"
        case _:
            return f"cotangent of {of}{level}"


def words(schedule: Schedule) -> list[list[str]]:
    """What was predicted and proved: pairs of a heading and a sentence."""
    found = [
        [
            "Memory",
            f"{show_bytes(schedule.total_bytes)} predicted, {show_bytes(schedule.fixed_bytes)} of it "
            f"parameters, gradients and input, and {show_bytes(schedule.peak_bytes)} temporaries, at most.",
        ],
        ["Time", f"{show_ns(schedule.time_ns)} predicted for the gradient, without the loss."],
        ["Proof", _proof(schedule)],
        [
            "Error",
            f"at most {schedule.error:.1e} relative in any rebuilt cotangent or gradient, as predicted; "
            f"{schedule.max_error:.0e} are allowed."
            if schedule.error
            else "none: what is rebuilt is rebuilt as it was."
            if reporting_runs(schedule.runs)
            else "none: nothing is rebuilt, so that gradients are those of backpropagation.",
        ],
    ]
    gaps = schedule.packed_bytes - schedule.peak_bytes
    if gaps > 0.001 * schedule.peak_bytes:
        found.append(["Fragmentation", f"{show_bytes(gaps)} more are expected between buffers."])
    if schedule.next_gain:
        found.append(["More memory", f"{schedule.next_gain}."])
    return found


def _proof(schedule: Schedule) -> str:
    if schedule.status is Status.OPTIMAL:
        return "optimal: no schedule of the plan space is predicted to be faster within this budget."
    if not schedule.bound_ns:
        return "none: it was not compared with all schedules."
    return (
        f"not proved optimal; no schedule is predicted to be more than {schedule.gap:.1%} faster within this "
        "budget."
    )
