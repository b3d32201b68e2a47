"""INVERT runs backward: each layer's input is rebuilt from its output."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp

from mwplan.execution import loops, repeats
from mwplan.execution.repeats import Part, Repeat
from mwplan.execution.scans import Scanned
from mwplan.execution.walker import Walker
from mwplan.network import operations, sketch
from mwplan.network.residuals import Residuals
from mwplan.plans.schedule import Run

PyTree = Any


def backward(walker: Walker, run: Run, kept: list[Any], box: list[PyTree], depth: int) -> None:
    """Backward over a run. `kept`, of F, is emptied; `box` as in `Interpreter.backward`."""
    if walker.check:
        walker.note(run, jnp.zeros(()))  # where the one layer's input is there already
    box[0] = walker.carried.filled(box[0], run.stop, walker.structs[run.stop])
    for piece in reversed(repeats.pieces(walker.view, run)):
        known = walker.x.get(piece.start)  # only the run's start can be: the run to the left keeps it
        if piece.count > 1:
            x = _scan(walker, run, piece, kept.pop(), box, depth)
            known = None  # rebuilt all the same
        else:
            y, ct = walker.x[piece.stop], box.pop()
            x, ct = _layer(walker, run, piece.stop, kept.pop(), y, ct, known, depth)
            box.append(ct)
            del y, ct
        if walker.check and (truth := walker.sketches.pop(piece.start, None)) is not None and known is None:
            found, x, box[0] = walker.gate((sketch.discrepancy(truth, sketch.take(x)), x, box[0]))
            walker.note(run, found)
        del known
        walker.claim(piece.start, x)
        del x
        walker.release(piece.stop)
    walker.release(run.start)
    box[0] = walker.carried.dropped(box[0], run.start)


def _layer(
    walker: Walker,
    run: Run | Part,
    layer: int,
    held: Residuals,
    y: PyTree,
    ct: PyTree,
    known: PyTree,
    depth: int,
) -> tuple[PyTree, PyTree]:
    """`(x, ct_in)`; `x` is `known` where it is there already."""
    operation = functools.partial(operations.invert_backward, rule=walker.rule(run, layer))
    x, grads, ct = walker.on_layer("backward", layer, depth, operation, held, y, ct, known)
    x, ct = walker.grads.found(walker, layer, depth, grads, (x, ct))
    return x, ct


def _scan(walker: Walker, run: Run, piece: Repeat, saved: Scanned, box: list[PyTree], depth: int) -> PyTree:
    part = Part.of(run, piece)

    def step(state: Any, repetition: Any, kept: list[Residuals]) -> Any:
        x, ct, buffers = state
        inner = walker.within(piece, repetition, buffers, single=not walker.grads.performs)
        for layer in range(piece.span, 0, -1):
            x, ct = _layer(inner, part, layer, kept.pop(), x, ct, None, depth)
        return (x, ct, inner.buffers(piece.once)), None

    state = (walker.x[piece.stop], box.pop(), walker.buffers(piece))
    (x, ct, buffers), _ = loops.scan(step, state, saved.kept, piece.count, reverse=True)
    walker.took(piece, buffers)
    box.append(ct)
    return x
