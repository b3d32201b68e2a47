"""The runs that the integer program chooses from, those left out that no fast enough schedule holds.

**Bound filtering** (ours). Let `V[n](b)` be the frontier's staircase at node `n`: no suffix from `n` within
`b` bytes is faster. Labels `(held, time)` of prefixes grow from the left; a label or a run whose
`time + t_c + V[n'](M - held - H_c)` exceeds a threshold `theta` is dropped. Every schedule of time at most
`theta` survives whole, so an optimum found at or below `theta` is the optimum, and a threshold with no
solution proves `theta + 1` a lower bound.
"""

from __future__ import annotations

import time as clock
from dataclasses import dataclass, field

import numpy as np

from mwplan.plans.schedule import Run, RunKind
from mwplan.solvers.candidates import Node
from mwplan.solvers.conditions import Conditioned
from mwplan.solvers.pareto import DONE, INF, NO_STAIRS, Ints, Stairs, staircase
from mwplan.solvers.reading import inner_runs


@dataclass(slots=True)
class Columns:
    """The runs that survived the filter: one row each."""

    source: list[Node] = field(default_factory=list)
    target: list[Node] = field(default_factory=list)
    peak: list[int] = field(default_factory=list)
    held: list[int] = field(default_factory=list)
    time: list[int] = field(default_factory=list)
    host: list[int] = field(default_factory=list)
    #: row of the node's atoms, or -1 - need of the inner schedule of a RECOMPUTE run
    handle: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.peak)

    def add(self, node: Node, runs: NodeRuns, row: int) -> None:
        """Adds one of the runs out of a node."""
        self.source.append(node)
        self.target.append(runs.target(row))
        self.peak.append(int(runs.peak[row]))
        self.held.append(int(runs.held[row]))
        self.time.append(int(runs.time[row]))
        self.host.append(int(runs.host[row]))
        self.handle.append(int(runs.handle[row]))

    def run(self, asked: Conditioned, row: int) -> Run:
        """Column `row` as a run."""
        (start, kept), (stop, _), handle = self.source[row], self.target[row], self.handle[row]
        if handle >= 0:
            return asked.candidates.run(start, kept, handle)
        tables = asked.tables
        source = tables.source(tables.levels)
        assert source is not None
        inner = inner_runs(tables, source, start, stop, kept, -1 - handle)
        return Run(kind=RunKind.RECOMPUTE, start=start, stop=stop, inner=inner)


class NodeRuns:
    """All candidate runs out of one node, as arrays, with the staircases of where they lead. A RECOMPUTE run
    stands once for each point of the Pareto set of its inner schedules."""

    def __init__(self, asked: Conditioned, node: Node) -> None:
        start, kept = node
        c, self.top = asked.candidates, asked.staircases
        atoms = c.atoms(start, kept)
        peak = np.maximum(atoms.forward_peak, atoms.backward_peak)
        keeps, rows = atoms.keeps_end.astype(np.int64), np.arange(len(atoms))
        parts = [(atoms.stop, keeps, peak, atoms.held, atoms.time, atoms.host, rows)]
        source, tables = self.top.source, asked.tables
        own, peaks = c.own_bytes(start, kept), c.recompute_forward_peak(start, kept)
        for stop in range(start + 1, self.top.limit(start) + 1):
            assert source is not None
            need, time = tables.suffix(source, start, stop, kept)
            need, time = staircase(np.maximum(need, peaks[stop - start - 1]), time, tables.tuning)
            forward = int(c.forward_sum[stop] - c.forward_sum[start])
            zero = np.zeros(need.size, dtype=np.int64)
            parts.append((zero + stop, zero, need, zero + own, time + forward, zero, -1 - need))
        columns = [np.concatenate(x) for x in zip(*parts)]
        order = np.argsort(2 * columns[0] + columns[1], kind="stable")
        self.stop, self.keeps, self.peak, self.held, self.time, self.host, self.handle = (
            x[order] for x in columns
        )
        node_id = 2 * self.stop + self.keeps
        cuts = np.flatnonzero(np.diff(node_id)) + 1
        self.groups = [
            (int(a), int(b))
            for a, b in zip(np.concatenate([[0], cuts]), np.concatenate([cuts, [node_id.size]]))
            if b > a
        ]

    def target(self, row: int) -> Node:
        """Where a run leads."""
        return int(self.stop[row]), bool(self.keeps[row])

    def completion(self, budget: int, held: int) -> Ints:
        """For each run, a lower bound on its time and that of all after it, `held` bytes being held to its
        left."""
        out = np.full(self.stop.size, INF, dtype=np.int64)
        for a, b in self.groups:
            need, time = self.top.nodes.get(self.target(a), NO_STAIRS)
            if not len(need):
                continue
            at = np.searchsorted(need, budget - held - self.held[a:b], side="right") - 1
            ok = (at >= 0) & (self.peak[a:b] <= budget - held)
            out[a:b][ok] = self.time[a:b][ok] + time[at[ok]]
        return out


class Filter:
    """The runs of a problem, each node's made once."""

    def __init__(self, asked: Conditioned) -> None:
        self.asked = asked
        self._nodes: dict[Node, NodeRuns] = {}

    def _runs(self, node: Node) -> NodeRuns:
        if node not in self._nodes:
            self._nodes[node] = NodeRuns(self.asked, node)
        return self._nodes[node]

    def columns(self, budget: int, theta: int, deadline: float) -> Columns | None:
        """The runs that stand in some schedule within `budget` whose time may be at most `theta`; None if
        `deadline` comes first."""
        out = Columns()
        new: dict[Node, list[Stairs]] = {(0, True): [DONE]}
        for start in range(self.asked.candidates.size):
            for node in ((start, False), (start, True)):
                if node not in new:
                    continue
                runs = self._runs(node)
                held, time = (np.concatenate(x) for x in zip(*new.pop(node)))
                used = np.zeros(runs.stop.size, dtype=np.bool_)
                for h, t in zip(*(x.tolist() for x in staircase(held, time))):
                    if clock.monotonic() > deadline:
                        return None
                    good = np.flatnonzero(runs.completion(budget, h) <= theta - t)
                    used[good] = True
                    for a in good.tolist():
                        label = runs.held[a : a + 1] + h, runs.time[a : a + 1] + t
                        new.setdefault(runs.target(a), []).append(label)
                for a in np.flatnonzero(used).tolist():
                    out.add(node, runs, a)
        return out
