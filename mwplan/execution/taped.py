"""Executes tapes (`mwplan.plans.tape`): a few loops over tables, whatever the schedule."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, UInt32

from mwplan.common import trees
from mwplan.execution import loops
from mwplan.execution.repeats import Repeat
from mwplan.execution.walker import Walker
from mwplan.network import operations, sharding
from mwplan.network.residuals import Residuals
from mwplan.plans.schedule import Run, RunKind
from mwplan.plans.tape import Atom, Tape, taped

PyTree = Any
Words = UInt32[Array, " words"]


@dataclass(frozen=True)
class Taped:
    """Runs of a schedule that are executed by a tape: those of `many`, one layer a repetition."""

    many: Repeat
    tape: Tape

    @property
    def run(self) -> Run:
        """One STORE run of the tape, as a walker of one repetition sees it."""
        return _stored(self.tape.option)


def _stored(option: str) -> Run:
    return Run(kind=RunKind.STORE, start=0, stop=1, options=(option,))


def find(walker: Walker, many: Repeat, option: str) -> Taped | None:
    """A tape for the runs of `many`, whose STORE runs have `option`; None where there is none, or it would
    take more memory than planned, or where arrays may lie on several devices."""
    if sharding.may_be_spread():  # the stack is one flat array, of which every device would hold all
        return None
    steps = _Steps(walker, many, _stored(option))
    if steps.held.keeps_output or not all(_is_plain(leaf) for leaf in jax.tree.leaves((steps.y, steps.held))):
        return None
    sizes = _words_of(steps.y), _words_of(steps.held)
    tape = taped(many.runs, *sizes, keeps_input=steps.held.keeps_input)
    return Taped(many, tape) if tape else None


def forward(walker: Walker, one: Taped, depth: int) -> Words:
    """F over the runs: as `Interpreter.forward`, but the claim on the input stays. Returns the stack, all
    there is to keep."""
    tape, many = one.tape, one.many
    steps = _Steps(walker, many, one.run, depth)
    leaves, treedef = jax.tree.flatten(steps.new(walker.x[many.start]))
    axes = [trees.varying_axes(leaf) for leaf in jax.tree.leaves(steps.y)]
    first = jax.tree.unflatten(treedef, [trees.vary(leaf, more) for leaf, more in zip(leaves, axes)])
    all_axes = frozenset().union(*axes, *(trees.varying_axes(leaf) for leaf in jax.tree.leaves(steps.held)))
    first, stack = loops.empty(tape.room, jnp.uint32, first)
    stack = trees.vary(stack, all_axes)
    table = _table(tape.forward)

    def step(k: Any, state: Any) -> Any:
        return steps.ahead(loops.row(table, k), first, state[1])

    last: tuple[PyTree, Words] = lax.fori_loop(0, len(tape.forward), step, (first, stack))
    walker.claim(many.stop, steps.whole(last[0]))
    return last[1]


def backward(walker: Walker, one: Taped, stack: Words, box: list[PyTree], depth: int) -> None:
    """Backward over the runs, as `Interpreter.backward`; the claim on the input goes."""
    tape, many = one.tape, one.many
    steps = _Steps(walker, many, one.run, depth)
    first = steps.new(walker.x[many.start])
    state = box.pop(), walker.buffers(many)
    state = steps.behind(_table([tape.first])[0], first, stack, state)
    # A loop of one turn is written out: the next atom would write to the stack before this one has read it.
    stack, state = walker.gate((stack, state))
    table = _table(tape.backward)

    def step(k: Any, state: Any) -> Any:
        stack, (ct, buffers) = state
        atom = loops.row(table, k)
        _, stack = steps.ahead(atom, first, stack, buffers)
        return stack, steps.behind(atom, first, stack, (ct, buffers))

    _, (ct, buffers) = lax.fori_loop(0, len(tape.backward), step, (stack, state))
    walker.took(many, buffers)
    box.append(ct)
    walker.release(many.start)


def _table(atoms: Sequence[Atom]) -> Array:
    return jnp.asarray(np.array([atom.numbers() for atom in atoms], np.int32))


class _Steps:
    """What a tape's loops do to one layer, counted from 0, and to the stack; `y` and `held`, shapes of an
    output and of residuals."""

    def __init__(self, walker: Walker, many: Repeat, run: Run, depth: int = 0) -> None:
        self.walker, self.many, self.run, self.depth = walker, many, run, depth
        x = walker.x.get(many.start, walker.structs[many.start])
        self.carried = walker.carried.window(many.start, many.start + 1)
        self.same = self.carried.throughout()
        self.y, self.held = jax.eval_shape(self._first, x)
        self.values = jax.tree.leaves(x)
        self.activation = _words_of(self.y)
        self.stride = _words_of(self.held) + (self.activation if self.held.keeps_input else 0)

    def _first(self, x: PyTree) -> tuple[PyTree, Residuals]:
        self.values = jax.tree.leaves(x)
        return self.store(jnp.int32(0), self.new(x))

    def new(self, x: PyTree) -> PyTree:
        """An activation without what all layers hand on as it is."""
        return self.carried.without(x, 0, self.same)

    def whole(self, x: PyTree) -> PyTree:
        """The activation that `new` took from."""
        return self.carried.with_(x, 0, self.same, self.values)

    def _within(self, layer: Any, buffers: Any) -> Walker:
        return self.walker.within(self.many, layer, buffers, single=not self.walker.grads.performs)

    def plain(self, layer: Any, x: PyTree, buffers: Any = None) -> PyTree:
        """Forward over one layer."""
        inner = self._within(layer, buffers)
        return self.new(inner.on_layer("forward", 1, self.depth, operations.plain_forward, self.whole(x)))

    def store(self, layer: Any, x: PyTree, buffers: Any = None) -> tuple[PyTree, Residuals]:
        """Forward over one layer, and its residuals."""
        inner = self._within(layer, buffers)
        operation = functools.partial(operations.forward, rule=inner.rule(self.run, 1))
        y, held = inner.on_layer("forward", 1, self.depth, operation, self.whole(x))
        return self.new(y), held

    def back(self, layer: Any, x: PyTree, held: Residuals, ct: PyTree, buffers: Any) -> tuple[PyTree, Any]:
        """Backward over one layer: the cotangent of its input, and the gradients of the stack of layers."""
        inner = self._within(layer, buffers)
        if held.keeps_input:
            inner.claim(0, self.whole(x))
        box = [ct]
        inner.store(self.run, [held], box, self.depth)
        return box.pop(), inner.grads.stacked(self.walker.view.places[self.many.start].part)

    def load(self, first: PyTree, stack: Words, place: Any) -> PyTree:
        """The activation at a place; the tape's own input, `first`, at a negative one."""
        found = _read(stack, self.y, jnp.maximum(place, 0))
        return jax.tree.map(lambda a, b: jnp.where(place < 0, a, b), first, found)

    def save(self, stack: Words, x: PyTree, place: Any) -> Words:
        """The stack with `x` at a place; as it is, at a negative one."""
        times = jnp.where(place < 0, 0, 1)
        found: Words = lax.fori_loop(0, times, lambda _, stack: _written(stack, x, place), stack)
        return found

    def ahead(self, atom: Any, first: PyTree, stack: Words, buffers: Any = None) -> tuple[PyTree, Words]:
        """What an atom does forward: where that led, and the stack."""
        start, load, plain, stored, row, save, *_ = atom
        x = self.load(first, stack, load)
        x = lax.fori_loop(0, plain, lambda j, x: self.plain(start + j, x, buffers), x)

        def store(j: Any, state: Any) -> Any:
            x, stack = state
            place = row + j * self.stride
            if self.held.keeps_input:
                stack = self.save(stack, x, place - self.activation)
            x, held = self.store(start + plain + j, x, buffers)
            return x, _written(stack, held, place)

        x, stack = lax.fori_loop(0, stored, store, (x, stack))
        return x, self.save(stack, x, save)

    def behind(self, atom: Any, first: PyTree, stack: Words, state: tuple[PyTree, Any]) -> tuple[PyTree, Any]:
        """What an atom does backward: the cotangent and the gradients."""
        *_, last, count, last_row = atom

        def step(j: Any, state: Any) -> Any:
            place = last_row - j * self.stride
            x = self.load(first, stack, place - self.activation) if self.held.keeps_input else None
            return self.back(last - 1 - j, x, _read(stack, self.held, place), *state)

        found: tuple[PyTree, Any] = lax.fori_loop(0, count, step, state)
        return found


