"""Prices operations by what a target's compiler makes of them: workspaces from its buffers, times from its
kernels.

Nothing is run. Operations are compiled side by side, in threads: XLA holds no lock of Python's. What was
compiled before, in any process, is read from disk (`mwplan.common.cache`). Several threads may price the
operations of several layers with one `Compiler`: each waits for what it asks for."""

from __future__ import annotations

import dataclasses
import math
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import jax

from mwplan.common import platforms, trees
from mwplan.compilers.alone import Alone, LastUser
from mwplan.network import operations
from mwplan.network.constants import tied, writes
from mwplan.network.products import written_once
from mwplan.targets import program
from mwplan.targets.crossing import Crossing
from mwplan.targets.devices import Device
from mwplan.targets.program import Compiled
from mwplan.targets.target import Target

PyTree = Any
_FORWARD = (operations.plain_forward, operations.forward)
_BACKWARD = (operations.store_backward, operations.reverse, operations.vijp, operations.advance)


def _function(operation: Callable[..., Any]) -> Any:
    return getattr(operation, "func", operation)


@dataclass(frozen=True)
class Compiling:
    """One operation, and what its compiled program costs, waited for where it is asked for."""

    alone: Alone
    future: Future[Compiled]
    pairs: list[_Pair] = field(default_factory=list)
    passing: CompilingSaving | None = None  # where its results come and go: of what writes into arrays

    @property
    def result(self) -> Any:
        """The shapes of what the operation gives."""
        return self.alone.result

    @property
    def time_ns(self) -> int:
        """The modelled time of its kernels: where it is one of a pair, its share of that."""
        return self.pairs[0].share_ns(self) if self.pairs else self.alone_ns

    @property
    def alone_ns(self) -> int:
        """The modelled time of its kernels, compiled alone."""
        return self.future.result().modelled_ns

    @property
    def workspace_bytes(self) -> int:
        """The compiled program's temporaries; in results' buffers too it may have laid some."""
        alone = self.future.result().temporary_bytes
        return alone if self.passing is None else max(alone, self.passing.beside_bytes)


@dataclass(frozen=True)
class _Pair:
    """Two operations that are compiled as one program, in which the compiler moves work from one to the
    other: what both write and read, the one may leave and the other make again."""

    handles: tuple[Compiling, ...]
    future: Future[Compiled]

    @property
    def temporary_bytes(self) -> int:
        """What both need beside arguments and results."""
        return self.future.result().temporary_bytes

    def share_ns(self, handle: Compiling) -> int:
        """A handle's part of the time of both, as they share it alone; never more than alone."""
        apart = sum(one.alone_ns for one in self.handles)
        both = min(apart, self.future.result().modelled_ns)
        return math.ceil(both * handle.alone_ns / max(1, apart))


