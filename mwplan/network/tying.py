"""Arrays that a chain holds in two places: what is tied so comes untied as it is trained."""

from __future__ import annotations

import warnings
from typing import Any

import jax

from mwplan.common import trees

PyTree = Any


class TiedWeightsWarning(UserWarning):
    """A chain holds one array as two parameters, which an optimizer's update makes two.

    >>> import warnings
    >>> dense = mw.layers.Dense.init(jax.random.key(0), 8, 8)
    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     net = mw.Chain([dense, jnp.tanh, dense])
    >>> [one.category.__name__ for one in caught]
    ['TiedWeightsWarning']
    """


def warn_if_tied(layers: PyTree) -> None:
    """Warns where two parameters are the same array; called by what makes a chain.

    Tracers are left alone: a chain that is made within a function of the one array (a loss of
    `mw.fit_function`, what `jax.grad` is given) is differentiated by it, in both its uses.
    """
    seen: dict[int, Any] = {}
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(layers)]
    flags = trees.parameter_flags(layers)
    for path, flag, leaf in zip(paths, flags, jax.tree.leaves(layers), strict=True):
        if not flag or not trees.is_array(leaf) or isinstance(leaf, jax.core.Tracer):
            continue
        if id(leaf) in seen:
            first, second = (f"`layers{jax.tree_util.keystr(one)}`" for one in (seen[id(leaf)], path))
            warnings.warn(
                f"{first} and {second} are one array. In a chain they are two parameters, each with the "
                "gradient of its own use: after an optimizer's update they differ. If they are tied, hold "
                "the array once and let a function use it twice: `mw.fit_function(loss, params, ...)` plans "
                "that. If not, give each its own: `jnp.array(weights)` is a copy",
                TiedWeightsWarning,
                stacklevel=3,
            )
            return
        seen[id(leaf)] = path
