r"""Parts of the rules of linear layers: the transposed map, left inverses, and refinement.

A linear layer $y = xJ + b$ keeps nothing for its input vjp, $\bar x = \bar y J^\top$; its vijp applies a left
inverse of $J^\top$'s transpose. Everything here computes in float32 or wider, whatever the activations'
dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Inexact

from mwplan.common import platforms, trees
from mwplan.network.rules import VijpRule, WholeFragment, full_precision


@runtime_checkable
class LinearLayer(Protocol):
    """A layer with `linear`, the layer without its bias, in the dtype of its argument."""

    def __call__(self, x: Any) -> Any:
        """The layer."""

    def linear(self, x: Any) -> Any:
        """The layer without its bias."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class InputShape:
    """Input residuals of a linear layer: no arrays, only the shapes and dtypes of its input."""

    shape: tuple[int, ...] = field(metadata={"static": True})
    dtype: str = field(metadata={"static": True})

    @staticmethod
    def of(x: Any) -> InputShape:
        """The shape and dtype of an array."""
        return InputShape(tuple(x.shape), jnp.dtype(x.dtype).name)

    def wide(self) -> jax.ShapeDtypeStruct:
        """The struct of the cotangent inside a moonwalk run."""
        return jax.ShapeDtypeStruct(self.shape, trees.working_dtype(self.dtype))


def times(
    x: Inexact[Array, "*batch inner"],
    matrix: Inexact[Array, "inner outer"],
    bias: Inexact[Array, " outer"] | None = None,
) -> Inexact[Array, "*batch outer"]:
    """`x @ matrix + bias`, but on TPUs as a product of two matrices.

    With more axes than two XLA:CPU computes the gradient of `matrix` from a transposed copy of the cotangent:
    one activation more at the step's peak. XLA:TPU chooses which axes lie along the tiles of memory, and
    would copy the activation to and fro for a shape of two axes.
    """
    if platforms.platform() == "tpu":
        y = x @ matrix
        return y if bias is None else y + trees.along(bias, y)
    y = x.reshape(-1, x.shape[-1]) @ matrix
    if bias is not None:
        y = y + trees.along(bias, y)
        # As part of the addition the new shape would keep XLA from adding in place: another activation more.
        y = y if x.ndim == 2 else trees.tie(y)
    return y.reshape(*x.shape[:-1], matrix.shape[1])


def transpose(layer: LinearLayer, x: Any, ct_out: Any) -> Any:
    """`ct_in = ct_out J^T` of a linear layer, in working precision; `x`: an `InputShape`, or a pytree of
    them. Cost: one input vjp."""
    wide = jax.tree.map(InputShape.wide, x, is_leaf=lambda one: isinstance(one, InputShape))
    return trees.transpose(trees.widen(layer).linear, wide, trees.widen(ct_out))


def cast(a: Array, dtype: Any) -> Array:
    """`a` in `dtype`. The same object where it has that dtype, so that residuals recognise parameters by
    identity."""
    return a if a.dtype == dtype else a.astype(dtype)


