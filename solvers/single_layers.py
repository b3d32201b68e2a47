"""The lowest level of recomputation where every run is one layer: all stretches with one beginning are merged
at once, keyed by their ends and needs."""

from __future__ import annotations

import numpy as np

from mwplan.solvers.candidates import Atoms, Candidates, Node
from mwplan.solvers.pareto import Ints, Stairs, begins, ends

#: points of many stretches: stop, need, time
_Points = tuple[Ints, Ints, Ints]
_NOTHING: _Points = (np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))


class SingleLayers:
    """The staircases of all stretches of schedules of STORE runs, or others of one layer.

    **Arguments:** `nodes`, those from which stretches begin; `cap`, bytes beyond which no schedule gains
    time; `thin`, what `thinned` may lose; `optimistic`, whether the staircases are then a bound; `span`, more
    than any need. **Cost:** O(L) sorts of all points with one beginning.
    """

    def __init__(
        self,
        candidates: Candidates,
        nodes: list[Node],
        *,
        cap: int | None,
        thin: float,
        optimistic: bool,
        span: int,
    ) -> None:
        self.candidates, self.nodes, self.cap, self.span = candidates, nodes, cap, span
        self.thin, self.optimistic = thin, optimistic
        self.slowest = candidates.profile.time_bound() + 1

    def apply(self) -> bool:
        """Whether all runs are of one layer, and times small enough to be told apart by their ends."""
        c = self.candidates
        if self.slowest * (c.size + 2) >= 2**62:
            return False
        return all((c.atoms(*node).stop == node[0] + 1).all() for node in self.nodes)

    def stairs(self) -> dict[tuple[int, int, bool], Stairs]:
        """The staircases, by `(s, r, e)`."""
        out: dict[tuple[int, int, bool], Stairs] = {}
        suffixes: dict[Node, _Points] = {}
        for start, kept in sorted(self.nodes, reverse=True):
            atoms = self.candidates.atoms(start, kept)
            after = {e: suffixes.get((start + 1, e), _NOTHING) for e in (False, True)}
            if not len(atoms):
                continue
            stop, need, time = suffixes[start, kept] = self._merged(start, atoms, after)
            cuts = np.flatnonzero(begins(stop)).tolist()
            for a, z in zip(cuts, [*cuts[1:], stop.size]):
                out[start, int(stop[a]), kept] = need[a:z], time[a:z]
        return out

    def _merged(self, start: int, atoms: Atoms, after: dict[bool, _Points]) -> _Points:
        """The stretches that begin with one of these runs."""
        cotangent = self.candidates.cotangent
        parts = []
        for row in range(len(atoms)):
            stop, need, time = (
                np.append(first, rest)
                for first, rest in zip((start + 1, 0, 0), after[bool(atoms.keeps_end[row])])
            )
            peak = np.maximum(atoms.forward_peak[row] + cotangent[stop], atoms.backward_peak[row])
            parts.append((stop, np.maximum(peak, need + atoms.held[row]), time + atoms.time[row]))
        stop, need, time = (np.concatenate(x) for x in zip(*parts))
        # Each part is in order already: the sort is a merge.
        order = np.argsort(stop * self.span + need, kind="stable")
        stop, need, time = stop[order], need[order], time[order]
        # Times of later stops lie below all earlier ones, so that the running minimum begins anew with each.
        low = time - stop * self.slowest
        keep = np.append(True, low[1:] < np.minimum.accumulate(low)[:-1])
        if self.cap is not None:
            keep &= need <= self.cap
        stop, need, time = stop[keep], need[keep], time[keep]
        last = ends(stop, need)
        return self._thinned(start, stop[last], need[last], time[last])

    def _thinned(self, start: int, stop: Ints, need: Ints, time: Ints) -> _Points:
        """`mwplan.solvers.pareto.thinned` for all stops at once."""
        tuning = self.candidates.problem.tuning
        loss = self.thin * tuning.thinning_share
        if not loss or not stop.size:
            return stop, need, time
        last = ends(stop)
        least = time[last][np.cumsum(begins(stop)) - 1]
        group = np.floor(np.log(time / np.maximum(least, 1)) / np.log1p(loss))
        first = begins(stop, group)
        short = (stop - start < tuning.short_layers) | (least <= 0)
        if not self.optimistic:
            keep = first | last | short
            return stop[keep], need[keep], time[keep]
        keep = first | short
        index = np.flatnonzero(keep)
        return stop[keep], need[keep], time[np.append(index[1:], time.size) - 1]
