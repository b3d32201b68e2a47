r"""Nested recomputation of identical layers as a tape: a table of numbers that one loop works off, so that the time to compile does not grow with the schedule.

Written out, every different run of such a schedule is a loop of its own, and a good one for hundreds of layers has hundreds. On the tape it is a sequence of *atoms*,

    load an activation,  `plain` layers forward,  `stored` layers forward whose residuals are kept,  save where that led,  `back` layers backward,

all over the same few arrays: what is kept of RECOMPUTE runs (`slots`, activations) and of STORE runs (`rows`, residuals) are stacks, for runs are taken backward in the
opposite order. These arrays are there from the forward sweep to the end, as large as they ever need to be. So that they take no more than the ledger counts, a
schedule is taped only if they are full when its forward sweep ends, as those of binomial schedules are (Griewank and Walther, ACM TOMS 2000).

No JAX here: `mwplan.taped` executes tapes, `mwplan.solvers.regular` counts on them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from mwplan.schedule import Run, RunKind, allow_nesting, nesting, walk

Key = TypeVar("Key")

#: about how many loops a tape compiles to
LOOPS = 9
#: and a run that is not recomputed
SWEEPS = {RunKind.STORE: 2, RunKind.MOONWALK: 3, RunKind.INVERT: 2}
#: fewer equal runs in a row than this are compiled one by one
WRITTEN_OUT = 4


@dataclass(slots=True)
class Atom:
    """From layer `start` on (0 the first of the tape), whose input lies in slot `load`: see the module. Its `stored` layers have rows from `row` and, where residuals share
    inputs, slots from `slot` on. `save`: a slot, or -1. `back` layers end with row `last_row` and slot `last_slot`, the first of them, `last`, counted from 1.
    """

    start: int
    load: int
    plain: int = 0
    stored: int = 0
    row: int = 0
    slot: int = 0
    save: int = -1
    last: int = 0
    back: int = 0
    last_row: int = 0
    last_slot: int = 0

    def numbers(self) -> tuple[int, ...]:
        """All of them, in the order above."""
        return (
            self.start, self.load, self.plain, self.stored, self.row, self.slot, self.save, self.last, self.back, self.last_row, self.last_slot,
        )  # fmt: skip


@dataclass(slots=True)
class Tape:
    """The tape of `size` layers: `forward` is the forward sweep; `first` takes layers backward before the atoms in `backward` (it goes nowhere itself).

    `option`, of all STORE runs; `slots`, `rows`: how many there are.
    """

    size: int
    option: str
    forward: list[Atom] = field(default_factory=list)
    first: Atom = field(default_factory=lambda: Atom(0, 0))
    backward: list[Atom] = field(default_factory=list)
    slots: int = 0
    rows: int = 0


def loops(runs: Sequence[Run]) -> int:
    """About how many loops a compiled step has for `runs`, each over identical layers."""
    total = 0
    for option, some in groups(runs, option_of):
        count = written_out(some)
        total += LOOPS if option and count > LOOPS and taped(some, keeps_input=False) else count
    return total


def groups(runs: Sequence[Run], key: Callable[[Run], Key]) -> Iterator[tuple[Key, tuple[Run, ...]]]:
    """Runs in a row of one key, STORE runs before the first other apart: a tape that begins with them would lose its first slot."""
    for same, group in itertools.groupby(runs, key=key):
        some = tuple(group)
        stored = len(list(itertools.takewhile(lambda run: run.kind is RunKind.STORE, some)))
        yield from ((same, part) for part in (some[:stored], some[stored:]) if part)


def written_out(runs: Sequence[Run]) -> int:
    """`loops` where none is taped."""
    allow_nesting(nesting(runs))
    known: dict[Any, tuple[int, int]] = {}
    return _total(_alike(run, known) for run in runs)


def _alike(run: Run, known: dict[Any, tuple[int, int]]) -> tuple[int, int]:
    """A number for all runs like this one, wherever they start, and the loops of one."""
    inner = tuple(_alike(one, known) for one in run.inner)
    key = run.kind, run.stop - run.start, run.options, inner
    if key not in known:
        known[key] = len(known), 1 + _total(inner) if inner else SWEEPS[run.kind]
    return known[key]


def _total(runs: Iterable[tuple[int, int]]) -> int:
    """The loops of runs in a row, as `_alike` gives them."""
    total = 0
    for (_, one), same in itertools.groupby(runs):
        count = sum(1 for _ in same)
        total += one * (count if count < WRITTEN_OUT else 1)
    return total


def option_of(run: Run) -> str | None:
    """The option of all STORE runs in a STORE or RECOMPUTE run; None where they have several, or where there are other runs."""
    found = {one.options if one.kind is RunKind.STORE else () for one in walk([run]) if not one.inner}
    options = found.pop() if len(found) == 1 else ()
    return options[0] if options else None


def taped(runs: Sequence[Run], *, keeps_input: bool) -> Tape | None:
    """The tape of `runs`, of layers that are alike; None where they are no STORE and RECOMPUTE runs by one option, or a tape would need more memory than they do.

    **Arguments:** `keeps_input`, whether the residuals of STORE runs share the layer's input. **Cost:** linear in the number of operations.
    """
    options = {option_of(run) for run in runs}
    option = options.pop()
    if options or option is None:
        return None
    maker = _Maker(runs[0].start, keeps_input)
    tape = Tape(runs[-1].stop - runs[0].start, option)
    maker.forward(runs)
    tape.forward = maker.atoms
    full = len(maker.slots), maker.rows
    maker.atoms = [tape.first]
    maker.backward(runs)
    tape.backward = maker.atoms[1:]
    tape.slots, tape.rows = maker.most
    return tape if full == maker.most and not maker.lost else None


class _Maker:
    """Goes through a schedule as the ledger does: `slots`, the positions whose activations are kept, and `rows`, how many residuals."""

    def __init__(self, first: int, keeps_input: bool) -> None:
        self.first, self.keeps_input = first, keeps_input
        self.slots: list[int] = [first]
        self.rows = 0
        self.most = (1, 0)
        #: whether the first slot is used for something else than the input, which lies elsewhere
        self.lost = False
        self.atoms: list[Atom] = []

    def forward(self, runs: Sequence[Run]) -> None:
        """Atoms for the forward sweep over `runs`, whose input is kept last."""
        atom = self._atom(runs[0].start)
        for run in runs:
            if run.kind is RunKind.RECOMPUTE:
                if atom.plain or atom.stored:
                    atom.save = self._push(run.start)
                    atom = self._atom(run.start)
                atom.plain = run.stop - run.start
            else:
                self._store(run.start, atom)

    def _store(self, at: int, atom: Atom) -> None:
        here = self.slots[-1:] == [at]  # kept, because the first run begins here
        if self.keeps_input and not here:
            self._push(at)
        if not atom.stored:
            atom.row, atom.slot = self.rows, len(self.slots) - 1
        if here and not self.keeps_input:
            self.slots.pop()
        atom.stored += 1
        self.rows += 1
        self._count()

    def _atom(self, start: int) -> Atom:
        assert self.slots[-1] == start
        self.atoms.append(Atom(start - self.first, len(self.slots) - 1))
        return self.atoms[-1]

    def _push(self, at: int) -> int:
        self.lost |= not self.slots
        self.slots.append(at)
        self._count()
        return len(self.slots) - 1

    def _count(self) -> None:
        self.most = max(self.most[0], len(self.slots)), max(self.most[1], self.rows)

    def backward(self, runs: Sequence[Run]) -> None:
        """Atoms for the backward sweep over `runs`."""
        left = list(runs)
        while left:
            run = left.pop()
            if run.kind is RunKind.RECOMPUTE:
                self.forward(run.inner)
                left += run.inner
                continue
            atom = self.atoms[-1]
            if not atom.back:
                atom.last, atom.last_row = run.stop - self.first, self.rows - 1
                atom.last_slot = len(self.slots) - 1
            atom.back += 1
            self.rows -= 1
            if self.keeps_input:
                assert self.slots[-1] == run.start
                self.slots.pop()
