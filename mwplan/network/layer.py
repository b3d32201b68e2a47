"""How the layers of this package are declared: frozen dataclasses that are pytrees."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar, cast, dataclass_transform

import jax

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


def static(**kwargs: Any) -> Any:
    """A dataclass field that is structure (sizes, names, functions), not an array.

    >>> @mw.layers.layer
    ... class Power:
    ...     exponent: int = mw.layers.static(default=2)
    ...     def __call__(self, x):
    ...         return x**self.exponent
    >>> jax.tree.leaves(Power(3))
    []
    """
    return dataclasses.field(metadata={"static": True}, **kwargs)


@dataclass_transform(frozen_default=True, field_specifiers=(static, dataclasses.field))
def layer(cls: type[T]) -> type[T]:
    """Makes `cls` a frozen dataclass and registers it as a pytree: `static()` fields are structure, all
    others leaves.

    >>> @mw.layers.layer
    ... class Scale:
    ...     factor: jax.Array
    ...     def __call__(self, x):
    ...         return self.factor * x
    >>> jax.tree.leaves(Scale(jnp.ones(())))
    [Array(1., dtype=float32)]
    """
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


def lean(function: F) -> F:
    """`function`, of which backpropagation keeps the inputs alone, wherever it stands: for what is cheap
    beside the arrays that JAX would keep.

    XLA:CPU also writes out what a value and its derivative have in common (of a gelu between two products
    three arrays); apart from each other they share nothing.
    """
    return cast(F, jax.checkpoint(function))
