r"""Schedules of few different runs for long stretches of identical layers: what compiles fast.

Equal runs in a row are one loop of a compiled step, different ones a loop each, so that the time to compile
is that of the different runs. Thinned tables of a long stretch (`mwplan.solvers.sparse`) do not know that,
and return up to hundreds of nearly equal ones. Here the top-level runs within a stretch are replaced by at
most two groups of

    c times RECOMPUTE of k layers, whose inner schedule is one group again, or none;   a tail of m layers,

the tail by one STORE option throughout, or by one MOONWALK or INVERT run with the options that the given
schedule has in the stretch; or, if that takes longer, by a schedule of recomputation and one STORE option,
which compiles to a few loops however many runs it has (`mwplan.plans.tape`). A RECOMPUTE run holds least for
each layer, so for each `c` of the last group the tail is as long as fits, and `k` follows: few shapes are to
be compared. Bytes are counted slightly too high here; what is found counts only if the ledger says that it
fits.

**Cost:** `O(log(n)^4)` shapes (half a second for 10,000 layers), and a few replays of the schedule.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from mwplan.plans.ledger import replay
from mwplan.plans.profiles import Profile
from mwplan.plans.schedule import Run, RunKind, Strategy, shifted, walk
from mwplan.plans.tape import SWEEPS, WRITTEN_OUT, loops
from mwplan.solvers.parts import Place, part, repeated, stretches
from mwplan.solvers.problem import Problem
from mwplan.solvers.sparse import SparseTables
from mwplan.solvers.tuning import TUNING, Tuning
from mwplan.solvers.uniform import UniformTables


@dataclass(frozen=True, slots=True)
class _Leaf:
    """STORE runs by one option, or one MOONWALK or INVERT run whose options are these, again and again."""

    kind: RunKind
    options: tuple[str, ...]

    def runs(self, start: int, stop: int) -> tuple[Run, ...]:
        if self.kind is RunKind.STORE:
            return tuple(
                Run(kind=self.kind, start=i, stop=i + 1, options=self.options) for i in range(start, stop)
            )
        options = tuple(itertools.islice(itertools.cycle(self.options), stop - start))
        return (Run(kind=self.kind, start=start, stop=stop, options=options),) if stop > start else ()


@dataclass(frozen=True, slots=True)
class _Shape:
    """`count` times RECOMPUTE of `length` layers by `inner`, and `after`; or `size` layers by `leaf`."""

    time_ns: int
    loops: int
    leaf: _Leaf | None = None
    size: int = 0
    count: int = 0
    length: int = 0
    inner: _Shape | None = None
    after: _Shape | None = None

    def price(self, tuning: Tuning) -> float:
        """Its time, where a loop costs something."""
        return self.time_ns * (1 + tuning.loop_price * self.loops)

    def runs(self, start: int) -> Iterator[Run]:
        if self.leaf:
            yield from self.leaf.runs(start, start + self.size)
            return
        assert self.inner is not None
        assert self.after is not None
        for _ in range(self.count):
            stop = start + self.length
            yield Run(kind=RunKind.RECOMPUTE, start=start, stop=stop, inner=tuple(self.inner.runs(start)))
            start = stop
        yield from self.after.runs(start)


class _Body:
    """Shapes for stretches of one layer, repeated; `leaves`, what tails may be of."""

    def __init__(self, problem: Problem, leaves: Sequence[_Leaf]) -> None:
        self.profile, self.max_error, self.tuning = problem.profile, problem.max_error, problem.tuning
        profile = self.profile
        self.own = profile.activation_bytes[0]
        self.forward_ns = profile.layers[0].forward_ns
        self.costs = functools.cache(self._costs)
        self.one_group = functools.cache(self._one_group)
        stores = [leaf for leaf in leaves if leaf.kind is RunKind.STORE]
        self.leaves = [leaf for leaf in leaves if leaf not in stores]
        for leaf in sorted(stores, key=lambda leaf: self.costs(leaf, 16)[::-1]):
            if not any(self.costs(one, 16) <= self.costs(leaf, 16) for one in self.leaves if one in stores):
                self.leaves.append(leaf)

    def _costs(self, leaf: _Leaf, size: int) -> tuple[int, int]:
        """Peak, its input counted, and time of a leaf of so many layers, of STORE runs from what 8 and 16 of
        them need; no peak is large enough where the error is too large."""
        if leaf.kind is RunKind.STORE and size > 16:
            (low, some), (high, more) = self.costs(leaf, 8), self.costs(leaf, 16)
            return high + -((low - high) * (size - 16) // 8), more + (more - some) * (size - 16) // 8
        found = replay(repeated(self.profile, size), leaf.runs(0, size))
        return found.peak_bytes + self.own if found.error <= self.max_error else 1 << 62, found.time_ns

    def leaf(self, leaf: _Leaf, size: int) -> _Shape:
        """That many layers by one leaf."""
        return _Shape(self.costs(leaf, size)[1], SWEEPS[leaf.kind], leaf, size)

    def longest(self, leaf: _Leaf, most: int, room: int) -> int:
        """Up to how many layers of a leaf fit."""
        return bisect.bisect_right(range(1, most + 1), room, key=lambda size: self.costs(leaf, size)[0])

    def group(self, count: int, length: int, inner: _Shape, after: _Shape) -> _Shape:
        """RECOMPUTE runs, and what follows."""
        written = count if count < WRITTEN_OUT else 1
        return _Shape(
            count * (length * self.forward_ns + inner.time_ns) + after.time_ns,
            written * (1 + inner.loops) + after.loops,
            count=count,
            length=length,
            inner=inner,
            after=after,
        )

    def _one_group(self, size: int, room: int, levels: int) -> _Shape | None:
        """The best of at most one group at each of so many levels, in about `room` bytes; None where nothing
        fits."""
        found = []
        for leaf in self.leaves:
            if self.longest(leaf, size, room) == size:
                found.append(self.leaf(leaf, size))
                continue
            for count in _counts(size // 2) if levels else ():
                rest = self.longest(leaf, size, room - count * self.own)
                length = -(-(size - rest) // count)
                rest = size - count * length
                if rest < 1 or length < 2:
                    continue
                if inner := self.one_group(length, room - (count - 1) * self.own, levels - 1):
                    found.append(self.group(count, length, inner, self.leaf(leaf, rest)))
        return min(found, key=lambda shape: shape.price(self.tuning), default=None)

    def best(self, size: int, room: int) -> _Shape | None:
        """The best of at most two groups at the top."""
        found = [self.one_group(size, room, levels) for levels in (0, 1, 2)]
        for count in _counts(size // 2):
            for length in _counts((size - 1) // count):
                inner = self.one_group(length, room - (count - 1) * self.own, 1)
                after = self.one_group(size - count * length, room - count * self.own, 1) if inner else None
                if inner and after:
                    found.append(self.group(count, length, inner, after))
        fits = [shape for shape in found if shape]
        if not fits:
            return self.one_group(size, room, self.tuning.group_levels)
        return min(fits, key=lambda shape: shape.price(self.tuning))


def _counts(most: int) -> Iterator[int]:
    """1, 2, 3, 4 and from there on four for each doubling."""
    at = step = 1
    while at <= most:
        yield at
        at += step
        if at >= 8 * step:
            step *= 2


def affordable(runs: Sequence[Run], loss: float, tuning: Tuning = TUNING) -> float:
    """The share of its time that a schedule may lose for fewer loops: `loss`, and in proportion more where it
    has more than `Tuning.many_loops`."""
    return loss * max(1.0, loops(runs) / tuning.many_loops)


def simplify(problem: Problem, runs: tuple[Run, ...], loss: float) -> tuple[Run, ...]:
    """`runs`, or a schedule of fewer different ones that fits `budget_bytes` as well and takes longer by at
    most the share `affordable` of `loss`.

    **Arguments:** `runs`, a schedule of the problem. **Cost:** as the module says.
    """
    profile, tuning = problem.profile, problem.tuning
    long = [(a, z) for a, z, uniform in stretches(profile, tuning.stretch_layers) if uniform]
    most_ns = int(replay(profile, runs).time_ns * (1 + affordable(runs, loss, tuning))) if long else 0
    for start, stop in long:
        within = [run for run in runs if start < run.stop <= stop]
        # Nothing is recomputed that was not: it may not be allowed.
        if loops(within) > tuning.few_loops and any(run.kind is RunKind.RECOMPUTE for run in within):
            runs = _replaced(problem, runs, within, start, most_ns)
    return runs


def _replaced(
    problem: Problem, runs: tuple[Run, ...], within: list[Run], start: int, most_ns: int
) -> tuple[Run, ...]:
    """`runs` with others in place of `within`, which reach into a stretch that begins at `start`, if there
    are better ones."""
    profile = problem.profile
    begin, end = max(start, within[0].start), within[-1].stop
    # A RECOMPUTE run may come from a few layers before the stretch: those are stored then.
    left = tuple(run for run in runs if run.stop <= within[0].start)
    for at in range(within[0].start, begin):
        option = min(profile.layers[at].store, key=lambda o: o.forward_ns + o.backward_ns)
        left += (Run(kind=RunKind.STORE, start=at, stop=at + 1, options=(option.name,)),)
    right = tuple(run for run in runs if run.start >= end)
    piece = part(profile, begin, end)
    taken = _taken(profile, piece, left, right, begin, end)
    here = problem.of(piece)
    body = _Body(here, _leaves(piece, within, begin))
    names = _most_stored(within, problem.tuning.tape_options)

    def shape(room: int) -> tuple[Run, ...] | None:
        found = body.best(end - begin, room)
        return tuple(found.runs(begin)) if found else None

    makers: list[Callable[[int], tuple[Run, ...] | None]] = [shape]
    makers += [functools.partial(_one_tape, here, begin, name) for name in names]
    best, least, room = runs, loops(runs), problem.budget
    lowest = math.inf
    for make in makers:
        less = 0
        for _ in range(problem.tuning.fit_attempts):
            found = make(room - taken - less)
            if found is None or loops(other := (*left, *found, *right)) >= least:
                break
            checked = replay(profile, other)
            price = checked.time_ns * (1 + problem.tuning.loop_price * loops(other))
            if checked.time_ns > most_ns or price >= lowest:
                break
            if checked.peak_bytes <= room and checked.error <= problem.max_error:
                best, lowest = other, price
                break
            less += max(1, checked.peak_bytes - room)
    return best


def _taken(
    profile: Profile, piece: Profile, left: tuple[Run, ...], right: tuple[Run, ...], begin: int, end: int
) -> int:
    """What the runs beside a piece take of the budget: what those to its left hold, and what those to its
    right need beyond the turn that a leaf's own replay ends with."""
    own, waiting = piece.activation_bytes[0], piece.cotangent_bytes[0]
    taken = 0
    if left:
        events = replay(part(profile, 0, begin), left).events
        taken += next(x.live_bytes for x in events if x.sweep == "turn") - waiting - own
    if right:
        after = replay(part(profile, end, len(profile)), [shifted(run, -end) for run in right])
        taken += max(0, after.peak_bytes - waiting)
    return taken


