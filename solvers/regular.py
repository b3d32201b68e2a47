r"""Schedules of few different runs for long stretches of identical layers: what compiles fast.

Equal runs in a row are one loop of a compiled step, different ones a loop each, so that the time to compile is that of the different runs. Thinned tables of a long
stretch (`mwplan.solvers.sparse`) do not know that, and return up to hundreds of nearly equal ones. Here the top-level runs within a stretch are replaced by at most two groups of

    c times RECOMPUTE of k layers, whose inner schedule is one group again, or none;   a tail of m layers,

the tail by one STORE option throughout, or by one MOONWALK or INVERT run with the options that the given schedule has in the stretch. A RECOMPUTE run holds least
for each layer, so for each `c` of the last group the tail is as long as fits, and `k` follows: few shapes are to be compared. Bytes are counted slightly too
high here; what is found counts only if the ledger says that it fits.

**Cost:** `O(log(n)^4)` shapes (half a second for 10,000 layers), and a few replays of the schedule.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mwplan.ledger import replay
from mwplan.profiles import Profile
from mwplan.schedule import Run, RunKind, shifted, walk
from mwplan.solvers.uniform import part, repeated, stretches
from mwplan.tape import LOOPS, SWEEPS, WRITTEN_OUT, loops

#: shorter stretches of identical layers are left as they are
LEAST_STRETCH = 96
#: levels of RECOMPUTE, of one group each, where two levels do not fit
_DEEPEST = 4
#: schedules of no more loops stay as they are
_FEW = 8
#: what one more loop may cost of the time, between schedules of few runs
_PRICE = 1e-3
_TRIES = 4


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

    @property
    def price(self) -> float:
        """Its time, where a loop costs something."""
        return self.time_ns * (1 + _PRICE * self.loops)

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


@dataclass(frozen=True, slots=True)
class _Binomial:
    """`size` layers in stored pieces of `length`, the first maybe shorter, recomputed in the binomial manner with `slots` RECOMPUTE runs at once; `after`.

    The schedule of fewest forward steps for that many (Griewank and Walther, ACM TOMS 2000). It compiles as a tape (`mwplan.tape`).
    """

    time_ns: int
    leaf: _Leaf
    size: int
    length: int
    slots: int
    after: _Shape | None = None

    @property
    def loops(self) -> int:
        """As of a tape."""
        return LOOPS + (self.after.loops if self.after else 0)

    @property
    def price(self) -> float:
        """Its time, where a loop costs something."""
        return self.time_ns * (1 + _PRICE * self.loops)

    def runs(self, start: int) -> Iterator[Run]:
        """The schedule, from a layer on."""
        pieces = -(-self.size // self.length)
        short = start - (
            pieces * self.length - self.size
        )  # where the first piece would begin if it were whole

        def made(first: int, stop: int, slots: int) -> Iterator[Run]:
            while stop - first > 1:
                middle = first + binomial_split(stop - first, slots)
                begin, end = max(start, short + first * self.length), short + middle * self.length
                inner = tuple(made(first, middle, slots))
                yield Run(kind=RunKind.RECOMPUTE, start=begin, stop=end, inner=inner)
                first, slots = middle, slots - 1
            begin = max(start, short + first * self.length)
            yield from self.leaf.runs(begin, short + stop * self.length)

        yield from made(0, pieces, self.slots)
        if self.after:
            yield from self.after.runs(start + self.size)


def _repetitions(pieces: int, slots: int) -> int:
    """How often a piece is recomputed at most."""
    times = 0
    while math.comb(slots + times, slots) < pieces:
        times += 1
    return times


def binomial_split(pieces: int, slots: int) -> int:
    """How many of the pieces the first RECOMPUTE run covers, with room for `slots` such runs at once: as many as may be."""
    times = _repetitions(pieces, slots)
    return min(math.comb(slots + times - 1, slots), pieces - math.comb(slots + times - 2, slots - 1))


def binomial_steps(pieces: int, slots: int) -> int:
    """The fewest pieces recomputed, over all, with room for `slots` RECOMPUTE runs at once."""
    if pieces == 1:
        return 0
    times = _repetitions(pieces, slots)
    return times * pieces - math.comb(slots + times, slots + 1)


class _Body:
    """Shapes for stretches of one layer, repeated; `leaves`, what tails may be of."""

    def __init__(self, profile: Profile, leaves: Sequence[_Leaf], max_error: float) -> None:
        self.profile, self.max_error = profile, max_error
        self.own = profile.activation_bytes[0]
        self.forward_ns = profile.layers[0].forward_ns
        self.costs = functools.cache(self._costs)
        self.one_group = functools.cache(self._one_group)
        stores = [leaf for leaf in leaves if leaf.kind is RunKind.STORE]
        self.stores = stores
        self.leaves = [leaf for leaf in leaves if leaf not in stores]
        for leaf in sorted(stores, key=lambda leaf: self.costs(leaf, 16)[::-1]):
            if not any(self.costs(one, 16) <= self.costs(leaf, 16) for one in self.leaves if one in stores):
                self.leaves.append(leaf)

    def _costs(self, leaf: _Leaf, size: int) -> tuple[int, int]:
        """Peak, its input counted, and time of a leaf of so many layers, of STORE runs from what 8 and 16 of them need; no peak is large enough where the error is too large."""
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
        """The best of at most one group at each of so many levels, in about `room` bytes; None where nothing fits."""
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
        return min(found, key=lambda shape: shape.price, default=None)

    def binomial(self, size: int, room: int) -> Iterator[_Binomial]:
        """Binomial recomputation in pieces of several lengths, of all layers or before a tail."""
        tails = [(None, 0)] + [
            (leaf, length)
            for leaf in self.leaves
            for length in _counts(min(size - 2, self.longest(leaf, size, room)))
        ]
        for leaf, length in itertools.product(self.stores, _counts(size // 2)):
            need, time = self.costs(leaf, length)
            if need > room:
                break
            for tail, rest in tails:
                left = size - rest
                slots = (room - max(need, self.costs(tail, rest)[0] if tail else 0)) // self.own
                pieces = -(-left // length)
                if slots < 1 or pieces < 2:
                    continue
                again = binomial_steps(pieces, slots) * length * self.forward_ns
                after = self.leaf(tail, rest) if tail else None
                total = time * left // length + again + (after.time_ns if after else 0)
                yield _Binomial(total, leaf, left, length, slots, after)

    def best(self, size: int, room: int) -> _Shape | _Binomial | None:
        """The best of at most two groups at the top, or of binomial recomputation."""
        found: list[_Shape | _Binomial | None] = [*self.binomial(size, room)]
        found += [self.one_group(size, room, levels) for levels in (0, 1, 2)]
        for count in _counts(size // 2):
            for length in _counts((size - 1) // count):
                inner = self.one_group(length, room - (count - 1) * self.own, 1)
                after = self.one_group(size - count * length, room - count * self.own, 1) if inner else None
                if inner and after:
                    found.append(self.group(count, length, inner, after))
        fits = [shape for shape in found if shape]
        if not fits:
            return self.one_group(size, room, _DEEPEST)
        return min(fits, key=lambda shape: shape.price)


def _counts(most: int) -> Iterator[int]:
    """1, 2, 3, 4 and from there on four for each doubling."""
    at = step = 1
    while at <= most:
        yield at
        at += step
        if at >= 8 * step:
            step *= 2


def simplify(
    profile: Profile, runs: tuple[Run, ...], room: int, *, max_error: float, loss: float
) -> tuple[Run, ...]:
    """`runs`, or a schedule of fewer different ones that fits `room` bytes as well and takes at most a factor `1 + loss` longer.

    **Arguments:** `runs`, a schedule of `profile` that keeps `max_error`. **Cost:** as the module says.
    """
    long = [(a, z) for a, z, uniform in stretches(profile, LEAST_STRETCH) if uniform]
    most_ns = int(replay(profile, runs).time_ns * (1 + loss)) if long else 0
    for start, stop in long:
        within = [run for run in runs if start < run.stop <= stop]
        # Nothing is recomputed that was not: it may not be allowed.
        if loops(within) > _FEW and any(run.kind is RunKind.RECOMPUTE for run in within):
            runs = _replaced(profile, runs, within, start, room, max_error, most_ns)
    return runs


def _replaced(
    profile: Profile,
    runs: tuple[Run, ...],
    within: list[Run],
    start: int,
    room: int,
    max_error: float,
    most_ns: int,
) -> tuple[Run, ...]:
    """`runs` with others in place of `within`, which reach into a stretch that begins at `start`, if there are better ones."""
    begin, end = max(start, within[0].start), within[-1].stop
    # A RECOMPUTE run may come from a few layers before the stretch: those are stored then.
    left = tuple(run for run in runs if run.stop <= within[0].start)
    for at in range(within[0].start, begin):
        option = min(profile.layers[at].store, key=lambda o: o.forward_ns + o.backward_ns)
        left += (Run(kind=RunKind.STORE, start=at, stop=at + 1, options=(option.name,)),)
    right = tuple(run for run in runs if run.start >= end)
    piece = part(profile, begin, end)
    own, waiting = piece.activation_bytes[0], piece.cotangent_bytes[0]
    # What others hold, and what those to the right need beyond the turn that a leaf's own replay ends with.
    taken = 0
    if left:
        events = replay(part(profile, 0, begin), left).events
        taken += next(x.live_bytes for x in events if x.sweep == "turn") - waiting - own
    if right:
        after = replay(part(profile, end, len(profile)), [shifted(run, -end) for run in right])
        taken += max(0, after.peak_bytes - waiting)
    body = _Body(piece, _leaves(piece, within, begin), max_error)
    less = 0
    for _ in range(_TRIES):
        found = body.best(end - begin, room - taken - less)
        other = (*left, *found.runs(begin), *right) if found else runs
        if loops(other) >= loops(runs):
            break
        checked = replay(profile, other)
        if checked.time_ns > most_ns:
            break
        if checked.peak_bytes <= room and checked.error <= max_error:
            return other
        less += max(1, checked.peak_bytes - room)
    return runs


def _leaves(piece: Profile, within: Sequence[Run], begin: int) -> list[_Leaf]:
    """STORE by any option; MOONWALK and INVERT by the options that the longest such run in `within`, at any depth, has from `begin` on."""
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
