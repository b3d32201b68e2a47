"""Executes a schedule operation by operation and looks at what is alive: the measured memory timeline."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax

from mwplan.common.errors import ArgumentError
from mwplan.common.sizes import show_bytes, show_ns
from mwplan.compilers.compiling import options_of, temporaries
from mwplan.execution.execute import check_match
from mwplan.execution.gradients import Gradients
from mwplan.execution.interpreter import Interpreter
from mwplan.execution.view import View
from mwplan.network import operations, sharding
from mwplan.network.carried import Carried
from mwplan.network.chain import Chain, boundaries, unstack
from mwplan.plans.ledger import Event, replay
from mwplan.plans.profiles import Profile
from mwplan.plans.schedule import Schedule

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PyTree = Any


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedEvent:
    """One operation as it ran.

    `array_bytes`: every array alive just after it that is not an argument of the step or a parameter's
    gradient: what the operation read and wrote, and what is held. `workspace_bytes`: its compiled program's
    temporaries. `predicted`: the ledger's event, where a profile was given.
    """

    sweep: str
    layer: int
    depth: int
    array_bytes: int
    workspace_bytes: int
    time_ns: int
    predicted: Event | None = None

    @property
    def predicted_array_bytes(self) -> int | None:
        """What the ledger expects `array_bytes` to be: what is alive without workspace and before any
        saving."""
        event = self.predicted
        return None if event is None else event.live_bytes - event.workspace_bytes + event.saving_bytes

    @property
    def live_bytes(self) -> int:
        """Arrays and workspace together. An operation dispatched alone saves nothing by dying inputs."""
        return self.array_bytes + self.workspace_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """A step's events as measured, and its gradients.

    >>> store = tuple(mw.Run(kind=mw.RunKind.STORE, start=i, stop=i + 1, options=("vjp",)) for i in range(2))
    >>> timeline = mw.trace(mw.Schedule(runs=store), mw.Chain([jnp.sin, jnp.cos]), jnp.ones(64), jnp.sum)
    >>> [(event.sweep, event.layer) for event in timeline.events]
    [('forward', 1), ('forward', 2), ('turn', 2), ('backward', 2), ('backward', 1)]
    """

    events: tuple[TracedEvent, ...]
    gradients: Any

    @property
    def peak_bytes(self) -> int:
        """The most bytes alive at any event."""
        return max(event.live_bytes for event in self.events)

    def __str__(self) -> str:
        top = max(self.events, key=lambda event: event.live_bytes)
        wrong = sum(e.predicted is not None and e.array_bytes != e.predicted_array_bytes for e in self.events)
        known = sum(event.predicted is not None for event in self.events)
        compared = f"; arrays as predicted at {known - wrong} of {known}" if known else ""
        return (
            f"timeline of {len(self.events)} operations in "
            f"{show_ns(sum(event.time_ns for event in self.events))}{compared}\n"
            f"  most alive: {show_bytes(top.live_bytes)}, at the {top.sweep} sweep of layer {top.layer}\n"
            "  `timeline.events` has each operation, `timeline.plot()` draws them, `timeline.gradients` are "
            "the parameters'"
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """Measured live bytes over the events, and the ledger's behind them; returns the axes."""
        from mwplan.common.plots import plot_timeline

        measured = [event.array_bytes for event in self.events]
        return plot_timeline(measured, [event.predicted_array_bytes for event in self.events], ax)


