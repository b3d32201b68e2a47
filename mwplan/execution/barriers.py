"""Barriers around the operations of a compiled step, by the platform that it is compiled for.

A barrier (`lax.optimization_barrier`) makes arrays wait for one another: nothing that reads one of them
begins before all are there. It costs no instruction, but XLA fuses nothing across it, so that what could have
stayed in registers is written to memory and read again. A step has them for three reasons, and each compiler
needs others:

1. *What is recomputed must not be merged with what it recomputes.* XLA merges equal expressions, and would
   keep the first instead. One barrier suffices, around the input of the recomputed stretch and the cotangent
   that it waits for: where `jax.checkpoint` has its own. It stands in every step, whatever is said here, as
   do those around a run's sketches and behind a MOONWALK run.
2. *Gradients of parameters must not be postponed.* Nothing waits for them but the end of the step, and while
   they wait, what they are computed from stays alive. A barrier around the results of a backward operation
   (gradients, and the cotangent that goes on) makes the next operation wait for both.
3. *Nothing of an operation may begin before its turn*, nor be left for later: the arguments of every
   operation wait for one another, and so do all its results.

XLA:GPU orders kernels for memory, and needs the first two (measured: `results/barriers`): so all that is
elementwise fuses across layers, forward and backward, as in backpropagation. Where a stretch is done again
one more barrier lets its last layer's backward pass wait for that layer's input. Two kinds of operations need
the third there too: one that rebuilds an activation from a layer's output, which can begin long before the
cotangent is there; and one that writes into constants (the zeros of a scatter, a loop's stacked results), for
these would be there from the start of the program (measured: `results/prediction`, up to four times the
memory planned). Two kinds of arrays have a barrier of their own there, which part nothing that would not be
written anyway: a layer's output that is kept for the backward pass and read by the next layer (XLA may keep
beside it what it was made of), and what an operation backward writes side by side for several products (XLA
may write it again for each). XLA:TPU removes barriers before it orders instructions: they keep what they part
from being merged and from being fused, and nothing waits. Its steps have none around operations; what must
wait depends on a number of what it waits for (`trees.after`). XLA:CPU orders for concurrency and needs all
three everywhere.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import jax

from mwplan.common import platforms, trees
from mwplan.network import operations
from mwplan.network.canonical import canonical
from mwplan.network.constants import tied
from mwplan.network.products import written_once
from mwplan.network.residuals import Residuals


@runtime_checkable
class Performer(Protocol):
    """Executes one operation. `sweep`, `layer`, `depth` as in `ledger.Event`."""

    def __call__(self, sweep: str, layer: int, depth: int, operation: Callable[..., Any], *args: Any) -> Any:
        """Returns `operation(*args)`."""


@dataclass(frozen=True, kw_only=True)
class Around:
    """The barriers around one operation: whether its `arguments` wait for one another (and what it makes of
    constants, an array of zeros that it writes to, say, for all of them), and its `results`;
    `residuals`, whether those among them do (else XLA may compute them again where they are used, from what
    is there anyway, instead of keeping them); `constants`, whether the arguments wait at least where the
    operation writes into arrays that it makes of constants alone: those would be there from the start of the
    program, for all layers; `kept`, whether a layer's output waits where it is kept (`kept`); `products`,
    whether what several products read is written once (`written_once`)."""

    arguments: bool
    results: bool
    residuals: bool = True
    constants: bool = False
    kept: bool = False
    products: bool = False

    def __call__(self, operation: Callable[..., Any], *args: Any) -> Any:
        """`operation(*args)`, between them."""
        free = () if self.residuals else Residuals
        if self.arguments or self.constants:
            operation = tied(operation, free, always=self.arguments)
        if self.products:
            operation = written_once(operation)
        result = operation(*args)
        return trees.tie(result, free) if self.results else result


#: No barrier.
NONE = Around(arguments=False, results=False)
#: An operation that is done, all of it, before the next begins.
DONE = Around(arguments=False, results=True)
#: An operation whose every part has its turn and keeps it.
APART = Around(arguments=True, results=True)


@dataclass(frozen=True, kw_only=True)
class Barriers:
    """Where a step has barriers: the performer of a compiled step.

    `forward`: around the operations of forward sweeps, recomputed ones too; `inverse`: around those backward
    that rebuild an activation from what came after it (INVERT runs); `backward`: around all others;
    `canonical`: whether convolutions are brought into one layout, as XLA:CPU needs it in loops. Every
    operation is in a scope, by which `mw.explain_peak` and profilers name it.

    >>> Barriers(forward=NONE, backward=DONE)("forward", 1, 0, jnp.add, 1.0, 2.0)
    Array(3., dtype=float32, weak_type=True)
    """

    forward: Around
    backward: Around
    inverse: Around = APART
    canonical: bool = False

    def __call__(self, sweep: str, layer: int, depth: int, operation: Callable[..., Any], *args: Any) -> Any:
        """Returns `operation(*args)`; the layers of a loop's body count from its own first."""
        around = self.forward if sweep == "forward" else self.backward
        around = self.inverse if _function(operation) is operations.invert_backward else around
        with jax.named_scope(f"{sweep} {layer}"):
            return around(canonical(operation) if self.canonical else operation, *args)

    def in_loop(self, *, single: bool) -> Barriers:
        """Those in the body of a loop; `single`: where that is one operation, whose turns follow one another
        anyway, and which barriers would keep from fusing with what it reads and writes."""
        inside = UNTIED if single else self
        return replace(inside, canonical=True) if platforms.platform() == "cpu" else inside


