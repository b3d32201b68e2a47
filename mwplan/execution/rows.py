"""Operations on one layer of a stack: its row is read where it is used, and its gradient written in place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from mwplan.common import platforms, trees
from mwplan.execution import loops
from mwplan.network import operations

PyTree = Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Written:
    """In the place of one layer's gradients: `stacked`, those of all layers, its own among them."""

    stacked: list[Any]


def on_row(
    source: PyTree, row: Any, stacked: list[Any] | None, *args: Any, operation: Callable[..., Any]
) -> Any:
    """`operation(layer, *args)` with the layer in `row` of the stacked layers `source`.

    Read before the operation, rows would be there from the start of the program: they depend on nothing.
    Where `stacked` are the gradients of all layers so far, the operation's own go among them (`Written`), so
    that they need no memory once they are written. On GPUs a row that is larger than what the operation reads
    beside is then read when the operation's turn comes, and before anything else of it: else XLA keeps it
    from a forward pass in the same repetition, or makes the gradient first, and row and gradient are there
    together. Smaller ones are not worth the fusions that these barriers prevent.
    """
    if stacked is None:
        return operation(loops.row(source, row), *args)
    large = platforms.platform() == "gpu" and _row_bytes(source, row) > trees.nbytes(args)
    if large:
        row, args = trees.tie((row, args))
    layer = loops.row(source, row)
    if large:
        layer, args = trees.tie((layer, args))
    result = operation(layer, *args)
    at = operations.gradients_of(operation)
    assert at is not None
    written = Written(loops.put(stacked, result[at], row))
    return (*result[:at], written, *result[at + 1 :])


def _row_bytes(source: PyTree, row: Any) -> int:
    return trees.nbytes(jax.eval_shape(loops.row, source, row))
