r"""A lower bound for long chains with stretches of identical layers, whose own tables
(`mwplan.solvers.sparse`) prove nothing.

Cut a schedule within `b` bytes down to some consecutive layers: runs are cut where they cross the ends, and
of a RECOMPUTE run that covers all that is left its inner schedule remains. What is left is nearly a schedule
of these layers alone within `b`, entered with its input kept and with nothing to turn on: what is held to its
left only adds to its events. Nearly: an event may need up to `cut_bytes` less than the layers alone say,
since another cotangent than `C` waits (forward events), another one than `D` stays (events of M), what an
input kept by others forbids is saved, or more than `last_workspace` is not needed. An INVERT run's share of
the error shrinks with its length, so shares are those of a chain of one layer. Times are sums over layers. So
with `T` a lower bound of the layers' frontier, no schedule spends less than `T(b + cut_bytes)` on them, and
bounds of disjoint pieces add up; other layers count with their fastest options. A chain that is one piece is
not cut.

What is lost: the memory that pieces take from one another; most at small budgets and in chains of many
pieces.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from mwplan.plans.profiles import Profile
from mwplan.solvers.pareto import DONE, NO_STAIRS, Stairs
from mwplan.solvers.parts import Place, part
from mwplan.solvers.predictions import fastest_ns
from mwplan.solvers.problem import Problem
from mwplan.solvers.sparse import SparseTables


def cut_bytes(profile: Profile) -> int:
    """By how much less than the tables of a uniform `profile` say events may need where it is cut out of a
    longer chain."""
    layer = profile.layers[0]
    waits = profile.cotangent_bytes[0]
    backward = [o.backward_saving_bytes for o in layer.store]
    backward += [o.backward_saving_bytes for o in layer.invert]
    moonwalk = [
        profile.sweep_cotangent_bytes[0]
        + max(o.rebuild_saving_bytes, o.advance_saving_bytes + o.last_workspace_bytes)
        for o in layer.moonwalk
    ]
    return max(waits, *backward, *moonwalk)


def lower_bound(problem: Problem, parts: Iterable[tuple[int, int, bool]]) -> Stairs:
    """A staircase that no schedule of the chain beats at any budget. No schedule fits below its least need.

    **Arguments:** `problem`, without side conditions, whose `thin` must not be 0; `parts`, as
    `mwplan.solvers.parts.stretches` gives them. **Cost:** the frontier of a piece for each uniform part.
    """
    profile = problem.profile
    pieces: list[tuple[int, Stairs]] = []
    rest = 0
    for start, stop, uniform in parts:
        if not uniform:
            rest += fastest_ns(part(profile, start, stop))
            continue
        count = -(-(stop - start) // problem.tuning.bound_piece)
        size = (stop - start) // count
        rest += fastest_ns(part(profile, start, start + 1)) * (stop - start - count * size)
        piece = part(profile, start, start + size)
        cut = size < len(profile)
        place = Place(whole=piece, ends=(DONE, DONE)) if cut else None
        need, time = SparseTables(problem.of(piece), place, bound=True).points()
        pieces.append((count, (np.maximum(need - cut_bytes(piece) * cut, 0), time)))
    if not all(need.size for _, (need, _) in pieces):
        return NO_STAIRS
    # Below one piece's least need nothing fits.
    needs = np.unique(np.concatenate([need for _, (need, _) in pieces]))
    needs = needs[needs >= max(int(need[0]) for _, (need, _) in pieces)]
    total = np.full(needs.size, rest, dtype=np.int64)
    for count, (need, time) in pieces:
        total += count * time[need.searchsorted(needs, side="right") - 1]
    return needs, np.maximum(total, fastest_ns(profile))
