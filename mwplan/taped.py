"""Executes tapes (`mwplan.tape`): a few loops over tables, whatever the schedule."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mwplan import loops, operations, trees
from mwplan.residuals import Residuals
from mwplan.schedule import Run, RunKind
from mwplan.tape import Atom, Tape, taped

if TYPE_CHECKING:
    from mwplan.interpret import Interpreter, Repeat

PyTree = Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Stacks:
    """What a tape keeps from forward to backward, leaves with a leading axis: activations in `slots`, but for the first, which is the stretch's own input; residuals' leaves in `rows`."""

    slots: PyTree
    rows: list[Any]


@dataclass(frozen=True)
class Taped:
    """Runs of a schedule that are executed by a tape: those of `many`, one layer a repetition."""

    many: Repeat
    tape: Tape

    @property
    def run(self) -> Run:
        """One STORE run of the tape, as an interpreter of one repetition sees it."""
        return Run(kind=RunKind.STORE, start=0, stop=1, options=(self.tape.option,))


def forward(walker: Interpreter, one: Taped, depth: int) -> Stacks:
    """F over the runs: as `Interpreter.forward`, but one claim on the input stays."""
    tape, many = one.tape, one.many
    steps = _Steps(walker, many, one.run, depth)
    first = walker.x[many.start]
    y, held = jax.eval_shape(lambda x: steps.store(jnp.int32(0), x), first)
    axes = [trees.varying_axes(leaf) for leaf in jax.tree.leaves(y)]
    leaves, treedef = jax.tree.flatten(first)
    first = jax.tree.unflatten(treedef, [trees.vary(leaf, more) for leaf, more in zip(leaves, axes)])
    first, slots = loops.rows_of(y, tape.slots - 1, first)
    first, rows = loops.rows_of(jax.tree.leaves(held), tape.rows, first)

    def step(k: Any, state: Any) -> Any:
        return steps.ahead(loops.row(_table(tape.forward), k), first, state[1], state[2])

    x, slots, rows = lax.fori_loop(0, len(tape.forward), step, (first, slots, rows))
    walker.claim(many.stop, x)
    return Stacks(slots, rows)


def backward(walker: Interpreter, one: Taped, kept: Stacks, box: list[PyTree], depth: int) -> None:
    """Backward over the runs, as `Interpreter.backward`; the claim on the input goes."""
    tape, many = one.tape, one.many
    steps = _Steps(walker, many, one.run, depth)
    first = walker.x[many.start]
    state = steps.behind(
        _table([tape.first])[0], first, kept.slots, kept.rows, (box.pop(), walker.buffers(many))
    )

    def step(k: Any, state: Any) -> Any:
        slots, rows, (ct, buffers) = state
        atom = loops.row(_table(tape.backward), k)
        _, slots, rows = steps.ahead(atom, first, slots, rows, buffers)
        return slots, rows, steps.behind(atom, first, slots, rows, (ct, buffers))

    _, _, (ct, buffers) = lax.fori_loop(0, len(tape.backward), step, (kept.slots, kept.rows, state))
    walker.took(many, buffers)
    box.append(ct)
    walker.release(many.start)


def _table(atoms: Sequence[Atom]) -> Any:
    return jnp.asarray(np.array([atom.numbers() for atom in atoms], np.int32))


def find(walker: Interpreter, many: Repeat, option: str) -> Taped | None:
    """A tape for the runs of `many`, whose STORE runs have `option`; None where there is none, or it would take more memory than planned."""
    run = Run(kind=RunKind.STORE, start=0, stop=1, options=(option,))
    held = _Steps(walker, many, run).held
    tape = None if held.keeps_output else taped(many.runs, keeps_input=held.keeps_input)
    return tape and Taped(many, tape)


class _Steps:
    """The operations of a tape's loops on one layer, and the stacks; layers and slots count from 0."""

    def __init__(self, walker: Interpreter, many: Repeat, run: Run, depth: int = 0) -> None:
        self.walker, self.many, self.run, self.depth = walker, many, run, depth
        x = walker.structs[many.start]
        _, self.held = jax.eval_shape(lambda x: self.store(jnp.int32(0), x), x)

    def _within(self, layer: Any, buffers: Any) -> Interpreter:
        return self.walker.within(self.many, layer, buffers, single=not self.walker.grads.performs)

    def plain(self, layer: Any, x: PyTree, buffers: Any = None) -> PyTree:
        """Forward over one layer."""
        inner = self._within(layer, buffers)
        return inner.perform("forward", 1, self.depth, operations.plain_forward, inner.layer(1), x)

    def store(self, layer: Any, x: PyTree, buffers: Any = None) -> tuple[PyTree, Residuals]:
        """Forward over one layer, and its residuals."""
        inner = self._within(layer, buffers)
        operation = functools.partial(operations.forward, rule=inner.rule(self.run, 1))
        result: tuple[PyTree, Residuals] = inner.perform(
            "forward", 1, self.depth, operation, inner.layer(1), x
        )
        return result

    def back(self, layer: Any, x: PyTree, row: list[Any], ct: PyTree, buffers: Any) -> tuple[PyTree, Any]:
        """Backward over one layer: the cotangent of its input, and the stack's gradients."""
        inner = self._within(layer, buffers)
        held = jax.tree.unflatten(jax.tree.structure(self.held), row)
        if held.keeps_input:
            inner.claim(0, x)
        box = [ct]
        inner.store(self.run, [held], box, self.depth)
        return box.pop(), inner.grads.stacked(self.walker.view.places[self.many.start].part)

    def load(self, first: PyTree, slots: PyTree, slot: Any) -> PyTree:
        """The activation in a slot."""
        if slots is None:
            return first
        found = loops.row(slots, jnp.maximum(slot - 1, 0))
        return jax.tree.map(lambda a, b: jnp.where(slot == 0, a, b), first, found)

    def save(self, slots: PyTree, x: PyTree, slot: Any) -> PyTree:
        """The slots with `x` in one of them; the first, and -1, are left alone."""
        if slots is None:
            return None
        times = jnp.where(slot > 0, 1, 0)
        return lax.fori_loop(0, times, lambda _, slots: loops.put(slots, x, slot - 1), slots)

    def ahead(
        self, atom: Any, first: PyTree, slots: PyTree, rows: Any, buffers: Any = None
    ) -> tuple[PyTree, PyTree, Any]:
        """What an atom does forward: where that led, the slots, the rows."""
        start, load, plain, stored, row, slot, save, *_ = atom
        x = self.load(first, slots, load)
        x = lax.fori_loop(0, plain, lambda j, x: self.plain(start + j, x, buffers), x)

        def store(j: Any, state: Any) -> Any:
            x, slots, rows = state
            if self.held.keeps_input:
                slots = self.save(slots, x, slot + j)
            x, held = self.store(start + plain + j, x, buffers)
            return x, slots, loops.put(rows, jax.tree.leaves(held), row + j)

        x, slots, rows = lax.fori_loop(0, stored, store, (x, slots, rows))
        return x, self.save(slots, x, save), rows

    def behind(
        self, atom: Any, first: PyTree, slots: PyTree, rows: Any, state: tuple[PyTree, Any]
    ) -> tuple[PyTree, Any]:
        """What an atom does backward: the cotangent and the gradients."""
        *_, last, count, last_row, last_slot = atom

        def step(j: Any, state: Any) -> Any:
            x = self.load(first, slots, last_slot - j) if self.held.keeps_input else None
            return self.back(last - 1 - j, x, loops.row(rows, last_row - j), *state)

        found: tuple[PyTree, Any] = lax.fori_loop(0, count, step, state)
        return found
