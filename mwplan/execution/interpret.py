"""Walks the runs of a schedule over a chain, forward and backward, and hands each operation to a *performer*.

In a compiled step the performer puts `lax.optimization_barrier` around the operation, so that XLA neither
postpones what it should free nor merges a recomputation with what it recomputes; `mwplan.execution.tracing`
uses one that dispatches every operation by itself and looks at what is alive. Where runs, or the layers
within one, repeat over a stack, one repetition is walked inside a `lax.scan`, by an interpreter of its own
whose layers are a window on the stack.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array

from mwplan.common import platforms, trees
from mwplan.common.errors import ScheduleMismatchError
from mwplan.execution import loops, taped
from mwplan.execution.taped import Taped
from mwplan.network import operations, rules, sketch
from mwplan.network.canonical import canonical
from mwplan.network.chain import Chain, Place, Stack, layer_name, repeats
from mwplan.network.residuals import Residuals
from mwplan.plans import tape
from mwplan.plans.schedule import Run, RunKind, shifted

PyTree = Any


class Performer(Protocol):
    """Executes one operation. `sweep`, `layer`, `depth` as in `ledger.Event`."""

    def __call__(self, sweep: str, layer: int, depth: int, operation: Callable[..., Any], *args: Any) -> Any:
        """Returns `operation(*args)`."""


def compiled(sweep: str, layer: int, depth: int, operation: Callable[..., Any], *args: Any) -> Any:
    """The performer of a compiled step.

    Inputs are tied so that no part of an operation (a factorisation of the weights, say) starts before its
    turn, outputs so that all of it is done before the next begins.
    """
    with named(sweep, layer):
        return trees.tie(operation(*trees.tie(args)))


def named(sweep: str, layer: int) -> Any:
    """The scope of an operation's instructions in a compiled program, by which `mw.explain_peak` and
    profilers name it; the layers of a loop's body count from its own first."""
    return jax.named_scope(f"{sweep} {layer}")


def loose(sweep: str, layer: int, depth: int, operation: Callable[..., Any], *args: Any) -> Any:
    """As `compiled`, but residuals are not tied: XLA may compute them where they are used, from what is there
    anyway, instead of keeping them."""
    with named(sweep, layer):
        return trees.tie(operation(*trees.tie(args, Residuals)), Residuals)


@dataclass(frozen=True)
class Detours:
    """An arrangement: operations that begin with a detour, an array of ones, negated an even number of times.

    What it is for: XLA places the longest-lived of equally large buffers first, where life is counted in
    allocations, and so leaves holes that depend on how many small buffers come and go beside the large ones.
    A detour adds some: the program is the same, the holes are others.

    `lengths`, of operations by `name`, even numbers; `others`, of all others.
    """

    SCOPE: ClassVar[str] = "detour"

    lengths: tuple[tuple[str, int], ...] = ()
    others: int = 0

    @functools.cached_property
    def _lengths(self) -> dict[str, int]:
        return dict(self.lengths)

    def length(self, name: str) -> int:
        """That of the operation `name`."""
        return self._lengths.get(name, self.others)


#: The shortest detour in every operation.
EVEN = Detours(others=2)


@dataclass
class Arranged:
    """As `compiled`, with detours. Nothing of an operation starts before its detour is over, or what it has
    already written would live the longer for it.

    `size`: of a detour's arrays, more than any output has, or they would be made in an output that is not
    written yet, and count for nothing. `one`: the number 1, from the last detour, which XLA does not know:
    each begins with it, and `settled` uses it, or XLA would leave them out. None before the first.
    """

    detours: Detours
    size: int
    one: Array | None = None

    def __call__(self, sweep: str, layer: int, depth: int, operation: Callable[..., Any], *args: Any) -> Any:
        """As `compiled`."""
        name = f"{sweep} {layer} {depth}"
        if times := self.detours.length(name):
            one = jnp.ones((), jnp.float32) if self.one is None else self.one
            with jax.named_scope(f"{Detours.SCOPE}:{name}"):
                args, one = trees.tie((args, one))
                ones = jnp.broadcast_to(one, (self.size,))
                for _ in range(times):
                    ones = trees.tie(-ones)
                args, self.one = trees.tie((args, ones[0]))
        return compiled(sweep, layer, depth, operation, *args)

    def settled(self, grads: PyTree) -> PyTree:
        """The same gradients, the smallest of them times `one`."""
        leaves, treedef = jax.tree.flatten(grads)
        sizes = [(leaf.size, i) for i, leaf in enumerate(leaves) if trees.is_inexact(leaf) and leaf.size]
        if self.one is not None and sizes:
            _, at = min(sizes)
            leaves[at] = leaves[at] * self.one.astype(leaves[at].dtype)
        return jax.tree.unflatten(treedef, leaves)


