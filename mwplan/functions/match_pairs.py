"""Couplings, recognised in operations: of the halves of an array, or of two arrays that go along together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from mwplan.functions.expressions import branch
from mwplan.functions.kinds import ELEMENTWISE, SHAPES
from mwplan.functions.match_linear import joined, part_start, parts_of, sequence
from mwplan.functions.registry import recognises
from mwplan.functions.stretches import Graph, Operation
from mwplan.functions.tracing import ALIAS
from mwplan.layers.coupling import Coupling, Nothing
from mwplan.layers.shapes import Concatenate, Swap

_Is = Callable[[Operation], bool]


@recognises("concatenate")
def coupling(y: Operation) -> Any:
    """`x1, x2 = split(x)`, `y1 = x1 + f(x2)`, `y2 = x2 + g(y1)`, `concatenate([y1, y2])`; or one of the two
    sums alone, the other half as it is. Either half may be first, on both sides."""
    parts = joined(y)
    if parts is None or len(parts) != 2 or len(y.graph.inputs) != 1:
        return None
    x = y.graph.at(y.graph.inputs[0])
    if x.shape != y.shape or parts[0].shape != parts[1].shape:
        return None
    halves = (0, y.shape[-1] // 2)
    for starts in (halves, halves[::-1]):
        for made in (parts, parts[::-1]):
            found = _coupled(made, x, starts)
            if found is not None:
                before, after = (Swap() if a != b else None for a, b in ((starts, halves), (made, parts)))
                return sequence(before, found, after)
    return None


def _coupled(made: Sequence[Operation], x: Operation, starts: tuple[int, ...]) -> Any:
    """The coupling of the halves of `x` that begin at `starts`, first and second, which makes these; else
    None."""
    (y1, y2), (first, second) = made, starts

    def is_half(one: Operation, start: int) -> bool:
        return one.shape[-1] == y1.shape[-1] and part_start(one, x) == start

    f = _added(y1, lambda one: is_half(one, first), lambda one: is_half(one, second))

    def is_y1(one: Operation) -> bool:
        return one is y1 or (f is NOTHING and is_half(one, first))

    g = _added(y2, lambda one: is_half(one, second), is_y1)
    return None if f is None or g is None or (f is g is NOTHING) else Coupling(f, g)


@recognises("concatenate")
def swapped(y: Operation) -> Any:
    """The halves of an array, exchanged."""
    parts = joined(y)
    if parts is None or len(parts) != 2 or len(y.graph.inputs) != 1:
        return None
    x, half = y.graph.at(y.graph.inputs[0]), y.shape[-1] // 2
    halves = [one.shape[-1] == half and part_start(one, x) for one in parts]
    return Swap() if x.shape == y.shape and halves == [half, 0] else None


#: Operations that are not worth a coupling.
SIMPLE = ELEMENTWISE | SHAPES | {"input"}
#: The branch of a half that stays as it is.
NOTHING = Nothing()


def _added(y: Operation, is_own: _Is, is_other: _Is) -> Any:
    """The branch `f` where `y` is a half plus `f` of the other; `NOTHING` where it is the half; else None."""
    if is_own(y):
        return NOTHING
    for own, rest in _sums(y):
        if is_own(own) and (found := _branch(rest, is_other)) is not None:
            return found
    return None


def _sums(y: Operation) -> list[tuple[Operation, Operation]]:
    """Both orders of a sum of two arrays."""
    if y.name != "add" or any(one.is_weight or one.shape != y.shape for one in y.inputs):
        return []
    a, b = y.inputs
    return [(a, b), (b, a)]


def _branch(y: Operation, is_input: Any) -> Any:
    """What leads to `y` from the one operation that `is_input` says, as a layer; None where it leads from
    elsewhere."""
    found: dict[int, Operation] = {}
    seen: set[int] = set()
    waiting = [y]
    while waiting:
        one = waiting.pop()
        if id(one) in seen or one.is_weight:
            continue
        seen.add(id(one))
        if is_input(one):
            found[id(one)] = one
        elif one.is_input:
            return None
        else:
            waiting += one.inputs
    if not found:
        return None
    return _from(y, list(found.values()))


def _from(y: Operation, starts: list[Operation]) -> Any:
    """`branch`, of one start, or of several that are the same part of the same array."""
    first = starts[0]
    if len(starts) == 1:
        return branch(y, first)
    steps = dict(y.graph.steps)
    for other in starts[1:]:  # the same slice, written twice
        step = steps.pop(other.value)  # type: ignore[arg-type]
        steps[other.value] = _alias_of(step, first)  # type: ignore[index]
    graph = Graph(steps, y.graph.avals, y.graph.inputs, y.graph.dependent)
    return branch(graph.at(y.value), graph.at(first.value))


def _alias_of(step: Any, first: Operation) -> Any:
    return dataclasses.replace(
        step, primitive=ALIAS, params={"aval": None}, inputs=(first.value,), outputs=step.outputs[:1]
    )


def pair(made: Sequence[Operation]) -> tuple[Any, tuple[Operation, Operation], tuple[Operation, Operation]]:
    """A coupling from two arrays to two: `(layer, inputs, results)`, in the layer's order; the layer is None
    where it is none."""
    graph = made[0].graph
    xs = [graph.at(one) for one in graph.inputs]
    nothing = (None, (xs[0], xs[1]), (made[0], made[1]))
    for y1, y2 in ((made[0], made[1]), (made[1], made[0])):
        for x1, a in _sums(y1):
            for x2, b in _sums(y2):
                if {id(x1), id(x2)} != {id(one) for one in xs}:
                    continue
                f = _branch(a, lambda one, x2=x2: one is x2)
                g = _branch(b, lambda one, y1=y1: one is y1)
                if f is not None and g is not None:
                    return Coupling(f, g), (x1, x2), (y1, y2)
    return nothing


def half(made: Operation, kept: Operation) -> Any:
    """The coupling of two arrays `(x1, kept)` that makes `x1 + f(kept)` and hands `kept` on, and the first of
    these; else None. An `f` that is elementwise does not count: every skip that is added would be one."""
    graph = made.graph
    (x1,) = (one for one in map(graph.at, graph.inputs) if one is not kept)
    if all(one.name in SIMPLE for one in made.walk()):
        return None
    f = _added(made, lambda one: one is x1, lambda one: one is kept)
    return None if f is None or f is NOTHING or made.shape != kept.shape else (Coupling(f, NOTHING), x1)


def apart(made: Sequence[Operation]) -> Any:
    """`Split` where two arrays are the halves of an input, in order; else None."""
    return parts_of(made)


def together(y: Operation) -> tuple[Operation, ...] | None:
    """The two inputs of which `y` is the concatenation, in order; else None."""
    parts = joined(y)
    if parts is None or len(parts) != 2 or not all(one.is_input for one in parts) or parts[0] is parts[1]:
        return None
    return parts


def concatenation() -> Concatenate:
    """The layer that `together` finds."""
    return Concatenate()
