r"""rotor's dynamic program: the best persistent checkpointing for one budget, bytes rounded up to slots.

With `m` slots, `n(b) = ceil(b / slot)` and `K = C[r]` waiting inside a recomputed stretch, in the accounting
of docs/accounting.md:

    T[s, r](m) = min  t_o + T[s+1, r](m - n(H_o))                         STORE option o, if n(peak_o) <= m
                      fwd(s, j) + T[s, j](m) + T[j, r](m - n(A[s]))       RECOMPUTE (s, j], if n(P_j + K) <= m

Source: Beaumont, Eyraud-Dubois, Herrmann, Joly, Shilova, *Optimal re-materialization strategies for
heterogeneous chains*, ACM TOMS 2024. Written from the recurrence, with the events of our accounting and its
nodes `(s, e)`. With one byte a slot it is exact: a second opinion on the frontier.
**Cost:** O(L^3 slots), vectorised over `j` and slots.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mwplan.plans.schedule import Run, RunKind, Solution, Status, Strategy
from mwplan.solvers.candidates import Atoms, Candidates
from mwplan.solvers.pareto import Ints
from mwplan.solvers.problem import Problem, check_integer

#: above any time; four of them still fit 64 bits
INF = 2**60


def rotor(problem: Problem, slots: int = 500) -> Solution:
    """The fastest schedule of STORE and RECOMPUTE runs whose bytes, rounded up to `slots` parts of the
    budget, fit it; whatever strategies the problem allows, and without side conditions.

    **Returns:** a `Solution`: FEASIBLE (its optimality is that of rounded bytes), or INFEASIBLE. `peak_bytes`
    is the budget's upper estimate, rounded.
    **Raises:** `ArgumentError`.
    """
    check_integer("slots", slots, 1)
    return _Rotor(problem, slots).solution()


class _Rotor:
    def __init__(self, problem: Problem, slots: int) -> None:
        alone = replace(problem.unconditional(), allowed={Strategy.STORE, Strategy.RECOMPUTE})
        self.c = Candidates(alone)
        self.size, self.slots, self.budget = self.c.size, slots, problem.budget
        self.nodes = [
            (True,) if s == 0 else (False, True) if self.c.kept_nodes[s] else (False,)
            for s in range(self.size)
        ]
        shape = (self.size + 1, slots + 1)
        # inner[s, e][j]: T[s, j] with K = C[j]; the chain itself, with K = 0 and the turn, comes last.
        self.inner = {(s, e): np.full(shape, INF) for s in range(self.size) for e in self.nodes[s]}
        self.top: dict[tuple[int, bool], Ints] = {}
        for stop in range(1, self.size + 1):
            end = {(stop, e): np.zeros(slots + 1, dtype=np.int64) for e in (False, True)}
            self._stretch(stop, int(self.c.cotangent[stop]), end, top=False)
        for e in (False, True):
            self.top[self.size, e] = np.where(np.arange(slots + 1) >= self.slot(self.c.turn_bytes(e)), 0, INF)
        self._stretch(self.size, 0, self.top, top=True)

    def slot(self, count: int) -> int:
        """Bytes to slots, rounded up."""
        return -(-int(count) * self.slots // self.budget)

    def _shift(self, row: Ints, by: int) -> Ints:
        """`row(m - by)`, along the last axis."""
        out = np.full(row.shape, INF)
        if by <= self.slots:
            out[..., by:] = row[..., : self.slots + 1 - by]
        return out

    def _stretch(self, stop: int, k: int, rows: dict[tuple[int, bool], Ints], *, top: bool) -> None:
        c = self.c
        right = np.full((self.size + 1, self.slots + 1), INF)
        m = np.arange(self.slots + 1)
        for start in range(stop - 1, -1, -1):
            for kept in self.nodes[start]:
                atoms = c.atoms(start, kept)
                best = np.full(self.slots + 1, INF)
                for row in range(len(atoms)):
                    best = np.minimum(best, self._stored(atoms, row, k, rows))
                if stop - start > 1:
                    own = self.slot(0 if kept else int(c.activation[start]))
                    peaks = c.recompute_forward_peak(start, kept)[: stop - start - 1] + k
                    first = np.array([self.slot(p) for p in peaks])
                    time = self.inner[start, kept][start + 1 : stop] + self._shift(
                        right[start + 1 : stop], own
                    )
                    time += (c.forward_sum[start + 1 : stop] - c.forward_sum[start])[:, None]
                    time[m[None, :] < first[:, None]] = INF
                    best = np.minimum(best, time.min(axis=0))
                rows[start, kept] = best = np.minimum(best, INF)
                if not top:
                    self.inner[start, kept][stop] = best
            if start:
                right[start] = rows[start, False]

    def _stored(self, atoms: Atoms, row: int, k: int, rows: dict[tuple[int, bool], Ints]) -> Ints:
        after = rows[int(atoms.stop[row]), bool(atoms.keeps_end[row])]
        out = self._shift(after, self.slot(atoms.held[row])) + int(atoms.time[row])
        peak = max(int(atoms.forward_peak[row]) + k, int(atoms.backward_peak[row]))
        out[: min(self.slots + 1, self.slot(peak))] = INF
        return np.minimum(out, INF)

    def solution(self) -> Solution:
        time = int(self.top[0, True][self.slots])
        if time >= INF:
            return Solution(status=Status.INFEASIBLE, solver="rotor")
        runs = self._read(0, self.size, True, self.slots, top=True)
        return Solution(
            status=Status.FEASIBLE,
            runs=runs,
            time_ns=time,
            peak_bytes=self.budget,
            solver="rotor",
            stats=(("slots", self.slots),),
        )

    def _value(self, start: int, stop: int, kept: bool, m: int, *, top: bool) -> int:
        if m < 0:
            return INF
        if top:
            return int(self.top[start, kept][m])
        return 0 if start == stop else int(self.inner[start, kept][stop][m])

    def _read(self, start: int, stop: int, kept: bool, m: int, *, top: bool) -> tuple[Run, ...]:
        c, out = self.c, []
        k = 0 if top else int(c.cotangent[stop])
        while start < stop:
            time = self._value(start, stop, kept, m, top=top)
            run, kept, m = self._first(start, stop, kept, m, k, time, top=top)
            out.append(run)
            start = run.stop
        return tuple(out)

    def _first(
        self, start: int, stop: int, kept: bool, m: int, k: int, time: int, *, top: bool
    ) -> tuple[Run, bool, int]:
        c = self.c
        atoms = c.atoms(start, kept)
        for row in range(len(atoms)):
            peak = max(int(atoms.forward_peak[row]) + k, int(atoms.backward_peak[row]))
            rest, keeps = m - self.slot(atoms.held[row]), bool(atoms.keeps_end[row])
            if self.slot(peak) <= m and time == int(atoms.time[row]) + self._value(
                start + 1, stop, keeps, rest, top=top
            ):
                return c.run(start, kept, row), keeps, rest
        rest = m - self.slot(0 if kept else int(c.activation[start]))
        for at in range(start + 1, stop):
            forward = int(c.forward_sum[at] - c.forward_sum[start])
            peak = int(c.recompute_forward_peak(start, kept)[at - start - 1]) + k
            inner = self._value(start, at, kept, m, top=False)
            if self.slot(peak) <= m and time == forward + inner + self._value(at, stop, False, rest, top=top):
                runs = self._read(start, at, kept, m, top=False)
                return Run(kind=RunKind.RECOMPUTE, start=start, stop=at, inner=runs), False, rest
        raise AssertionError("a table's entry has no run behind it")
