"""Expressions as programs: to be compared with what a layer of `mwplan.layers` does, and to be a branch.

The operations of an expression are put in the order in which they are met from its result, so that two
functions that compute the same in another order are the same program.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax

from mwplan.functions.programs import Program
from mwplan.functions.stretches import Graph, Operation, Weight, resolved
from mwplan.functions.tracing import Constant, Flat, Operand, Step
from mwplan.network.layer import layer, static


@layer
class Branch:
    """A stretch of a function's operations as a layer: one array to one array.

    `weights`, the arrays that it reads besides; `program`, its operations, whose inputs are `x` and these."""

    weights: tuple[Any, ...]
    program: Program = static()

    def __call__(self, x: Any) -> Any:
        """The array."""
        return self.program(x, *self.weights)[0]


def expression(y: Operation, inputs: Sequence[int]) -> tuple[Program, list[int]]:
    """The program that makes `y` of these values, and the other values that it reads, in order: those that
    nothing among the graph's operations makes."""
    graph = y.graph
    steps: list[Step] = []
    done: set[int] = set(inputs)
    sources: dict[int, None] = {}

    def place(one: Operand) -> Operand:
        return resolved(one, graph.steps, graph.avals, inputs)

    waiting: list[tuple[int, bool]] = [(y.value, False)] if isinstance(y.value, int) else []
    while waiting:
        value, ready = waiting.pop()
        if value in done:
            continue
        step = graph.steps.get(value)
        if step is None:
            sources[value] = None
            done.add(value)
            continue
        read = [place(one) for one in step.inputs]
        if ready:
            done.update(step.outputs)
            steps.append(replace(step, inputs=tuple(read), scope="", region=-1))
            continue
        waiting.append((value, True))
        waiting += [(one, False) for one in reversed(read) if isinstance(one, int) and one not in done]
    return Program(steps, (*inputs, *sources), (y.value,), graph.avals), list(sources)


def branch(y: Operation, x: Operation) -> Branch:
    """What leads from `x` to `y`, as a layer."""
    assert isinstance(x.value, int)
    program, sources = expression(y, (x.value,))
    weights = tuple(Weight(v, tuple(y.graph.avals[v].shape), y.graph.avals[v].dtype) for v in sources)
    return Branch(weights, program)


def computes(candidate: Any, y: Operation, x: Operation) -> Any:
    """`candidate`, a layer of shapes, with the weights of `y` where it computes `y` of `x` by the same
    operations; else None."""
    assert isinstance(x.value, int)
    leaves, treedef = jax.tree.flatten(candidate)
    shapes = tuple((tuple(leaf.shape), str(leaf.dtype)) for leaf in leaves)
    known = _program_of(treedef, shapes, x.shape, str(x.dtype))
    if known is None:
        return None
    want, order, names = known
    if names_of(y) != names:
        return None
    got, sources = expression(y, (x.value,))
    if got != want or len(sources) != len(order):
        return None
    made = list(leaves)
    for at, value in zip(order, sources):
        made[at] = Weight(value, tuple(y.graph.avals[value].shape), y.graph.avals[value].dtype)
    return jax.tree.unflatten(treedef, made) if {*order} == {*range(len(leaves))} else None


@functools.lru_cache(maxsize=256)
def _program_of(
    treedef: Any, shapes: tuple[Any, ...], x_shape: tuple[int, ...], x_dtype: str
) -> tuple[Program, list[int], list[str]] | None:
    """The program of a layer, which of its leaves are read, in order, and `names_of` it; None where it does
    not take such an input."""
    structs = [jax.ShapeDtypeStruct(*one) for one in shapes]
    x = jax.ShapeDtypeStruct(x_shape, x_dtype)
    try:
        closed = jax.make_jaxpr(lambda x, leaves: jax.tree.unflatten(treedef, leaves)(x))(x, structs)
    except Exception:  # shapes that the layer refuses, whatever it raises
        return None
    flat = Flat(frozenset())
    given: list[Operand] = [flat.value(aval) for aval in closed.in_avals]
    (made,) = flat.walk(closed.jaxpr, closed.consts, given, "")
    if isinstance(made, Constant):
        return None
    steps = {v: step for step in flat.steps for v in step.outputs}
    graph = Graph(steps, flat.avals, (0,), set(steps))
    graph.dependent = depending(graph, 0)
    y = graph.at(made)
    program, sources = expression(y, (0,))
    order = [v - 1 for v in sources] if all(v <= len(shapes) for v in sources) else []
    return program, order, names_of(y)


def names_of(y: Operation) -> list[str]:
    """The names of all operations of an expression, sorted: cheaper to compare than programs."""
    return sorted(one.name for one in y.walk())


def depending(graph: Graph, source: int) -> set[int]:
    """The values of a graph that depend on one of them."""
    found = {source}
    for step in {id(step): step for step in graph.steps.values()}.values():
        if not found.isdisjoint(step.read):
            found.update(step.outputs)
    return found
