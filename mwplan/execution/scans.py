"""Sweeps over what repeats: one repetition is walked, inside a `loops.scan`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import jax
from jaxtyping import Array

from mwplan.execution import loops
from mwplan.execution.repeats import Repeat
from mwplan.execution.walker import Walker

PyTree = Any
AnyWalker = TypeVar("AnyWalker", bound=Walker)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Scanned:
    """What a scan over a `Repeat` keeps from forward to backward; every leaf has a leading axis, one row a
    repetition.

    `carried`: the leaves of the first input, for those that all repetitions hand on as they are and that are
    not among the rows. `claims`: of the activations in `x`, by position within the repetition. `end_claims`:
    how many want the repetition's last activation, which is the first of the next, and kept there.
    """

    x: dict[int, PyTree]
    kept: list[Any]
    sketches: dict[int, Array]
    carried: list[Any]
    claims: tuple[tuple[int, int], ...] = field(metadata={"static": True})
    end_claims: int = field(metadata={"static": True})


def forward(walker: AnyWalker, many: Repeat, walk: Callable[[AnyWalker], list[Any]]) -> Scanned:
    """F over a repetition after another; `walk` does one and returns what it keeps.

    As in `Interpreter.forward`, one claim on the first input is consumed, one on the last output is left.
    """
    fixed: list[Any] = []
    carried = walker.carried.window(many.start, many.start + many.span)
    same = carried.throughout()
    values = jax.tree.leaves(walker.x[many.start])

    def step(x: PyTree, repetition: Any, _: None) -> Any:
        inner = walker.within(many, repetition, single=True)
        inner.claim(0, carried.with_(x, 0, same, values))
        kept = walk(inner)
        y = inner.x[many.span]
        inner.release(many.span)
        end_claims = inner.claims.pop(many.span, 0)
        if end_claims:
            inner.x[0] = carried.with_(x, 0, same, values)  # the repetition before wants it
            del inner.x[many.span]
        fixed[:] = tuple(sorted(inner.claims.items())), end_claims
        new = {at: carried.without(one, at, same) for at, one in inner.x.items()}
        return carried.without(y, many.span, same), (new, kept, inner.sketches)

    first = carried.without(walker.x[many.start], 0, same)
    y, rows = loops.scan(step, first, None, many.count)
    y = carried.with_(y, many.span, same, values)
    claims, end_claims = fixed
    walker.claim(many.stop, y)
    for _ in range(end_claims):
        walker.claim(many.stop)
    walker.release(many.start)
    x, kept, sketches = rows
    return Scanned(x, kept, sketches, values if same else [], claims, end_claims)


def backward(
    walker: AnyWalker,
    many: Repeat,
    saved: Scanned,
    carried: Any,
    walk: Callable[[AnyWalker, Any, list[Any]], Any],
    *,
    single: bool,
) -> tuple[Any, Any]:
    """Over the repetitions from the last to the first:
    `walk(walker within, carried, kept) -> carried, row`; `single`, as in `Walker.within`.

    Returns the last `carried` and the stacked rows; the gradients go where they belong.
    """
    fixed: list[Any] = []
    window = walker.carried.window(many.start, many.start + many.span)
    same = window.throughout()

    def step(state: Any, repetition: Any, rows: Any) -> Any:
        carried, end, buffers = state
        x, kept, sketches = rows
        inner = walker.within(many, repetition, buffers, single=single)
        inner.x = {at: window.with_(one, at, same, saved.carried) for at, one in x.items()}
        inner.claims, inner.sketches = dict(saved.claims), dict(sketches)
        if saved.end_claims:
            inner.x[many.span] = window.with_(end, many.span, same, saved.carried)
            inner.claims[many.span] = saved.end_claims
        carried, row = walk(inner, carried, kept)
        keys = tuple(sorted(inner.report))
        fixed[:] = [keys]
        end = x[0] if saved.end_claims else None
        return (carried, end, inner.buffers(many.once)), (row, inner.reported(keys))

    end = window.without(walker.x[many.stop], many.span, same) if saved.end_claims else None
    rows = (saved.x, saved.kept, saved.sketches)
    (carried, _, buffers), (out, reports) = loops.scan(
        step, (carried, end, walker.buffers(many)), rows, many.count, reverse=True
    )
    for _ in range(saved.end_claims):
        walker.release(many.stop)
    walker.took(many, buffers)
    flat = reports.reshape(-1)
    for i in range(many.count):
        for j, (start, stop) in enumerate(fixed[0]):
            shift = many.start + i * many.span
            walker.report[start + shift, stop + shift] = flat, i * len(fixed[0]) + j
    return carried, out
