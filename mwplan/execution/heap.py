"""What XLA's allocator does with a compiled program, and what it would do with others that differ in their
detours (`mwplan.execution.interpret.Detours`).

The compiler's own reports say when each buffer comes and goes. Of equally large ones the allocator places the
longest-lived first, where life is counted in allocations and releases: longer and shorter detours make other
lives of the same buffers, and with some of them there are fewer holes. With which, is found by packing the
buffers anew (`mwplan.plans.packing`): milliseconds each, where a compilation takes seconds.
"""

from __future__ import annotations

import collections
import random
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mwplan.compilers.compiling import temporaries
from mwplan.execution.interpret import EVEN, Detours
from mwplan.plans.packing import Buffer, pack

#: Buffers of a smaller share of the largest are left out: they find a place between the others.
_SMALL = 1 / 500
_ONE = 4  # bytes of what a detour ends with, however long it is
_LENGTHS = (0, 2, 4, 8, 16, 32)
_TRIES, _FEW = 400, 4  # and how many lengths are changed in each


@dataclass(frozen=True)
class Heap:
    """The large temporary buffers of a compiled program with the detours `EVEN`.

    `buffers`, and when the first array in each ends (`packing.pack`); their moments count `events`,
    allocations and releases. `owners`, of buffers and of events: of each the operation whose detour it
    belongs to, None for most.
    """

    buffers: tuple[Buffer, ...]
    firsts: tuple[int, ...]
    owners: tuple[str | None, ...]
    events: tuple[str | None, ...]

    def needs(self, detours: Detours) -> int:
        """Bytes of the program with these detours instead, holes included. Cost: that of `packing.pack`."""
        weights = [EVEN.others if owner is None else detours.length(owner) for owner in self.events]
        clock = np.cumsum(weights).tolist()
        there = [
            (Buffer(one.size_bytes, clock[one.start], clock[one.stop]), clock[first])
            for one, first, owner in zip(self.buffers, self.firsts, self.owners)
            if owner is None or detours.length(owner)
        ]
        return pack([one for one, _ in there], [first for _, first in there]).total_bytes

    @property
    def alive(self) -> int:
        """Bytes alive at once: the program needs no less with any detours."""
        change = np.zeros(len(self.events) + 1, np.int64)
        for one, owner in zip(self.buffers, self.owners):
            if owner is None:
                change[one.start] += one.size_bytes
                change[one.stop] -= one.size_bytes
        return int(change.cumsum().max())

    def arranged(self, room: int, shortest: int = 0) -> Detours | None:
        """Detours with which the program needs at most `room` bytes, few and short ones; None where none are
        found, which takes a second or two.

        `shortest`, of any: with none at all in an operation it may be compiled otherwise in a small part, and
        differ from the program that this heap is of.
        """
        names, rng = sorted({owner for owner in self.events if owner is not None}), random.Random(0)
        if self.alive > room or not names:
            return None
        none, *some = [length for length in _LENGTHS if length >= shortest]
        bare = dict.fromkeys(names, none)
        best, least = bare, self._with(bare)
        for at in range(_TRIES):
            if least <= room:
                break
            few = rng.sample(names, min(len(names), rng.randint(1, _FEW)))
            lengths = (best if at % 2 else bare) | {name: rng.choice([none, *some]) for name in few}
            needs = self._with(lengths)
            if needs <= least:
                best, least = lengths, needs
        if least > room:
            return None
        for name in [name for name in names if best[name] > none]:  # each costs time
            for length in (length for length in (none, *some) if length < best[name]):
                if self._with(best | {name: length}) <= room:
                    best = best | {name: length}
                    break
        return Detours(tuple(best.items()))

    def _with(self, lengths: dict[str, int]) -> int:
        return self.needs(Detours(tuple(lengths.items())))