def _most_stored(runs: Sequence[Run], most: int) -> list[str]:
    """The options of STORE runs, at any depth, that a tape might do with alone: at most so many, the most
    frequent first."""
    stored = collections.Counter(run.options[0] for run in walk(runs) if run.kind is RunKind.STORE)
    return [name for name, _ in stored.most_common(most)]


def _one_tape(problem: Problem, begin: int, option: str, room: int) -> tuple[Run, ...] | None:
    """The fastest schedule of a piece, from layer `begin` on, by recomputation and one STORE option; None
    where nothing fits. It compiles as a tape where memory is scarce."""
    tables = _tables(problem, begin, option)
    if isinstance(tables, UniformTables):  # which knows the chain's own input only, and does not count it
        room -= problem.profile.activation_bytes[0] if begin else 0
        need = tables.points()[0]
        if not need.size or need[0] > room:
            return None
        return tuple(shifted(run, begin) for run in tables.runs(room))
    need = tables.points(begin == 0)[0]
    return tables.read(begin == 0, room)[0] if need.size and need[0] <= room else None


@functools.lru_cache(maxsize=8)
def _tables(problem: Problem, begin: int, option: str) -> SparseTables | UniformTables:
    piece, tuning = problem.profile, problem.tuning
    store = tuple(one for one in piece.layers[0].store if one.name == option)
    layer = dataclasses.replace(piece.layers[0], store=store, moonwalk=(), invert=())
    alone = dataclasses.replace(
        problem.of(dataclasses.replace(piece, layers=(layer,) * len(piece))),
        max_error=0.0,
        allowed={Strategy.STORE, Strategy.RECOMPUTE},
        thin=tuning.tape_thin,
    )
    if len(piece) <= tuning.tape_exact_layers:
        return UniformTables(alone)
    return SparseTables(alone, Place(whole=alone.profile, first=begin))


def _leaves(piece: Profile, within: Sequence[Run], begin: int) -> list[_Leaf]:
    """STORE by any option; MOONWALK and INVERT by the options that the longest such run in `within`, at any
    depth, has from `begin` on."""
    stored = any(run.kind is RunKind.STORE for run in walk(tuple(within)))
    out = [_Leaf(RunKind.STORE, (o.name,)) for o in piece.layers[0].store] if stored else []
    for kind in (RunKind.MOONWALK, RunKind.INVERT):
        some = [
            run.options[max(0, begin - run.start) :]
            for run in walk(tuple(within))
            if run.kind is kind and run.stop > begin
        ]
        if some:
            out.append(_Leaf(kind, max(some, key=len)))
    return out
