"""Bilinear maps with transposes of their own, where those that JAX derives take more memory or time."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

from mwplan.common.trees import vary, varying_axes


@runtime_checkable
class BilinearMap(Protocol):
    """A function of two arrays, linear in each. Hashable, by value."""

    def __call__(self, x: Array, w: Array, /) -> Array:
        """The product."""

    def to_x(self, w: Array, ct: Array, /) -> Array:
        """The cotangent of `x`, of its shape and dtype, from that of the product."""

    def to_w(self, x: Array, ct: Array, /) -> Array:
        """That of `w`."""


def bilinear(product: BilinearMap, x: Array, w: Array) -> Array:
    """`product(x, w)`, whose transposes are the product's own. It keeps nothing but `x` and `w`.

    May be differentiated any number of times, forward too; under `jax.vmap` the derivatives are those that
    JAX derives.
    """
    x, w = vary((x, w), varying_axes((x, w)))
    y: Array = _bilinear.bind(x, w, product=product, jaxpr=jax.make_jaxpr(product)(x, w))
    return y


def _apply(x: Array, w: Array, *, product: BilinearMap, jaxpr: Any) -> Array:
    return product(x, w)


# Outside of any program each is one of its own, rather than one for each of its parts.
_run = jax.jit(lambda product, x, w: product(x, w), static_argnums=0)
_to_x = jax.jit(lambda product, w, ct: product.to_x(w, ct), static_argnums=0, inline=True)
_to_w = jax.jit(lambda product, x, ct: product.to_w(x, ct), static_argnums=0, inline=True)


def _batch(args: Any, axes: Any, *, product: BilinearMap, jaxpr: Any) -> tuple[Array, int]:
    return jax.vmap(product, axes)(*args), 0


#: `jaxpr`, the product as a program: for what reads programs (`canonical.CALLS`).
_bilinear = Primitive("bilinear")
_bilinear.def_impl(lambda x, w, *, product, jaxpr: _run(product, x, w))
_bilinear.def_abstract_eval(lambda x, w, *, product, jaxpr: jaxpr.out_avals[0])
mlir.register_lowering(_bilinear, mlir.lower_fun(_apply, multiple_results=False))
batching.primitive_batchers[_bilinear] = _batch
ad.defbilinear(
    _bilinear,
    lambda ct, x, w, *, product, jaxpr: _to_x(product, w, ct),
    lambda ct, x, w, *, product, jaxpr: _to_w(product, x, ct),
)
