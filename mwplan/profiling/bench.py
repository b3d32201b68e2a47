"""Compiles single operations, times them, and reads their workspace off the compiled program."""

from __future__ import annotations

import functools
import hashlib
import math
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from mwplan.common import trees
from mwplan.compilers.compiling import options_of, temporaries, workspace
from mwplan.network import operations
from mwplan.network.constants import tied
from mwplan.plans.packing import Workspace
from mwplan.profiling.growth import random_cotangent

PyTree = Any
_KEPT = 32 << 20  # bytes: glibc's largest threshold, up to which it keeps freed blocks
_PIECE = 1 << 10  # bytes: parts of a workspace below leave no hole to speak of
SMALL = 1 << 14  # bytes: below, a saving is not worth a compilation


@runtime_checkable
class Priced(Protocol):
    """An operation's result, time and workspace."""

    @property
    def result(self) -> Any:
        """What the operation gives: arrays or shapes."""

    @property
    def time_ns(self) -> int:
        """Its time."""

    @property
    def workspace_bytes(self) -> int:
        """What it allocates beside inputs and outputs."""


@runtime_checkable
class Pricing(Protocol):
    """Tells what operations cost: by running them (`Bench`), or by counting
    (`mwplan.profiling.roofline.Roofline`)."""

    def cotangent(self, y: PyTree) -> PyTree:
        """A cotangent of `y`."""

    def program(self, operation: Callable[..., Any], *args: Any) -> Priced:
        """What `operation(*args)` gives and costs; its time is known after `settle`."""

    def in_place(self, handle: Any, operation: Callable[..., Any], *args: Any, dead: Any) -> Priced:
        """As `Bench.in_place`."""

    def settle(self) -> None:
        """Makes the times of all programs known."""

    def fresh(self) -> tuple[int, int]:
        """As `Bench.fresh`."""

    def saving(
        self, handle: Any, operation: Callable[..., Any], *args: Any, dead: Any, outputs: Callable[[Any], Any]
    ) -> int:
        """As `Bench.saving`."""


class Program:
    """One compiled operation: workspace, and time once settled.

    It takes `(recycled, dying, leaves)`: buffers for outputs, inputs whose memory goes to other outputs, and
    the rest. `into` says which output takes the memory of which input.
    """

    def __init__(
        self, compiled: Any, leaves: list[Any], overhead_ns: int, into: dict[int, int] | None = None
    ) -> None:
        self.compiled = compiled
        self.into = into or {}
        self.dying = [leaves[i] for i in self.into.values()]
        self.leaves = [leaf for i, leaf in enumerate(leaves) if i not in self.into.values()]
        self.overhead_ns = overhead_ns
        self.workspace_bytes = temporaries(compiled)
        self.workspace = workspace(compiled, _PIECE)
        self.samples: list[int] = []

    @property
    def time_ns(self) -> int:
        """Median time of a run, less what an empty call costs."""
        return max(0, math.ceil(statistics.median(self.samples)) - self.overhead_ns)

    def run(self, buffers: list[Any]) -> tuple[list[Any], int]:
        """The outputs, in the place of `buffers`, which an earlier run gave, and the nanoseconds that it
        took."""
        dying = [_refilled(buffers[j], leaf, 0) for j, leaf in zip(self.into, self.dying)]
        recycled = [buffer for j, buffer in enumerate(buffers) if j not in self.into]
        jax.block_until_ready(dying)
        start = time.perf_counter_ns()
        outputs = jax.block_until_ready(self.compiled(recycled, dying, self.leaves))
        return outputs, time.perf_counter_ns() - start

    def sample(self, buffers: list[Any]) -> list[Any]:
        """Runs twice and notes the second's time: in a step what an operation reads has just been written,
        and here other programs ran since."""
        outputs, _ = self.run(buffers)
        outputs, taken = self.run(outputs)
        self.samples.append(taken)
        return outputs


class Handle:
    """A `Program` as one caller sees it: with the result at its own arguments, and the program that is timed
    for it, if that is another; `row_bytes`, what it needs more where its layer is one of a stack."""

    def __init__(
        self, program: Program, result: Any, timed: Program | None = None, row_bytes: int = 0
    ) -> None:
        self.program = program
        self.result = result
        self.timed = timed or program
        self.row_bytes = row_bytes

    @property
    def time_ns(self) -> int:
        """As `Program.time_ns`."""
        return self.timed.time_ns

    @property
    def workspace_bytes(self) -> int:
        """As `Program.workspace_bytes`, and `row_bytes`."""
        return self.program.workspace_bytes + self.row_bytes


