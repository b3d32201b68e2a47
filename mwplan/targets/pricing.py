"""Prices operations by what a target's compiler makes of them: workspaces from its buffers, times from its
kernels.

Nothing is run. Operations are compiled side by side, in threads: XLA holds no lock of Python's. What was
compiled before, in any process, is read from disk (`mwplan.common.cache`). Several threads may price the
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
import numpy as np

from mwplan.common import trees
from mwplan.targets import program
from mwplan.targets.program import Compiled
from mwplan.targets.target import Target

PyTree = Any
SMALL = 1 << 14  # bytes: below, a saving is not worth a compilation


@dataclass(frozen=True)
class Compiling:
    """One operation: the shapes of its result, and what its compiled program costs, waited for where it is
    asked for; `inputs`, the leaves of its arguments, by which `Compiler.saving` finds them."""

    result: Any
    inputs: list[Any]
    flat: Callable[[list[Any]], list[Any]]
    future: Future[Compiled]

    @property
    def time_ns(self) -> int:
        """The modelled time of its kernels."""
        return self.future.result().modelled_ns

    @property
    def workspace_bytes(self) -> int:
        """The compiled program's temporaries."""
        return self.future.result().temporary_bytes


@dataclass(frozen=True)
class CompilingSaving:
    """As `mwplan.profiling.bench.Saved`: of a program in which what dies and what is made are temporaries."""

    handle: Compiling
    future: Future[Compiled] | None
    apart_bytes: int

    @property
    def saving_bytes(self) -> int:
        """Bytes that the operation needs less than inputs, outputs and workspace."""
        if self.future is None:
            return 0
        needs = self.future.result().temporary_bytes
        return max(0, self.apart_bytes + self.handle.workspace_bytes - needs)


class Compiler:
    """`mwplan.profiling.bench.Pricing` by a target's compiler.

    **Arguments:** `target`; `workers`, compilations at a time (as many as there are cores); `progress(done,
    started)`, called whenever one is done."""

    def __init__(
        self, target: Target, workers: int | None = None, progress: Callable[[int, int], None] | None = None
    ) -> None:
        target.place()  # or it says what is missing, before anything is traced
        self.target = target
        self.pool = ThreadPoolExecutor(workers or os.cpu_count() or 1, thread_name_prefix="compile")
        self.known: dict[str, Future[Compiled]] = {}
        self.progress = progress or (lambda done, started: None)
        self.done = 0
        self._lock = threading.Lock()

    def program(self, operation: Callable[..., Any], *args: Any) -> Compiling:
        """Starts to compile the operation for shapes like `args`, between barriers as within a step."""
        inputs, treedef = jax.tree.flatten(args)

        def flat(leaves: list[Any]) -> list[Any]:
            return jax.tree.leaves(operation(*jax.tree.unflatten(treedef, leaves)))

        def between(leaves: list[Any]) -> list[Any]:
            found: list[Any] = trees.tie(_arrays(flat(trees.tie(_whole(inputs, leaves)))))
            return found

        # Objects of its own for every leaf: `saving` tells them apart by identity.
        result = trees.struct(jax.eval_shape(operation, *args))
        return Compiling(result, inputs, flat, self._started(between, _arrays(inputs)))

    def saving(self, handle: Compiling, *, dead: PyTree, temporary: PyTree) -> CompilingSaving:
        """What the operation needs less where it is the last user of `dead`, leaves of its arguments, and
        `temporary`, leaves of its result, are no results of the step."""
        gone, wanted = ({id(leaf) for leaf in jax.tree.leaves(tree)} for tree in (dead, temporary))
        dies = [id(leaf) in gone for leaf in handle.inputs]
        outputs = jax.tree.leaves(handle.result)
        made = trees.nbytes([leaf for leaf in outputs if id(leaf) in wanted])
        dying = trees.nbytes([leaf for leaf, mine in zip(handle.inputs, dies) if mine])
        if dying < SMALL or made < SMALL:
            return CompilingSaving(handle, None, 0)

        mine = [id(leaf) in wanted for leaf in outputs]
        rest_bytes = 0

        def step(given: tuple[list[Any], Any]) -> Any:
            nonlocal rest_bytes
            leaves, zero = given
            whole = _whole(handle.inputs, leaves)
            fresh = trees.tie([_moved(leaf, zero) if one else leaf for leaf, one in zip(whole, dies)])
            there = {id(leaf) for leaf in fresh}
            # What is passed through as it came takes no memory of its own.
            kept = [
                (leaf, one) for leaf, one in zip(handle.flat(fresh), mine) if one or id(leaf) not in there
            ]
            rest_bytes = trees.nbytes([leaf for leaf, one in kept if not one])
            # Gradients too leave as sums: in an output's buffer the compiler would find room for temporaries
            # until it is written.
            return [_summed(leaf) for leaf in trees.tie(_arrays([leaf for leaf, _ in kept]))]

        zero = jax.ShapeDtypeStruct((), jnp.int32)
        future = self._started(step, (_arrays(handle.inputs), zero))
        return CompilingSaving(handle, future, dying + made + rest_bytes)

    def together(self, *handles: Compiling) -> None:
        """Nothing: each operation's time is modelled."""

    def derive(self, handle: Compiling, base: Compiling, more: Compiling) -> None:
        """Nothing: each operation's time is modelled."""

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
            self.progress(done, started)


def _arrays(leaves: list[Any]) -> list[Any]:
    """What a compiled program can take and return: no float0 arrays, which have no memory."""
    return [leaf for leaf in leaves if not _is_float0(leaf)]


def _is_float0(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and leaf.dtype == jax.dtypes.float0


def _whole(like: list[Any], arrays: list[Any]) -> list[Any]:
    """`arrays` with the float0 zeros that are among `like`."""
    rest = iter(arrays)
    return [np.zeros(leaf.shape, leaf.dtype) if _is_float0(leaf) else next(rest) for leaf in like]


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
