"""A chain with every way of handling a layer in it, and its profile."""

from __future__ import annotations

import functools
from typing import Any

import jax

import mwplan as mw
from mwplan.layers import Conv2D, Dense, LeakyReLU, MaxMin
from tests.helpers import tanh, with_round_times


def conv_chain() -> mw.Chain:
    """Activations of 1 MiB, every way of handling a layer in it."""
    keys = iter(jax.random.split(jax.random.key(0), 8))
    made: list[Any] = [Conv2D.init(next(keys), 8, 16, 1), LeakyReLU(0.6)]
    for _ in range(3):
        made += [Conv2D.init(next(keys), 16, 16, 1), MaxMin()]
    made += [Conv2D.init(next(keys), 16, 16, 3), tanh, Dense.init(next(keys), 16, 4)]
    return mw.Chain(made)


@functools.cache
def measured() -> tuple[mw.Chain, Any, mw.Profile]:
    chain = conv_chain()
    x = jax.random.normal(jax.random.key(1), (64, 16, 16, 8))
    return chain, x, with_round_times(mw.profile(chain, x, repeats=1))
