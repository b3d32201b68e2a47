"""Coupling blocks: each half goes through a branch and is added to the other; invertible for any branches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from mwplan.common import trees
from mwplan.common.errors import ArgumentError
from mwplan.common.trees import widen
from mwplan.layers.linear import WholeOf
from mwplan.network import rules
from mwplan.network.layer import layer
from mwplan.network.residuals import remembered
from mwplan.network.rules import (
    InvertRule,
    Unavailable,
    VijpRule,
    full_precision,
)

_Halves = Array | tuple[Array, Array]


def _halves(x: _Halves) -> tuple[Array, Array]:
    """The two parts that a coupling acts on."""
    if isinstance(x, tuple):
        if len(x) != 2:
            raise ArgumentError(f"`x` has {len(x)} parts: Coupling takes an array or a pair of arrays")
        return x
    if not hasattr(x, "shape"):
        raise ArgumentError(
            f"`x` is a {type(x).__name__}: Coupling takes an array or a pair (a tuple) of arrays"
        )
    if x.ndim < 1 or x.shape[-1] % 2:
        raise ArgumentError(
            f"`x.shape={x.shape}`: Coupling needs an even number of channels on the last axis"
        )
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]


def _as(x: _Halves, first: Array, second: Array) -> Any:
    """The parts as `x` has them."""
    return (first, second) if isinstance(x, tuple) else jnp.concatenate([first, second], -1)


@full_precision
def branch_vjp(branch: Any, x: Array) -> tuple[Array, Any]:
    """A branch in working and full precision at `x`, and its vjp."""
    y, vjp = jax.vjp(widen(branch), x)
    return y, vjp


@layer
class Nothing:
    """The branch of a half that a coupling leaves as it is: zeros like the other half."""

    def __call__(self, x: Array) -> Array:
        """Zeros."""
        return jnp.zeros_like(x)


@layer
class Coupling:
    """`y1 = x1 + f(x2)`, `y2 = x2 + g(y1)`, for any layers `f` and `g`.

    The output of `f` has the shape of `x1`, that of `g` the shape of `x2`. The input is the pair `(x1, x2)`,
    or an array with them as the halves of its last axis; the output is the same. Pairs are cheaper, because
    nothing is copied between one coupling and the next: `mwplan.layers.Split` makes them, `Concatenate`
    joins them again.

    >>> layer = mw.layers.Coupling(jnp.tanh, jnp.sin)
    >>> a, b = layer((jnp.zeros(2), jnp.ones(2)))
    >>> bool(jnp.allclose(a, jnp.tanh(1.0)) and jnp.allclose(b, 1 + jnp.sin(a)))
    True
    """

    f: Any
    g: Any

    def __call__(self, x: _Halves) -> Any:
        """Applies the block."""
        x1, x2 = _halves(x)
        y1 = x1 + self.f(x2)
        return _as(x, y1, x2 + self.g(y1))

    def vijp_rules(self, x: Any) -> Sequence[VijpRule | Unavailable]:
        """Subtraction, from the input or from the branches' own residuals."""
        return [Subtract(), SubtractVjps(), WholeOf("whole_input", base=Subtract())]

    def invert_rules(self, x: Any) -> Sequence[InvertRule | Unavailable]:
        """Subtraction. Where a branch's vjp keeps booleans (ReLU masks), also subtraction that keeps them; it
        is last because it is more accurate."""
        leaves, treedef = jax.tree.flatten((self, x))
        shapes = tuple(trees.struct_of(a) if hasattr(a, "dtype") else a for a in leaves)
        try:
            keeps = _keeps_booleans(treedef, shapes)
        except TypeError:  # something in a branch cannot be hashed: traced for this call alone
            keeps = _keeps_booleans.__wrapped__(treedef, shapes)
        return [CouplingInverse(), *[CouplingBits()] * keeps]


@dataclass(frozen=True)
class Subtract(VijpRule):
    r"""$\bar x_1 = \bar y_1 + \bar y_2\,dG(y_1)$, $\bar x_2 = \bar y_2 + \bar x_1\,dF(x_2)$, solved by
    subtraction.

    $\bar y_2 = \bar x_2 - \bar x_1\,dF(x_2)$ and $\bar y_1 = \bar x_1 - \bar y_2\,dG(y_1)$: nothing is
    erased, whatever $F$ and $G$ are.

    **Residuals:** the input, often shared; both sweeps differentiate the branches at it, in float32 or wider.
    **Cost:** a forward and an input vjp of both branches in each. **Growth:** near 1 while the branches are
    small beside the identity. **Source:** ours; the block is RevNet's, arXiv:1707.04585.
    """

    name: str = "subtract"

    def forward(self, layer: Coupling, x: Any) -> tuple[Any, Any]:
        """The output and the input."""
        return layer(x), x

    def _branches(self, layer: Coupling, x: _Halves) -> tuple[Any, Any]:
        x1, x2 = _halves(widen(x))
        moved, f_vjp = branch_vjp(layer.f, x2)
        _, g_vjp = branch_vjp(layer.g, x1 + moved)
        return f_vjp, g_vjp

    def reverse(self, layer: Coupling, residuals: Any, ct_out: Any) -> tuple[Any, Any]:
        """`ct_in`."""
        return self._pull(self._branches(layer, residuals), ct_out), ()

    def _pull(self, branches: tuple[Any, Any], ct_out: _Halves) -> Any:
        f_vjp, g_vjp = branches
        ct1, ct2 = _halves(widen(ct_out))
        ct1 = ct1 + g_vjp(ct2)[0]
        return _as(ct_out, ct1, ct2 + f_vjp(ct1)[0])

    def rebuild(self, layer: Coupling, x: Any, ct_in: Any, fragment: Any) -> Any:
        """`ct_out`."""
        f_vjp, g_vjp = self._branches(layer, x)
        ct1, ct2 = _halves(ct_in)
        ct2 = ct2 - f_vjp(ct1)[0]
        return _as(ct_in, ct1 - g_vjp(ct2)[0], ct2)


