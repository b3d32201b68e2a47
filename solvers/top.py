"""The top level: what follows any inner schedule, down to the turn, at every budget."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from mwplan.plans.schedule import Run
from mwplan.solvers import reading
from mwplan.solvers.beginnings import Beginnings
from mwplan.solvers.candidates import Candidates, Node
from mwplan.solvers.diagonals import NO_POINTS
from mwplan.solvers.pareto import NO_STAIRS, Ints, Stairs
from mwplan.solvers.splits import Buffer, Grid, Pairs, grouped
from mwplan.solvers.tables import Tables


@dataclass(slots=True)
class _Parts:
    """What a suffix may begin with: staircases, forward peaks, held bytes, what of its time is no
    staircase's, and the rows of what is left."""

    stairs: list[Stairs] = field(default_factory=list)
    floors: list[int] = field(default_factory=list)
    holds: list[int] = field(default_factory=list)
    spent: list[int] = field(default_factory=list)
    to: list[int] = field(default_factory=list)

    def add(self, stairs: Stairs, floor: int, held: int, spent: int, to: int) -> None:
        """Adds one run or a group of them."""
        self.stairs.append(stairs)
        self.floors.append(floor)
        self.holds.append(held)
        self.spent.append(spent)
        self.to.append(to)


class _Ahead:
    """What is left from each node on, as rows of a buffer: row 0 is empty, `rows[0, e, s]` a node's."""

    def __init__(self, grid: Grid, size: int) -> None:
        self.buffer = Buffer(grid, 2 * size + 3)
        self.buffer.extend(1, np.zeros(0, dtype=np.int64), *NO_STAIRS)
        self.rows = np.zeros((1, 2, size + 1), dtype=np.int64)

    def add(self, node: Node, stairs: Stairs) -> None:
        """What is left from one node on."""
        need, time = stairs
        self.rows[0, int(node[1]), node[0]] = self.buffer.rows
        self.buffer.extend(1, np.zeros(need.size, dtype=np.int64), need, time)


