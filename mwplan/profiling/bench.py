"""Prices operations on this device: their memory from compiled programs, their time from runs.

Each operation is traced once. What it allocates is read off a program of its own, compiled as cheaply as
the compiler allows (its buffers are the same, see `memory_options`) and never run. What it takes is measured
where it stands: the operations of one option follow one another in one program, as within a step, whose time
is shared out by what the operations count for. Programs are lowered one after another and compiled side by
side.
"""

from __future__ import annotations

import functools
import hashlib
import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from mwplan.common import platforms, trees
from mwplan.compilers.alone import Alone, LastUser, named
from mwplan.compilers.compiling import memory_options, temporaries, timing_options, workspace
from mwplan.network.constants import waiting
from mwplan.plans.packing import Workspace
from mwplan.profiling import costs, programs
from mwplan.profiling.roofline import DEVICES, Device
from mwplan.profiling.touch import FirstTouch
from mwplan.solvers.parallel import processors
from mwplan.targets.crossing import Crossing

PyTree = Any
_PIECE = 1 << 10  # bytes: parts of a workspace below leave no hole to speak of
_ENOUGH_NS = 100_000_000  # of one program's runs, together
_DRAWN = 1 << 20  # elements of noise: larger arrays repeat them, which times do not tell
_SHORT_NS = 5_000_000  # what is over so soon may find in caches what it reads


@runtime_checkable
class Priced(Protocol):
    """An operation's result, time and workspace."""

    @property
    def result(self) -> Any:
        """The shapes of what the operation gives."""

    @property
    def time_ns(self) -> int:
        """Its time, once settled."""

    @property
    def workspace_bytes(self) -> int:
        """What it allocates beside inputs and outputs, once settled."""


@runtime_checkable
class Saved(Protocol):
    """What an operation needs less where it is the last user of something."""

    @property
    def saving_bytes(self) -> int:
        """Bytes, once settled."""


@runtime_checkable
class Pricing(Protocol):
    """Tells what operations cost: by compiling and running them (`Bench`), or by counting
    (`mwplan.profiling.roofline.Roofline`). Arguments are pytrees of shapes."""

    @property
    def device(self) -> Device:
        """Figures of the device, or of one like it."""

    def program(self, operation: Callable[..., Any], *args: Any) -> Any:
        """What `operation(*args)` gives and costs, as `Priced`."""

    def saving(self, handle: Any, *, dead: PyTree, temporary: PyTree) -> Saved:
        """What the operation needs less where it is the last user of `dead`, as `Saving`."""

    def together(self, *handles: Any, free: bool = False) -> Any:
        """These operations follow one another: their times are measured in one program, if at all. `free`:
        nothing stands between them in a step, where forward operations have no barriers; where a compiler
        was asked what it makes of both, what they need (`temporary_bytes`), else None."""

    def crossing(
        self, forward: Any, backward: Any, *, ends: tuple[PyTree, PyTree], ct: PyTree, grads: PyTree
    ) -> Crossing | None:
        """What a compiler keeps from the one to the other; None where it keeps what it is told to. `ends`:
        the leaves of the layer's input and output that count there."""

    def derive(self, handle: Any, base: Any, more: Any) -> None:
        """The operation `handle` does what `base` does, and beside it some of what `more` does: its time need
        not be measured."""


def cotangent(y: PyTree) -> PyTree:
    """The shapes of a cotangent of `y`."""
    return jax.tree.map(
        lambda leaf: (
            trees.struct_of(leaf)
            if trees.is_inexact(leaf)
            else jax.ShapeDtypeStruct(leaf.shape, jax.dtypes.float0)
        ),
        y,
    )


@dataclass(frozen=True)
class Memory:
    """What is read off a compiled program."""

    temporaries: int
    workspace: Workspace


def like_this_one() -> Device:
    """Figures of a device of this one's kind: shares of times count, not the times."""
    return DEVICES["laptop" if platforms.platform() == "cpu" else "h100"]