#: No barriers around operations: the recomputed is recomputed, all else is XLA's to order.
UNTIED = Barriers(forward=NONE, backward=NONE, inverse=NONE)
#: Barriers around activations and cotangents, but not around residuals.
LOOSE = Barriers(
    forward=replace(APART, residuals=False),
    backward=replace(APART, residuals=False),
    inverse=replace(APART, residuals=False),
)  # fmt: skip
#: By platform, those under which the compiled step's peak is the planned one.
_ORDERED = Barriers(
    forward=replace(NONE, constants=True, kept=True), backward=replace(DONE, constants=True, products=True)
)
PLANNED = {"cpu": Barriers(forward=APART, backward=APART), "gpu": _ORDERED, "tpu": UNTIED}


def _function(operation: Any) -> Any:
    """The function of `mwplan.network.operations` that is behind an operation, or behind a row's
    (`rows.on_row`)."""
    while isinstance(operation, functools.partial):
        operation = operation.keywords.get("operation", operation.func)
    return operation


def planned() -> Barriers:
    """Those of the platform that the program is being traced for; on one that is not known, as on CPUs."""
    return PLANNED.get(platforms.platform(), PLANNED["cpu"])


def starts_early(perform: Performer) -> bool:
    """Whether an operation may begin before all its arguments are there, so that a forward pass that is done
    again must be made to wait for the cotangent that wants it."""
    return isinstance(perform, Barriers) and not perform.backward.arguments


def done_early(perform: Performer) -> bool:
    """Whether an operation backward has an end, but may begin before all its arguments are there: the last
    layer of a stretch that is done again, by its cotangent alone, long before its activation."""
    return starts_early(perform) and isinstance(perform, Barriers) and perform.backward.results


def kept(perform: Performer, y: Any) -> Any:
    """A layer's output that is kept for the backward pass and read by the next layer, which is one array
    where `perform` says so: else XLA may keep beside it what it was made of."""
    return trees.tie(y) if isinstance(perform, Barriers) and perform.forward.kept else y


def in_loop(perform: Performer, *, single: bool) -> Performer:
    """What takes the place of `perform` in the body of a loop; `single` as in `Barriers.in_loop`."""
    return perform.in_loop(single=single) if isinstance(perform, Barriers) else perform
