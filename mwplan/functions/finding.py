"""The layers that stand in a flow, and where it pays to cut around them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import jax

from mwplan.common import trees
from mwplan.functions.flow import Flow
from mwplan.functions.gradients import dependents
from mwplan.functions.recognition import Found, Listing, of, passable, recognise, structs
from mwplan.layers import shapes
from mwplan.layers.coupling import Coupling
from mwplan.layers.sequential import Sequential

#: Layers that only move numbers: no reason to cut.
MOVING = (shapes.Reshape, shapes.Permute, shapes.Flatten, shapes.Split, shapes.Concatenate, shapes.Swap)

#: What may be alive at the start of layers that are cut around, in units of their input.
MOST_CARRIED = 1.5
#: Layers in a row, not counting those that only move numbers, that are cut around.
LEAST_LAYERS = 3


def find(flow: Flow) -> list[Found]:
    """The layers among a flow's operations, in order."""
    found: list[Found] = []
    for start, stop, region in flow.spans():
        found += recognise(_listing(flow, start, stop, region), start, stop)
    return found


def data(flow: Flow) -> set[int]:
    """The arguments that are data: floating-point arrays that are not among the parameters."""
    signature = flow.traced.signature
    return {
        v
        for v, i in enumerate(signature.dynamic)
        if i >= signature.params and trees.is_inexact(flow.traced.avals[v]) and flow.traced.avals[v].shape
    }


def _listing(flow: Flow, start: int, stop: int, region: int) -> Listing:
    traced = flow.traced
    inputs = data(flow)
    others = set(range(traced.sources)) - flow.differentiated
    both = dependents(traced.steps, set(flow.differentiated), traced.regions) & dependents(
        traced.steps, others, traced.regions
    )
    of_data = dependents(traced.steps, inputs, traced.regions)
    born, dies = flow.lifetimes()
    for i, read in enumerate(flow.reads):
        dies.update({v: i for v in read if v in inputs})
    dies.update({v: len(flow.steps) for v in flow.closure(flow.results())[1] if v in inputs})
    made = {v for v in born if v in both or v in of_data}
    activations = frozenset(made | inputs)
    outside = frozenset[int]()
    if region >= 0:
        carry = traced.regions[region].carry
        outside = frozenset(v for v in activations if born.get(v, -1) < start and v not in carry)
    return Listing(
        steps=flow.steps,
        recipes=flow.recipes,
        reads=flow.reads,
        avals=traced.avals,
        activations=activations,
        dies=dies,
        barred=frozenset(v for v in flow.recipes if v in of_data),
        outside=outside,
    )


def why_not(found: Found, avals: Sequence[object]) -> str | None:
    """Why a layer can neither be passed by a vijp nor inverted; None where it can."""
    x = of([jax.ShapeDtypeStruct(avals[v].shape, avals[v].dtype) for v in found.inputs])  # type: ignore[attr-defined]
    return passable(structs(found.layer), x)


def runs(flow: Flow, found: Sequence[Found]) -> list[list[Found]]:
    """Layers one right after another, all of which can be passed or inverted: `LEAST_LAYERS` that do not
    just move numbers, or a coupling."""
    out: list[list[Found]] = []
    for one in found:
        if why_not(one, flow.traced.avals) is not None:
            continue
        adjacent = out and out[-1][-1].stop == one.start and {*out[-1][-1].results} == {*one.inputs}
        same = adjacent and flow.steps[one.start].region == flow.steps[out[-1][-1].start].region
        if same:
            out[-1].append(one)
        else:
            out.append([one])
    some = [run for run in map(_trimmed, out) if _pays(run)]
    if not some:
        return []
    made, _ = flow.lifetimes()
    alive = flow.alive_bytes(0, len(flow.steps))

    def carries_little(run: list[Found]) -> bool:
        """Whether little else is alive where a run begins: not in the branch of a residual block."""
        own = sum(flow.traced.nbytes(v) for v in run[0].inputs if v in made)
        return not own or int(alive[run[0].start]) <= MOST_CARRIED * own

    return [run for run in some if carries_little(run)]


def _moves(layer: Any) -> bool:
    """Whether a layer only moves numbers."""
    return isinstance(layer, MOVING) or (isinstance(layer, Sequential) and all(map(_moves, layer.layers)))


def _trimmed(run: list[Found]) -> list[Found]:
    """Without what only moves numbers at its ends."""
    while run and _moves(run[-1].layer) and not isinstance(run[-1].layer, shapes.Concatenate):
        run = run[:-1]
    while run and _moves(run[0].layer) and not isinstance(run[0].layer, shapes.Split):
        run = run[1:]
    return run


def _pays(run: list[Found]) -> bool:
    layers = [one for one in run if not _moves(one.layer)]
    return len(layers) >= LEAST_LAYERS or any(_couples(one.layer) for one in layers)


def _couples(layer: Any) -> bool:
    """Whether a layer is a coupling, or one of exchanged halves."""
    return isinstance(layer, Coupling) or (isinstance(layer, Sequential) and any(map(_couples, layer.layers)))


def tiled(found: Sequence[Found], start: int, stop: int) -> list[Found]:
    """The layers that cover the operations `start .. stop - 1`; none where they do not."""
    some = [one for one in found if start <= one.start and one.stop <= stop]
    bounds = [start, *(one.stop for one in some)]
    whole = [one.start for one in some] == bounds[:-1] and bounds[-1] == stop
    linked = all(a.results == b.inputs for a, b in itertools.pairwise(some))
    return some if some and whole and linked else []