def looped(sweep: str, layer: int, depth: int, operation: Callable[..., Any], *args: Any) -> Any:
    """The performer of a compiled step inside a loop."""
    return compiled(sweep, layer, depth, canonical(operation), *args)


def looped_loose(sweep: str, layer: int, depth: int, operation: Callable[..., Any], *args: Any) -> Any:
    """As `loose`, where `looped` is needed."""
    return loose(sweep, layer, depth, canonical(operation), *args)


def alone(sweep: str, layer: int, depth: int, operation: Callable[..., Any], *args: Any) -> Any:
    """The performer without ties: of an untied step, and of a loop's body that is one operation, whose turns
    follow one another anyway. Ties would keep XLA from fusing the operation with what it reads and writes."""
    with named(sweep, layer):
        return operation(*args)


def looped_alone(sweep: str, layer: int, depth: int, operation: Callable[..., Any], *args: Any) -> Any:
    """As `alone`, where `looped` is needed."""
    with named(sweep, layer):
        return canonical(operation)(*args)


@dataclass(frozen=True)
class View:
    """The layers that an interpreter sees: of a whole chain, or of a window on one of its stacks.

    `places`, of each layer; `at`, a repetition to be added to theirs, known only when the program runs.
    """

    chain: Chain
    places: list[Place]
    at: Any = 0

    def layer(self, position: int) -> PyTree:
        """The layer that makes `x_position`."""
        place = self.places[position - 1]
        part = self.chain.parts[place.part]
        if not isinstance(part, Stack):
            return part
        return loops.row(part.block[place.phase], self.at + place.repetition)

    def tag(self, position: int) -> Hashable:
        """What layers that may be walked by one scan share."""
        place = self.places[position - 1]
        stacked = isinstance(self.chain.parts[place.part], Stack)
        return (place.part, place.phase) if stacked else ("alone", place.part)

    def window(self, start: int, span: int, repetition: Any) -> View:
        """The layers `start + 1 .. start + span`, `repetition` times as many further on."""
        base = self.places[start]
        block = len(self.chain.parts[base.part].block)
        inside = [
            dataclasses.replace(place, repetition=place.repetition - base.repetition)
            for place in self.places[start : start + span]
        ]
        return View(self.chain, inside, self.at + base.repetition + repetition * (span // block))


class Gradients:
    """Parameter gradients as they are found, by part of the chain: of a layer a list, of a stack one list a
    layer of its block, of stacked arrays.

    `performs`: whether `found` performs an operation of its own.
    """

    performs: ClassVar[bool] = False

    def __init__(self, chain: Chain, parts: list[Any] | None = None) -> None:
        self.chain = chain
        self.parts: list[Any] = [None] * len(chain.parts) if parts is None else parts

    def within(self, part: int, buffers: Any) -> Gradients:
        """Those of one repetition of a stack; `buffers`, its gradients so far."""
        parts = [None] * len(self.parts)
        parts[part] = buffers
        return Gradients(self.chain, parts)

    def layer(self, view: View, position: int) -> PyTree:
        """The layer that makes `x_position`."""
        return view.layer(position)

    def found(
        self, walker: Interpreter, position: int, depth: int, grads: list[Any], later: PyTree
    ) -> PyTree:
        """The gradient of one layer has come. Returns `later`, what follows needs: it may be made to wait."""
        view = walker.view
        place = view.places[position - 1]
        if not isinstance(self.chain.parts[place.part], Stack):
            self.parts[place.part] = grads
            return later
        block = list(self.stacked(place.part))
        block[place.phase] = loops.put(block[place.phase], grads, view.at + place.repetition)
        self.parts[place.part] = block
        return later

    def stacked(self, part: int) -> list[Any]:
        """The arrays of a stack's gradients, zeros where none has come."""
        if self.parts[part] is None:
            block = self.chain.parts[part].block
            self.parts[part] = [[jnp.zeros_like(leaf) for leaf in trees.parameters(one)] for one in block]
        return self.parts[part]


@dataclass(frozen=True)
class Repeat:
    """`count` times the same: the `span` layers from `start` on, and, between the runs of a schedule, the
    `runs` that cover them (from 0)."""

    start: int
    span: int
    count: int
    runs: tuple[Run, ...] = ()

    @property
    def stop(self) -> int:
        """The last of its layers."""
        return self.start + self.span * self.count


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Scanned:
    """What a scan over a `Repeat` keeps from forward to backward; every leaf has a leading axis, one row a
    repetition.

    `claims`: of the activations in `x`, by position within the repetition. `end_claims`: how many want the
    repetition's last activation, which is the first of the next, and kept there.
    """

    x: dict[int, PyTree]
    kept: list[Any]
    sketches: dict[int, Array]
    claims: tuple[tuple[int, int], ...] = field(metadata={"static": True})
    end_claims: int = field(metadata={"static": True})


#: Fewer repetitions than this are written out: a scan frees what it stacks only as a whole.
LEAST_REPETITIONS = 4
#: The longest block of runs, or of layers, that is looked for as a repetition.
LONGEST_BLOCK = 16


class Interpreter:
    """Walks the runs of a schedule over a chain.

    **Arguments:** `view`, the layers; `structs`, the shapes of their boundaries; `grads`, where gradients go;
    `perform`, which executes an operation; `gate`, which makes arrays wait for one another; `check`, whether
    runs that reconstruct something are compared with the truth.

    **Attributes:** `x`, the activations alive by position, each once however many runs want it, and `claims`,
    how many do; `report`, the discrepancies by run, each a scalar or a row of a vector; `sketches`, of the
    activations that INVERT runs will rebuild.
    """

    def __init__(
        self,
        view: View,
        structs: Sequence[PyTree],
        grads: Gradients,
        perform: Performer = compiled,
        gate: Callable[[PyTree], PyTree] = trees.tie,
        *,
        check: bool = False,
    ) -> None:
        self.view = view
        self.structs = structs
        self.grads = grads
        self.perform = perform
        self.gate = gate
        self.check = check
        self.x: dict[int, PyTree] = {}
        self.claims: dict[int, int] = {}
        self.report: dict[tuple[int, int], Any] = {}
        self.sketches: dict[int, Array] = {}

    def layer(self, position: int) -> PyTree:
        """The layer that makes `x_position`."""
        return self.grads.layer(self.view, position)

    # -- activations
    # -----------------------------------------------------------------------------------------------

    def claim(self, position: int, value: PyTree = None) -> None:
        """One more user of `x_position`; `value` is needed from the first."""
        if position not in self.x:
            self.x[position] = value
        self.claims[position] = self.claims.get(position, 0) + 1

    def release(self, position: int) -> None:
        """One user less; the last one drops it."""
        self.claims[position] -= 1
        if not self.claims[position]:
            del self.x[position], self.claims[position]

    def shared(self, layer: int, held: Residuals) -> tuple[PyTree, PyTree]:
        """The layer's input and output where its residuals share them, else None."""
        return self.x[layer - 1] if held.keeps_input else None, self.x[layer] if held.keeps_output else None

    def release_shared(self, layer: int, held: Residuals) -> None:
        """The residuals are gone: so are their claims."""
        if held.keeps_output:
            self.release(layer)
        if held.keeps_input:
            self.release(layer - 1)

    # -- repetitions
    # -----------------------------------------------------------------------------------------------

    def segments(self, runs: Sequence[Run]) -> list[Run | Repeat | Taped]:
        """`runs`, with those that repeat over a stack taken together, and those that are better executed by a
        tape."""
        out: list[Run | Repeat | Taped] = []
        rest: list[Run] = []
        for alike, group in itertools.groupby(runs, key=self._alike):
            some = tuple(group)
            found = self._taped(some, alike[1]) if alike else None
            if found:
                out += [*self._segments(rest), found]
                rest = []
            else:
                rest += some
        return out + self._segments(rest)

    def _alike(self, run: Run) -> tuple[int, str] | None:
        """What STORE and RECOMPUTE runs have in common that one tape may hold: a stack whose block is one
        layer, and an option; else None."""
        first, last = self.view.places[run.start], self.view.places[run.stop - 1]
        part = self.view.chain.parts[first.part]
        if not isinstance(part, Stack) or len(part.block) > 1 or first.part != last.part:
            return None
        option = tape.option_of(run)
        return (first.part, option) if option else None

    def _taped(self, runs: tuple[Run, ...], option: str) -> Taped | None:
        if tape.written_out(runs) <= tape.LOOPS:
            return None
        start = runs[0].start
        many = Repeat(start, 1, runs[-1].stop - start, runs)
        return taped.find(self, many, option)

    def _segments(self, runs: Sequence[Run]) -> list[Run | Repeat | Taped]:
        keys: list[Hashable] = []
        for run in runs:
            tag = self.view.tag(run.start + 1)
            within = self.view.places[run.stop - 1].part == self.view.places[run.start].part
            # What a loop stacks is on the device.
            within = within and run.kind is not RunKind.OFFLOAD
            keys.append((shifted(run, -run.start), tag) if within else run)
        out: list[Run | Repeat | Taped] = []
        for at, period, count in repeats(keys, LONGEST_BLOCK):
            if count < LEAST_REPETITIONS or not _stacked(self.view, runs[at].start):
                out += runs[at : at + period * count]
                continue
            start = runs[at].start
            block = tuple(shifted(run, -start) for run in runs[at : at + period])
            out.append(Repeat(start, block[-1].stop, count, block))
        return out

    def pieces(self, run: Run) -> list[Repeat]:
        """The layers of one run, with those that repeat over a stack taken together."""
        each = (
            run.options if run.kind in (RunKind.MOONWALK, RunKind.INVERT) else [""] * (run.stop - run.start)
        )
        keys = [(self.view.tag(run.start + 1 + i), option) for i, option in enumerate(each)]
        out = []
        for at, period, count in repeats(keys, LONGEST_BLOCK):
            start = run.start + at
            if count < LEAST_REPETITIONS or not _stacked(self.view, start):
                out += [Repeat(start + i, 1, 1) for i in range(period * count)]
            else:
                out.append(Repeat(start, period, count))
        return out

    def within(
        self, many: Repeat, repetition: Any, buffers: Any = None, *, single: bool = False
    ) -> Interpreter:
        """An interpreter of one repetition; `buffers`, the stack's gradients so far; `single`, whether each
        of its layers is one operation."""
        perform = compiled if isinstance(self.perform, Arranged) else self.perform
        if platforms.platform() == "cpu":
            perform = {compiled: looped, alone: looped_alone, loose: looped_loose}.get(perform, perform)
        if single and many.span == 1:
            bare = {compiled: alone, looped: looped_alone, loose: alone, looped_loose: looped_alone}
            perform = bare.get(perform, perform)
        return Interpreter(
            self.view.window(many.start, many.span, repetition),
            self.structs[many.start : many.start + many.span + 1],
            self.grads.within(self.view.places[many.start].part, buffers),
            perform,
            self.gate,
            check=self.check,
        )

    def buffers(self, many: Repeat) -> Any:
        """The gradients of the stack that `many` repeats over."""
        return self.grads.stacked(self.view.places[many.start].part)

    def _scan_forward(self, many: Repeat, walk: Callable[[Interpreter], list[Any]]) -> Scanned:
        """F over a repetition after another; `walk` does one and returns what it keeps.

        As in `forward`, one claim on the first input is consumed, one on the last output is left.
        """
        fixed: list[Any] = []

        def step(x: PyTree, repetition: Any, _: None) -> Any:
            inner = self.within(many, repetition, single=True)
            inner.claim(0, x)
            kept = walk(inner)
            y = inner.x[many.span]
            inner.release(many.span)
            end_claims = inner.claims.pop(many.span, 0)
            if end_claims:
                inner.x[0] = x  # the repetition before wants it
                del inner.x[many.span]
            fixed[:] = tuple(sorted(inner.claims.items())), end_claims
            return y, (inner.x, kept, inner.sketches)

        y, rows = loops.scan(step, self.x[many.start], None, many.count)
        claims, end_claims = fixed
        self.claim(many.stop, y)
        for _ in range(end_claims):
            self.claim(many.stop)
        self.release(many.start)
        x, kept, sketches = rows
        return Scanned(x, kept, sketches, claims, end_claims)

    def _scan_backward(
        self,
        many: Repeat,
        saved: Scanned,
        carried: Any,
        walk: Callable[[Interpreter, Any, list[Any]], Any],
        *,
        single: bool,
    ) -> tuple[Any, Any]:
        """Over the repetitions from the last to the first:
        `walk(interpreter, carried, kept) -> carried, row`; `single`, as in `within`.

        Returns the last `carried` and the stacked rows; the gradients go where they belong.
        """

        def step(state: Any, repetition: Any, rows: Any) -> Any:
            carried, end, buffers = state
            x, kept, sketches = rows
            inner = self.within(many, repetition, buffers, single=single)
            inner.x, inner.claims, inner.sketches = dict(x), dict(saved.claims), dict(sketches)
            if saved.end_claims:
                inner.x[many.span], inner.claims[many.span] = end, saved.end_claims
            carried, row = walk(inner, carried, kept)
            keys = tuple(sorted(inner.report))
            fixed[:] = [keys]
            end = x[0] if saved.end_claims else None
            return (carried, end, inner.buffers(_whole(many))), (row, inner.reported(keys))

        fixed: list[Any] = []
        end = self.x[many.stop] if saved.end_claims else None
        rows = (saved.x, saved.kept, saved.sketches)
        (carried, _, buffers), (out, reports) = loops.scan(
            step, (carried, end, self.buffers(many)), rows, many.count, reverse=True
        )
        for _ in range(saved.end_claims):
            self.release(many.stop)
        self.took(many, buffers)
        flat = reports.reshape(-1)
        for i in range(many.count):
            for j, (start, stop) in enumerate(fixed[0]):
                shift = many.start + i * many.span
                self.report[start + shift, stop + shift] = flat, i * len(fixed[0]) + j
        return carried, out

    def took(self, many: Repeat, buffers: Any) -> None:
        """The gradients of the stack that `many` repeats over are now these."""
        self.grads.parts[self.view.places[many.start].part] = buffers

    def reported(self, keys: Sequence[tuple[int, int]]) -> Array:
        """The discrepancies of these runs, as one vector; NaN where there is none."""
        pool: list[Array] = [jnp.full(1, jnp.nan, jnp.float32)]
        where: dict[int, int] = {}
        index, size = [], 1
        for key in keys:
            vector, row = self.report.get(key, (pool[0], 0))
            if vector is pool[0]:
                index.append(0)
                continue
            if id(vector) not in where:
                where[id(vector)] = size
                pool.append(vector)
                size += vector.size
            index.append(where[id(vector)] + row)
        if not index:
            return jnp.zeros(0, jnp.float32)
        return jnp.concatenate(pool)[jnp.asarray(index)]

    def _sketch(self, position: int) -> None:
        """Of `x_position`, before anything else is done with it."""
        tied = self.gate((sketch.take(self.x[position]), self.x[position]))
        self.sketches[position], self.x[position] = tied

    def _note(self, run: Run, discrepancy: Array) -> None:
        self.report[run.start, run.stop] = discrepancy[None], 0

    # -- F
    # --------------------------------------------------------------------------------

    def forward(self, runs: Sequence[Run], depth: int) -> list[Any]:
        """F over `runs`: returns what each keeps, or what a scan over several does.

        The stretch's input is in `x`, claimed once; that claim is consumed, and one on its output is left.
        """
        kept: list[Any] = []
        for one in self.segments(runs):
            if isinstance(one, Run):
                kept.append(self._forward_run(one, depth))
            elif isinstance(one, Taped):
                kept.append(taped.forward(self, one, depth))
            else:
                walk = functools.partial(Interpreter.forward, runs=one.runs, depth=depth)
                kept.append(self._scan_forward(one, walk))
        return kept

    def _forward_run(self, run: Run, depth: int) -> list[Any]:
        kept: list[Any] = []
        pieces = self.pieces(run)
        if run.kind in (RunKind.MOONWALK, RunKind.RECOMPUTE):
            self.claim(run.start)
        invert = run.kind is RunKind.INVERT and self.check
        if invert:
            self._sketch(run.start)
        for piece in pieces:
            if piece.count > 1:
                part = _part(run, piece)
                walk = functools.partial(Interpreter._forward_layers, run=part, depth=depth)
                saved = self._scan_forward(piece, walk)
                if run.kind is not RunKind.RECOMPUTE:
                    kept.append(saved)
            else:
                kept += self._forward_layers(_part(run, piece, shift=False), depth)
                if invert and piece.stop == run.start + 1 < run.stop:
                    self._sketch(piece.stop)
        if run.kind is RunKind.INVERT:
            self.claim(run.stop)
        return kept

    def _forward_layers(self, run: Run | _Part, depth: int) -> list[Any]:
        kept = []
        for layer in range(run.start + 1, run.stop + 1):
            one = self.layer(layer)
            keeps_input = keeps_output = False
            operation: Callable[..., Any]
            if run.kind is RunKind.OFFLOAD:
                operation = functools.partial(operations.offload_forward, rule=self.rule(run, layer))
                y, away = self.perform("forward", layer, depth, operation, one, self.x[layer - 1])
                kept.append(away)
            elif run.kind is not RunKind.RECOMPUTE:
                operation = functools.partial(operations.forward, rule=self.rule(run, layer))
                y, held = self.perform("forward", layer, depth, operation, one, self.x[layer - 1])
                kept.append(held)
                keeps_input, keeps_output = held.keeps_input, held.keeps_output
            else:
                y = self.perform("forward", layer, depth, operations.plain_forward, one, self.x[layer - 1])
            self.claim(layer, y)
            del y
            if keeps_output:
                self.claim(layer)
            if not keeps_input:
                self.release(layer - 1)
        return kept

    # -- backward
    # --------------------------------------------------------------------------------------------------

    def backward(self, runs: Sequence[Run], kept: list[Any], box: list[PyTree], depth: int) -> None:
        """Backward over `runs`.

        `box` holds one cotangent, that of the stretch's output on entry and of its input on exit: a list, so
        that no frame up the stack keeps alive what the sweep is done with. `kept` is emptied for the same
        reason.
        """
        for one in reversed(self.segments(runs)):
            held = kept.pop()
            if isinstance(one, Run):
                self._backward_run(one, held, box, depth)
                continue
            if isinstance(one, Taped):
                taped.backward(self, one, held, box, depth)
                continue

            def walk(inner: Interpreter, ct: PyTree, kept: list[Any], runs: Any = one.runs) -> Any:
                inside = [ct]
                inner.backward(runs, kept, inside, depth)
                return inside.pop(), None

            stores = all(run.kind is RunKind.STORE for run in one.runs)
            single = stores and not self.grads.performs
            box.append(self._scan_backward(one, held, box.pop(), walk, single=single)[0])

    def _backward_run(self, run: Run, held: list[Any], box: list[PyTree], depth: int) -> None:
        match run.kind:
            case RunKind.STORE:
                self.store(run, held, box, depth)
            case RunKind.MOONWALK:
                self._moonwalk(run, held, box, depth)
            case RunKind.RECOMPUTE:
                self._recompute(run, box, depth)
            case RunKind.INVERT:
                self._invert(run, held, box, depth)
            case RunKind.OFFLOAD:
                self._offload(run, held, box, depth)

    def store(self, run: Run, kept: list[Residuals], box: list[PyTree], depth: int) -> None:
        """Backward over a STORE run."""
        layer, held = run.stop, kept.pop()
        operation = functools.partial(operations.store_backward, rule=self.rule(run, layer))
        grads, ct = self.perform(
            "backward",
            layer,
            depth,
            operation,
            self.layer(layer),
            held,
            *self.shared(layer, held),
            box.pop(),
        )
        self.release_shared(layer, held)
        box.append(self.grads.found(self, layer, depth, grads, ct))

    def _offload(self, run: Run, kept: list[Any], box: list[PyTree], depth: int) -> None:
        layer = run.stop
        operation = functools.partial(operations.offload_backward, rule=self.rule(run, layer))
        grads, ct = self.perform(
            "backward", layer, depth, operation, self.layer(layer), kept.pop(), box.pop()
        )
        box.append(self.grads.found(self, layer, depth, grads, ct))

    def _moonwalk(self, run: Run, kept: list[Any], box: list[PyTree], depth: int) -> None:
        pieces = self.pieces(run)
        inside = [trees.widen(box.pop())]
        compared = self._compared(run, pieces) if self.check else None
        truth = got = None
        fragments: list[Any] = []
        for piece in reversed(pieces):  # R
            if piece.stop == compared:
                # Before the next operation's arrays are there.
                truth, inside[0] = self.gate((sketch.take(inside[0]), inside[0]))
            if piece.count > 1:
                part = _part(run, piece)

                def walk(inner: Interpreter, ct: PyTree, held: list[Any], part: _Part = part) -> Any:
                    return _swapped(inner._reverse(part, held, [ct], depth))

                ct, rows = self._scan_backward(piece, kept.pop(), inside.pop(), walk, single=True)
                fragments.append(rows)
                inside.append(ct)
                del ct, rows
            else:
                out, ct = self._reverse(_part(run, piece, shift=False), [kept.pop()], inside, depth)
                fragments.append(out)
                inside.append(ct)
                del ct, out
        box.append(trees.cast_like(inside[0], self.structs[run.start]))
        for piece in pieces:  # M
            if piece.count > 1:
                self._scan_advance(run, piece, fragments.pop(), inside, depth)
            else:
                self._advance(_part(run, piece, shift=False), fragments.pop(), inside, depth, run.stop)
            if piece.stop == compared:
                got, inside[0] = self.gate((sketch.take(inside[0]), inside[0]))
        found = None if truth is None or got is None else sketch.discrepancy(truth, got)
        # The runs to the left need only what R found: without this tie XLA may start them before M is done.
        # (Tying the last `ct` would not do: what nobody uses is dropped from a barrier.)
        if run.start > 0:
            touched = {self.view.places[layer].part for layer in range(run.start, run.stop)}
            parts = {i: self.grads.parts[i] for i in touched}
            box[0], parts, found = self.gate((box[0], parts, found))
            for i in touched:
                self.grads.parts[i] = parts[i]
        if found is not None:
            self._note(run, found)

    def _compared(self, run: Run, pieces: Sequence[Repeat]) -> int:
        """Where a run's cotangent is compared with the truth: the last position that its gradients need, so
        that a compiler drops the M sweep beyond, as it would without the comparison; its end, if it has no
        parameters."""
        for piece in reversed(pieces):
            if piece.count > 1 or trees.parameters(self.layer(piece.stop)):
                return piece.stop
        return run.stop

    def _reverse(self, part: _Part, kept: list[Residuals], box: list[PyTree], depth: int) -> Any:
        """R over some layers: `(fragments, ct)`, the fragments from the last layer to the first."""
        fragments = []
        for layer in range(part.stop, part.start, -1):
            held = kept.pop()
            operation = functools.partial(operations.reverse, rule=self.rule(part, layer))
            ct, fragment = self.perform(
                "reverse",
                layer,
                depth,
                operation,
                self.layer(layer),
                held,
                *self.shared(layer, held),
                box.pop(),
            )
            box.append(ct)
            fragments.append(fragment)
            self.release_shared(layer, held)
            del held, ct, fragment
        return fragments, box.pop()

    def _advance(
        self, part: _Part, fragments: list[Any], box: list[PyTree], depth: int, end: int | None
    ) -> None:
        """M over some layers; `end`, the last of the run, whose output nobody needs."""
        for layer in range(part.start + 1, part.stop + 1):
            one = self.layer(layer)
            operation: Callable[..., Any] = functools.partial(operations.vijp, rule=self.rule(part, layer))
            ct = self.perform(
                "rebuild", layer, depth, operation, one, self.x[layer - 1], box.pop(), fragments.pop()
            )
            operation = functools.partial(operations.advance, last=layer == end)
            y, grads = self.perform("advance", layer, depth, operation, one, self.x[layer - 1], ct)
            self.release(layer - 1)
            ct, y = self.grads.found(self, layer, depth, grads, (ct, y))
            box.append(ct)
            if layer != end:
                self.claim(layer, y)
            del ct, y

    def _scan_advance(self, run: Run, piece: Repeat, fragments: Any, box: list[PyTree], depth: int) -> None:
        part = _part(run, piece)

        def step(state: Any, repetition: Any, fragments: Any) -> Any:
            x, ct, buffers = state
            inner = self.within(piece, repetition, buffers)
            inner.claim(0, x)
            inside = [ct]
            inner._advance(part, list(fragments), inside, depth, None)
            return (inner.x[piece.span], inside.pop(), inner.buffers(_whole(piece))), None

        state = (self.x[piece.start], box.pop(), self.buffers(piece))
        (x, ct, buffers), _ = loops.scan(step, state, fragments, piece.count)
        self.took(piece, buffers)
        box.append(ct)
        if piece.stop < run.stop:
            self.claim(piece.stop, x)
        self.release(piece.start)

    def _recompute(self, run: Run, box: list[PyTree], depth: int) -> None:
        # Nothing but this tie keeps XLA from recomputing at once, or from not recomputing at all.
        self.x[run.start], ct = self.gate((self.x[run.start], box.pop()))
        box.append(ct)
        del ct
        kept = self.forward(run.inner, depth + 1)
        self.release(run.stop)
        self.backward(run.inner, kept, box, depth + 1)

    def _invert(self, run: Run, kept: list[Any], box: list[PyTree], depth: int) -> None:
        if self.check:
            self._note(run, jnp.zeros(()))  # where the one layer's input is there already
        for piece in reversed(self.pieces(run)):
            known = self.x.get(piece.start)  # only the run's start can be: the run to the left keeps it
            if piece.count > 1:
                x = self._scan_invert(run, piece, kept.pop(), box, depth)
                known = None  # rebuilt all the same
            else:
                y, ct = self.x[piece.stop], box.pop()
                x, ct = self._invert_layer(run, piece.stop, kept.pop(), y, ct, known, depth)
                box.append(ct)
                del y, ct
            if self.check and (truth := self.sketches.pop(piece.start, None)) is not None and known is None:
                found, x, box[0] = self.gate((sketch.discrepancy(truth, sketch.take(x)), x, box[0]))
                self._note(run, found)
            del known
            self.claim(piece.start, x)
            del x
            self.release(piece.stop)
        self.release(run.start)

    def _invert_layer(
        self, run: Run | _Part, layer: int, held: Residuals, y: PyTree, ct: PyTree, known: PyTree, depth: int
    ) -> tuple[PyTree, PyTree]:
        """`(x, ct_in)`."""
        operation = functools.partial(operations.invert_backward, rule=self.rule(run, layer))
        x, grads, ct = self.perform(
            "backward", layer, depth, operation, self.layer(layer), held, y, ct, known
        )
        x, ct = self.grads.found(self, layer, depth, grads, (x, ct))
        return x, ct

    def _scan_invert(self, run: Run, piece: Repeat, saved: Scanned, box: list[PyTree], depth: int) -> PyTree:
        part = _part(run, piece)

        def step(state: Any, repetition: Any, kept: list[Residuals]) -> Any:
            x, ct, buffers = state
            inner = self.within(piece, repetition, buffers, single=not self.grads.performs)
            for layer in range(piece.span, 0, -1):
                x, ct = inner._invert_layer(part, layer, kept.pop(), x, ct, None, depth)
            return (x, ct, inner.buffers(_whole(piece))), None

        state = (self.x[piece.stop], box.pop(), self.buffers(piece))
        (x, ct, buffers), _ = loops.scan(step, state, saved.kept, piece.count, reverse=True)
        self.took(piece, buffers)
        box.append(ct)
        return x

    # -- rules
    # -----------------------------------------------------------------------------------------------------

    def rule(self, run: Run | _Part, layer: int) -> Any:
        """The rule that a run names for one of its layers."""
        one, x = self.layer(layer), self.structs[layer - 1]
        find = {
            RunKind.STORE: rules.store_rules,
            RunKind.OFFLOAD: rules.store_rules,
            RunKind.MOONWALK: rules.vijp_rules,
            RunKind.INVERT: rules.invert_rules,
        }[run.kind]
        name = run.options[layer - run.start - 1]
        offered = [r for r in find(one, x) if not isinstance(r, rules.Unavailable)]
        for candidate in offered:
            if candidate.name == name:
                return candidate
        raise ScheduleMismatchError(
            f"the schedule wants {run.kind.name} option {name!r} of layer {layer} ({layer_name(one)}), which "
            "has "
            f"{[r.name for r in offered]} for this input: profile and plan again"
        )


@dataclass(frozen=True)
class _Part:
    """Some layers of a run."""

    kind: RunKind
    start: int
    stop: int
    options: tuple[str, ...]


def _part(run: Run, piece: Repeat, *, shift: bool = True) -> _Part:
    """One repetition of `piece`; with `shift` from 0, as an interpreter within sees it."""
    at = piece.start - run.start
    base = 0 if shift else piece.start
    return _Part(run.kind, base, base + piece.span, run.options[at : at + piece.span])


def _whole(many: Repeat) -> Repeat:
    """The repetition as an interpreter within sees it."""
    return Repeat(0, many.span, 1)


def _swapped(pair: tuple[Any, Any]) -> tuple[Any, Any]:
    return pair[1], pair[0]


def _stacked(view: View, start: int) -> bool:
    return isinstance(view.chain.parts[view.places[start].part], Stack)
