"""MOONWALK runs backward: the reverse sweep R from input residuals, then the sweep M forward again."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from mwplan.common import trees
from mwplan.execution import barriers, loops, repeats, scans
from mwplan.execution.repeats import Part, Repeat
from mwplan.execution.walker import Walker
from mwplan.network import operations, sketch
from mwplan.network.residuals import Residuals
from mwplan.plans.schedule import Run

PyTree = Any


def backward(walker: Walker, run: Run, held: list[Any], box: list[PyTree], depth: int) -> None:
    """R and M over a run. `held`, what F kept, is emptied; `box` as in `Interpreter.backward`."""
    pieces = repeats.pieces(walker.view, run)
    whole = walker.carried.filled(box.pop(), run.stop, walker.structs[run.stop])
    inside = [trees.widen(whole)]
    del whole
    compared = _compared(walker, run, pieces) if walker.check else None
    truth = got = None
    fragments: list[Any] = []
    for piece in reversed(pieces):  # R
        if piece.stop == compared:
            # Before the next operation's arrays are there.
            truth, inside[0] = walker.gate((sketch.take(inside[0]), inside[0]))
        fragments.append(_reversed(walker, run, piece, held, inside, depth))
    first = trees.cast_like(inside[0], walker.structs[run.start])
    box.append(walker.carried.dropped(first, run.start))
    del first
    if barriers.starts_early(walker.perform):
        # As where a stretch is recomputed: M's forward pass needs no cotangent, and might begin before R.
        walker.wait(run.start, inside)
    for piece in pieces:  # M
        if piece.count > 1:
            _scan_advance(walker, run, piece, fragments.pop(), inside, depth)
        else:
            _advance(walker, Part.of(run, piece, shift=False), fragments.pop(), inside, depth, run.stop)
        if piece.stop == compared:
            got, inside[0] = walker.gate((sketch.take(inside[0]), inside[0]))
    found = None if truth is None or got is None else sketch.discrepancy(truth, got)
    # The runs to the left need only what R found: without this barrier XLA may start them before M is done.
    # (One on the last `ct` would not do: what nobody uses is dropped from a barrier.)
    if run.start > 0:
        touched = {walker.view.places[layer].part for layer in range(run.start, run.stop)}
        parts = {i: walker.grads.parts[i] for i in touched}
        box[0], parts, found = walker.gate((box[0], parts, found))
        for i in touched:
            walker.grads.parts[i] = parts[i]
    if found is not None:
        walker.note(run, found)


def _compared(walker: Walker, run: Run, pieces: Sequence[Repeat]) -> int:
    """Where a run's cotangent is compared with the truth: the last position that its gradients need, so that
    a compiler drops the M sweep beyond, as it would without the comparison; its end, if it has no
    parameters."""
    for piece in reversed(pieces):
        if piece.count > 1 or trees.parameters(walker.layer(piece.stop)):
            return piece.stop
    return run.stop


def _reversed(walker: Walker, run: Run, piece: Repeat, held: list[Any], box: list[PyTree], depth: int) -> Any:
    """R over a piece of the run: its fragments."""
    if piece.count == 1:
        fragments, ct = _reverse(walker, Part.of(run, piece, shift=False), [held.pop()], box, depth)
        box.append(ct)
        return fragments
    part = Part.of(run, piece)

    def walk(inner: Walker, ct: PyTree, kept: list[Any]) -> Any:
        fragments, ct = _reverse(inner, part, kept, [ct], depth)
        return ct, fragments

    ct, rows = scans.backward(walker, piece, held.pop(), box.pop(), walk, single=True)
    box.append(ct)
    return rows


def _reverse(walker: Walker, part: Part, kept: list[Residuals], box: list[PyTree], depth: int) -> Any:
    """R over some layers: `(fragments, ct)`, the fragments from the last layer to the first."""
    fragments = []
    for layer in range(part.stop, part.start, -1):
        held = kept.pop()
        operation = functools.partial(operations.reverse, rule=walker.rule(part, layer))
        shared = walker.shared(layer, held)
        ct, fragment = walker.on_layer("reverse", layer, depth, operation, held, *shared, box.pop())
        box.append(ct)
        fragments.append(fragment)
        walker.release_shared(layer, held)
        del held, ct, fragment, shared
    return fragments, box.pop()


def _advance(
    walker: Walker, part: Part, fragments: list[Any], box: list[PyTree], depth: int, end: int | None
) -> None:
    """M over some layers; `end`, the last of the run, whose output nobody needs."""
    for layer in range(part.start + 1, part.stop + 1):
        operation: Callable[..., Any] = functools.partial(operations.vijp, rule=walker.rule(part, layer))
        ct = walker.on_layer(
            "rebuild", layer, depth, operation, walker.x[layer - 1], box.pop(), fragments.pop()
        )
        operation = functools.partial(operations.advance, last=layer == end)
        y, grads = walker.on_layer("advance", layer, depth, operation, walker.x[layer - 1], ct)
        walker.release(layer - 1)
        ct, y = walker.grads.found(walker, layer, depth, grads, (ct, y))
        box.append(ct)
        if layer != end:
            walker.claim(layer, y)
        del ct, y


def _scan_advance(
    walker: Walker, run: Run, piece: Repeat, fragments: Any, box: list[PyTree], depth: int
) -> None:
    part = Part.of(run, piece)
    carried = walker.carried.window(piece.start, piece.start + piece.span)
    same, values = carried.throughout(), jax.tree.leaves(walker.x[piece.start])

    def step(state: Any, repetition: Any, fragments: Any) -> Any:
        x, ct, buffers = state
        inner = walker.within(piece, repetition, buffers)
        inner.claim(0, carried.with_(x, 0, same, values))
        inside = [ct]
        _advance(inner, part, list(fragments), inside, depth, None)
        y = carried.without(inner.x[piece.span], piece.span, same)
        return (y, inside.pop(), inner.buffers(piece.once)), None

    state = (carried.without(walker.x[piece.start], 0, same), box.pop(), walker.buffers(piece))
    (x, ct, buffers), _ = loops.scan(step, state, fragments, piece.count)
    walker.took(piece, buffers)
    box.append(ct)
    if piece.stop < run.stop:
        walker.claim(piece.stop, carried.with_(x, piece.span, same, values))
    walker.release(piece.start)
