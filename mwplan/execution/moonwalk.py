"""MOONWALK runs backward: the reverse sweep R from input residuals, then the sweep M forward again."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from mwplan.common import trees
from mwplan.execution import barriers, loops, repeats, scans
from mwplan.execution.repeats import Part, Repeat
from mwplan.execution.walker import Walker
from mwplan.network import operations, sketch
from mwplan.network.residuals import Residuals
from mwplan.network.rules import WholeFragment
from mwplan.plans.schedule import Run

PyTree = Any


def backward(walker: Walker, run: Run, held: list[Any], box: list[PyTree], depth: int) -> None:
    """R and M over a run. `held`, what F kept, is emptied; `box` as in `Interpreter.backward`."""
    pieces = repeats.pieces(walker.view, run)
    whole = walker.carried.filled(box.pop(), run.stop, walker.structs[run.stop])
    inside = [trees.widen(whole)]
    del whole
    needed = _needed(walker, run, pieces)
    compared = needed if walker.check and not _is_whole(run, needed) else None
    truth: Any = None
    fragments: list[Any] = []
    for piece in reversed(pieces):  # R
        if piece.stop == compared:
            # Before the next operation's arrays are there.
            truth, inside[0] = walker.gate((sketch.take(inside[0]), inside[0]))
        checked = _checked(walker, run, piece, needed)
        fragments.append(_reversed(walker, run, piece, checked, held, inside, depth))
    first = trees.cast_like(inside[0], walker.structs[run.start])
    box.append(walker.carried.dropped(first, run.start))
    del first
    if barriers.starts_early(walker.perform):
        # As where a stretch is recomputed: M's forward pass needs no cotangent, and might begin before R.
        walker.wait(run.start, inside)
    distances: list[Array] = []
    for piece in pieces:  # M
        checked = _checked(walker, run, piece, needed)
        if piece.count > 1:
            distances += _scan_advance(walker, run, piece, checked, fragments.pop(), inside, depth)
        else:
            part = Part.of(run, piece, shift=False)
            distances += _advance(walker, part, checked, fragments.pop(), inside, depth, run.stop)
        if piece.stop == compared:
            got, inside[0] = walker.gate((sketch.take(inside[0]), inside[0]))
            distances.append(sketch.discrepancy(truth, got))
    found = functools.reduce(jnp.maximum, distances, jnp.zeros(())) if walker.check else None
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


def _needed(walker: Walker, run: Run, pieces: Sequence[Repeat]) -> int:
    """The last position that a run's gradients need; its end, if it has no parameters. Up to there the
    rebuilt cotangent is compared with the truth, so that a compiler drops the M sweep beyond, as it would
    without the comparison."""
    for piece in reversed(pieces):
        if piece.count > 1 or trees.parameters(walker.layer(piece.stop)):
            return piece.stop
    return run.stop


def _is_whole(run: Run, layer: int) -> bool:
    """Whether a layer's fragment is the whole cotangent: nothing that was rebuilt before goes on."""
    return run.options[layer - run.start - 1] == WholeFragment.name


def _checked(walker: Walker, run: Run, piece: Repeat, needed: int) -> tuple[bool, ...]:
    """For each layer of one repetition of a piece, whether what was rebuilt up to its input is compared with
    the truth: where a whole cotangent takes its place, or the error would never be seen."""
    found = []
    for layer in range(piece.start + 1, piece.start + piece.span + 1):
        # Before the first of a loop stands, in all repetitions but one, the last of it.
        before = layer - 1 if layer > piece.start + 1 or piece.count == 1 else piece.start + piece.span
        ends = _is_whole(run, layer) and before > run.start and not _is_whole(run, before)
        found.append(walker.check and ends and layer <= needed + 1)
    return tuple(found)


def _reversed(
    walker: Walker,
    run: Run,
    piece: Repeat,
    checked: Sequence[bool],
    held: list[Any],
    box: list[PyTree],
    depth: int,
) -> Any:
    """R over a piece of the run: its fragments."""
    if piece.count == 1:
        part = Part.of(run, piece, shift=False)
        fragments, ct = _reverse(walker, part, checked, [held.pop()], box, depth)
        box.append(ct)
        return fragments
    part = Part.of(run, piece)

    def walk(inner: Walker, ct: PyTree, kept: list[Any]) -> Any:
        fragments, ct = _reverse(inner, part, checked, kept, [ct], depth)
        return ct, fragments

    ct, rows = scans.backward(walker, piece, held.pop(), box.pop(), walk, single=True)
    box.append(ct)
    return rows


def _reverse(
    walker: Walker,
    part: Part,
    checked: Sequence[bool],
    kept: list[Residuals],
    box: list[PyTree],
    depth: int,
) -> Any:
    """R over some layers: `(fragments, ct)`, the fragments from the last layer to the first; of a layer that
    is `checked`, with a sketch of the cotangent before it."""
    fragments = []
    for layer in range(part.stop, part.start, -1):
        held = kept.pop()
        operation = functools.partial(operations.reverse, rule=walker.rule(part, layer))
        shared = walker.shared(layer, held)
        ct, fragment = walker.on_layer("reverse", layer, depth, operation, held, *shared, box.pop())
        if checked[layer - part.start - 1]:
            truth, ct = walker.gate((sketch.take(ct), ct))
            fragment = fragment, truth
            del truth
        box.append(ct)
        fragments.append(fragment)
        walker.release_shared(layer, held)
        del held, ct, fragment, shared
    return fragments, box.pop()


def _advance(
    walker: Walker,
    part: Part,
    checked: Sequence[bool],
    fragments: list[Any],
    box: list[PyTree],
    depth: int,
    end: int | None,
) -> list[Array]:
    """M over some layers: how far what it rebuilt is from the truth, before each that is `checked`. `end`,
    the last of the run, whose output nobody needs."""
    distances = []
    for layer in range(part.start + 1, part.stop + 1):
        if checked[layer - part.start - 1]:
            fragments[-1], truth = fragments[-1]
            got, box[-1] = walker.gate((sketch.take(box[-1]), box[-1]))
            distances.append(sketch.discrepancy(truth, got))
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
    return distances


def _scan_advance(
    walker: Walker,
    run: Run,
    piece: Repeat,
    checked: Sequence[bool],
    fragments: Any,
    box: list[PyTree],
    depth: int,
) -> list[Array]:
    part = Part.of(run, piece)
    carried = walker.carried.window(piece.start, piece.start + piece.span)
    same, values = carried.throughout(), jax.tree.leaves(walker.x[piece.start])

    def step(state: Any, repetition: Any, fragments: Any) -> Any:
        x, ct, buffers = state
        inner = walker.within(piece, repetition, buffers)
        inner.claim(0, carried.with_(x, 0, same, values))
        inside = [ct]
        distances = _advance(inner, part, checked, list(fragments), inside, depth, None)
        y = carried.without(inner.x[piece.span], piece.span, same)
        return (y, inside.pop(), inner.buffers(piece.once)), distances

    state = (carried.without(walker.x[piece.start], 0, same), box.pop(), walker.buffers(piece))
    (x, ct, buffers), distances = loops.scan(step, state, fragments, piece.count)
    walker.took(piece, buffers)
    box.append(ct)
    if piece.stop < run.stop:
        walker.claim(piece.stop, carried.with_(x, piece.span, same, values))
    walker.release(piece.start)
    return [jnp.max(one) for one in distances]
