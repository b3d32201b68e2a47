"""Prices operations by what a target's compiler makes of them: workspaces from its buffers, times from its
kernels.

Nothing is run. Operations are compiled side by side, in threads: XLA holds no lock of Python's. What was
compiled before, in any process, is read from disk (`mwplan.targets.cache`). Several threads may price the
operations of several layers with one `Compiler`: each waits for what it asks for."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from mwplan.common import trees
from mwplan.targets import program
from mwplan.targets.program import Compiled
from mwplan.targets.target import Target

PyTree = Any
SMALL = 1 << 14  # bytes: below, a saving is not worth a compilation


@dataclass(frozen=True)
class Compiling:
    """One operation: the shapes of its result, and what its compiled program costs, waited for where it is
    asked for."""

    result: Any
    future: Future[Compiled]

    @property
    def time_ns(self) -> int:
        """The modelled time of its kernels."""
        return self.future.result().modelled_ns

    @property
    def workspace_bytes(self) -> int:
        """The compiled program's temporaries."""
        return self.future.result().temporary_bytes


class Compiler:
    """`mwplan.profiling.bench.Pricing` by a target's compiler.

    **Arguments:** `target`; `workers`, compilations at a time (as many as there are cores); `told(done,
    started)`, called whenever one is done."""

    def __init__(
        self, target: Target, workers: int | None = None, told: Callable[[int, int], None] | None = None
    ) -> None:
        target.place()  # or it says what is missing, before anything is traced
        self.target = target
        self.pool = ThreadPoolExecutor(workers or os.cpu_count() or 1, thread_name_prefix="compile")
        self.known: dict[str, Future[Compiled]] = {}
        self.told = told or (lambda done, started: None)
        self.done = 0
        self._lock = threading.Lock()

    def cotangent(self, y: PyTree) -> PyTree:
        """The shapes of a cotangent of `y`."""

        def one(leaf: Any) -> Any:
            dtype = leaf.dtype if trees.is_inexact(leaf) else jax.dtypes.float0
            return jax.ShapeDtypeStruct(leaf.shape, dtype)

        return jax.tree.map(one, y)

    def program(self, operation: Callable[..., Any], *args: Any) -> Compiling:
        """Starts to compile the operation for arrays or shapes like `args`, between barriers as within a
        step."""
        leaves, treedef = jax.tree.flatten(args)

        def between(leaves: list[Any]) -> list[Any]:
            result = operation(*jax.tree.unflatten(treedef, trees.tie(leaves)))
            return trees.tie(_arrays(jax.tree.leaves(result)))

        out = jax.eval_shape(operation, *args)
        # Objects of its own for every leaf: `saving` tells them apart by identity.
        result = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), out)
        return Compiling(result, self._started(between, leaves))

    def in_place(self, handle: Compiling, operation: Callable[..., Any], *args: Any, dead: Any) -> Compiling:
        """`handle`: what an operation moves is counted alike wherever it writes."""
        return handle

    def settle(self) -> None:
        """Nothing: times are waited for where they are asked for."""

    def fresh(self) -> tuple[int, int]:
        """Nothing: accelerators pool their memory."""
        return 0, 0

    def saving(
        self,
        handle: Compiling,
        operation: Callable[..., Any],
        *args: Any,
        dead: Any,
        outputs: Callable[[Any], Any],
    ) -> int:
        """Bytes that the operation needs less than inputs + outputs + workspace where it is the last user of
        `dead`, as `mwplan.profiling.bench.Bench.saving`: of a program in which both are temporaries."""
        leaves, treedef = jax.tree.flatten(args)
        gone = {id(leaf) for leaf in jax.tree.leaves(dead)}
        mine = [id(leaf) in gone for leaf in leaves]
        inputs = sum(trees.nbytes(leaf) for leaf, dies in zip(leaves, mine) if dies)
        made = trees.nbytes(outputs(handle.result))
        if inputs < SMALL or made < SMALL:
            return 0
        temporary = {id(leaf) for leaf in jax.tree.leaves(outputs(handle.result))}
        which = [id(leaf) in temporary for leaf in jax.tree.leaves(handle.result)]
        rest_bytes = sum(
            trees.nbytes(leaf) for leaf, mine_ in zip(jax.tree.leaves(handle.result), which) if not mine_
        )

        def step(given: tuple[list[Any], Any]) -> Any:
            leaves, zero = given
            fresh = trees.tie([_moved(leaf, zero) if dies else leaf for leaf, dies in zip(leaves, mine)])
            result = operation(*jax.tree.unflatten(treedef, fresh))
            # Gradients too leave as sums: in an output's buffer the compiler would find room for temporaries
            # until it is written.
            return [_summed(leaf) for leaf in trees.tie(_arrays(jax.tree.leaves(result)))]

        zero = jax.ShapeDtypeStruct((), jnp.int32)
        needs = self._started(step, (leaves, zero)).result().temporary_bytes
        return max(0, inputs + made + rest_bytes + handle.workspace_bytes - needs)

    def _started(self, function: Callable[[Any], Any], given: Any) -> Future[Compiled]:
        """Its compilation, in another thread, unless it is known."""
        lowered = program.lower(function, (given,), self.target)
        name = program.key(lowered, self.target, self.target.compiler_options)
        with self._lock:
            if name not in self.known:
                self.known[name] = self.pool.submit(self._made, name, lowered)
            return self.known[name]

    def _made(self, name: str, lowered: Any) -> Compiled:
        try:
            return program.known_or_built(name, lowered, self.target, self.target.compiler_options)
        finally:
            with self._lock:
                self.done += 1
                done, started = self.done, len(self.known)
            self.told(done, started)


def _arrays(leaves: list[Any]) -> list[Any]:
    """What a compiled program can return: no float0 arrays, which have no memory."""
    return [leaf for leaf in leaves if not (hasattr(leaf, "dtype") and leaf.dtype == jax.dtypes.float0)]


def _moved(leaf: Any, zero: Any) -> Any:
    """A copy that the compiler must make: `zero` is 0, and only known when the program runs."""
    if leaf.dtype == jax.dtypes.float0:
        return leaf
    if trees.is_key(leaf):
        return jax.random.wrap_key_data(
            _moved(jax.random.key_data(leaf), zero), impl=jax.random.key_impl(leaf)
        )
    if leaf.dtype == jnp.bool_:
        return leaf ^ (zero != 0)
    return leaf + jnp.asarray(zero).astype(leaf.dtype)


def _summed(leaf: Any) -> Any:
    """One number that needs all of `leaf`."""
    return jnp.sum((jax.random.key_data(leaf) if trees.is_key(leaf) else leaf).astype(jnp.float32))