@dataclass(frozen=True)
class SubtractVjps(Subtract):
    """As `subtract`, but the residuals are those of the branches' input vjps, not the input. The reverse
    sweep runs no forward."""

    name: str = "subtract_vjps"

    def forward(self, layer: Coupling, x: Any) -> tuple[Any, Any]:
        """The output and the branches' vjps."""
        return layer(x), self._branches(layer, x)

    def reverse(self, layer: Coupling, residuals: Any, ct_out: Any) -> tuple[Any, Any]:
        """`ct_in`."""
        return self._pull(residuals, ct_out), ()


@dataclass(frozen=True)
class CouplingInverse(InvertRule):
    """`x2 = y2 - g(y1)`, `x1 = y1 - f(x2)`. The branches compute as in the forward pass, in JAX's default
    precision: what was added is subtracted.

    **Cost:** a forward and a vjp of both branches, the one's memory after the other's.
    """

    name: str = "subtract"

    def inverse(self, layer: Coupling, y: Any, kept: Any) -> Any:
        """`x`."""
        y1, y2 = _halves(y)
        x2 = y2 - layer.g(y1)
        return _as(y, y1 - layer.f(x2), x2)

    def backward(self, layer: Coupling, y: Any, kept: Any, ct_out: Any) -> tuple[Any, list[Any], Any]:
        """Each branch runs once, for its value and its vjp."""
        (y1, y2), (ct1, ct2) = _halves(y), _halves(ct_out)
        f_bits, g_bits = kept or (None, None)
        moved, g_vjp = _value_and_vjp(layer.g, y1, g_bits)
        g_grads, ct = g_vjp(ct2)
        x2, ct1, g_grads = trees.tie((y2 - moved, ct1 + ct, g_grads))
        moved, f_vjp = _value_and_vjp(layer.f, x2, f_bits)
        f_grads, ct = f_vjp(ct1)
        x = _as(y, y1 - moved, x2)
        return x, [*f_grads, *g_grads], _as(ct_out, ct1, ct2 + ct)


@dataclass(frozen=True)
class CouplingBits(CouplingInverse):
    """As `subtract`, but the branches are differentiated with the booleans of the forward pass: no ReLU's
    mask flips, however wrong the rebuilt activation is.

    **Residuals:** the boolean leaves of the branches' vjps, for a ReLU one bit an element. **Cost:** as
    `subtract`. Kinks that a vjp keeps as floats (`jnp.maximum`) or as integers (`MaxPool`) are not kept: they
    are differentiated at the rebuilt activation.
    """

    name: str = "subtract_bits"
    keeps: bool = True

    def forward(self, layer: Coupling, x: Any) -> tuple[Any, Any]:
        """The output, and the booleans of the vjps of `f` and `g`."""
        x1, x2 = _halves(x)
        moved, f_vjp = rules.value_and_vjp(layer.f, x2)
        y1 = x1 + moved
        moved, g_vjp = rules.value_and_vjp(layer.g, y1)
        kept = tuple(list(filter(_is_boolean, jax.tree.leaves(vjp))) for vjp in (f_vjp, g_vjp))
        return _as(x, y1, x2 + moved), kept


@remembered
def _keeps_booleans(treedef: Any, shapes: tuple[Any, ...]) -> bool:
    """Whether `CouplingBits` keeps anything of the flattened layer and input. Traced once for all that are
    alike: a step asks for every layer."""
    arrays = [leaf for leaf in shapes if isinstance(leaf, jax.ShapeDtypeStruct)]

    def kept(arrays: list[Any]) -> Any:
        left = iter(arrays)
        leaves = [next(left) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf for leaf in shapes]
        return CouplingBits().forward(*jax.tree.unflatten(treedef, leaves))[1]

    return bool(jax.tree.leaves(jax.eval_shape(kept, arrays)))


def _is_boolean(leaf: Any) -> bool:
    return trees.is_array(leaf) and leaf.dtype == jnp.bool_


def _value_and_vjp(branch: Any, x: Any, bits: list[Any] | None) -> tuple[Any, Any]:
    """`rules.value_and_vjp`, with `bits` in place of the boolean leaves of the vjp, which is a pytree of what
    it keeps."""
    y, vjp = rules.value_and_vjp(branch, x)
    if bits is None:
        return y, vjp
    leaves, treedef = jax.tree.flatten(vjp)
    where = [i for i, leaf in enumerate(leaves) if _is_boolean(leaf)]
    for i, bit in zip(where, bits, strict=True):
        leaves[i] = bit
    return y, jax.tree.unflatten(treedef, leaves)
