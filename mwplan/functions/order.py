"""What is computed before the chain, what each piece computes for itself, and the order of the rest."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mwplan.common import trees
from mwplan.functions.kinds import ELEMENTWISE, SHAPES, SLICES
from mwplan.functions.tracing import ALIAS, Step, Traced

#: Values of at most so many bytes, made from data alone, are computed before the chain.
SMALL_BYTES = 1024
#: A cheap value takes at most so many operations.
CHEAP_STEPS = 64


def hoisted(traced: Traced, of_params: set[int], of_data: set[int]) -> set[int]:
    """The steps that are executed before the chain: small values made of data alone, random keys, parts of
    parameters, and what the rows of stacks are cut out of."""
    chosen = dict.fromkeys(_makers(traced, [v for one in traced.regions for v in one.rows.values()]), True)
    ready = set(range(traced.sources)) | {v for i in chosen for v in traced.steps[i].outputs}
    whole = {
        v: v for v in range(traced.sources) if v in of_params
    }  # what a value is a part of, or another shape of
    for i, step in enumerate(traced.steps):
        if i in chosen or not ready.issuperset(step.read) or traced.outputs[0] in step.outputs:
            continue
        avals = [traced.avals[v] for v in step.outputs]
        of = [whole[v] for v in step.read if v in whole]
        if step.primitive is ALIAS:
            continue
        if of_params.isdisjoint(step.outputs):
            small = sum(map(trees.nbytes, avals)) <= SMALL_BYTES
            keys = any(jnp.issubdtype(a.dtype, jax.dtypes.extended) for a in avals)
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
    for i in sorted(chosen, reverse=True):
        step = traced.steps[i]
        if chosen[i] or not wanted.isdisjoint(step.outputs):
            kept.add(i)
            wanted.update(step.read)
    return kept


def _makers(traced: Traced, values: Sequence[int]) -> list[int]:
    """The steps that make these values, and all that they need."""
    wanted, found = {*values}, []
    for i in range(len(traced.steps) - 1, -1, -1):
        if not wanted.isdisjoint(traced.steps[i].outputs):
            found.append(i)
            wanted.update(traced.steps[i].read)
    return found


def weights(traced: Traced, of_params: set[int], of_data: set[int]) -> set[int]:
    """What is made of parameters element by element, though of data too, in no larger a shape: weights with a
    mask, with noise, in steps. They are no activations."""
    both = of_params & of_data
    found = of_params - both
    for step in traced.steps:
        if step.primitive.name not in ELEMENTWISE | SHAPES or both.isdisjoint(step.outputs):
            continue
        size = sum(traced.avals[v].size for v in step.outputs)
        largest = max((traced.avals[v].size for v in step.read if v in found), default=0)
        if largest >= size and all(v in found or v not in both for v in step.read):
            found.update(step.outputs)
    return found & both


def cheap(steps: Sequence[tuple[Step, bool]], sources: set[int], loss: Any) -> dict[int, Step]:
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


def late(steps: Sequence[tuple[Step, bool]], recipes: dict[int, Step]) -> list[Step]:
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

    for region, group in itertools.groupby(steps, key=lambda pair: pair[0].region):
        part = list(group)
        if region >= 0:  # what it needs from outside stands before it, and all of it together
            for step, _ in part:
                for v in _behind(step, recipes):
                    if v in waiting and waiting[v].region != region:
                        place(waiting[v])
        for step, alone in part:
            if not alone:
                place(step)
        if region >= 0:
            for step, _ in part:
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