def compiled(lowered: Any) -> tuple[Any, Heap | None]:
    """`lowered`, a step of `mw.jit` with the detours `EVEN`, compiled, and its heap; on CPUs alone: elsewhere
    the reports have not been held against programs."""
    if jax.default_backend() != "cpu":
        return lowered.compile(), None
    with tempfile.TemporaryDirectory() as folder:
        program = lowered.compile({"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        reports = {
            path.name.partition("cpu_after_optimizations")[2]: path.read_text()
            for path in Path(folder).glob("*.cpu_after_optimizations*.txt")
        }
    try:
        return program, read(reports[".txt"], reports["-live-range.txt"], reports["-buffer-assignment.txt"])
    except KeyError:
        return program, None


def arrangements(lower: Callable[[Detours], Any], room: int) -> Iterator[tuple[Detours, Any, bool]]:
    """Programs of one step with detours, `lower(detours)` compiled, one after another: with the same
    everywhere, to read its heap; with the few by which that heap takes at most `room` bytes; and with some
    more. With each whether to keep it if it fits: of two that do, the one of fewer detours takes less
    time."""
    even, found = compiled(lower(EVEN))
    rest = 0 if found is None else max(0, temporaries(even) - found.needs(EVEN))
    few = None if found is None else found.arranged(room - rest)
    yield EVEN, even, few is None
    if found is None or few is None:
        return
    yield few, lower(few).compile(), True
    more = found.arranged(room - rest, EVEN.others)
    if more is not None:
        yield more, lower(more).compile(), True


def read(program: str, lives: str, places: str) -> Heap | None:
    """The heap, from the reports on the optimized program, on live ranges and on the assignment of buffers;
    None where they look otherwise than those of JAX 0.10 and 0.11."""
    temporary = re.search(
        r"^allocation \d+: size \d+,(?: page \d+,)? preallocated-temp:\n((?: value:.*\n)+)",
        places,
        re.MULTILINE,
    )
    ranges = re.findall(
        r"^ *(\S+?)(?:\{.*\})?:(\d+)-(\d+)$", lives.partition("BufferLiveRange:")[2], re.MULTILINE
    )
    if temporary is None or not ranges:
        return None
    scopes = re.findall(
        rf'^ *(?:ROOT )?%?(\S+) = .*op_name="[^"]*\b{Detours.SCOPE}:([^/")]*)', program, re.MULTILINE
    )
    owners = dict(scopes)
    alive = {name: (int(start), int(stop)) for name, start, stop in ranges}
    # Not those of tuples, a few pointers each: they are no part of the arrangement, and no events of it.
    values = re.findall(
        r"value: <(\d+) (\S+?)(?:\{.*\})?(?: \(phi\))? @\d+> \(size=(\d+),offset=(\d+)\): [^(]",
        temporary[1],
    )
    return _replayed(
        _Value(*alive[name], int(number), size, int(offset), owners.get(name) if size > _ONE else None)
        for number, name, size, offset in ((number, name, int(size), at) for number, name, size, at in values)
        if name in alive
    )


@dataclass(order=True, frozen=True)
class _Value:
    """An array of the program: the instructions that write it and that last read it, its number, size and
    place, and whose detour it is part of."""

    start: int
    stop: int
    number: int
    size: int
    offset: int
    owner: str | None


@dataclass
class _Life:
    """A buffer, of one array after another: when it comes, when the first array in it ends, when it goes."""

    start: int
    first: int = -1
    stop: int = -1


def _replayed(values: Iterable[_Value]) -> Heap:
    """The allocator's events, one instruction after another: what it writes comes, in the place of what it is
    the last to read where XLA put it there; then the rest of that goes."""
    comes: dict[int, list[_Value]] = collections.defaultdict(list)
    goes: dict[int, list[_Value]] = collections.defaultdict(list)
    for value in sorted(values):
        comes[value.start].append(value)
        goes[value.stop].append(value)
    events: list[str | None] = []
    buffers: dict[_Value, _Life] = {}  # by first array
    first: dict[_Value, _Value] = {}

    def event(value: _Value) -> int:
        events.append(value.owner)
        return len(events) - 1

    for at in sorted({*comes, *goes}):
        for value in comes[at]:
            places = (value.offset, value.size)
            read = (one for one in goes[at] if (one.offset, one.size) == places and one.start < at)
            old = next(read, None)
            if old is None:
                first[value] = value
                buffers[value] = _Life(event(value))
                continue
            goes[at].remove(old)
            first[value] = first[old]
            life, now = buffers[first[old]], event(old)
            life.first = now if life.first < 0 else life.first
            event(value)
        for value in goes[at]:
            buffers[first[value]].stop = event(value)
    least = _SMALL * max((value.size for value in buffers), default=0)
    large = [(value, life) for value, life in buffers.items() if value.size >= least]
    return Heap(
        tuple(Buffer(value.size, life.start, life.stop) for value, life in large),
        tuple(life.stop if life.first < 0 else life.first for _, life in large),
        tuple(value.owner for value, _ in large),
        tuple(events),
    )