class Handle(Alone):
    """One operation, and what was found of it."""

    def __init__(self, operation: Callable[..., Any], args: Any) -> None:
        super().__init__(operation, args)
        self.memory: Future[Memory] | None = None
        self.on_row: Future[Memory] | None = None  # the same, of a layer that is a row of a stack
        self.time: float | None = None
        self._counted: float | None = None

    def barred(self, *arrays: Any) -> list[Any]:
        """The outputs, between barriers as within a step."""
        return list(trees.tie(waiting(self.jaxpr)(*arrays)))

    def lowered(self) -> Any:
        """Its program, ready to be compiled."""
        return jax.jit(self.barred).lower(*self.inputs)

    @property
    def counted_ns(self) -> float:
        """What a roofline says of its time: shares count, not the figure."""
        if self._counted is None:
            self._counted = 1.0 + like_this_one().time_ns(costs.kernels(programs.graph(self.jaxpr)))
        return self._counted

    @property
    def measured_ns(self) -> float:
        """What its time has been found to be."""
        assert self.time is not None
        return self.time

    @property
    def time_ns(self) -> int:
        """As `Priced.time_ns`."""
        return math.ceil(self.measured_ns)

    @property
    def workspace_bytes(self) -> int:
        """As `Priced.workspace_bytes`."""
        return max(self.alone_bytes, 0 if self.on_row is None else self.on_row.result().temporaries)

    @property
    def alone_bytes(self) -> int:
        """The same of a layer that stands alone."""
        assert self.memory is not None
        return self.memory.result().temporaries


class Saving:
    """What an operation needs less than inputs + outputs + workspace, read off the program of `LastUser`."""

    def __init__(self, handle: Handle, dead: PyTree, temporary: PyTree) -> None:
        self.handle = handle
        self.last = LastUser(handle, dead, temporary)
        self.needs: Future[Memory] | None = None

    def lowered(self) -> Any:
        """The program, ready to be compiled."""
        return jax.jit(self.last.step).lower(*self.last.shapes)

    @property
    def saving_bytes(self) -> int:
        """As `Saved.saving_bytes`."""
        if self.needs is None:
            return 0
        apart = self.last.apart_bytes + self.handle.alone_bytes
        return max(0, apart - self.needs.result().temporaries)


