"""What operations cost on one layer of a stack: its row is read first, its gradient written in place."""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from mwplan.common import platforms, trees
from mwplan.compilers.alone import with_float0
from mwplan.execution import loops, rows
from mwplan.network import operations
from mwplan.network.constants import tied
from mwplan.profiling.bench import Layer, Saved
from mwplan.targets.devices import Device
from mwplan.targets.pricing import Compiler, Compiling
from mwplan.targets.program import Compiled

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
            if _reads_layer(handle.operation, handle.args):
                step, given = _on_row(handle.operation, handle.args)
                handle.on_row = self.bench.memory("row", None, functools.partial(step.lower, *given))
                futures.append(handle.on_row)
        return futures


@dataclass(frozen=True)
class OnRow:
    """An operation priced by itself, `alone`, and on one layer of a stack."""

    alone: Compiling
    on_row: Future[Compiled]

    @property
    def result(self) -> Any:
        """As `Priced.result`."""
        return self.alone.result

    @property
    def time_ns(self) -> int:
        """As `Priced.time_ns`."""
        return self.alone.time_ns

    @property
    def workspace_bytes(self) -> int:
        """As `Priced.workspace_bytes`."""
        return max(self.alone.workspace_bytes, self.on_row.result().temporary_bytes)


class StackedCompiler:
    """As a target's `Compiler`, of layers of a stack: with the memory of rows in the workspaces, as
    `StackedLayer`."""

    def __init__(self, compiler: Compiler) -> None:
        self.compiler = compiler

    @property
    def device(self) -> Device:
        """As `Pricing.device`."""
        return self.compiler.device

    def program(self, operation: Callable[..., Any], *args: Any) -> Compiling | OnRow:
        """As `Pricing.program`."""
        alone = self.compiler.program(operation, *args)
        if not _reads_layer(operation, args):
            return alone
        with platforms.lowering_for(self.compiler.target.platform):
            step, given = _on_row(operation, args)
        return OnRow(alone, self.compiler.started(step, *given))

    def saving(self, handle: Compiling | OnRow, *, dead: PyTree, temporary: PyTree) -> Saved:
        """As `Pricing.saving`, of the layer that stands alone, but for what would be rows."""
        alone = handle.alone if isinstance(handle, OnRow) else handle
        stay = {id(leaf) for leaf in jax.tree.leaves(_from_rows(alone.alone.operation, alone.alone.args))}
        dead = [leaf for leaf in jax.tree.leaves(dead) if id(leaf) not in stay]
        return self.compiler.saving(alone, dead=dead, temporary=temporary)

    def together(self, *handles: Any, free: bool = False) -> None:
        """Nothing: forward and backward are in loops of their own, between which a compiler moves nothing."""

    def crossing(
        self, forward: Any, backward: Any, *, ends: tuple[PyTree, PyTree], ct: PyTree, grads: PyTree
    ) -> None:
        """Nothing, as `together`."""

    def derive(self, handle: Any, base: Any, more: Any) -> None:
        """As `Compiler.derive`."""


def _reads_layer(operation: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    """Whether it is an operation of a step on a layer with parameters."""
    function = getattr(operation, "func", operation)
    return function.__module__ == operations.__name__ and trees.nbytes(args[0]) > 0


def _from_rows(operation: Callable[..., Any], args: tuple[Any, ...]) -> PyTree:
    """Of the arguments of an operation backward the layer's input and output, which a loop's forward sweep
    has put among those of all repetitions: their rows are copies, and what they are copied from stays."""
    backward = getattr(operation, "func", operation) in (operations.store_backward, operations.reverse)
    return args[2:4] if backward else ()


def _on_row(operation: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    """The operation as a step performs it, jitted, and its arguments' shapes."""
    layer, *rest = args
    makes = operations.gradients_of(operation) is not None
    source = jax.tree.map(_stacked, layer)
    grads = [_stacked(leaf) for leaf in trees.parameters(layer)] if makes else None
    leaves, treedef = jax.tree.flatten(rest)
    kept = {id(leaf) for leaf in jax.tree.leaves(_from_rows(operation, args))}
    kept = kept if platforms.platform() != "cpu" else set()
    real = [_stacked(leaf) if id(leaf) in kept else leaf for leaf in leaves if not trees.is_float0(leaf)]
    in_rows = [id(leaf) in kept for leaf in leaves if not trees.is_float0(leaf)]
    on_row = functools.partial(rows.on_row, operation=operation)
    performed = tied(on_row) if platforms.platform() == "cpu" else on_row

    def step(grads: list[Any] | None, source: PyTree, row: Any, arrays: list[Any]) -> Any:
        arrays = [loops.row(one, row) if inside else one for one, inside in zip(arrays, in_rows, strict=True)]
        given = with_float0(leaves, arrays)
        return trees.tie(performed(source, row, grads, *jax.tree.unflatten(treedef, given)))

    row = jax.ShapeDtypeStruct((), jnp.int32)
    return jax.jit(step, donate_argnums=0), (grads, source, row, real)


def _stacked(leaf: Any) -> jax.ShapeDtypeStruct:
    return trees.struct_of(leaf, (_ROWS, *jnp.shape(leaf)))
