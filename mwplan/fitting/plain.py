"""Plain backpropagation, which every fit stands beside."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

from mwplan.common import trees
from mwplan.compilers import compiling
from mwplan.network import sharding
from mwplan.network.chain import Chain

PyTree = Any


def backpropagation(loss: Callable[..., Any], has_aux: bool, wrt_input: bool) -> Callable[..., Any]:
    """`jax.value_and_grad` of `loss(chain(x), *args)`, as a function of `chain, x, *args`."""

    def plain(chain: Chain, x: PyTree, *args: Any) -> Any:
        return loss(chain(x), *args)

    return jax.value_and_grad(plain, argnums=(0, 1) if wrt_input else 0, has_aux=has_aux, allow_int=True)


def compiled_bytes(plain: Callable[..., Any] | None, args: tuple[Any, ...]) -> Callable[[], int | None]:
    """What asks for the temporaries of `plain(*args)`, which is compiled once, when it is first asked; None
    without `plain`, or where arrays may lie on several devices. It keeps shapes alone."""
    if plain is None or sharding.may_be_spread():
        return lambda: None
    shapes = trees.struct(args)

    @functools.cache
    def needs() -> int:
        lowered: Any = jax.jit(lambda *args: plain(*args)).lower(*shapes)
        return compiling.temporaries(lowered.compile(compiling.memory_options() or None))

    return needs
