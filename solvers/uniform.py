r"""Chains of identical layers: a stretch is known by its length alone.

With equal layers and boundaries `T[s, r, e]` of `mwplan.solvers.tables` depends on `n = r - s` and `e`
only, so one table of L rows replaces one of L^2. Every split is tried: exact. Long chains that need not be
exact have `mwplan.solvers.sparse`.

**Cost:** O(L^2) combinations of staircases.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from mwplan.plans.schedule import Run, RunKind, Strategy
from mwplan.solvers.candidates import Candidates
from mwplan.solvers.pareto import DONE, NO_STAIRS, Ints, Stairs, staircase, value_at
from mwplan.solvers.problem import Problem
from mwplan.solvers.splits import grouped

#: runs of one length, `e'`, `F` and `H`
Group = tuple[int, bool, int, int, Stairs]


class UniformTables:
    """The tables of a uniform chain.

    **Arguments:** `problem`, of such a chain.
    """

    def __init__(self, problem: Problem) -> None:
        profile = problem.profile
        self.size, self.nested = len(profile), Strategy.RECOMPUTE in problem.strategies
        self.candidates = Candidates(problem)
        self.own = int(profile.activation_bytes[0])
        self.k = int(profile.cotangent_bytes[0])
        self.forward = profile.layers[0].forward_ns
        self.cap = self.candidates.fastest_need()
        self._survivors: dict[bool, list[Group]] = {False: [], True: []}
        self._read_groups = {False: 0, True: 0}
        both = bool(self.candidates.kept_nodes[1:].any())
        self.states = (False, True) if both else (False,)
        peaks = profile.layers[0].forward_workspace_bytes + self.own
        # Forward peak of RECOMPUTE runs without x_s: of one layer, and of more.
        self.peaks = (peaks, peaks + (self.own if self.size > 1 else 0))
        #: inner[e][n]: the staircase of n layers inside a RECOMPUTE run; e is True for its start as the
        #: chain's too
        self.inner: dict[bool, list[Stairs]] = {False: [DONE], True: [DONE]}
        self.top: dict[bool, list[Stairs]] = {
            e: [(np.array([self.candidates.turn_bytes(e)]), np.zeros(1, dtype=np.int64))]
            for e in (False, True)
        }
        for n in range(1, self.size + 1):
            # A chain starts at a kept boundary, so e = True is always needed there.
            for e in (False, True):
                self.inner[e].append(self._merge(n, e, self.k, self.inner) if self.nested else NO_STAIRS)
        for n in range(1, self.size + 1):
            for e in (False, True):
                asked = e in self.states if n < self.size else e
                self.top[e].append(self._merge(n, e, 0, self.top) if asked else NO_STAIRS)

    def _recompute_peak(self, n: int, e: bool) -> int:
        return (0 if e else self.own) + self.peaks[n > 1]

    def _start(self, e: bool) -> int:
        """Where the short chain has a node like this one with all lengths after it."""
        return 0 if e else 1

    def _merge(self, n: int, e: bool, k: int, family: dict[bool, list[Stairs]]) -> Stairs:
        needs: list[Ints] = []
        times: list[Ints] = []
        for length, keeps, floor, held, (back, spent) in self._atoms(e, n):
            need, time = family[keeps][n - length]
            if not need.size:
                continue
            budget = np.concatenate([back, need + held])
            own = back.searchsorted(budget, side="right") - 1
            rest = need.searchsorted(budget - held, side="right") - 1
            ok = (own >= 0) & (rest >= 0)
            needs.append(np.maximum(budget[ok], floor + k))
            times.append(spent[own[ok]] + time[rest[ok]])
        if self.nested and n > 1:
            self._merge_recompute(n, e, k, family[False], needs, times)
        if not needs:
            return NO_STAIRS
        need, time = staircase(np.concatenate(needs), np.concatenate(times))
        if self.cap is not None:
            need, time = need[need <= self.cap], time[need <= self.cap]
        return need, time

    def _atoms(self, e: bool, n: int) -> Iterator[Group]:
        """STORE, MOONWALK and INVERT runs of at most `n` layers, `(length, e', F, H, staircase of (B, t))`;
        those shorter than `n` without the runs that a RECOMPUTE run in their place beats (see
        `mwplan.solvers.tables.Tables`)."""
        start = self._start(e)
        if start >= self.size:
            return
        atoms = self.candidates.atoms(start, e)
        known = self._survivors[e]
        waiting = self.k
        low = atoms.groups[self._read_groups[e] - 1][2] if self._read_groups[e] else 0
        ending: list[Group] = []
        for stop, keeps, high in atoms.groups[self._read_groups[e] :]:
            length = stop - start
            if length > n:
                break
            columns = [x[low:high] for x in atoms.costs]
            low = high
            if length == n:
                ending += [(length, keeps, *x) for x in grouped(columns, waiting)]
                continue
            if self.nested and not keeps:
                f, b, held, time = columns
                need, best = self.inner[e][length]
                at = np.searchsorted(need, b, side="right") - 1
                if need.size:
                    beaten = (at >= 0) & (best[at] + length * self.forward <= time)
                    beaten &= (held >= (0 if e else self.own)) & (f >= self._recompute_peak(length, e))
                    columns = [x[~beaten] for x in columns]
            known += [(length, keeps, *x) for x in grouped(columns, waiting)]
            self._read_groups[e] += 1
        yield from (x for x in known if x[0] <= n)
        yield from ending

    def _merge_recompute(
        self, n: int, e: bool, k: int, rest: list[Stairs], needs: list[Ints], times: list[Ints]
    ) -> None:
        own = 0 if e else self.own
        lengths = range(1, n)
        left = [self.inner[e][j] for j in lengths]
        right = [rest[n - j] for j in lengths]
        ln, lt = (np.concatenate([x[i] for x in left]) for i in (0, 1))
        rn, rt = (np.concatenate([x[i] for x in right]) for i in (0, 1))
        index = np.arange(len(lengths))
        lg, rg = np.repeat(index, [len(x[0]) for x in left]), np.repeat(index, [len(x[0]) for x in right])
        rn = rn + own
        span = 1 + max(int(ln.max(initial=0)), int(rn.max(initial=0)))
        peak = np.array([self._recompute_peak(j, e) + k for j in lengths])
        forward = np.array(lengths) * self.forward
        lk, rk = ln + lg * span, rn + rg * span
        for need, time, group, key, other, other_time, other_group in (
            (ln, lt, lg, lk, rk, rt, rg),
            (rn, rt, rg, rk, lk, lt, lg),
        ):
            if not other.size:
                continue
            at = np.searchsorted(other, key, side="right") - 1
            ok = (at >= 0) & (other_group[at] == group)
            g = group[ok]
            needs.append(np.maximum(need[ok], peak[g]))
            times.append(time[ok] + other_time[at[ok]] + forward[g])

    # -- reading
    # -------------------------------------------------------------------------------------------------

    def points(self) -> Stairs:
        """The chain's staircase."""
        return self.top[True][self.size]

    def runs(self, budget: int) -> tuple[Run, ...]:
        """The runs of the fastest schedule of the chain within `budget`, which must hold at least one."""
        return self._read(0, self.size, True, budget, 0, self.top)

    def _read(
        self, start: int, stop: int, e: bool, budget: int, k: int, family: dict[bool, list[Stairs]]
    ) -> tuple[Run, ...]:
        # A stack of stretches instead of calls, as in `mwplan.solvers.reading`: start, position, stop, e,
        # budget, runs.
        stack: list[tuple[int, int, int, bool, int, list[Run]]] = [(start, start, stop, e, budget, [])]
        while True:
            begin, at, end, e, budget, runs = stack.pop()
            if at == end:
                if not stack:
                    return tuple(runs)
                stack[-1][-1].append(Run(kind=RunKind.RECOMPUTE, start=begin, stop=end, inner=tuple(runs)))
                continue
            outer = not stack
            table, waiting = (family, k) if outer else (self.inner, self.k)
            need, times = table[e][end - at]
            step = int(np.searchsorted(need, budget, side="right")) - 1
            need_, time = int(need[step]), int(times[step])
            run, to, keeps, rest = self._first(at, end, e, need_, time, waiting, table)
            stack.append((begin, to, end, keeps, rest, runs))
            if run is None:
                stack.append((at, at, to, e, need_, []))
            else:
                runs.append(run)

    def _first(
        self, start: int, stop: int, e: bool, budget: int, time: int, k: int, family: dict[bool, list[Stairs]]
    ) -> tuple[Run | None, int, bool, int]:
        """The run that comes first (None for RECOMPUTE), where it ends, the next `e`, and the budget left
        there."""
        n = stop - start
        base = self._start(e)
        if base < self.size:
            atoms = self.candidates.atoms(base, e)
            peak = np.maximum(atoms.forward_peak + k, atoms.backward_peak)
            for row in np.flatnonzero((peak <= budget) & (atoms.stop - base <= n)):
                length, keeps = int(atoms.stop[row]) - base, bool(atoms.keeps_end[row])
                rest = budget - int(atoms.held[row])
                if int(atoms.time[row]) + value_at(*family[keeps][n - length], rest) == time:
                    run = self.candidates.run(base, e, int(row))
                    stop = start + length
                    return dataclasses.replace(run, start=start, stop=stop), stop, keeps, rest
        rest = budget - (0 if e else self.own)
        for length in range(1, n):
            if self._recompute_peak(length, e) + k > budget:
                continue
            inner = value_at(*self.inner[e][length], budget)
            if inner + value_at(*family[False][n - length], rest) + length * self.forward == time:
                return None, start + length, False, rest
        raise AssertionError("a staircase's point has no run behind it")
