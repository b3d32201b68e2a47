r"""Chains of identical layers: a stretch is known by its length alone.

With equal layers and boundaries `T[s, r, e]` of `mwplan.solvers.frontier` depends on `n = r - s` and `e` only, so one table of L rows replaces one of
L^2. `thin = 0` tries every split and is exact. Otherwise run lengths come from a ladder (all up to 17, then steps of 1/16; every remaining length is
still reached, by several runs), stretches of more than `_NESTED` layers are not recomputed all but a few layers at a time, and staircases are thinned.
No loss is proved: `bound_ns` is then the time of every layer's fastest option, and what does not fit is UNKNOWN, not INFEASIBLE. Measured at 250 layers
with `thin = 0.01`: 1.0% at the budgets that the thinned frontier reaches; the leanest schedules, which nest nearly as deep as the chain is
long, are not among them (there the least need found is a third above the least).
Moonwalk and invert runs are at most `_LONGEST` layers long if thinned.

**Cost:** O(L * ladder * points), 120 rungs at 10,000 layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from mwplan.profiles import Profile
from mwplan.schedule import Run, RunKind, Strategy
from mwplan.solvers.pareto import Ints, staircase, thinned, value_at
from mwplan.solvers.runs import Candidates
from mwplan.solvers.splits import Buffer, Side, envelope, grid, grouped

Stairs = tuple[Ints, Ints]
#: runs of one length, `e'`, `F` and `H`
Group = tuple[int, bool, int, int, Stairs]
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
        self.candidates = Candidates(
            self.short, max_error=max_error, allowed=allowed, loss=thin / 6, of=self.size
        )
        self.ladder = self._rungs()
        self.own = int(profile.activation_bytes[0])
        self.k = int(profile.cotangent_bytes[0])
        self.forward = profile.layers[0].forward_ns
        self.cap = self.candidates.fastest_need() if longest == self.size else None
        self._rung_set = set(self.ladder)
        self._survivors: dict[bool, list[Group]] = {False: [], True: []}
        self._read_groups = {False: 0, True: 0}
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
        self._sides: dict[bool, Side] = {}
        self._rights: dict[bool, Buffer] = {}
        self._make_buffers()
        for n in range(1, self.size + 1):
            # A chain starts at a kept boundary, so e = True is always needed there.
            for e in (False, True):
                # Without other kept boundaries only RECOMPUTE runs from the chain's start need these, which are rungs if long.
                asked = not e or len(self.states) == 2 or n <= _NESTED or n in self._rung_set
                inner = self._merge(n, e, self.k, self.inner) if self.nested and asked else _NONE
                self.inner[e].append(inner)
            if self._rights:
                self._rights[False].append(n, n, self.inner[False][n])
        for n in range(1, self.size + 1):
            for e in self.states if n < self.size else (True,):
                self.top[e].append(self._merge(n, e, 0, self.top))
            for e in (False, True):
                if len(self.top[e]) == n:
                    self.top[e].append(_NONE)
            if self._rights:
                self._rights[True].append(n, n, self.top[False][n])

    def _make_buffers(self) -> None:
        """For thinned chains: the staircases of RECOMPUTE runs by rung, and of the rest by length, as `mwplan.solvers.splits` wants them."""
        p = self.profile
        high = p.bytes_bound() - p.fixed_bytes
        span = 1 << (high + 1).bit_length()
        if self.thin == 0 or not self.nested or span * (self.size + 2) >= 2**63:
            return
        least = 2 * (self.own + self.k) + p.layers[0].forward_workspace_bytes
        budgets = grid(least // 2, least, high, 512 if self.size <= 2000 else 256)
        for e in (False, True):
            own = 0 if e else self.own
            self._sides[e] = Side(budgets, span, self.k, own, -1, rows=len(self.ladder))
            self._rights[e] = Buffer(budgets, span, self.size + 1)

    def _rungs(self) -> list[int]:
        if self.thin == 0:
            return list(range(1, self.size + 1))
        out = list(range(1, min(_DENSE, self.size) + 1))
        while out[-1] * 17 // 16 + 1 <= self.size:
            out.append(out[-1] * 17 // 16 + 1)
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
        if self.nested and self._sides and n > _NESTED:
            self._merge_rungs(n, e, k, self._rights[family is self.top], needs, times)
        elif self.nested and n > 1:
            self._merge_recompute(n, e, k, family[False], needs, times)
        if not needs:
            return _NONE
        need, time = staircase(np.concatenate(needs), np.concatenate(times))
        if self.cap is not None:
            need, time = need[need <= self.cap], time[need <= self.cap]
        return thinned(need, time, self.thin / 3, optimistic=False) if self.thin and n >= 4 else (need, time)

    def _atoms(self, e: bool, n: int) -> Iterator[Group]:
        """STORE, MOONWALK and INVERT runs of at most `n` layers, `(length, e', F, H, staircase of (B, t))`; those shorter than `n` without
        the runs that a RECOMPUTE run in their place beats (see `mwplan.solvers.frontier.Tables`)."""
        start = self._start(e)
        if start >= len(self.short):
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
            columns = [x[low:high] for x in (atoms.forward_peak, atoms.backward_peak, atoms.held, atoms.time)]
            low = high
            if length not in self._rung_set:
                columns = [x[:0] for x in columns]
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

    def _merge_rungs(
        self, n: int, e: bool, k: int, right: Buffer, needs: list[Ints], times: list[Ints]
    ) -> None:
        """As `_merge_recompute`, for a long stretch of a thinned chain: rungs only, and only where they may matter."""
        side = self._sides[e]
        while side.count < len(self.ladder) and self.ladder[side.count] < n:
            length = self.ladder[side.count]
            need, time = self.inner[e][length]
            spent = time + length * self.forward
            side.append(0, self._recompute_peak(length, e), 0 if e else self.own, (need, spent))
        groups = side.count
        while groups and self.ladder[groups - 1] >= n:
            groups -= 1
        side.children[:groups] = n - np.array(self.ladder[:groups])
        known = staircase(np.concatenate(needs), np.concatenate(times)) if needs else _NONE
        for need, time in envelope([(side, groups)], right, k, known, slack=self.thin):
            needs.append(need)
            times.append(time)

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
        # A stack of stretches instead of calls, as in `mwplan.solvers.frontier`: start, position, stop, e, budget, runs.
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
        """The run that comes first (None for RECOMPUTE), where it ends, the next `e`, and the budget left there."""
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
                    stop = start + length
                    return dataclasses.replace(run, start=start, stop=stop), stop, keeps, rest
        rest = budget - (0 if e else self.own)
        for length in self._lengths(n):
            if self._recompute_peak(length, e) + k > budget:
                continue
            inner = value_at(*self.inner[e][length], budget)
            if inner + value_at(*family[False][n - length], rest) + length * self.forward == time:
                return None, start + length, False, rest
        raise AssertionError("a staircase's point has no run behind it")
