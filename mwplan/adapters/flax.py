"""Flax modules as layers: the parameters become leaves, the code structure. Needs the `flax` extra for `from_nnx`."""

from __future__ import annotations

from typing import Any

import jax

from mwplan.layers.base import layer, static

PyTree = Any


@layer
class Linen:
    """A Flax Linen module with its variables; `y = module.apply(variables, x, **options)`.

    Variables that `apply` would change (batch statistics) are read, not updated.
    """

    variables: PyTree
    module: Any = static()
    options: tuple[tuple[str, Any], ...] = static(default=())

    def __call__(self, x: PyTree) -> PyTree:
        """Applies the module."""
        return self.module.apply(self.variables, x, **dict(self.options))


def from_linen(module: Any, variables: PyTree, **options: Any) -> Linen:
    """`module` (hashable, as Linen modules are) with `variables`, as from `module.init(key, x)`; `options` go to every call."""
    return Linen(variables, module, tuple(sorted(options.items())))


@layer
class NNX:
    """A Flax NNX module taken apart; called, it is put together again, as a copy: what a call changes of its state goes with the copy."""

    state: PyTree
    graph: Any = static()

    def __call__(self, x: PyTree) -> PyTree:
        """Applies the module."""
        from flax import nnx

        return nnx.merge(self.graph, _fresh(self.state))(x)


def from_nnx(module: Any) -> NNX:
    """`module` as a layer: its state are the leaves, and `module` stays as it is.

    Changes that a call makes to the state (batch statistics, the counters of random streams) are dropped: two calls agree, and Dropout draws the same mask in
    each. For another mask a step, make the layer again from a module with other `rngs`; its plan holds.
    """
    from flax import nnx

    graph, state = nnx.split(module)
    return NNX(_fresh(state), graph)


def _fresh(state: PyTree) -> PyTree:
    """The same arrays in variables of its own: a module that is put together of variables writes into them."""
    return jax.tree.map(lambda leaf: leaf, state)