class Joint:
    """Operations in one program. It takes `(recycled, inputs)`: buffers for outputs, which an earlier run
    gave, and the rest: in a compiled step an operation writes into memory that is there already."""

    def __init__(self, handles: Sequence[Handle]) -> None:
        self.handles = handles
        made = {id(leaf) for handle in handles for leaf in handle.outputs}
        used = {id(leaf) for handle in handles for leaf in handle.inputs}
        free = {id(leaf): leaf for handle in handles for leaf in handle.inputs if id(leaf) not in made}
        self.inputs = list(free.values())
        self.outputs = [leaf for handle in handles for leaf in handle.outputs if id(leaf) not in used]
        self.ns = 0.0

    @functools.cached_property
    def lowered(self) -> Any:
        """The program, ready to be compiled."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*donated.*")  # an output that is an input needs none
            jitted = jax.jit(
                self._run,
                donate_argnums=0,
                keep_unused=True,
                compiler_options=timing_options() or None,
            )
            return jitted.lower(self.outputs, self.inputs)

    @functools.cached_property
    def name(self) -> str:
        """A name that it shares with equal programs alone: by those of its operations and what they hand to
        one another; by its text, where one of them has no name."""
        return named(self.handles) or str(self.lowered.as_text())

    def _run(self, recycled: list[Any], inputs: list[Any]) -> list[Any]:
        known = {id(leaf): array for leaf, array in zip(self.inputs, inputs, strict=True)}
        for handle in self.handles:
            found = handle.barred(*(known[id(leaf)] for leaf in handle.inputs))
            known.update({id(leaf): array for leaf, array in zip(handle.outputs, found, strict=True)})
        return [known[id(leaf)] for leaf in self.outputs]

    def share(self) -> None:
        """Gives each operation that has no time yet its share of the whole."""
        counted = sum(handle.counted_ns for handle in self.handles)
        for handle in self.handles:
            if handle.time is None:
                handle.time = self.ns * handle.counted_ns / counted


class Bench:
    """Compiles and times; equal programs once.

    `touch`, called where something is timed: what memory costs that was not there before.
    """

    def __init__(self, repeats: int, seed: int, touch: Callable[[], FirstTouch] = FirstTouch) -> None:
        self.repeats = repeats
        self.key = jax.random.key(seed)
        self.noise = np.random.default_rng(seed)
        self.touch = touch
        self.known: dict[str, Future[Any]] = {}  # programs by their text
        self.times: dict[str, float] = {}
        self._pool = ThreadPoolExecutor(processors(), thread_name_prefix="mwplan-compiler")
        self._overhead_ns: float | None = None

    def close(self) -> None:
        """Ends its threads, without waiting for what nobody waits for."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def memory(self, kind: str, digest: str | None, lower: Callable[[], Any]) -> Future[Memory]:
        """What a program needs, from a compilation that is not for running it; `kind` and `digest`, its name,
        None: its text is. It is not lowered where one of that name is known."""

        def compiled(lowered: Any) -> Memory:
            found = _compiled(lowered, memory_options())
            return Memory(temporaries(found), workspace(found, _PIECE))

        if digest is None:
            lowered = lower()
            return self._once("text", lowered.as_text(), lambda: lowered, compiled)
        return self._once(kind, digest, lower, compiled)

    def program(self, joint: Joint) -> Future[Any]:
        """The program of a `Joint`, compiled to be run."""
        return self._once("run", joint.name, lambda: joint.lowered, lambda lowered: _compiled(lowered, {}))

    def _once(
        self, kind: str, name: str, lower: Callable[[], Any], make: Callable[[Any], Any]
    ) -> Future[Any]:
        name = hashlib.sha256(f"{kind}:{name}".encode()).hexdigest()
        if name not in self.known:
            self.known[name] = self._pool.submit(make, lower())
        return self.known[name]

    def time(self, joints: Sequence[Joint], arrays: Callable[[Any], Any]) -> None:
        """Times programs in rounds, so that a slow moment hits all alike; `arrays`: of a shape."""
        new = {joint.name: joint for joint in joints if joint.name not in self.times}
        overhead = self._overhead() if new else 0.0
        made: dict[int, Any] = {}  # one array for each shape, whoever reads it
        runs = []
        for joint in new.values():
            inputs = [made.setdefault(id(leaf), arrays(leaf)) for leaf in joint.inputs]
            runs.append(_Run(self.program(joint).result(), inputs, joint.outputs))
        for _ in range(1 + self.repeats):
            for run in runs:
                run.sample()
        for joint, run in zip(new.values(), runs):
            touched = self.touch().ns(temporaries(run.program))
            # What a first touch costs is rough: it does not explain all of a program's time.
            self.times[joint.name] = max(run.median_ns - touched, run.median_ns / 4) - overhead
        for joint in joints:
            joint.ns = max(0.0, self.times[joint.name])
            joint.share()

    def _overhead(self) -> float:
        """What a run costs that does nothing."""
        if self._overhead_ns is None:
            leaf = jax.ShapeDtypeStruct((), jnp.float32)
            joint = Joint([Handle(lambda a: a + 1, (leaf,))])
            run = _Run(self.program(joint).result(), [jnp.zeros((), jnp.float32)], joint.outputs)
            for _ in range(51):
                run.sample()
            self._overhead_ns = run.median_ns
        return self._overhead_ns


class _Run:
    """A program that is run again and again, in the place of what it gave before."""

    def __init__(self, program: Any, inputs: list[Any], outputs: list[Any]) -> None:
        self.program, self.inputs = program, inputs
        self.buffers = _buffers(outputs)
        self.samples: list[int] = []
        self.taken = 0  # by the last run

    @property
    def median_ns(self) -> float:
        """Of its samples."""
        return float(statistics.median(self.samples))

    def sample(self) -> None:
        """The first time a run that does not count, unless it is long enough to make up for that.

        What is short runs twice and the second time counts: in a step what an operation reads has just been
        written, and here other programs ran since. What is long is sampled no more often than it needs.
        """
        if sum(self.samples) > _ENOUGH_NS:
            return
        for again in (False, True):
            start = time.perf_counter_ns()
            self.buffers = jax.block_until_ready(self.program(self.buffers, self.inputs))
            taken = time.perf_counter_ns() - start
            if again or (self.taken or taken) >= _SHORT_NS:
                break
        if self.taken or taken > _ENOUGH_NS:
            self.samples.append(taken)
        self.taken = taken


