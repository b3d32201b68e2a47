r"""Chains of identical layers: a stretch is known by its length alone.

With equal layers and boundaries `T[s, r, e]` of `mwplan.solvers.frontier` depends on `n = r - s` and `e` only, so one table of L rows replaces one of
L^2. `thin = 0` tries every split and is exact. Otherwise run lengths come from a ladder (all up to 24, then steps of about 1/8, which
is where the loss comes from; every remaining length is still reached, by several runs) and staircases are thinned; measured losses are below `thin`, none
is proved: `bound_ns` is then the time of every layer's fastest option, and what does not fit is UNKNOWN, not INFEASIBLE.
Moonwalk and invert runs are at most `_LONGEST` layers long if thinned.

**Cost:** O(L * ladder * points), 100 rungs at 10,000 layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from mwplan.profiles import Profile
from mwplan.schedule import Run, RunKind, Strategy
from mwplan.solvers.pareto import Ints, staircase, thinned, value_at
from mwplan.solvers.runs import Candidates

Stairs = tuple[Ints, Ints]
_NONE: Stairs = (np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))
_LONGEST = 256
_DENSE = 12
#: longer stretches are not recomputed all but a few layers at a time: that would nest as deep as they are long
_NESTED = 96


def is_uniform(profile: Profile) -> bool:
    """Whether all layers are equal (names apart) and all boundaries alike."""
    first = dataclasses.replace(profile.layers[0], name="")
    boundaries = (profile.activation_bytes, profile.cotangent_bytes, profile.sweep_cotangent_bytes)
    return all(len(set(x)) == 1 for x in boundaries) and all(
        x == profile.layers[0] or dataclasses.replace(x, name="") == first for x in profile.layers
    )


def shortened(profile: Profile, size: int) -> Profile:
    """The first `size` layers."""
    return dataclasses.replace(
        profile,
        layers=profile.layers[:size],
        activation_bytes=profile.activation_bytes[: size + 1],
        cotangent_bytes=profile.cotangent_bytes[: size + 1],
        sweep_cotangent_bytes=profile.sweep_cotangent_bytes[: size + 1],
    )


class UniformTables:
    """The tables of a uniform chain. `candidates` are those of a chain of at most `_LONGEST + 1` layers, if `thin`.

    **Arguments:** as of `mwplan.solvers.frontier.solve_frontier`.
    """

    def __init__(
        self, profile: Profile, *, max_error: float, allowed: frozenset[Strategy], thin: float
    ) -> None:
        self.profile, self.size, self.thin = profile, len(profile), thin
        self.nested = Strategy.RECOMPUTE in allowed
        longest = self.size if thin == 0 else min(self.size, _LONGEST + 1)
        self.short = shortened(profile, longest)
        self.candidates = Candidates(self.short, max_error=max_error, allowed=allowed, loss=thin / 6)
        self.ladder = self._rungs()
        self.own = int(profile.activation_bytes[0])
        self.k = int(profile.cotangent_bytes[0])
        self.forward = profile.layers[0].forward_ns
        self.cap = self.candidates.fastest_need() if longest == self.size else None
        self._rung_set = set(self.ladder)
        self._survivors: dict[bool, list[tuple[int, bool, Ints, Ints, Ints, Ints, int]]] = {
            False: [],
            True: [],
        }
        both = bool(self.candidates.kept_nodes[1:].any())
        self.states = (False, True) if both else (False,)
        peaks = profile.layers[0].forward_workspace_bytes + self.own
        # Forward peak of RECOMPUTE runs without x_s: of one layer, and of more.
        self.peaks = (peaks, peaks + (self.own if self.size > 1 else 0))
        none = (np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64))
        #: inner[e][n]: the staircase of n layers inside a RECOMPUTE run; e is True for its start as the chain's too
        self.inner: dict[bool, list[Stairs]] = {False: [none], True: [none]}
        self.top: dict[bool, list[Stairs]] = {
            e: [(np.array([self.candidates.turn_bytes(e)]), np.zeros(1, dtype=np.int64))]
            for e in (False, True)
        }
        for n in range(1, self.size + 1):
            # A chain starts at a kept boundary, so e = True is always needed there.
            for e in (False, True):
                self.inner[e].append(self._merge(n, e, self.k, self.inner) if self.nested else _NONE)
        for n in range(1, self.size + 1):
            for e in self.states if n < self.size else (True,):
                self.top[e].append(self._merge(n, e, 0, self.top))
            for e in (False, True):
                if len(self.top[e]) == n:
                    self.top[e].append(_NONE)

    def _rungs(self) -> list[int]:
        if self.thin == 0:
            return list(range(1, self.size + 1))
        out = list(range(1, min(_DENSE, self.size) + 1))
        while out[-1] * 5 // 4 + 1 <= self.size:
            out.append(out[-1] * 5 // 4 + 1)
        return out

    def _lengths(self, n: int) -> list[int]:
        """Lengths of RECOMPUTE runs tried first in a stretch of `n` layers: rungs, and, if `n` is small, what leaves a power of two."""
        if self.thin == 0:
            return self.ladder[: n - 1]
        found = {j for j in self.ladder if j < n}
        if n <= _NESTED:
            found.update(n - (1 << i) for i in range((n - 1).bit_length()) if n > 1 << i)
        return sorted(found)

    def _recompute_peak(self, n: int, e: bool) -> int:
        return (0 if e else self.own) + self.peaks[n > 1]

    def _start(self, e: bool) -> int:
        """Where the short chain has a node like this one with all lengths after it."""
        return 0 if e else 1

    def _merge(self, n: int, e: bool, k: int, family: dict[bool, list[Stairs]]) -> Stairs:
        needs: list[Ints] = []
        times: list[Ints] = []
        for length, keeps, f, b, held, spent in self._atoms(e, n):
            need, time = family[keeps][n - length]
            if need.size and spent.size:
                peak = np.maximum(f + k, b)
                needs.append(np.maximum(peak[:, None], held[:, None] + need[None, :]).ravel())
                times.append((spent[:, None] + time[None, :]).ravel())
        if self.nested and n > 1:
            self._merge_recompute(n, e, k, family[False], needs, times)
        if not needs:
            return _NONE
        need, time = staircase(np.concatenate(needs), np.concatenate(times))
        if self.cap is not None:
            need, time = need[need <= self.cap], time[need <= self.cap]
        return thinned(need, time, self.thin / 3, optimistic=False) if self.thin and n >= 4 else (need, time)

    def _atoms(self, e: bool, n: int) -> Iterator[tuple[int, bool, Ints, Ints, Ints, Ints]]:
        """STORE, MOONWALK and INVERT runs of at most `n` layers, `(length, e', F, B, H, t)`; those shorter than `n` without the runs that
        a RECOMPUTE run in their place beats (see `mwplan.solvers.frontier.Tables`)."""
        start = self._start(e)
        if start >= len(self.short):
            return
        atoms = self.candidates.atoms(start, e)
        known = self._survivors[e]
        low = known[-1][6] if known else 0
        ended = False
        for stop, keeps, high in atoms.groups[len(known) :]:
            length = stop - start
            if length > n:
                break
            columns = [x[low:high] for x in (atoms.forward_peak, atoms.backward_peak, atoms.held, atoms.time)]
            low = high
            if length not in self._rung_set:
                columns = [x[:0] for x in columns]
            ended = ended or length == n
            if ended:
                yield length, keeps, columns[0], columns[1], columns[2], columns[3]
                continue
            if self.nested and not keeps:
                f, b, held, time = columns
                need, best = self.inner[e][length]
                at = np.searchsorted(need, b, side="right") - 1
                if need.size:
                    beaten = (at >= 0) & (best[at] + length * self.forward <= time)
                    beaten &= (held >= (0 if e else self.own)) & (f >= self._recompute_peak(length, e))
                    columns = [x[~beaten] for x in columns]
            known.append((length, keeps, columns[0], columns[1], columns[2], columns[3], high))
        for x in known:
            if x[3].size and x[0] <= n:
                yield x[:6]

    def _merge_recompute(
        self, n: int, e: bool, k: int, rest: list[Stairs], needs: list[Ints], times: list[Ints]
    ) -> None:
        own = 0 if e else self.own
        lengths = self._lengths(n)
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

    # -- reading -------------------------------------------------------------------------------------------------

    def points(self) -> Stairs:
        """The chain's staircase."""
        return self.top[True][self.size]

    def runs(self, budget: int) -> tuple[Run, ...]:
        """The runs of the fastest schedule of the chain within `budget`, which must hold at least one."""
        return self._read(0, self.size, True, budget, 0, self.top)

    def _read(
        self, start: int, stop: int, e: bool, budget: int, k: int, family: dict[bool, list[Stairs]]
    ) -> tuple[Run, ...]:
        out = []
        while start < stop:
            need, times = family[e][stop - start]
            step = int(np.searchsorted(need, budget, side="right")) - 1
            run, e, budget = self._first(start, stop, e, int(need[step]), int(times[step]), k, family)
            out.append(run)
            start = run.stop
        return tuple(out)

    def _first(
        self, start: int, stop: int, e: bool, budget: int, time: int, k: int, family: dict[bool, list[Stairs]]
    ) -> tuple[Run, bool, int]:
        n = stop - start
        base = self._start(e)
        if base < len(self.short):
            atoms = self.candidates.atoms(base, e)
            peak = np.maximum(atoms.forward_peak + k, atoms.backward_peak)
            for row in np.flatnonzero((peak <= budget) & (atoms.stop - base <= n)):
                length, keeps = int(atoms.stop[row]) - base, bool(atoms.keeps_end[row])
                rest = budget - int(atoms.held[row])
                if (
                    length in self._rung_set
                    and int(atoms.time[row]) + value_at(*family[keeps][n - length], rest) == time
                ):
                    run = self.candidates.run(base, e, int(row))
                    return dataclasses.replace(run, start=start, stop=start + length), keeps, rest
        rest = budget - (0 if e else self.own)
        for length in self._lengths(n):
            if self._recompute_peak(length, e) + k > budget:
                continue
            inner = value_at(*self.inner[e][length], budget)
            if inner + value_at(*family[False][n - length], rest) + length * self.forward == time:
                runs = self._read(start, start + length, e, budget, self.k, self.inner)
                return Run(kind=RunKind.RECOMPUTE, start=start, stop=start + length, inner=runs), False, rest
        raise AssertionError("a staircase's point has no run behind it")
