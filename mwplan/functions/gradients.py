"""Which values carry the loss's gradient, and what depends on what."""

from __future__ import annotations

from collections.abc import Sequence

from mwplan.common import trees
from mwplan.common.errors import ArgumentError
from mwplan.functions.tracing import Region, Step, Traced


def gradients(traced: Traced) -> tuple[set[int], set[int]]:
    """The differentiated parameters, and the values that lie between them and the loss. Raises
    `ArgumentError` where there are none."""
    count = sum(i < traced.signature.params for i in traced.signature.dynamic)
    of_params = {v for v in range(count) if trees.is_inexact(traced.avals[v])}
    depends = _differentiable(traced, of_params)
    loss = traced.outputs[0]
    if not isinstance(loss, int) or loss not in depends:
        raise ArgumentError(
            "`loss` does not depend, differentiably, on any array of `params`: its gradient is zero "
            "everywhere. Are the "
            "parameters the first argument, and floating-point?"
        )
    wanted = _wanted(traced, loss, depends)
    for region in traced.regions:
        for before, after in region.carry.items():
            if before in wanted or after in wanted:
                wanted.update((before, after))
    return {v for v in range(count) if v in wanted}, wanted


def _differentiable(traced: Traced, on: set[int]) -> set[int]:
    """`on`, and the values whose derivatives with respect to it are not zero by what the operations are."""
    found = dict.fromkeys(on)
    stacked = _stacked(traced.regions)
    while True:
        count = len(found)
        for step in traced.steps:
            if step.primitive.name == "stop_gradient":
                continue
            if any(v in found or stacked.get(v) in found for v in step.read):
                found.update(dict.fromkeys(v for v in step.outputs if trees.is_inexact(traced.avals[v])))
        found.update(dict.fromkeys(row for row, value in stacked.items() if value in found))
        for region in traced.regions:
            found.update(
                dict.fromkeys(
                    before
                    for before, after in region.carry.items()
                    if after in found and trees.is_inexact(traced.avals[before])
                )
            )
        if len(found) == count:
            return {*found}


def _wanted(traced: Traced, loss: int, depends: set[int]) -> set[int]:
    """Those of `depends` that the loss depends on."""
    wanted = {loss}
    stacked = _stacked(traced.regions)
    while True:
        count = len(wanted)
        for step in reversed(traced.steps):
            if step.primitive.name != "stop_gradient" and not wanted.isdisjoint(step.outputs):
                wanted.update(v for v in step.read if v in depends)
                wanted.update(stacked[v] for v in step.read if v in stacked and v in depends)
        for region in traced.regions:
            wanted.update(after for before, after in region.carry.items() if before in wanted)
        if len(wanted) == count:
            return wanted


def dependents(steps: Sequence[Step], on: set[int], regions: Sequence[Region] = ()) -> set[int]:
    """`on`, and all that depends on them."""
    found = set(on)
    stacked = _stacked(regions)
    while True:
        count = len(found)
        found.update(row for row, value in stacked.items() if value in found)
        for step in steps:
            if any(v in found or stacked.get(v) in found for v in step.read):
                found.update(step.outputs)
        for region in regions:
            found.update(before for before, after in region.carry.items() if after in found)
        if len(found) == count or not regions:
            return found


def _stacked(regions: Sequence[Region]) -> dict[int, int]:
    return {row: value for region in regions for row, value in region.rows.items()}