class Bench:
    """Times operations in rounds, so that a slow moment hits all alike; equal programs are compiled and timed
    once.

    Outputs are donated back as the next run's output buffers: in a compiled step an operation writes into
    memory that is there already, and fresh pages would be counted against it here.
    """

    def __init__(self, repeats: int, seed: int) -> None:
        self.repeats = repeats
        self.key = jax.random.key(seed)
        self.options = options_of() or None
        self.known: dict[str, Program] = {}
        self.needs: dict[str, int] = {}
        self.unsettled: list[Program] = []
        self.plain = jax.jit(operations.plain_forward, compiler_options=self.options)
        self.overhead_ns = 0
        empty = self.program(lambda a: a + 1, jnp.zeros(()))
        self.settle(rounds=50)
        self.overhead_ns = empty.time_ns

    def forward(self, one: PyTree, x: PyTree) -> PyTree:
        """The layer's output, not timed."""
        return self.plain(one, x)

    def cotangent(self, y: PyTree) -> PyTree:
        """White noise like `y`, in its dtypes."""
        return trees.cast_like(random_cotangent(trees.struct(y), self.key), y)

    def program(self, operation: Callable[..., Any], *args: Any) -> Handle:
        """Compiles the operation for `args`, between barriers as within a step, and runs it once; `settle`
        times it."""

        leaves, treedef = jax.tree.flatten(args)  # programs are compared without their callers' classes
        out = jax.eval_shape(operation, *args)
        program = self._compiled(operation, leaves, treedef, jax.tree.leaves(out), {})
        flat = program.compiled(_buffers(jax.tree.leaves(out)), [], leaves)
        return Handle(program, jax.tree.unflatten(jax.tree.structure(out), flat))

    def in_place(self, handle: Handle, operation: Callable[..., Any], *args: Any, dead: Any) -> Handle:
        """`handle`, timed as where the operation is the last user of `dead`, leaves of `args` (found by
        identity).

        Outputs may then be written where these were, which elementwise operations do within a step: less
        memory moves. Where the compiler would have to copy for it (products read an input more than once), it
        does not do so within a step either, and the time stays that of `handle`.
        """
        leaves, treedef = jax.tree.flatten(args)
        gone = {id(leaf) for leaf in jax.tree.leaves(dead)}
        out = jax.tree.leaves(handle.program.compiled.out_info)
        free = {j: (leaf.shape, leaf.dtype) for j, leaf in enumerate(out)}
        into: dict[int, int] = {}
        for i, leaf in enumerate(leaves):
            same = [j for j, kind in free.items() if kind == (jnp.shape(leaf), leaf.dtype)]
            if id(leaf) in gone and same and trees.nbytes(leaf) >= SMALL:
                into[same[0]] = i
                del free[same[0]]
        if not into:
            return handle
        program = self._compiled(operation, leaves, treedef, out, into)
        better = program.workspace_bytes <= handle.program.workspace_bytes
        return Handle(handle.program, handle.result, program if better else None, handle.row_bytes)

    def _compiled(
        self,
        operation: Callable[..., Any],
        leaves: list[Any],
        treedef: Any,
        out: list[Any],
        into: dict[int, int],
    ) -> Program:
        """The operation's `Program`, known or new; `into` as there."""
        where = {i: k for k, i in enumerate(into.values())}

        def recycling(recycled: list[Any], dying: list[Any], rest: list[Any]) -> list[Any]:
            others = iter(rest)
            given = [dying[where[i]] if i in where else next(others) for i in range(len(leaves))]
            result = tied(operation)(*jax.tree.unflatten(treedef, given))
            return trees.tie(jax.tree.leaves(result))

        jitted = jax.jit(recycling, donate_argnums=(0, 1), keep_unused=True, compiler_options=self.options)
        dying, rest = [leaves[i] for i in where], [leaf for i, leaf in enumerate(leaves) if i not in where]
        lowered = jitted.lower([leaf for j, leaf in enumerate(out) if j not in into], dying, rest)
        key = hashlib.sha256(lowered.as_text().encode()).hexdigest()
        if key not in self.known:
            with warnings.catch_warnings():
                # an output that is an input needs no buffer
                warnings.filterwarnings("ignore", message=".*donated.*")
                self.known[key] = Program(lowered.compile(), leaves, self.overhead_ns, into)
            self.unsettled.append(self.known[key])
        return self.known[key]

    def settle(self, rounds: int | None = None) -> None:
        """Times every new program: one warm-up and `repeats` rounds over all of them."""
        outputs = [_buffers(program.compiled.out_info) for program in self.unsettled]
        for _ in range(1 + (rounds or self.repeats)):
            outputs = [program.sample(buffers) for program, buffers in zip(self.unsettled, outputs)]
        for program in self.unsettled:
            del program.samples[0]
            program.leaves = program.dying = []  # what it was timed on need not be kept
        self.unsettled.clear()

    def fresh(self) -> tuple[int, int]:
        """`(kept_bytes, fresh_mib_ns)` of `Profile`: a large array as a temporary against the same array in
        an output's memory, which is there already.

        glibc maps blocks above 32 MiB anew each time, and keeps smaller ones; whether that is so here, a
        smaller array tells. Other platforms pool memory.
        """
        if jax.default_backend() != "cpu":
            return 0, 0
        small, large = (self._fresh_mib_ns(size) for size in (_KEPT * 3 // 4, 2 * _KEPT))
        return (_KEPT if small < large / 2 else 0), large

    def _fresh_mib_ns(self, size: int) -> int:
        """What an allocation of `size` bytes costs, for each MiB of it."""

        def filled(value: Any) -> tuple[Any, Any]:
            array = jax.lax.optimization_barrier(jnp.broadcast_to(value, (size // 4,)))
            return array, jnp.sum(array)

        one = jnp.ones((), jnp.float32)  # 4 bytes, with `jax_enable_x64` too
        temporary = jax.jit(lambda v: filled(v)[1], compiler_options=self.options)
        given = jax.jit(lambda buffer, v: filled(v), donate_argnums=0, keep_unused=True)
        buffer = jnp.zeros(size // 4, jnp.float32)
        taken: tuple[list[int], list[int]] = [], []
        for _ in range(2 + max(9, self.repeats)):
            start = time.perf_counter_ns()
            jax.block_until_ready(temporary(one))
            between = time.perf_counter_ns()
            buffer, _ = jax.block_until_ready(given(buffer, one))
            taken[0].append(between - start)
            taken[1].append(time.perf_counter_ns() - between)
        more = statistics.median(taken[0][2:]) - statistics.median(taken[1][2:])
        return max(0, int(more / (size / 2**20)))

    def workspaces(self) -> tuple[Workspace, ...]:
        """What the workspaces of all programs consist of. On CPUs alone: elsewhere it has not been held
        against compiled steps."""
        found = {one.workspace_bytes: one.workspace for one in self.known.values() if one.workspace.buffers}
        return tuple(found[total] for total in sorted(found)) if jax.default_backend() == "cpu" else ()

    def saving(
        self,
        handle: Handle,
        operation: Callable[..., Any],
        *args: Any,
        dead: Any,
        outputs: Callable[[Any], Any],
    ) -> int:
        """Bytes that the operation needs less than inputs + outputs + workspace where it is the last user of
        `dead`.

        `dead` are leaves of `args` (found by identity); `outputs` picks from the result what is temporary
        (not gradients). A program is compiled, and not run, in which both are temporaries: XLA then places
        outputs where dead inputs were, as it will within a step, and its temporaries are what the operation
        really needs.
        """
        leaves, treedef = jax.tree.flatten(args)
        gone = {id(leaf) for leaf in jax.tree.leaves(dead)}
        mine = [id(leaf) in gone for leaf in leaves]
        inputs = sum(trees.nbytes(leaf) for leaf, dies in zip(leaves, mine) if dies)
        made = trees.nbytes(outputs(handle.result))
        if inputs < SMALL or made < SMALL:
            return 0

        rest_bytes = 0

        def step(leaves: list[Any], zero: Any) -> Any:
            nonlocal rest_bytes
            fresh = [_moved(leaf, zero) if dies else leaf for leaf, dies in zip(leaves, mine)]
            fresh = trees.tie(fresh)
            result = operation(*jax.tree.unflatten(treedef, fresh))
            given = {id(leaf) for leaf in fresh}
            temporary = {id(leaf) for leaf in jax.tree.leaves(outputs(result))}
            made = [
                leaf for leaf in jax.tree.leaves(result) if id(leaf) in temporary or id(leaf) not in given
            ]
            rest_bytes = trees.nbytes([leaf for leaf in made if id(leaf) not in temporary])
            # Gradients too leave as sums: in an output's buffer the compiler would find room for temporaries
            # until it is written.
            return [_summed(leaf) for leaf in trees.tie(made)]

        lowered = jax.jit(step, compiler_options=self.options).lower(leaves, jnp.zeros((), jnp.int32))
        key = hashlib.sha256(lowered.as_text().encode()).hexdigest()
        if key not in self.needs:
            self.needs[key] = temporaries(lowered.compile())
        return max(0, inputs + made + rest_bytes + handle.program.workspace_bytes - self.needs[key])


def _buffers(structs: list[Any]) -> list[Any]:
    """Fresh arrays of these shapes, without compiling anything for it (but for typed keys)."""
    return [
        jnp.zeros(leaf.shape, leaf.dtype)
        if trees.is_key(leaf)
        else jnp.array(np.zeros(leaf.shape, leaf.dtype))
        for leaf in structs
    ]


@functools.partial(jax.jit, donate_argnums=0, keep_unused=True)
def _refilled(buffer: Any, leaf: Any, zero: Any) -> Any:
    """`leaf`'s values in `buffer`'s memory."""
    return _moved(leaf, zero)


def _moved(leaf: Any, zero: Any) -> Any:
    """A copy that the compiler must make: `zero` is 0, and only known when the program runs. A float0 array,
    which has no memory, is none."""
    if leaf.dtype == jax.dtypes.float0:
        return leaf
    if trees.is_key(leaf):
        return jax.random.wrap_key_data(
            _moved(jax.random.key_data(leaf), zero), impl=jax.random.key_impl(leaf)
        )
    if leaf.dtype == jnp.bool_:
        return leaf ^ (zero != 0)
    return trees.typed_like(leaf + jnp.asarray(zero).astype(leaf.dtype), leaf)


def _summed(leaf: Any) -> Any:
    """One number that needs all of `leaf`."""
    if leaf.dtype == jax.dtypes.float0:
        return jnp.zeros(())
    return jnp.sum((jax.random.key_data(leaf) if trees.is_key(leaf) else leaf).astype(jnp.float32))