@dataclass(frozen=True)
class CompilingSaving:
    """As `mwplan.profiling.bench.Saved`, read off the program of `LastUser`."""

    handle: Compiling
    last: LastUser
    future: Future[Compiled] | None

    @property
    def beside_bytes(self) -> int:
        """Bytes that the program needs beside what it reads for the last time and what it makes."""
        return 0 if self.future is None else self.future.result().temporary_bytes - self.last.apart_bytes

    @property
    def saving_bytes(self) -> int:
        """Bytes that the operation needs less than inputs, outputs and workspace."""
        if self.future is None:
            return 0
        apart = self.last.apart_bytes + self.handle.workspace_bytes
        return max(0, apart - self.future.result().temporary_bytes)


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
        self.named: dict[str, Future[Compiled]] = {}  # the same, without lowering
        self.progress = progress or (lambda done, started: None)
        self.done = 0
        self._lock = threading.Lock()

    @property
    def device(self) -> Device:
        """The target's figures."""
        assert self.target.device is not None
        return self.target.device

    def program(self, operation: Callable[..., Any], *args: Any) -> Compiling:
        """Starts to compile the operation for shapes like `args`, between barriers as within a step."""
        with platforms.lowering_for(self.target.platform):
            alone = Alone(operation, args, self._performed(operation))

        def between(leaves: list[Any]) -> list[Any]:
            found: list[Any] = trees.tie(alone.function(*trees.tie(leaves)))
            return found

        handle = Compiling(alone, self.started(between, alone.inputs, name=alone.digest))
        if self.target.platform == "gpu" and _function(operation) in _FORWARD and writes(alone.jaxpr.jaxpr):
            last = LastUser(alone, (), alone.result)
            name = last.digest and f"last user {last.digest}"
            passing = CompilingSaving(handle, last, self.started(last.step, *last.shapes, name=name))
            return dataclasses.replace(handle, passing=passing)
        return handle

    def _performed(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        """The operation with the barriers within that a step on a GPU gives it
        (`mwplan.execution.barriers`)."""
        if self.target.platform != "gpu":
            return operation
        waits = tied(operation, always=False)
        return written_once(waits) if _function(operation) in _BACKWARD else waits

    def saving(self, handle: Compiling, *, dead: PyTree, temporary: PyTree) -> CompilingSaving:
        """What the operation needs less where it is the last user of `dead`, leaves of its arguments, and
        `temporary`, leaves of its result, are no results of the step."""
        last = LastUser(handle.alone, dead, temporary)
        name = last.digest and f"last user {last.digest}"
        future = self.started(last.step, *last.shapes, name=name) if last.worth else None
        return CompilingSaving(handle, last, future)

    def together(self, *handles: Compiling, free: bool = False) -> _Pair | None:
        """Compiles them as one program where nothing stands between them (`free`) and compilers are given
        that freedom; else nothing: each operation's time is modelled."""
        if not free or self.target.platform == "cpu":
            return None
        made = {id(leaf) for one in handles for leaf in one.alone.outputs}
        inputs = {id(leaf): leaf for one in handles for leaf in one.alone.inputs if id(leaf) not in made}
        read = {id(leaf) for one in handles for leaf in one.alone.inputs}
        first, *_ = handles
        results = {id(leaf) for leaf in jax.tree.leaves(first.result[0])}

        def run(leaves: list[Any]) -> list[Any]:
            known = dict(zip(inputs, trees.tie(leaves), strict=True))
            for one in handles:
                found = one.alone.function(*(known[id(leaf)] for leaf in one.alone.inputs))
                known.update(zip(map(id, one.alone.outputs), found, strict=True))
            wanted = (key for key in known if key in made and (key in results or key not in read))
            tied: list[Any] = trees.tie([known[key] for key in wanted])
            return tied

        pair = _Pair(handles, self.started(run, list(inputs.values())))
        for one in handles:
            one.pairs.append(pair)
        return pair

    def crossing(
        self,
        forward: Compiling,
        backward: Compiling,
        *,
        ends: tuple[PyTree, PyTree],
        ct: PyTree,
        grads: PyTree,
    ) -> Crossing | None:
        """As `Pricing.crossing`."""
        if self.target.platform != "gpu":  # on TPUs no pause would hold: their compiler removes barriers
            return None
        memory = self.device.memory_bytes
        return Crossing(forward.alone, backward.alone, *ends, ct, grads, self.started, memory)

    def derive(self, handle: Compiling, base: Compiling, more: Compiling) -> None:
        """Nothing: each operation's time is modelled."""

    def started(self, function: Callable[..., Any], *given: Any, name: str | None = None) -> Future[Compiled]:
        """The compilation of `function(*given)`, in another thread, unless it is known; `function`, or what
        `jax.jit` made of one. `name`: of the program; one that had it already is not even lowered."""
        with self._lock:
            if name in self.named:
                return self.named[name]
        lowered = program.lower(function, given, self.target)
        key = program.key(lowered, self.target, self.target.compiler_options)
        with self._lock:
            if key not in self.known:
                self.known[key] = self.pool.submit(self._made, key, lowered)
            if name is not None:
                self.named[name] = self.known[key]
            return self.known[key]

    def _made(self, name: str, lowered: Any) -> Compiled:
        try:
            return program.known_or_built(name, lowered, self.target, self.target.compiler_options)
        finally:
            with self._lock:
                self.done += 1
                done, started = self.done, len(self.known)
            self.progress(done, started)
