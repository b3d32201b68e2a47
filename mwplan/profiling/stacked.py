"""What operations cost on one layer of a stack: its row is read first, its gradient written in place."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mwplan.common import trees
from mwplan.compilers.compiling import temporaries
from mwplan.execution import rows
from mwplan.network import operations
from mwplan.network.constants import tied
from mwplan.profiling.bench import Bench, Handle

PyTree = Any
_ROWS = 2  # of one alone the compiler needs no copy


class StackedBench:
    """As a `Bench`, with the memory of rows in the workspaces: of the layer where an operation reads it, of
    its gradient until that is among those of the stack."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.in_place = bench.in_place
        self.saving = bench.saving
        self.settle = bench.settle
        self.fresh = bench.fresh
        self.cotangent = bench.cotangent

    def program(self, operation: Callable[..., Any], *args: Any) -> Handle:
        """As `Bench.program`. **Cost:** one more compilation for operations on layers with parameters."""
        handle = self.bench.program(operation, *args)
        on_layer = getattr(operation, "func", operation).__module__ == operations.__name__
        if on_layer and trees.nbytes(args[0]):
            needs = self._needs(operation, *args)
            handle.row_bytes = max(0, needs - handle.program.workspace_bytes)
        return handle

    def _needs(self, operation: Callable[..., Any], layer: PyTree, *args: Any) -> int:
        """Temporary bytes of the operation as a step performs it."""
        makes = operations.gradients_of(operation) is not None
        source = jax.tree.map(_stacked, layer)
        grads = [_stacked(leaf) for leaf in trees.parameters(layer)] if makes else None

        def step(grads: list[Any] | None, source: PyTree, row: Any, args: tuple[Any, ...]) -> Any:
            on_row = functools.partial(rows.on_row, operation=operation)
            return trees.tie(tied(on_row)(source, row, grads, *args))

        jitted = jax.jit(step, donate_argnums=0, compiler_options=self.bench.options)
        return temporaries(jitted.lower(grads, source, jnp.int32(0), args).compile())


def _stacked(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((_ROWS, *jnp.shape(leaf)), leaf.dtype)
