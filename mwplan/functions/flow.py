"""What depends on what: which values carry a gradient, what is computed from the arguments alone, and what is
alive where.

A *source* is an argument's leaf, an array that the function closes over, or a small value computed from these
alone before the chain begins (random keys, positions, slices of stacked parameters). Sources are there all
the time: they cost nothing at a cut. *Cheap* values are made from sources by casts, shapes and elementwise
operations: every piece that reads one makes it itself."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from mwplan.common import trees
from mwplan.common.errors import ArgumentError
from mwplan.functions.tracing import Step, Traced

#: Operations that change types and shapes alone.
SHAPES = frozenset(
    [
        "broadcast_in_dim",
        "convert_element_type",
        "copy",
        "expand_dims",
        "iota",
        "reshape",
        "rev",
        "slice",
        "squeeze",
        "transpose",
        "reduce_precision",
        "bitcast_convert_type",
        "stop_gradient",
        "name",
        "pvary",
        "pcast",
        "split",
        "unstack",
    ]
)
#: Operations on each element by itself.
ELEMENTWISE = frozenset(
    [
        "abs",
        "acos",
        "acosh",
        "add",
        "add_any",
        "and",
        "asin",
        "asinh",
        "atan",
        "atan2",
        "atanh",
        "cbrt",
        "ceil",
        "clamp",
        "complex",
        "conj",
        "cos",
        "cosh",
        "div",
        "eq",
        "erf",
        "erf_inv",
        "erfc",
        "exp",
        "exp2",
        "expm1",
        "floor",
        "ge",
        "gt",
        "imag",
        "integer_pow",
        "is_finite",
        "le",
        "log",
        "log1p",
        "logistic",
        "lt",
        "max",
        "min",
        "mul",
        "ne",
        "neg",
        "nextafter",
        "not",
        "or",
        "pow",
        "real",
        "rem",
        "round",
        "rsqrt",
        "select_n",
        "shift_left",
        "shift_right_arithmetic",
        "shift_right_logical",
        "sign",
        "sin",
        "sinh",
        "sqrt",
        "square",
        "sub",
        "tan",
        "tanh",
        "xor",
        "population_count",
    ]
)
#: Operations that take a part of an array.
SLICES = frozenset(["slice", "squeeze", "dynamic_slice", "gather", "split", "unstack", "reshape"])
#: Values of at most so many bytes, made from data alone, are computed before the chain.
SMALL_BYTES = 1024
#: A cheap value takes at most so many operations.
CHEAP_STEPS = 64


@dataclass(frozen=True, kw_only=True)
class Flow:
    """The operations of a function in the order in which they will be cut, and what is known of its values.

    **Attributes:** `differentiated`, the parameters that the loss depends on, differentiably; `carrying`, all
    values that carry its gradient; `prologue`, what is computed before the chain, and `sources`, all values
    that are there before it; `steps`, the others, in order, without cheap ones; `recipes`, the operation that
    makes each cheap value; `reads`, of each of `steps`, the values that are not cheap which it needs, in
    order."""

    traced: Traced
    differentiated: frozenset[int]
    carrying: frozenset[int]
    prologue: tuple[Step, ...]
    sources: frozenset[int]
    steps: tuple[Step, ...]
    recipes: dict[int, Step]
    reads: tuple[tuple[int, ...], ...]

    def closure(self, values: Iterable[int]) -> tuple[list[Step], list[int]]:
        """The cheap operations that make the cheap ones of `values`, in order, and the values that are not
        cheap which these and `values` need, in the order in which they are met."""
        made: dict[int, None] = {}
        steps: list[Step] = []
        needed: dict[int, None] = {}
        waiting = list(values)[::-1]
        while waiting:
            value = waiting.pop()
            step = self.recipes.get(value)
            if step is None:
                needed[value] = None
            elif value in made:
                continue
            elif missing := [v for v in step.read if v in self.recipes and v not in made]:
                waiting += [value, *missing[::-1]]
            else:
                made.update(dict.fromkeys(step.outputs))
                steps.append(step)
                needed.update({v: None for v in step.read if v not in self.recipes})
        return steps, list(needed)

    def results(self) -> list[int]:
        """The values that the last piece must return: results that are neither constants nor there from the
        start."""
        return [v for v in dict.fromkeys(self.traced.outputs) if isinstance(v, int) and v not in self.sources]

    def lifetimes(self) -> tuple[dict[int, int], dict[int, int]]:
        """Of every value that `steps` make: the step that makes it, and the last that reads it (`len(steps)`:
        a result)."""
        born = {v: i for i, step in enumerate(self.steps) for v in step.outputs}
        dies = {}
        for i, read in enumerate(self.reads):
            dies.update({v: i for v in read if v in born})
        dies.update(dict.fromkeys((v for v in self.closure(self.results())[1] if v in born), len(self.steps)))
        return born, dies

    def alive_bytes(self) -> np.ndarray:
        """For each position `0 .. len(steps)`, the bytes made before it that are read after it. Results do
        not count: they stay alive to the end wherever the cuts are."""
        change = np.zeros(len(self.steps) + 2, dtype=np.int64)
        born, dies = self.lifetimes()
        for value, last in dies.items():
            if last < len(self.steps):
                change[born[value] + 1] += self.traced.nbytes(value)
                change[last + 1] -= self.traced.nbytes(value)
        return np.cumsum(change)[: len(self.steps) + 1]


def analyse(traced: Traced) -> Flow:
    """The flow of a function. Raises `ArgumentError` where the loss does not depend on any parameter."""
    differentiated, carrying = _gradients(traced)
    of_params = _dependents(traced, differentiated)
    of_data = _dependents(traced, set(range(traced.sources)) - differentiated)
    from_sources = [
        not (any(v in of_params for v in step.outputs) and any(v in of_data for v in step.outputs))
        for step in traced.steps
    ]
    hoisted = _hoisted(traced, of_params, of_data)
    prologue = [step for i, step in enumerate(traced.steps) if i in hoisted]
    sources = set(range(traced.sources)) | {v for step in prologue for v in step.outputs}
    rest = [
        (step, alone) for i, (step, alone) in enumerate(zip(traced.steps, from_sources)) if i not in hoisted
    ]
    recipes = _cheap(rest, sources, traced.outputs[0])
    ordered = _late([(step, alone) for step, alone in rest if step.outputs[0] not in recipes], recipes)
    flow = Flow(
        traced=traced,
        differentiated=frozenset(differentiated),
        carrying=frozenset(carrying),
        prologue=tuple(prologue),
        sources=frozenset(sources),
        steps=tuple(ordered),
        recipes=recipes,
        reads=(),
    )
    reads = tuple(tuple(flow.closure(step.read)[1]) for step in flow.steps)
    return Flow(**{**{name: getattr(flow, name) for name in flow.__dataclass_fields__}, "reads": reads})


def _gradients(traced: Traced) -> tuple[set[int], set[int]]:
    """The differentiated parameters, and the values that lie between them and the loss."""
    count = sum(i < traced.signature.params for i in traced.signature.dynamic)
    depends = {v for v in range(count) if trees.is_inexact(traced.avals[v])}
    for step in traced.steps:
        if step.primitive.name != "stop_gradient" and not depends.isdisjoint(step.read):
            depends.update(v for v in step.outputs if trees.is_inexact(traced.avals[v]))
    loss = traced.outputs[0]
    if not isinstance(loss, int) or loss not in depends:
        raise ArgumentError(
            "`loss` does not depend, differentiably, on any array of `params`: its gradient is zero "
            "everywhere. Are the parameters "
            "the first argument, and floating-point?"
        )
    wanted = {loss}
    for step in reversed(traced.steps):
        if step.primitive.name != "stop_gradient" and not wanted.isdisjoint(step.outputs):
            wanted.update(v for v in step.read if v in depends)
    return {v for v in range(count) if v in wanted}, wanted


def _dependents(traced: Traced, on: set[int]) -> set[int]:
    """`on`, and all that depends on them."""
    found = set(on)
    for step in traced.steps:
        if not found.isdisjoint(step.read):
            found.update(step.outputs)
    return found


def _hoisted(traced: Traced, of_params: set[int], of_data: set[int]) -> set[int]:
    """The steps that are executed before the chain: small values made of data alone, random keys, and parts
    of parameters."""
    ready = set(range(traced.sources))
    whole = {
        v: v for v in ready if v in of_params
    }  # the parameter that a value is a part of, or all of in another shape
    chosen: dict[int, bool] = {}  # candidates, and whether each is wanted for itself
    for i, step in enumerate(traced.steps):
        if not ready.issuperset(step.read) or traced.outputs[0] in step.outputs:
            continue
        avals = [traced.avals[v] for v in step.outputs]
        of = [whole[v] for v in step.read if v in whole]
        if of_params.isdisjoint(step.outputs):
            small = sum(map(trees.nbytes, avals)) <= SMALL_BYTES
            keys = any(jax.dtypes.issubdtype(a.dtype, jax.dtypes.extended) for a in avals)
            if not small or not (keys or of_data.intersection(step.outputs)):
                continue
            chosen[i] = True
        elif step.primitive.name in SLICES and len(of) == 1 and of_data.isdisjoint(step.outputs):
            chosen[i] = any(a.size < traced.avals[of[0]].size for a in avals)
            whole.update(dict.fromkeys(step.outputs, of[0]))
        else:
            continue
        ready.update(step.outputs)
    wanted: set[int] = set()
    kept: set[int] = set()
    for i in reversed(chosen):
        step = traced.steps[i]
        if chosen[i] or not wanted.isdisjoint(step.outputs):
            kept.add(i)
            wanted.update(step.read)
    return kept


def _cheap(steps: Sequence[tuple[Step, bool]], sources: set[int], loss: Any) -> dict[int, Step]:
    """The cheap values and the operations that make them."""
    cost: dict[int, int] = dict.fromkeys(sources, 0)
    recipes: dict[int, Step] = {}
    for step, alone in steps:
        if loss in step.outputs:
            continue
        if alone and step.primitive.name in SHAPES | ELEMENTWISE and all(v in cost for v in step.read):
            total = 1 + sum(cost[v] for v in step.read)
            if total <= CHEAP_STEPS:
                cost.update(dict.fromkeys(step.outputs, total))
                recipes.update(dict.fromkeys(step.outputs, step))
    return recipes


def _late(steps: Sequence[tuple[Step, bool]], recipes: dict[int, Step]) -> list[Step]:
    """The operations in program order, but what is computed from sources alone right before its first use."""
    waiting = {v: step for step, alone in steps if alone for v in step.outputs}
    if len({id(step) for step in waiting.values()}) == len(steps):
        return [step for step, _ in steps]  # a function of parameters alone
    out: list[Step] = []
    done: set[int] = set()

    def place(step: Step) -> None:
        todo = [step]
        while todo:
            one = todo[-1]
            if id(one) in done:
                todo.pop()
                continue
            before = [
                waiting[v] for v in _behind(one, recipes) if v in waiting and id(waiting[v]) not in done
            ]
            if before:
                todo += before[::-1]
            else:
                done.add(id(todo.pop()))
                out.append(one)

    for step, alone in steps:
        if not alone:
            place(step)
    for step, _ in steps:  # what only results need
        place(step)
    return out


def _behind(step: Step, recipes: dict[int, Step]) -> list[int]:
    """The values that are not cheap which `step` reads, itself or through cheap ones."""
    found: dict[int, None] = {}
    seen: set[int] = set()
    waiting = list(step.read)
    while waiting:
        value = waiting.pop()
        if value in recipes:
            if value not in seen:
                seen.add(value)
                waiting += recipes[value].read
        else:
            found[value] = None
    return list(found)
