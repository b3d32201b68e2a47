"""What operations cost on one layer of a stack: its row is read first, its gradient written in place."""

from __future__ import annotations

import functools
from concurrent.futures import Future
from typing import Any

import jax
import jax.numpy as jnp

from mwplan.common import trees
from mwplan.compilers.alone import with_float0
from mwplan.execution import rows
from mwplan.network import operations
from mwplan.network.constants import tied
from mwplan.profiling.bench import Handle, Layer

PyTree = Any
_ROWS = 2  # of one alone the compiler needs no copy


class StackedLayer(Layer):
    """As a `Layer`, with the memory of rows in the workspaces: of the layer where an operation reads it, of
    its gradient until that is among those of the stack. **Cost:** one more compilation for each operation on
    a layer with parameters."""

    def start(self) -> list[Future[Any]]:
        """As `Layer.start`."""
        futures = super().start()
        for handle in self.handles:
            function = getattr(handle.operation, "func", handle.operation)
            if function.__module__ == operations.__name__ and trees.nbytes(handle.args[0]):
                handle.on_row = self.bench.memory(_lowered(handle))
                futures.append(handle.on_row)
        return futures


def _lowered(handle: Handle) -> Any:
    """The operation as a step performs it."""
    layer, *args = handle.args
    makes = operations.gradients_of(handle.operation) is not None
    source = jax.tree.map(_stacked, layer)
    grads = [_stacked(leaf) for leaf in trees.parameters(layer)] if makes else None
    leaves, treedef = jax.tree.flatten(args)
    real = [leaf for leaf in leaves if not trees.is_float0(leaf)]

    def step(grads: list[Any] | None, source: PyTree, row: Any, arrays: list[Any]) -> Any:
        given = with_float0(leaves, arrays)
        on_row = functools.partial(rows.on_row, operation=handle.operation)
        return trees.tie(tied(on_row)(source, row, grads, *jax.tree.unflatten(treedef, given)))

    jitted = jax.jit(step, donate_argnums=0)
    return jitted.lower(grads, source, jax.ShapeDtypeStruct((), jnp.int32), real)


def _stacked(leaf: Any) -> jax.ShapeDtypeStruct:
    return trees.struct_of(leaf, (_ROWS, *jnp.shape(leaf)))
