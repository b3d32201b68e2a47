"""Layers that communicate over the axes of a mesh (`jax.lax.pmean` within one), where there is no mesh."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax

from mwplan.common.errors import ChainError
from mwplan.network.chain import Chain, Stack, boundaries
from mwplan.network.layer import layer, static
from mwplan.network.wrapping import Wrapper

PyTree = Any


@layer
class WithAxes(Wrapper):
    """A layer, called where axes of these `names` have one device each."""

    inner: Any
    names: tuple[str, ...] = static()

    def whole(self) -> Any:
        """The layer within."""
        return self.inner

    def within(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(*args)` with the axes bound."""
        for name in self.names:
            function = jax.vmap(function, in_axes=None, out_axes=None, axis_name=name, axis_size=1)
        return function(*args)


def bound(chain: Chain, x: PyTree) -> Chain:
    """`chain`, or where its layers want axes that are not bound, those of a `jax.shard_map` in which the step
    is taken, the same chain with each of them one device long. Raises as `boundaries`.

    Collectives then cost nothing, and gather nothing.
    """
    names: tuple[str, ...] = ()
    while True:
        one = _with_axes(chain, names) if names else chain
        try:
            boundaries(one, x)
        except ChainError as error:
            found = re.search(r"unbound axis name: *'?(\w+)", str(error.__cause__))
            if not isinstance(error.__cause__, NameError) or found is None or found[1] in names:
                raise
            names += (found[1],)
        else:
            return one


def _with_axes(chain: Chain, names: tuple[str, ...]) -> Chain:
    return Chain(
        [
            Stack(tuple(WithAxes(one, names) for one in part.block), part.depth)
            if isinstance(part, Stack)
            else WithAxes(part, names)
            for part in chain.parts
        ]
    )