class Layer:
    """The operations of one layer on a bench: `Pricing`, in three steps. They are traced as they are asked
    for, compiled by `start`, timed by `settle`."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.handles: list[Handle] = []
        self.savings: list[Saving] = []
        self.joints: list[Joint] = []
        self.derived: list[tuple[Handle, Handle, Handle]] = []
        self.device = like_this_one()

    def program(self, operation: Callable[..., Any], *args: Any) -> Handle:
        """As `Pricing.program`."""
        handle = Handle(operation, args)
        self.handles.append(handle)
        return handle

    def saving(self, handle: Handle, *, dead: PyTree, temporary: PyTree) -> Saving:
        """As `Pricing.saving`."""
        saving = Saving(handle, dead, temporary)
        self.savings.append(saving)
        return saving

    def together(self, *handles: Handle, free: bool = False) -> None:
        """As `Pricing.together`."""
        self.joints.append(Joint(handles))

    def crossing(
        self, forward: Handle, backward: Handle, *, ends: tuple[PyTree, PyTree], ct: PyTree, grads: PyTree
    ) -> None:
        """Nothing: each operation stands between barriers."""

    def derive(self, handle: Handle, base: Handle, more: Handle) -> None:
        """As `Pricing.derive`."""
        self.derived.append((handle, base, more))

    def start(self) -> list[Future[Any]]:
        """Has everything compiled: what is waited for."""
        futures = [self.bench.program(joint) for joint in self.joints]
        for handle in self.handles:
            handle.memory = self.bench.memory("alone", handle.digest, handle.lowered)
            futures.append(handle.memory)
        for saving in self.savings:
            if saving.last.worth:
                saving.needs = self.bench.memory("last user", saving.last.digest, saving.lowered)
                futures.append(saving.needs)
        return futures

    def settle(self, values: dict[int, Any]) -> None:
        """Times everything at `values`, arrays for shapes by their identities; at white noise for others."""

        def arrays(leaf: Any) -> Any:
            if id(leaf) in values:
                return values[id(leaf)]
            if trees.is_inexact(leaf):  # by NumPy: nothing need be compiled for it
                noise = self.bench.noise.standard_normal(min(math.prod(leaf.shape), _DRAWN), np.float32)
                return jnp.array(np.resize(noise.astype(leaf.dtype), leaf.shape))
            return _buffers([leaf])[0]

        self.bench.time(self.joints, arrays)
        for handle, base, more in self.derived:
            extra = (handle.counted_ns - base.counted_ns) * more.measured_ns / more.counted_ns
            handle.time = max(0.0, base.measured_ns + extra)
        measured = sum(joint.ns for joint in self.joints)
        counted = sum(handle.counted_ns for joint in self.joints for handle in joint.handles)
        for handle in self.handles:
            if handle.time is None:  # it stands nowhere that was timed
                handle.time = handle.counted_ns * measured / counted

    def forward(self, layer: PyTree, x: PyTree) -> PyTree:
        """The layer's output, by the program that was timed."""
        plain = self.joints[0]
        (handle,) = plain.handles
        arrays = [leaf for leaf in jax.tree.leaves((layer, x)) if not trees.is_float0(leaf)]
        return handle.returned(self.bench.program(plain).result()(_buffers(plain.outputs), arrays))

    def workspaces(self) -> tuple[Workspace, ...]:
        """What the workspaces of its operations consist of."""
        done = [handle.memory for handle in self.handles] + [saving.needs for saving in self.savings]
        found = [future.result().workspace for future in done if future is not None]
        return tuple(one for one in found if one.buffers)


def _compiled(lowered: Any, options: dict[str, Any]) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*donated.*")
        return lowered.compile(options or None)


def _buffers(structs: list[Any]) -> list[Any]:
    """New arrays of these shapes, small ones without compiling anything for it (but for typed keys)."""
    return [
        jnp.zeros(leaf.shape, leaf.dtype)
        if trees.is_key(leaf) or math.prod(leaf.shape) > _DRAWN
        else jnp.array(np.zeros(leaf.shape, leaf.dtype))
        for leaf in structs
    ]