class Top:
    """The staircases of all suffixes of a chain, or a part of it, outside RECOMPUTE runs: `nodes`.

    `T` of `mwplan.solvers.tables` with `K = 0`; the empty suffix is the turn, or what follows the part.
    **Arguments:** `tables`, of inner schedules; `candidates`, if other than inside RECOMPUTE runs (side
    conditions); `closing`, whether a RECOMPUTE run may end the chain, which is never better but may be asked
    for; `penalty_ns`, added to the time of each run. **Cost:** O(L^2) combinations of staircases.
    """

    def __init__(
        self,
        tables: Tables,
        candidates: Candidates | None = None,
        *,
        closing: bool = False,
        penalty_ns: int = 0,
    ) -> None:
        self.tables, self.candidates = tables, candidates or tables.candidates
        self.size, self.penalty_ns = tables.size, penalty_ns
        ends = tables.place.ends
        self.closing = closing or ends is not None
        self.source = tables.source(tables.levels)
        self.nodes: dict[Node, Stairs] = {}
        every = [(start, kept) for start in range(self.size) for kept in tables.kept_states(start)]
        self.candidates.prepare(every)
        ahead = _Ahead(tables.grid, self.size)
        for kept in (False, True):
            turn = np.array([self.candidates.turn_bytes(kept)]), np.zeros(1, dtype=np.int64)
            self.nodes[self.size, kept] = ends[kept] if ends else turn
            ahead.add((self.size, kept), self.nodes[self.size, kept])
        plain = self.candidates is tables.candidates and self.closing is (ends is not None)
        begun = tables.begun if plain and not penalty_ns else None
        if begun:
            begun.read(self.size + 1, every, nested=True)
            tables.begun = None
        for start in range(self.size - 1, -1, -1):
            some = [(start, kept) for kept in tables.kept_states(start)]
            self.nodes |= {node: self._suffix(node, begun, ahead) for node in some}
            for node in some:
                ahead.add(node, self.nodes[node])

    def limit(self, start: int) -> int:
        """Up to where a RECOMPUTE run from `start` may go."""
        if self.source is None:
            return start
        return min(self.size if self.closing else self.size - 1, int(self.candidates.reach[start]))

    def _suffix(self, node: Node, begun: Beginnings | None, ahead: _Ahead) -> Stairs:
        """The staircase from one node on."""
        tables = self.tables
        if begun:
            waiting = np.zeros(1, dtype=np.int64)
            of, pairs = begun.pairs([node], [self.limit(node[0])], ahead.rows, waiting)
            left = begun.buffer
        else:
            pairs, left = self._pairs(node, ahead.rows)
            of = np.zeros(pairs.left.size, dtype=np.int64)
        n = self.size - node[0] + (tables.tuning.short_layers if tables.place.ends else 0)
        _, need, time = tables.best(
            of,
            pairs,
            NO_POINTS,
            (left, ahead.buffer),
            n,
            capped=self.candidates is tables.candidates,
            share=tables.tuning.top_share,
        )
        return need, time

    def _pairs(self, node: Node, rows: Ints) -> tuple[Pairs, Buffer]:
        """How the suffix from one node may begin, and the buffer that the runs are in."""
        c, tables, (start, kept) = self.candidates, self.tables, node
        limit, parts = self.limit(start), _Parts()
        peaks, own = c.recompute_forward_peak(start, kept), c.own_bytes(start, kept)
        if self.source is not None:
            for at in range(start + 1, limit + 1):
                forward = int(c.forward_sum[at] - c.forward_sum[start])
                inner = tables.suffix(self.source, start, at, kept)
                parts.add(inner, int(peaks[at - start - 1]), own, forward, int(rows[0, 0, at]))
        atoms, low = c.atoms(start, kept), 0
        for at, keeps, high in atoms.groups:
            columns = [x[low:high] for x in atoms.costs]
            low = high
            if not keeps and at <= limit and c is tables.candidates and not self.closing:
                columns = self._undominated(columns, node, at)
            for floor, held, found in grouped(columns, tables.waiting) if columns[0].size else ():
                parts.add(found, floor, held, 0, int(rows[0, int(keeps), at]))
        sizes = [x[0].size for x in parts.stairs]
        floors, holds, to = (np.array(x, dtype=np.int64) for x in (parts.floors, parts.holds, parts.to))
        left = Buffer(tables.grid, len(sizes), sheeted=True)
        need, time = (np.concatenate([NO_STAIRS[i], *(x[i] for x in parts.stairs)]) for i in (0, 1))
        spent = np.repeat(np.array(parts.spent, dtype=np.int64) + self.penalty_ns, sizes)
        left.extend(len(sizes), np.repeat(np.arange(len(sizes)), sizes), need, time + spent, floors)
        return Pairs(np.arange(len(sizes)), to, holds, floors, tables.shifts.rows(holds)), left

    def _undominated(self, columns: list[Ints], node: Node, stop: int) -> list[Ints]:
        """Those of the runs `(F, B, H, t)` from a node to `(stop, False)` that no RECOMPUTE run beats."""
        if self.source is None:
            return columns
        f, b, held, time = columns
        c, (start, kept) = self.candidates, node
        n, t = self.tables.suffix(self.source, start, stop, kept)
        if not n.size:
            return columns
        at = np.searchsorted(n, b, side="right") - 1
        forward = int(c.forward_sum[stop] - c.forward_sum[start])
        beaten = (at >= 0) & (t[at] + forward <= time) & (held >= c.own_bytes(start, kept))
        beaten &= f >= int(c.recompute_forward_peak(start, kept)[stop - start - 1])
        return [x[~beaten] for x in columns]

    # -- reading

    def stairs(self, kept: bool = True) -> Stairs:
        """The staircase of all of the chain, or the part, from the node with `kept`."""
        return self.nodes.get((0, kept), NO_STAIRS)

    def runs(self, budget: int) -> tuple[Run, ...]:
        """The runs of the fastest schedule of the chain within `budget`, which must hold at least one."""
        return self.read(True, budget)[0]

    def read(self, kept: bool, budget: int) -> tuple[tuple[Run, ...], bool, int]:
        """As `runs`, of a part of a chain from the node with `kept`; with that of its end and the budget left
        there."""
        suffixes = reading.Suffixes(
            candidates=self.candidates,
            stairs=lambda at, keeps: self.nodes.get((at, keeps), NO_STAIRS),
            waiting=0,
            limit=self.size if self.closing else self.size - 1,
            source=self.source,
            penalty_ns=self.penalty_ns,
        )
        return reading.read(self.tables, suffixes, 0, self.size, kept, budget)
