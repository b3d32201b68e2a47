"""White noise in the shapes of cotangents."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mwplan.common import trees

PyTree = Any


def random_cotangent(like: PyTree, key: jax.Array) -> PyTree:
    """White noise in the working precision of each inexact leaf of `like`; float0 zeros for the others, as
    `jax.vjp` has them.

    Drawn here, by NumPy, where `key` is known, so that nothing is compiled for it. Within a program by the
    device's own generator: the default one takes XLA:CPU a second to compile, for every program that draws.
    """
    leaves, treedef = jax.tree.flatten(like)
    if isinstance(key, jax.core.Tracer):
        keys = draws(key, len(leaves))
        made = [
            jax.random.normal(k, leaf.shape, trees.working_dtype(leaf.dtype))
            if trees.is_inexact(leaf)
            else trees.no_cotangent(leaf)
            for k, leaf in zip(keys, leaves)
        ]
    else:
        noise = np.random.default_rng(np.asarray(jax.random.key_data(key)))
        made = [
            _normal(noise, leaf) if trees.is_inexact(leaf) else trees.no_cotangent(leaf) for leaf in leaves
        ]
    return jax.tree.unflatten(treedef, made)


def _normal(noise: np.random.Generator, leaf: Any) -> jax.Array:
    """As `jax.random.normal`: of a complex number both parts have half the variance."""
    dtype = trees.working_dtype(leaf.dtype)
    parts = [noise.standard_normal(leaf.shape, np.float32) for _ in range(1 + _is_complex(dtype))]
    made = parts[0] if len(parts) == 1 else (parts[0] + 1j * parts[1]) / math.sqrt(2)
    return jnp.asarray(made.astype(dtype))


def _is_complex(dtype: Any) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.complexfloating))


def draws(key: jax.Array, count: int) -> list[jax.Array]:
    """`count` keys of the device's generator, whose streams differ however little the keys do."""
    words = jnp.resize(jax.random.key_data(key), (4,))
    return [jax.random.wrap_key_data(words.at[3].add(jnp.uint32(i)), impl="rbg") for i in range(count)]


def another(key: jax.Array) -> jax.Array:
    """A key whose stream differs from that of `key`."""
    words = np.array(jax.random.key_data(key))
    words[-1] ^= 1 << 31
    other: jax.Array = jax.random.wrap_key_data(jnp.asarray(words), impl=jax.random.key_impl(key))
    return other
