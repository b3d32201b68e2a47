"""What depends on what: which values carry a gradient, what is computed from the arguments alone, and what is
alive where.

A *source* is an argument's leaf, an array that the function closes over, or a small value computed from these
alone before the chain begins (random keys, positions, slices of stacked parameters). Sources are there all
the time: they cost nothing at a cut. *Cheap* values are made from sources by casts, shapes and elementwise
operations: every piece that reads one makes it itself."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mwplan.functions.gradients import dependents, gradients
from mwplan.functions.order import cheap, hoisted, late, weights
from mwplan.functions.tracing import ALIAS, Step, Traced


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

    def alive_bytes(self, start: int, stop: int) -> np.ndarray:
        """For each position `start .. stop`, the bytes made before it that are read after it. Results do not
        count: they stay alive to the end wherever the cuts are. In a region, nor does what is made before
        it."""
        inside = self.steps[start].region >= 0
        change = np.zeros(stop - start + 2, dtype=np.int64)
        born, dies = self.lifetimes()
        carry = self.traced.regions[self.steps[start].region].carry if inside else {}
        for value, last in dies.items():
            first = born[value]
            if last < len(self.steps) and last >= start and (first >= start or not inside or value in carry):
                begins, ends = max(first + 1 - start, 0), min(last + 1 - start, stop - start + 1)
                if begins < ends:
                    change[begins] += self.traced.nbytes(value)
                    change[ends] -= self.traced.nbytes(value)
        return np.cumsum(change)[: stop - start + 1]

    def spans(self) -> Sequence[tuple[int, int, int]]:
        """`(start, stop, region)` of each stretch of operations in one region, or in none (-1)."""
        bounds = [i for i, step in enumerate(self.steps) if i == 0 or step.region != self.steps[i - 1].region]
        return [(a, b, self.steps[a].region) for a, b in zip(bounds, [*bounds[1:], len(self.steps)])]


def analyse(traced: Traced) -> Flow:
    """The flow of a function. Raises `ArgumentError` where the loss does not depend on any parameter."""
    differentiated, carrying = gradients(traced)
    rows = {row for region in traced.regions for row in region.rows}
    of_params = dependents(traced.steps, differentiated, traced.regions)
    of_data = dependents(traced.steps, set(range(traced.sources)) - differentiated, traced.regions)
    both = (of_params & of_data) - weights(traced, of_params, of_data)
    before = hoisted(traced, of_params, of_data)
    prologue = [step for i, step in enumerate(traced.steps) if i in before]
    sources = set(range(traced.sources)) | rows | {v for step in prologue for v in step.outputs}
    rest = [
        (step, step.primitive is not ALIAS and both.isdisjoint(step.outputs))
        for i, step in enumerate(traced.steps)
        if i not in before
    ]
    recipes = cheap(rest, sources, traced.outputs[0])
    ordered = late([(step, alone) for step, alone in rest if step.outputs[0] not in recipes], recipes)
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
    return replace(flow, reads=tuple(tuple(flow.closure(step.read)[1]) for step in flow.steps))
