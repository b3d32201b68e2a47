"""Parameter gradients as they are found: each layer's by itself, those of a stack in its arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax.numpy as jnp

from mwplan.common import trees
from mwplan.execution import loops
from mwplan.execution.barriers import Performer
from mwplan.execution.rows import Written
from mwplan.execution.view import View
from mwplan.network.chain import Chain, Stack

PyTree = Any


@runtime_checkable
class Finder(Protocol):
    """Who finds gradients, a walker: the layers that it sees, how it executes an operation, and how it makes
    arrays wait for one another."""

    view: View
    perform: Performer
    gate: Callable[[PyTree], PyTree]

    def layer(self, position: int) -> PyTree:
        """The layer that makes `x_position`."""


class Gradients:
    """Parameter gradients by part of the chain: of a layer a list, of a stack one list a layer of its block,
    of stacked arrays.

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

    def source(self, view: View, position: int) -> tuple[PyTree, Any]:
        """What the layer that makes `x_position` is read from: `View.source`."""
        return view.source(position)

    def found(self, finder: Finder, position: int, depth: int, grads: Any, later: PyTree) -> PyTree:
        """The gradient of one layer has come, in the stack's already where it is `Written`. Returns `later`,
        what follows needs: it may be made to wait."""
        view = finder.view
        place = view.place(position)
        if not isinstance(self.chain.parts[place.part], Stack):
            self.parts[place.part] = grads
            return later
        block = list(self.stacked(place.part))
        if isinstance(grads, Written):
            block[place.phase] = grads.stacked
        else:
            block[place.phase] = loops.put(block[place.phase], grads, view.at + place.repetition)
        self.parts[place.part] = block
        return later

    def stacked(self, part: int) -> list[Any]:
        """The arrays of a stack's gradients, zeros where none has come."""
        if self.parts[part] is None:
            block = self.chain.parts[part].block
            self.parts[part] = [[jnp.zeros_like(leaf) for leaf in trees.parameters(one)] for one in block]
        found: list[Any] = self.parts[part]
        return found