class LinearRule(VijpRule):
    """Base of the vijps of linear layers: no input residuals, and a reverse in working precision. Both sweeps
    multiply in `full_precision`."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in ("reverse", "fragment", "rebuild"):
            setattr(cls, name, full_precision(getattr(cls, name)))

    def forward(self, layer: Any, x: Any) -> tuple[Any, Any]:
        """The layer's output; nothing is kept but the input's shape."""
        return layer(x), jax.tree.map(InputShape.of, x)

    def reverse(self, layer: Any, residuals: Any, ct_out: Any) -> tuple[Any, Any]:
        """The transposed map."""
        return transpose(layer, residuals, ct_out), self.fragment(layer, residuals, trees.widen(ct_out))


def no_examples(layer: LinearLayer, x: Any, ct_in: Array) -> Array:
    """The cotangent of an output of no examples."""
    return jnp.zeros(jax.eval_shape(layer.linear, x).shape, ct_in.dtype)


def left_inverse(a: Inexact[Array, "*batch rows cols"]) -> Inexact[Array, "*batch cols rows"]:
    r"""$A^+$ with $A^+ A = I$, for `rows >= cols` and full column rank.

    Square: LU. Tall: $A = QR$ (Householder), $A^+ = R^{-1} Q^H$, so the error grows with the condition number
    and not with its square, as it would from the normal equations. Cost: about $4\,rows\,cols^2$ flop a
    matrix (four times that if complex), once a step. A singular matrix gives non-finite or huge entries;
    `check` finds it beforehand.
    """
    rows, cols = a.shape[-2:]
    if rows == cols:
        inverse: Array = jnp.linalg.inv(a)
        return inverse
    q, r = jnp.linalg.qr(a)
    qh = jnp.conj(jnp.swapaxes(q, -1, -2))
    return jax.lax.linalg.triangular_solve(r, qh, left_side=True, lower=False)


def rank_problem(a: Any, what: str) -> str | None:
    """Why `a` (..., rows, cols), concrete, has no usable left inverse, or None: for `VijpRule.check`.

    Non-finite entries, or a smallest singular value below 100 eps of the largest (eps of the working
    precision), over all matrices of the batch.
    """
    dtype = trees.working_dtype(np.asarray(a).dtype)
    eps = float(jnp.finfo(dtype).eps)
    a = np.asarray(a).astype(np.complex128 if jnp.issubdtype(dtype, jnp.complexfloating) else np.float64)
    if not np.isfinite(a).all():
        return f"{what} has non-finite entries"
    if eps > 1e-12 and a.size:
        # Cheap and sufficient: Gram - (100 eps |A|_F)^2 I positive definite, in float64. What fails is looked
        # at closely.
        bound = 100 * eps * np.sqrt(np.sum(np.abs(a) ** 2, axis=(-2, -1)).max())
        gram = np.conj(np.swapaxes(a, -1, -2)) @ a
        try:
            np.linalg.cholesky(gram - bound**2 * np.eye(a.shape[-1]))
            return None
        except np.linalg.LinAlgError:
            pass
    s = np.linalg.svd(a, compute_uv=False)
    if s.shape[-1] < a.shape[-1]:
        return f"{what} has fewer rows than columns: {a.shape[-2:]}"
    largest, smallest = float(s.max(initial=0.0)), float(s.min(initial=math.inf))
    if not smallest > 100 * eps * largest:
        return (
            f"{what} is singular in working precision: "
            f"smallest singular value {smallest:.1e}, largest {largest:.1e}"
        )
    return None


@dataclass(frozen=True)
class WholeOf(WholeFragment):
    """The whole cotangent as the fragment, with the residuals of another rule, which keeps less than
    `jax.vjp` does."""

    base: VijpRule = field(kw_only=True)

    def check(self, layer: Any, x: Any) -> str | None:
        """None: nothing is inverted."""
        return None

    def forward(self, layer: Any, x: Any) -> tuple[Any, Any]:
        """That of the other rule."""
        return self.base.forward(layer, x)

    def reverse(self, layer: Any, residuals: Any, ct_out: Any) -> tuple[Any, Any]:
        """The other rule's `ct_in`, and the cotangent."""
        ct_out = trees.widen(ct_out)
        return self.base.reverse(layer, residuals, ct_out)[0], ct_out


def percent_of(percent: int, count: int) -> int:
    """The number of directions that a fraction of `count` stands for, rounded up."""
    return -(-percent * count // 100)


@dataclass(frozen=True)
class Refined(VijpRule):
    r"""A vijp followed by one step of iterative refinement.

    With $V$ the vijp and $J$ the layer's Jacobian, $\bar y_1 = \bar y_0 + V(\bar x - \bar y_0 J^\top)$, the
    residual of the fragment taken along. It removes the part of the local error that comes from an inexact
    factorisation (the error of the error is of second order) and leaves growth as it is. Cost: one more
    forward of what the residuals need, an input vjp and a vijp.
    """

    base: VijpRule
    name: str = field(init=False)
    has_fragment: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", f"{self.base.name}+refine")
        object.__setattr__(self, "has_fragment", self.base.has_fragment)

    def check(self, layer: Any, x: Any) -> str | None:
        """That of the rule refined."""
        return self.base.check(layer, x)

    def forward(self, layer: Any, x: Any) -> tuple[Any, Any]:
        """That of the rule refined."""
        return self.base.forward(layer, x)

    def reverse(self, layer: Any, residuals: Any, ct_out: Any) -> tuple[Any, Any]:
        """That of the rule refined."""
        return self.base.reverse(layer, residuals, ct_out)

    def rebuild(self, layer: Any, x: Any, ct_in: Any, fragment: Any) -> Any:
        """The vijp, and the vijp of what it missed."""
        first = self.base.rebuild(layer, x, ct_in, fragment)
        _, residuals = self.base.forward(layer, x)
        back = self.base.reverse(layer, residuals, first)
        missed = jax.tree.map(jnp.subtract, (ct_in, fragment), back)
        return jax.tree.map(jnp.add, first, self.base.rebuild(layer, x, *missed))
