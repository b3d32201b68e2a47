"""Which layers of `mwplan.layers` stand in a function's operations.

From every position at which few arrays are alive the operations are followed as long as they take one array
of the activation, or two, to one or two, and nobody needs what they took. Of the stretches found so, the
longest that a matcher (`registry`) recognises is a layer. What else is alive passes by.

**Cost:** operations times the length of stretches, which ends where another array of the activation is read.
It is most of what a cut takes (`python -m experiments.waiting`).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from mwplan.functions import match_activations, match_linear, match_norms, match_pairs  # noqa: F401 (register)
from mwplan.functions.registry import MATCHERS
from mwplan.functions.stretches import SEEN_THROUGH, Graph, Operation, Weight
from mwplan.functions.tracing import Step
from mwplan.network import rules

#: Operations of a stretch at most, where it is one layer without branches; with branches.
SHORT, LONG = 48, 512


@dataclass(frozen=True, kw_only=True)
class Found:
    """A layer: operations `start .. stop - 1`; `layer`, with `Weight`s for arrays; `inputs`, `results`, the
    values that it takes and makes, in its order: one, or a pair."""

    start: int
    stop: int
    layer: Any
    inputs: tuple[int, ...]
    results: tuple[int, ...]

    @property
    def weights(self) -> list[Weight]:
        """The arrays that it is made of."""
        return [leaf for leaf in jax.tree.leaves(self.layer) if isinstance(leaf, Weight)]


@dataclass(frozen=True, kw_only=True)
class Listing:
    """Operations to look through: `steps` in order, `recipes` of what they read besides; `reads`, of each
    step the values that are none of the recipes'; `activations`, values that are alive only where they are
    needed; `dies`, the last step that reads each of these; `barred`, values that no layer may read, and
    `outside`, those that it may not in the operations of a loop."""

    steps: Sequence[Step]
    recipes: Mapping[int, Step]
    reads: Sequence[Sequence[int]]
    avals: Sequence[Any]
    activations: frozenset[int]
    dies: Mapping[int, int]
    barred: frozenset[int] = frozenset()
    outside: frozenset[int] = frozenset()

    @functools.cached_property
    def alive(self) -> list[int]:
        """How many activations are alive before each step."""
        change = [0] * (len(self.steps) + 2)
        born = {v: i for i, step in enumerate(self.steps) for v in step.outputs}
        for v in self.activations:
            if (last := self.dies.get(v, -1)) >= 0:
                change[born.get(v, -1) + 1] += 1
                change[min(last, len(self.steps)) + 1] -= 1
        return list(itertools.accumulate(change))

    @functools.cached_property
    def makers(self) -> dict[int, Step]:
        """What makes each value."""
        return {**self.recipes, **{v: step for step in self.steps for v in step.outputs}}

    @functools.cached_property
    def last(self) -> list[int]:
        """Of every value the last step that reads it, or -1."""
        return [self.dies.get(v, -1) for v in range(len(self.avals))]

    @functools.cached_property
    def forbidden(self) -> list[bool]:
        """The steps that read what no layer may."""
        return [not self.barred.isdisjoint(step.read) for step in self.steps]

    def alike(self, a: int, b: int) -> bool:
        """Whether two values are made by operations of the list, and of one shape and type."""
        made = all(v in self.makers and v not in self.recipes for v in (a, b))
        return made and all(
            getattr(self.avals[a], f) == getattr(self.avals[b], f) for f in ("shape", "dtype")
        )


#: A stretch's end, its inputs and its results.
_End = tuple[int, tuple[int, ...], tuple[int, ...]]


class _Walk:
    """The stretches from one position on; `ends`, of each its end, inputs and results, shortest first, those
    that hand one of their inputs on before the others; `dependent`, what depends on inputs."""

    def __init__(self, listing: Listing, start: int, stop: int) -> None:
        self.listing = listing
        self.dependent: set[int] = set()
        whole: list[_End] = []
        halves: list[_End] = []
        self._go(start, stop, whole, halves)
        self.ends = [*halves, *whole]

    def _go(self, start: int, stop: int, whole: list[_End], halves: list[_End]) -> None:
        listing = self.listing
        inputs: list[int] = []
        besides: set[int] = set()
        alive: set[int] = set()
        last = listing.last
        reach = LONG if listing.alive[start] <= 2 else SHORT
        for at in range(start, min(stop, start + reach)):
            step, read = listing.steps[at], listing.reads[at]
            if listing.forbidden[at] or not self._reads(step, read, inputs, besides):
                return
            of = alive if self.depends else besides
            for v in step.outputs:
                if last[v] > at:
                    of.add(v)
            for v in read:
                if last[v] <= at:
                    alive.discard(v)
                    besides.discard(v)
            if besides or not inputs or not 1 <= len(alive) <= 2:
                continue
            kept = [v for v in inputs if last[v] > at]
            if not kept:
                whole.append((at + 1, tuple(inputs), tuple(sorted(alive))))
                if at - start > SHORT:
                    return
            elif len(kept) == len(alive) == 1 and len(inputs) == 2 and listing.alike(*alive, *kept):
                halves.append((at + 1, tuple(inputs), (*alive, *kept)))

    def _reads(self, step: Step, read: Sequence[int], inputs: list[int], besides: set[int]) -> bool:
        """Whether a layer may go on with an operation; `depends`, whether that depends on its inputs."""
        one = self.listing
        self.depends = False
        for v in read:
            if v in self.dependent:
                self.depends = True
            elif v in one.activations and v not in besides:
                if v not in inputs:
                    if v in one.outside or len(inputs) == 2:
                        return False
                    inputs.append(v)
                self.depends = True
        if self.depends:
            self.dependent.update(step.outputs)
        return True


def recognise(listing: Listing, start: int, stop: int) -> list[Found]:
    """The layers among the operations `start .. stop - 1`, in order."""
    found: list[Found] = []
    position = start
    while position < stop:
        one = _longest(listing, position, stop)
        if one is None:
            position += 1
        else:
            found.append(one)
            position = one.stop
    return found


#: What makes the results of a layer of more than one array, by how many it takes and makes.
_LAST = {(2, 2): ("add",), (1, 2): ("slice", "split"), (2, 1): ("concatenate",)}


def _longest(listing: Listing, start: int, stop: int) -> Found | None:
    walk = _Walk(listing, start, stop)
    graphs: dict[tuple[int, ...], Graph] = {}
    for end, inputs, results in reversed(walk.ends):
        last = _LAST.get((len(inputs), len(results)), MATCHERS)
        names = [listing.makers[v].primitive.name for v in results if v not in inputs]
        if not all(name in last or name in SEEN_THROUGH for name in names):
            continue
        if inputs not in graphs:
            graphs[inputs] = Graph(listing.makers, listing.avals, inputs, walk.dependent)
        made = [graphs[inputs].at(v) for v in results]
        matched = _match(graphs[inputs], made)
        if matched is None or not _fits(*matched):
            continue
        layer, takes, gives = matched
        back = {id(one): v for one, v in zip(made, results)}
        return Found(
            start=start,
            stop=end,
            layer=layer,
            inputs=tuple(one.value for one in takes),
            results=tuple(back[id(one)] for one in gives),
        )
    return None


def _match(graph: Graph, made: Sequence[Operation]) -> Any:
    """`(layer, inputs, results)`, or None."""
    xs = tuple(map(graph.at, graph.inputs))
    if len(xs) == len(made) == 2 and made[1].is_input:
        found = None if made[0].is_input or made[0].is_weight else match_pairs.half(*made)
        return None if found is None else (found[0], (found[1], made[1]), tuple(made))
    if any(one.is_input or one.is_weight for one in made):
        return None
    if len(xs) == len(made) == 1:
        y = made[0]
        for matcher in MATCHERS.get(y.name, ()):
            layer = matcher(y)
            if layer is not None:
                return layer, xs, (y,)
        return None
    if len(xs) == len(made) == 2:
        layer, takes, gives = match_pairs.pair(made)
        return None if layer is None else (layer, takes, gives)
    if len(xs) == 1:
        ordered = sorted(made, key=lambda one: match_linear.part_start(one, xs[0]) or 0)
        layer = match_pairs.apart(ordered)
        return None if layer is None else (layer, xs, tuple(ordered))
    parts = match_pairs.together(made[0])
    return None if parts is None else (match_pairs.concatenation(), parts, tuple(made))


def structs(tree: Any) -> Any:
    """A layer with shapes in place of its `Weight`s."""
    return jax.tree.map(lambda leaf: leaf.struct() if isinstance(leaf, Weight) else leaf, tree)


def of(values: Sequence[Any]) -> Any:
    """One array, or a pair, as layers take it."""
    return values[0] if len(values) == 1 else tuple(values)


def _fits(layer: Any, takes: Sequence[Operation], gives: Sequence[Operation]) -> bool:
    """Whether the layer takes such arrays and gives arrays of the shapes and types that the operations do."""
    given, wanted = ([(one.shape, one.dtype) for one in some] for some in (takes, gives))
    leaves, treedef = jax.tree.flatten(structs(layer))
    shapes = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
    return bool(_results(treedef, shapes, tuple(given)) == tuple(wanted))


@functools.lru_cache(maxsize=1024)
def _results(treedef: Any, shapes: tuple[Any, ...], given: tuple[Any, ...]) -> Any:
    layer = jax.tree.unflatten(treedef, [jax.ShapeDtypeStruct(*one) for one in shapes])
    try:
        y = jax.eval_shape(lambda layer, x: layer(x), layer, of([jax.ShapeDtypeStruct(*x) for x in given]))
    except Exception:  # a matcher's layer may refuse in any way
        return None
    return tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(y))


def passable(layer: Any, x: Any) -> str | None:
    """None where a layer of shapes has a vijp, a fragment smaller than the whole, or an inverse at inputs
    like `x`; else the reason why it has none."""
    leaves, treedef = jax.tree.flatten(layer)
    shapes = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
    given = tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(x))
    reason: str | None = _passable(treedef, shapes, given)
    return reason


@functools.lru_cache(maxsize=1024)
def _passable(treedef: Any, shapes: tuple[Any, ...], given: tuple[Any, ...]) -> str | None:
    layer = jax.tree.unflatten(treedef, [jax.ShapeDtypeStruct(*one) for one in shapes])
    x = of([jax.ShapeDtypeStruct(*one) for one in given])
    ways = [*rules.vijp_rules(layer, x), *rules.invert_rules(layer, x)]
    if any(not isinstance(one, (rules.Unavailable, rules.WholeFragment)) for one in ways):
        return None
    reasons = [one.reason for one in ways if isinstance(one, rules.Unavailable)]
    return f"{type(layer).__name__} has no vijp: {reasons[0] if reasons else 'none is defined'}"