def trace(
    schedule: Schedule,
    chain: Chain,
    x: PyTree,
    loss: Callable[..., Any],
    *args: Any,
    profile: Profile | None = None,
) -> Timeline:
    """Runs one gradient step of `loss(y, *args)` by `schedule`, every operation dispatched alone, and
    measures it.

    **Arguments:** `schedule`; `chain`, `x`; `loss(y, *args)`, a scalar; `args`; `profile`, the one the
    schedule was made from, to set the ledger's events beside.
    **Returns:** a `Timeline`. Its live bytes come from the arrays that exist on the device, on any backend.
    **Raises:** `ScheduleMismatchError`; `ArgumentError` where called under `jax.jit`.
    **Cost:** each distinct operation is compiled once, and run twice (the second run is timed).

    >>> store = tuple(mw.Run(kind=mw.RunKind.STORE, start=i, stop=i + 1, options=("vjp",)) for i in range(2))
    >>> timeline = mw.trace(mw.Schedule(runs=store), mw.Chain([jnp.sin, jnp.cos]), jnp.ones(64), jnp.sum)
    >>> len(timeline.events), all(event.live_bytes >= 64 * 4 for event in timeline.events)
    (5, True)
    """
    check_match(schedule, chain)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((chain, x, args))):
        raise ArgumentError("`trace` measures concrete arrays: call it outside `jax.jit`")
    if any(sharding.spread(leaf) for leaf in jax.tree.leaves((chain, x, args))):
        raise ArgumentError(
            "`trace` looks at one device, and these arrays lie on several: give arrays of one"
        )
    expected = () if profile is None else replay(profile, schedule.runs).events
    chain = unstack(chain)  # every operation is dispatched alone
    watch = _Watch(chain)
    view = View(chain, chain.places())
    structs = boundaries(chain, x)
    carried = Carried.along(chain, structs, wrt_input=False)
    interpreter = Interpreter(
        view, structs, watch.gradients, watch.perform, lambda tree: tree, carried=carried
    )
    interpreter.claim(0, x)
    interpreter.claim(0)
    kept = interpreter.forward(schedule.runs, 0)
    y = interpreter.x[len(chain)]
    # `y` may carry integers and random keys along
    cotangent = jax.jit(jax.grad(lambda y: loss(y, *args), allow_int=True), compiler_options=watch.options)
    box = [carried.dropped(jax.block_until_ready(cotangent(y)), len(chain))]
    watch.note("turn", len(chain), 0, 0, 0)
    del y
    interpreter.release(len(chain))
    interpreter.backward(schedule.runs, kept, box, 0)
    events = tuple(
        TracedEvent(
            sweep=sweep,
            layer=layer,
            depth=depth,
            array_bytes=live,
            workspace_bytes=workspace,
            time_ns=taken,
            predicted=expected[i] if i < len(expected) else None,
        )
        for i, (sweep, layer, depth, live, workspace, taken) in enumerate(watch.events)
    )
    return Timeline(events=events, gradients=watch.gradients.parts)


class _Watch:
    """A performer that dispatches every operation alone and counts the bytes alive after it."""

    def __init__(self, chain: Chain) -> None:
        self.options = options_of() or None
        self.gradients = Gradients(chain)
        self.events: list[tuple[str, int, int, int, int, int]] = []
        self.compiled: dict[Any, Any] = {}
        # Whatever exists before the step begins is an argument, or none of its business.
        gc.collect()
        self.before = {array.unsafe_buffer_pointer(): array for array in jax.live_arrays()}

    def perform(self, sweep: str, layer: int, depth: int, operation: Callable[..., Any], *args: Any) -> Any:
        """Runs the operation twice, times the second run, and notes what is alive."""
        key = (
            getattr(operation, "func", operation),
            tuple(sorted(getattr(operation, "keywords", {}).items())),
            jax.tree.structure(args),
            tuple((leaf.shape, leaf.dtype.name) for leaf in jax.tree.leaves(args)),
        )
        if key not in self.compiled:
            compiled = jax.jit(operation, compiler_options=self.options).lower(*args).compile()
            self.compiled[key] = compiled, _passed_through(operation, args)
        run, same = self.compiled[key]
        jax.block_until_ready(run(*args))
        start = time.perf_counter_ns()
        result = jax.block_until_ready(run(*args))
        taken = time.perf_counter_ns() - start
        if same:
            leaves, treedef = jax.tree.flatten(result)
            inputs = jax.tree.leaves(args)
            result = jax.tree.unflatten(
                treedef, [inputs[same[i]] if i in same else leaf for i, leaf in enumerate(leaves)]
            )
            del leaves
        where = operations.gradients_of(operation)
        self.note(sweep, layer, depth, temporaries(run), taken, () if where is None else result[where])
        return result

    def note(
        self, sweep: str, layer: int, depth: int, workspace: int, taken: int, new_gradients: Any = ()
    ) -> None:
        """Counts the bytes of all live arrays but arguments and gradients, buffers once."""
        skip = {
            leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((self.gradients.parts, new_gradients))
        }
        buffers = {
            array.unsafe_buffer_pointer(): array.nbytes for array in jax.live_arrays() if not _away(array)
        }
        for known in skip | self.before.keys():
            buffers.pop(known, None)
        self.events.append((sweep, layer, depth, sum(buffers.values()), workspace, taken))


def _away(array: jax.Array) -> bool:
    """Whether it is in the host's memory, on a device that has its own."""
    device: Any = next(iter(array.sharding.device_set))
    kind = array.sharding.memory_kind
    return kind is not None and kind.endswith("host") and kind != device.default_memory().kind


def _passed_through(operation: Callable[..., Any], args: tuple[Any, ...]) -> dict[int, int]:
    """Outputs of the operation that are inputs of it, by index: one buffer within a step, but a copy when
    dispatched alone."""
    jaxpr = jax.make_jaxpr(operation)(*args).jaxpr
    where = {var: i for i, var in enumerate(jaxpr.invars)}
    return {
        i: where[var]
        for i, var in enumerate(jaxpr.outvars)
        if isinstance(var, type(jaxpr.invars[0])) and var in where
    }
