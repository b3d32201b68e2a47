"""Bases of numerical cokernels for all layers of a chain, and their renewal as the weights change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from mwplan.common import trees


def refresh(tree: Any) -> Any:
    """`tree` (a layer, a chain, any pytree of them) with every basis of a numerical cokernel renewed from the
    present weights.

    It takes an SVD a layer on the host (for convolutions, one a frequency). Call it now and then, not in
    every step.

    >>> net = mw.Chain([mw.layers.Dense.he(jax.random.key(0), 8, 8)])
    >>> mw.layers.refresh(net)[0].basis.shape
    (8, 4)
    """

    def has_basis(node: Any) -> bool:
        return callable(getattr(node, "refresh", None)) and hasattr(node, "basis")

    return jax.tree.map(lambda node: node.refresh() if has_basis(node) else node, tree, is_leaf=has_basis)


def with_bases(chain: Sequence[Any], x: Any, fraction: float = 0.5) -> list[Any]:
    """The layers of `chain` with a basis in each that can have one, at inputs like `x` (array or struct).

    >>> net = mw.Chain([mw.layers.Dense.init(jax.random.key(0), 8, 8), jnp.tanh])
    >>> mw.layers.with_bases(net, jnp.ones((2, 8)))[0].basis.shape
    (8, 4)
    """
    made = []
    at = trees.struct(x) if not isinstance(x, jax.ShapeDtypeStruct) else x
    for one in chain:
        if hasattr(one, "with_basis"):
            takes_input = hasattr(one, "geometry")
            made.append(one.with_basis(at, fraction) if takes_input else one.with_basis(fraction))
        else:
            made.append(one)
        at = jax.eval_shape(one, at)
    return made
