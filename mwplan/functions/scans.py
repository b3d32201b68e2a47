"""Scans over stacked layers, opened: their body stands in the list of operations once, as a region.

A `lax.scan` repeats its body `length` times, with a row of each of its stacked arrays. Where these arrays are
there before the chain begins (stacked parameters, keys, data) the region becomes a `mw.Stack`, and its pieces
layers like all others; where they are computed by the layers before, where the stacked results are used, or
the scan runs backwards, the scan stays one operation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mwplan.common import trees
from mwplan.functions.gradients import dependents
from mwplan.functions.kinds import ELEMENTWISE
from mwplan.functions.tracing import ALIAS, CHECKPOINTS, Constant, Flat, Operand, Region, Step, Traced, needed
from mwplan.network.canonical import scan_counts

#: Operations on each element that change its type at most.
UNARY = ELEMENTWISE | {"convert_element_type", "copy", "reduce_precision", "stop_gradient"}


def expand(traced: Traced, *, keep_checkpoints: bool = False) -> Traced:
    """`traced` with the scans that can be stacks opened."""
    inexact = {v for v in range(traced.sources) if _is_parameter(traced, v)}
    of_params = dependents(traced.steps, inexact)
    of_data = dependents(traced.steps, set(range(traced.sources)) - inexact)
    used = {v for step in traced.steps for v in step.read} | {v for v in traced.outputs if isinstance(v, int)}
    opener = _Opener(traced, of_params & of_data, used, frozenset(CHECKPOINTS if keep_checkpoints else ()))
    steps: list[Step] = []
    for step in traced.steps:
        steps += (opener.opened(step) if step.primitive.name == "scan" else None) or [step]
    if not opener.regions:
        return traced
    return replace(
        traced,
        steps=tuple(needed(steps, traced.outputs, opener.regions)),
        avals=tuple(opener.avals),
        regions=tuple(opener.regions),
    )


def _is_parameter(traced: Traced, v: int) -> bool:
    signature = traced.signature
    of_params = v < len(signature.dynamic) and signature.dynamic[v] < signature.params
    return of_params and trees.is_inexact(traced.avals[v])


@dataclass
class _Opener:
    """Opens scans; `activations`, the values that depend on parameters and data both."""

    traced: Traced
    activations: set[int]
    used: set[int]
    keep: frozenset[str]

    def __post_init__(self) -> None:
        self.avals = list(self.traced.avals)
        self.regions: list[Region] = []
        self.makers = {v: step for step in self.traced.steps for v in step.outputs}

    def opened(self, step: Step) -> list[Step] | None:
        """The steps of a scan's body, with the names of its carry before and after them; None where it must
        stay."""
        params = step.params
        consts, carries = scan_counts(params)
        closed = params["jaxpr"]
        stacked = step.inputs[consts + carries :]
        if params["reverse"] or closed.consts or not carries or not params["length"]:
            return None
        if not self.used.isdisjoint(step.outputs[carries:]) or not self.used.intersection(
            step.outputs[:carries]
        ):
            return None
        if not all(isinstance(v, int) and v not in self.activations for v in stacked):
            return None
        number = len(self.regions)
        flat = Flat(self.keep, avals=self.avals)
        start = [flat.value(var.aval) for var in closed.jaxpr.invars[consts : consts + carries]]
        before = [self._alias(step, one, v, -1) for one, v in zip(step.inputs[consts:], start)]
        rows: dict[int, int] = {}
        given: list[Operand] = []
        for one in stacked:
            assert isinstance(one, int)
            given.append(self._row(flat, one, rows))
        made = flat.walk(closed.jaxpr, (), [*step.inputs[:consts], *start, *given], step.scope)
        after = [self._alias(step, one, v, number) for one, v in zip(made[:carries], step.outputs)]
        inside = needed(flat.steps, made[:carries])
        self.regions.append(Region(depth=params["length"], carry=dict(zip(start, step.outputs)), rows=rows))
        return [*before, *(replace(one, region=number) for one in inside), *after]

    def _alias(self, step: Step, one: Operand, value: int, region: int) -> Step:
        """Another name for a value."""
        return Step(
            primitive=ALIAS, params={"aval": self.avals[value]}, inputs=(one,), outputs=(value,),
            scope=step.scope, context=step.context, region=region,
        )  # fmt: skip

    def _row(self, flat: Flat, value: int, rows: dict[int, int]) -> int:
        """A row of a stacked value. What was made of it element by element is made of the row instead: casts
        of all parameters to another precision."""
        maker = self.makers.get(value)
        if maker is not None and maker.primitive.name in UNARY and not maker.params.get("sharding"):
            arrays = [one for one in maker.inputs if isinstance(one, int)]
            scalars = all(one.aval.shape == () for one in maker.inputs if isinstance(one, Constant))
            if len(arrays) == 1 and scalars and self.avals[arrays[0]].shape == self.avals[value].shape:
                inner = self._row(flat, arrays[0], rows)
                out = flat.value(_row_aval(self.avals[value]))
                inputs = tuple(inner if isinstance(one, int) else one for one in maker.inputs)
                flat.steps.append(replace(maker, inputs=inputs, outputs=(out,)))
                return out
        row = flat.value(_row_aval(self.avals[value]))
        rows[row] = value
        return row


def _row_aval(aval: Any) -> Any:
    return aval.update(shape=aval.shape[1:])


def stacked_by(regions: Sequence[Region]) -> dict[int, int]:
    """Of every row, the stacked value."""
    return {row: value for region in regions for row, value in region.rows.items()}
