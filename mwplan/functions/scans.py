"""Scans over stacked layers, opened: their body stands in the list of operations once, as a region.

A `lax.scan` repeats its body `length` times, with a row of each of its stacked arrays. Where these arrays are
there before the chain begins (stacked parameters, keys, data), or are made of such row by row (weights with
masks, noise on weights), the region becomes a `mw.Stack`, and its pieces layers like all others. Of a scan
that runs backwards the stacked arrays are reversed first, a copy. Where stacked arrays are computed by the
layers before, or the stacked results are used, the scan stays one operation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from mwplan.common import trees
from mwplan.functions.gradients import dependents
from mwplan.functions.kinds import ELEMENTWISE
from mwplan.functions.tracing import ALIAS, CHECKPOINTS, Flat, Operand, Region, Step, Traced, needed
from mwplan.network.canonical import scan_counts

#: Operations on each element that change its type at most.
EACH = ELEMENTWISE | {"convert_element_type", "copy", "reduce_precision", "stop_gradient"}


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
        if closed.consts or not carries or not params["length"]:
            return None
        if not self.used.isdisjoint(step.outputs[carries:]) or not self.used.intersection(
            step.outputs[:carries]
        ):
            return None
        if not all(isinstance(v, int) and self._has_rows(v) for v in stacked):
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
        reversals: list[Step] = []
        if params["reverse"]:
            reversals = [self._reversed(flat, step, row, rows) for row in rows]
        made = flat.walk(closed.jaxpr, (), [*step.inputs[:consts], *start, *given], step.scope)
        after = [self._alias(step, one, v, number) for one, v in zip(made[:carries], step.outputs)]
        inside = needed(flat.steps, made[:carries])
        self.regions.append(Region(depth=params["length"], carry=dict(zip(start, step.outputs)), rows=rows))
        return [*reversals, *before, *(replace(one, region=number) for one in inside), *after]

    def _alias(self, step: Step, one: Operand, value: int, region: int) -> Step:
        """Another name for a value."""
        return Step(
            primitive=ALIAS, params={"aval": self.avals[value]}, inputs=(one,), outputs=(value,),
            scope=step.scope, context=step.context, region=region,
        )  # fmt: skip

    def _has_rows(self, value: int) -> bool:
        """Whether the rows of a stacked value are there before the chain begins, or made of such."""
        if value not in self.activations:
            return True
        maker = self.makers.get(value)
        if maker is None or not self._by_rows(maker):
            return False
        return all(self._has_rows(v) for v in maker.read if self._is_stacked(v, maker))

    def _is_stacked(self, v: Operand, maker: Step) -> bool:
        """Whether an operand of `maker` has a row for each of its result's."""
        shape = self._shape(v)
        if maker.primitive.name != "broadcast_in_dim":
            return bool(shape)
        return bool(shape) and maker.params["broadcast_dimensions"][0] == 0

    def _shape(self, one: Operand) -> tuple[int, ...]:
        aval = self.avals[one] if isinstance(one, int) else one.aval
        return tuple(aval.shape)

    def _by_rows(self, maker: Step) -> bool:
        """Whether an operation makes each row of its result of the same row of what it reads."""
        if maker.params.get("sharding"):
            return False
        shapes = [self._shape(one) for one in maker.inputs]
        shape = self.avals[maker.outputs[0]].shape
        if maker.primitive.name == "broadcast_in_dim":
            stacked = self._is_stacked(maker.inputs[0], maker)
            return len(shapes) == 1 and (not stacked or shapes[0][0] == shape[0])
        return maker.primitive.name in EACH and all(one in ((), shape) for one in shapes)

    def _row(self, flat: Flat, value: int, rows: dict[int, int]) -> int:
        """A row of a stacked value. What is made of one array element by element is made of the row instead
        (casts of all parameters to another precision), and so is what is the same in all rows, or is made by
        rows of parameters and data both."""
        maker = self.makers.get(value)
        if maker is not None and self._by_rows(maker):
            stacked = [one for one in maker.read if self._is_stacked(one, maker)]
            each = maker.primitive.name in EACH
            if value in self.activations or not stacked or (each and len(stacked) == len(maker.read) == 1):
                out = flat.value(_row_aval(self.avals[value]))
                inputs = tuple(
                    self._row(flat, one, rows) if isinstance(one, int) and one in stacked else one
                    for one in maker.inputs
                )
                params = maker.params if each else _row_params(maker.params)
                flat.steps.append(replace(maker, inputs=inputs, outputs=(out,), params=params))
                return out
        row = next((row for row, of in rows.items() if of == value), None)
        if row is None:
            row = flat.value(_row_aval(self.avals[value]))
            rows[row] = value
        return row

    def _reversed(self, flat: Flat, step: Step, row: int, rows: dict[int, int]) -> Step:
        """What makes the stacked value of a row in reverse order."""
        value, rows[row] = rows[row], flat.value(self.avals[rows[row]])
        return Step(
            primitive=lax.rev_p, params={"dimensions": (0,)}, inputs=(value,), outputs=(rows[row],),
            scope=step.scope, context=step.context,
        )  # fmt: skip


def _row_aval(aval: Any) -> Any:
    return aval.update(shape=aval.shape[1:])


def _row_params(params: dict[str, Any]) -> dict[str, Any]:
    """Those of a `broadcast_in_dim`, of a row."""
    dims = tuple(d - 1 for d in params["broadcast_dimensions"] if d)
    return {**params, "shape": params["shape"][1:], "broadcast_dimensions": dims}


def stacked_by(regions: Sequence[Region]) -> dict[int, int]:
    """Of every row, the stacked value."""
    return {row: value for region in regions for row, value in region.rows.items()}


def in_rows(stacked: Any) -> Any:
    """A stacked value that was computed, one row after the other in memory. In whatever layout the compiler
    made it (a transpose is but another layout), each loop that wants the other would have a copy."""
    if trees.is_key(stacked):
        return stacked
    return with_layout_constraint(stacked, Layout(tuple(range(stacked.ndim))))