# -- arrays of any dtype in one of words
# -------------------------------------------------------------------------------


def _is_plain(leaf: Any) -> bool:
    """Whether a tape can hold such an array: whole bytes, which are strongly typed when they are read."""
    known = any(jnp.issubdtype(leaf.dtype, kind) for kind in (jnp.floating, jnp.integer, jnp.bool_))
    return known and trees.bits(leaf.dtype) >= 8 and not trees.is_weak(leaf)


def _words(leaf: Any) -> int:
    return int(-(-leaf.size * leaf.dtype.itemsize // 4))


def _words_of(tree: PyTree) -> int:
    return sum(_words(leaf) for leaf in jax.tree.leaves(tree))


def _written(stack: Words, tree: PyTree, place: Any) -> Words:
    """The stack with the tree's leaves from `place` on."""
    for leaf in jax.tree.leaves(tree):
        words = _as_words(leaf)
        stack = lax.dynamic_update_slice(stack, words, (place,), allow_negative_indices=False)
        place = place + words.size
    return stack


def _read(stack: Words, structs: PyTree, place: Any) -> PyTree:
    """What `_written` wrote."""
    leaves, treedef = jax.tree.flatten(structs)
    found = []
    for struct in leaves:
        size = _words(struct)
        words = lax.dynamic_slice(stack, (place,), (size,), allow_negative_indices=False)
        found.append(_from_words(words, struct))
        place = place + size
    return jax.tree.unflatten(treedef, found)


def _as_words(leaf: Array) -> Words:
    if leaf.dtype == jnp.bool_:
        leaf = leaf.astype(jnp.uint8)
    each = leaf.dtype.itemsize
    flat = leaf.reshape(-1)
    if each < 4:
        flat = jnp.pad(flat, (0, -flat.size % (4 // each))).reshape(-1, 4 // each)
    return lax.bitcast_convert_type(flat, jnp.uint32).reshape(-1)


def _from_words(words: Words, struct: Any) -> Array:
    dtype = np.dtype(np.uint8) if struct.dtype == jnp.bool_ else struct.dtype
    if dtype.itemsize > 4:
        words = words.reshape(-1, dtype.itemsize // 4)
    flat = lax.bitcast_convert_type(words, dtype).reshape(-1)
    return flat[: math.prod(struct.shape)].reshape(struct.shape).astype(struct.dtype)
