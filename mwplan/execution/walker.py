"""What every sweep needs: the activations alive, the layers and their rules, single operations on them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Self

import jax.numpy as jnp
from jaxtyping import Array

from mwplan.common import trees
from mwplan.common.errors import ScheduleMismatchError
from mwplan.execution import barriers, loops, rows
from mwplan.execution.barriers import Performer
from mwplan.execution.gradients import Gradients
from mwplan.execution.repeats import Part, Repeat
from mwplan.execution.view import View
from mwplan.network import kept, operations, rules, sketch
from mwplan.network.carried import Carried
from mwplan.network.chain import layer_name
from mwplan.network.residuals import Residuals
from mwplan.plans.schedule import Run, RunKind

PyTree = Any


class Walker:
    """Walks single layers, forward and backward.

    **Arguments:** `view`, the layers; `structs`, the shapes of their boundaries; `grads`, where gradients go;
    `perform`, which executes an operation (None: in a program, with the barriers of its platform); `gate`,
    which makes arrays wait for one another; `check`, whether runs that reconstruct something are compared
    with the truth; `carried`, what layers hand on as it is.

    **Attributes:** `x`, the activations alive by position, each once however many runs want it, and `claims`,
    how many do; `report`, the discrepancies by run, each a scalar or a row of a vector; `sketches`, of the
    activations that INVERT runs will rebuild.
    """

    def __init__(
        self,
        view: View,
        structs: Sequence[PyTree],
        grads: Gradients,
        perform: Performer | None = None,
        gate: Callable[[PyTree], PyTree] = trees.tie,
        *,
        check: bool = False,
        carried: Carried | None = None,
    ) -> None:
        self.view = view
        self.structs = structs
        self.grads = grads
        self.perform = barriers.planned() if perform is None else perform
        self.gate = gate
        self.check = check
        self.carried = carried or Carried.along(view.chain, structs, wrt_input=True)
        self.x: dict[int, PyTree] = {}
        self.claims: dict[int, int] = {}
        self.report: dict[tuple[int, int], Any] = {}
        self.sketches: dict[int, Array] = {}

    def within(self, many: Repeat, repetition: Any, buffers: Any = None, *, single: bool = False) -> Self:
        """A walker of one repetition; `buffers`, the stack's gradients so far; `single`, whether each of its
        layers is one operation."""
        return type(self)(
            self.view.window(many.start, many.span, repetition),
            self.structs[many.start : many.start + many.span + 1],
            self.grads.within(self.view.places[many.start].part, buffers),
            barriers.in_loop(self.perform, single=single and many.span == 1),
            self.gate,
            check=self.check,
            carried=self.carried.window(many.start, many.start + many.span),
        )

    def wait(self, position: int, box: list[PyTree]) -> None:
        """Makes `x_position`, from which a forward pass is done again, wait for the cotangent in `box`."""
        self.x[position], box[0] = self.gate((self.x[position], box[0]))
        self.x[position] = trees.after(self.x[position], box[0])

    def wait_for_cotangent(self, position: int, box: list[PyTree]) -> None:
        """Makes the cotangent in `box` wait for `x_position`, if that is there."""
        if position in self.x:
            self.x[position], box[0] = self.gate((self.x[position], box[0]))

    # -- layers and their gradients
    # -----------------------------------------------------------------------------------------------

    def layer(self, position: int) -> PyTree:
        """The layer that makes `x_position`."""
        source, row = self.grads.source(self.view, position)
        return source if row is None else loops.row(source, row)

    def on_layer(
        self, sweep: str, position: int, depth: int, operation: Callable[..., Any], *args: Any
    ) -> Any:
        """Performs `operation(layer, *args)` with the layer that makes `x_position`.

        One of a stack's is read within, and its gradients may be written within (`rows.on_row`).
        """
        source, row = self.grads.source(self.view, position)
        if row is None:
            return self.perform(sweep, position, depth, operation, source, *args)
        makes = operations.gradients_of(operation) is not None and not self.grads.performs
        place = self.view.place(position)
        stacked = self.grads.stacked(place.part)[place.phase] if makes else None
        on_row = functools.partial(rows.on_row, operation=operation)
        return self.perform(sweep, position, depth, on_row, source, row, stacked, *args)

    def rule(self, run: Run | Part, layer: int) -> Any:
        """The rule that a run names for one of its layers."""
        one, x = self.layer(layer), self.structs[layer - 1]
        name = run.options[layer - run.start - 1]
        offered_stores = functools.partial(kept.store_rules, name=name)
        find: dict[RunKind, Callable[..., Sequence[Any]]] = {
            RunKind.STORE: offered_stores,
            RunKind.OFFLOAD: offered_stores,
            RunKind.MOONWALK: rules.vijp_rules,
            RunKind.INVERT: rules.invert_rules,
        }
        offered = [r for r in find[run.kind](one, x) if not isinstance(r, rules.Unavailable)]
        for candidate in offered:
            if candidate.name == name:
                if run.kind in (RunKind.STORE, RunKind.OFFLOAD):
                    return self.carried.store(candidate, layer, x, self.structs[layer])
                return candidate
        raise ScheduleMismatchError(
            f"the schedule wants {run.kind.name} option {name!r} of layer {layer} ({layer_name(one)}), which "
            "has "
            f"{[r.name for r in offered]} for this input: profile and plan again"
        )

    def buffers(self, many: Repeat) -> Any:
        """The gradients of the stack that `many` repeats over."""
        return self.grads.stacked(self.view.places[many.start].part)

    def took(self, many: Repeat, buffers: Any) -> None:
        """The gradients of the stack that `many` repeats over are now these."""
        self.grads.parts[self.view.places[many.start].part] = buffers

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

    # -- reports
    # -----------------------------------------------------------------------------------------------

    def take_sketch(self, position: int) -> None:
        """Of `x_position`, before anything else is done with it."""
        tied = self.gate((sketch.take(self.x[position]), self.x[position]))
        self.sketches[position], self.x[position] = tied

    def note(self, run: Run, discrepancy: Array) -> None:
        """What `run` reports."""
        self.report[run.start, run.stop] = discrepancy[None], 0

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

    # -- single layers
    # -----------------------------------------------------------------------------------------------

    def forward_layers(self, run: Run | Part, depth: int) -> list[Any]:
        """F over some layers: returns what each keeps; nothing of RECOMPUTE runs."""
        kept = []
        for layer in range(run.start + 1, run.stop + 1):
            keeps_input = keeps_output = False
            operation: Callable[..., Any]
            if run.kind is RunKind.OFFLOAD:
                operation = functools.partial(operations.offload_forward, rule=self.rule(run, layer))
                y, offloaded = self.on_layer("forward", layer, depth, operation, self.x[layer - 1])
                kept.append(offloaded)
            elif run.kind is not RunKind.RECOMPUTE:
                operation = functools.partial(operations.forward, rule=self.rule(run, layer))
                y, held = self.on_layer("forward", layer, depth, operation, self.x[layer - 1])
                kept.append(held)
                keeps_input, keeps_output = held.keeps_input, held.keeps_output
                if keeps_output and layer < len(self.structs) - 1:
                    y = barriers.kept(self.perform, y)
            else:
                y = self.on_layer("forward", layer, depth, operations.plain_forward, self.x[layer - 1])
            self.claim(layer, y)
            del y
            if keeps_output:
                self.claim(layer)
            if not keeps_input:
                self.release(layer - 1)
        return kept

    def store(self, run: Run, kept: list[Residuals], box: list[PyTree], depth: int) -> None:
        """Backward over a STORE run: `box` holds the cotangent of its output, and then of its input."""
        layer, held = run.stop, kept.pop()
        operation = functools.partial(operations.store_backward, rule=self.rule(run, layer))
        shared = self.shared(layer, held)
        grads, ct = self.on_layer("backward", layer, depth, operation, held, *shared, box.pop())
        del shared
        self.release_shared(layer, held)
        box.append(self.grads.found(self, layer, depth, grads, ct))

    def offload(self, run: Run, kept: list[Any], box: list[PyTree], depth: int) -> None:
        """Backward over an OFFLOAD run."""
        layer = run.stop
        operation = functools.partial(operations.offload_backward, rule=self.rule(run, layer))
        grads, ct = self.on_layer("backward", layer, depth, operation, kept.pop(), box.pop())
        box.append(self.grads.found(self, layer, depth, grads, ct))
