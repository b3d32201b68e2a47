r"""Nested recomputation of identical layers as a tape: a table of numbers that one loop works off, so that
the time to compile does not grow with the schedule.

Written out, every different run of such a schedule is a loop of its own, and a good one for hundreds of
layers has hundreds. On the tape it is a sequence of *atoms*,

    load an activation,  `plain` layers forward,  `stored` layers forward whose residuals are kept,  save
    where that led,  `back` layers backward.

What is kept, the inputs of RECOMPUTE runs and the residuals of STORE runs, lies in one stack, for runs are
taken backward in the opposite order. That is an array which is there from the forward sweep to the end, as
large as it ever needs to be. So that it takes about what the ledger counts, a schedule is taped only if the
stack is nearly full when the forward sweep ends, as it is wherever memory is scarce.

No JAX here: `mwplan.execution.taped` executes tapes, `mwplan.solvers.regular` counts on them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mwplan.plans.schedule import Run, RunKind, allow_nesting, nesting, walk

#: about how many loops a tape compiles to
LOOPS = 9
#: and a run that is not recomputed
SWEEPS = {RunKind.STORE: 2, RunKind.OFFLOAD: 2, RunKind.MOONWALK: 3, RunKind.INVERT: 2}
#: fewer equal runs in a row than this are compiled one by one
WRITTEN_OUT = 4
#: how full the stack must be when the forward sweep ends
FULL = 0.9


@dataclass(slots=True)
class Atom:
    """From layer `start` on (0 the first of the tape), whose input lies at `load`: see the module.

    The residuals of the first of its `stored` layers are written at `row`, those that follow a stride further
    on; each layer's input, if residuals share it, lies before them. `save`: where, or -1. `back` layers end
    with that at `last_row`, the first of them, layer `last`, counted from 1. The tape's own input lies
    elsewhere: its place is negative.
    """

    start: int
    load: int
    plain: int = 0
    stored: int = 0
    row: int = 0
    save: int = -1
    last: int = 0
    back: int = 0
    last_row: int = 0

    def numbers(self) -> tuple[int, ...]:
        """All of them, in the order above."""
        return (
            self.start,
            self.load,
            self.plain,
            self.stored,
            self.row,
            self.save,
            self.last,
            self.back,
            self.last_row,
        )


@dataclass(slots=True)
class Tape:
    """`forward` is the forward sweep; `first` takes layers backward before the atoms in `backward` (it goes
    nowhere itself).

    `option`, of all STORE runs; `room`: the size of the stack, in units of what `taped` was given, an
    activation at least.
    """

    option: str
    forward: list[Atom] = field(default_factory=list)
    first: Atom = field(default_factory=lambda: Atom(0, 0))
    backward: list[Atom] = field(default_factory=list)
    room: int = 0


def loops(runs: Sequence[Run]) -> int:
    """About how many loops a compiled step has for `runs`, each over identical layers."""
    total = 0
    for option, group in itertools.groupby(runs, key=option_of):
        some = tuple(group)
        count = written_out(some)
        total += LOOPS if option and count > LOOPS and taped(some, 1, 1, keeps_input=False) else count
    return total


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
    """The option of all STORE runs in a STORE or RECOMPUTE run; None where they have several, or where there
    are other runs."""
    found = {one.options if one.kind is RunKind.STORE else () for one in walk([run]) if not one.inner}
    options = found.pop() if len(found) == 1 else ()
    return options[0] if options else None


def taped(runs: Sequence[Run], activation: int, residuals: int, *, keeps_input: bool) -> Tape | None:
    """The tape of `runs`, of layers that are alike; None where they are no STORE and RECOMPUTE runs by one
    option, or a tape would need more memory than they do.

    **Arguments:** `activation`, `residuals`, their sizes in any unit; `keeps_input`, whether the residuals
    share the layer's input. **Cost:** linear in the number of operations.
    """
    options = {option_of(run) for run in runs}
    option = options.pop()
    if options or option is None:
        return None
    maker = _Maker(runs[0].start, activation, residuals, keeps_input)
    tape = Tape(option)
    maker.forward(runs)
    tape.forward = maker.atoms
    full = maker.top
    maker.atoms = [tape.first]
    maker.backward(runs)
    tape.backward = maker.atoms[1:]
    tape.room = max(maker.room, activation)  # what is never read or written is still a part of it
    return tape if full >= FULL * maker.room else None


class _Maker:
    """Goes through a schedule as the ledger does: `stack`, positions of activations, or None for residuals,
    and where they lie; `top`, where it ends."""

    def __init__(self, first: int, activation: int, residuals: int, keeps_input: bool) -> None:
        self.first, self.keeps_input = first, keeps_input
        self.activation, self.residuals = activation, residuals
        self.stride = residuals + (activation if keeps_input else 0)
        self.stack: list[tuple[int | None, int]] = [(first, -activation)]
        self.top = self.room = 0
        self.atoms: list[Atom] = []

    def forward(self, runs: Sequence[Run]) -> None:
        """Atoms for the forward sweep over `runs`, whose input is on the stack's top."""
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
        here = bool(self.stack) and self.stack[-1][0] == at  # kept, because the first run begins here
        if self.keeps_input and not here:
            self._push(at)
        elif here and not self.keeps_input:
            self._pop()
        row = self._push(None)
        if not atom.stored:
            atom.row = row
        assert row == atom.row + atom.stored * self.stride
        atom.stored += 1

    def _atom(self, start: int) -> Atom:
        at, place = self.stack[-1]
        assert at == start
        self.atoms.append(Atom(start - self.first, place))
        return self.atoms[-1]

    def _push(self, at: int | None) -> int:
        place = self.top
        self.stack.append((at, place))
        self.top += self.residuals if at is None else self.activation
        self.room = max(self.room, self.top)
        return place

    def _pop(self) -> int:
        _, place = self.stack.pop()
        self.top = max(0, place)
        return place

    def backward(self, runs: Sequence[Run]) -> None:
        """Atoms for the backward sweep over `runs`."""
        left = list(runs)
        while left:
            run = left.pop()
            if run.kind is RunKind.RECOMPUTE:
                self.forward(run.inner)
                left += run.inner
                continue
            atom, place = self.atoms[-1], self._pop()
            if not atom.back:
                atom.last, atom.last_row = run.stop - self.first, place
            assert place == atom.last_row - atom.back * self.stride
            atom.back += 1
            if self.keeps_input:
                assert self.stack[-1][0] == run.start
                self._pop()
