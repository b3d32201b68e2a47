"""ReLU, leaky ReLU, MaxMin and GroupSort: activations whose derivative needs a few bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mwplan.common import platforms
from mwplan.common.errors import ArgumentError
from mwplan.common.trees import along, widen
from mwplan.layers.linear import InputShape, WholeOf
from mwplan.network.bits import Packing
from mwplan.network.layer import layer, static
from mwplan.network.rules import InvertRule, OutputStore, StoreRule, Unavailable, VijpRule


@layer
class LeakyReLU:
    """`x` where positive, `slope * x` elsewhere.

    >>> mw.layers.LeakyReLU(0.5)(jnp.array([-2.0, 3.0]))
    Array([-1.,  3.], dtype=float32)
    """

    slope: float = static(default=0.5)

    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Applies the activation."""
        return jnp.where(x > 0, x, x * self.slope)

    def vijp_rules(self, x: Any) -> Sequence[VijpRule | Unavailable]:
        """Division by the derivative, for slopes that are not near zero."""
        if not abs(self.slope) >= 1e-3:
            return [
                Unavailable(
                    "divide",
                    f"`slope={self.slope}` erases the cotangent where x <= 0 (needs abs(slope) >= 1e-3)",
                )
            ]
        return [LeakyDivide()]

    def store_rules(self, x: Any) -> Sequence[StoreRule]:
        """One bit an element; for positive slopes also the output, which the next layer often keeps
        anyway."""
        return [LeakyBits(), SignOfOutput(bits=LeakyBits())] if self.slope > 0 else [LeakyBits()]

    def invert_rules(self, x: Any) -> Sequence[InvertRule | Unavailable]:
        """Division, for positive slopes."""
        if not self.slope >= 1e-3:
            return [
                Unavailable(
                    "divide",
                    f"`slope={self.slope}`: only increasing activations are inverted (needs slope >= 1e-3)",
                )
            ]
        return [LeakyInverse()]


@dataclass(frozen=True)
class LeakyBits(StoreRule):
    """Keeps the sign of the input: one bit an element."""

    name: str = "bits"

    def forward(self, layer: LeakyReLU, x: Any) -> tuple[Any, Any]:
        """The activation, and where the input was positive."""
        return layer(x), x > 0

    def backward(self, layer: LeakyReLU, residuals: Any, ct_out: Any) -> tuple[list[Any], Any]:
        """No parameters; the cotangent times the derivative."""
        return [], jnp.where(residuals, ct_out, ct_out * layer.slope)


@dataclass(frozen=True)
class SignOfOutput(OutputStore):
    """Keeps the output, whose sign is the input's, instead of the packed bits that `bits` keeps."""

    bits: StoreRule = field(kw_only=True)

    def backward(self, layer: Any, residuals: Any, ct_out: Any) -> tuple[list[Any], Any]:
        """As that of `bits`."""
        return self.bits.backward(layer, residuals > 0, ct_out)


@dataclass(frozen=True)
class LeakyDivide(VijpRule):
    r"""Divides by the derivative: $\bar x = \bar y \odot f'(x)$, $\bar y = \bar x / f'(x)$ with
    $f' \in \{1, slope\}$.

    Nothing is erased while the slope is not 0. **Residuals:** one bit an element, the sign of `x`. **Cost:**
    one pass. **Growth:** about $\sqrt{(1 + slope^{-2}) (1 + slope^2)} / 2$ for random signs: 1.25 at slope
    0.5, 1.8 at 0.3.
    **Source:** arXiv:2402.14212.
    """

    name: str = "divide"

    def forward(self, layer: LeakyReLU, x: Any) -> tuple[Any, Any]:
        """The activation, and where the input was positive."""
        return layer(x), x > 0

    def reverse(self, layer: LeakyReLU, residuals: Any, ct_out: Any) -> tuple[Any, Any]:
        """The cotangent times the derivative."""
        ct_out = widen(ct_out)
        return jnp.where(residuals, ct_out, ct_out * layer.slope), ()

    def rebuild(self, layer: LeakyReLU, x: Any, ct_in: Any, fragment: Any) -> Any:
        """`ct_in` over the derivative at `x`."""
        return jnp.where(x > 0, ct_in, ct_in / layer.slope)


@dataclass(frozen=True)
class LeakyInverse(InvertRule):
    """`y` where positive, `y / slope` elsewhere."""

    name: str = "divide"

    def inverse(self, layer: LeakyReLU, y: Any, kept: Any) -> Any:
        """`x`."""
        return jnp.where(y > 0, y, y / layer.slope)


@layer
class ReLU:
    """`x` where positive, 0 elsewhere.

    The part of the cotangent that it erases depends on the data, so the only fragment of fixed size that
    restores it is the whole cotangent. Any other strategy keeps one bit an element.

    >>> mw.layers.ReLU()(jnp.array([-2.0, 3.0]))
    Array([0., 3.], dtype=float32)
    """

    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Applies the activation."""
        return jnp.where(x <= 0, jnp.zeros((), x.dtype), x)  # NaN stays NaN

    def vijp_rules(self, x: Any) -> Sequence[VijpRule | Unavailable]:
        """None: the whole cotangent only."""
        return [
            Unavailable(
                "divide", "ReLU erases the cotangent wherever x <= 0, and where that is depends on the data"
            ),
            WholeOf("whole_bits", base=ReLUMask()),
        ]

    def store_rules(self, x: Any) -> Sequence[StoreRule]:
        """One bit an element, or the output, which the next layer often keeps anyway."""
        return [ReLUBits(), SignOfOutput(bits=ReLUBits())]


@dataclass(frozen=True)
class ReLUBits(StoreRule):
    """Keeps the sign of the input: one bit an element."""

    name: str = "bits"

    def forward(self, layer: ReLU, x: Any) -> tuple[Any, Any]:
        """The activation, and where the input was positive."""
        return layer(x), x > 0

    def backward(self, layer: ReLU, residuals: Any, ct_out: Any) -> tuple[list[Any], Any]:
        """No parameters; the cotangent where the input was positive."""
        return [], jnp.where(residuals, ct_out, jnp.zeros((), ct_out.dtype))


@dataclass(frozen=True)
class ReLUMask(VijpRule):
    """The sweeps of ReLU with one bit an element; its vijp does not exist, so only `WholeOf` uses it."""

    name: str = "mask"

    def forward(self, layer: ReLU, x: Any) -> tuple[Any, Any]:
        """The activation, and where the input was positive."""
        return layer(x), x > 0

    def reverse(self, layer: ReLU, residuals: Any, ct_out: Any) -> tuple[Any, Any]:
        """The cotangent where the input was positive."""
        return jnp.where(residuals, widen(ct_out), 0.0), ()

    def rebuild(self, layer: ReLU, x: Any, ct_in: Any, fragment: Any) -> Any:
        """Refuses."""
        raise NotImplementedError("ReLU has no vijp")


@layer
class MaxMin:
    """The larger and the smaller of each pair of channels: channel `c` of the first half and channel `c` of
    the second.

    1-Lipschitz and norm-preserving for cotangents, forward invertible given one bit a pair. Needs an even
    number of channels, last.

    >>> mw.layers.MaxMin()(jnp.array([1.0, 5.0, 2.0, 4.0]))
    Array([2., 5., 1., 4.], dtype=float32)
    """

    def __call__(self, x: Float[Array, "*batch channels"]) -> Float[Array, "*batch channels"]:
        """Applies the activation: maxima in the first half, minima in the second."""
        a, b = _halves(x)
        swap = a < b
        return jnp.concatenate([jnp.where(swap, b, a), jnp.where(swap, a, b)], -1)

    def vijp_rules(self, x: Any) -> Sequence[VijpRule | Unavailable]:
        """Undoing the permutation."""
        return [MaxMinUndo()]

    def store_rules(self, x: Any) -> Sequence[StoreRule]:
        """One bit a pair."""
        return [MaxMinBits()]

    def invert_rules(self, x: Any) -> Sequence[InvertRule | Unavailable]:
        """Undoing the permutation."""
        return [Unpermute(MaxMinBits())]


def _halves(x: Array) -> tuple[Array, Array]:
    if x.ndim < 1 or x.shape[-1] % 2:
        raise ArgumentError(f"`x.shape={x.shape}`: MaxMin needs an even number of channels on the last axis")
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]


def _exchange(
    ct: Float[Array, "*batch channels"], swap: Bool[Array, "*batch pairs"]
) -> Float[Array, "*batch channels"]:
    """Exchanges the halves where `swap`: its own inverse and transpose."""
    a, b = _halves(ct)
    if platforms.platform() != "tpu":
        return jnp.concatenate([jnp.where(swap, b, a), jnp.where(swap, a, b)], -1)
    # As the derivative of the forward pass puts them together: of the halves in this order XLA:TPU makes
    # larger windows for the convolution that reads them, a tenth of a step's cycles.
    lead, half = [(0, 0)] * (ct.ndim - 1), a.shape[-1]
    second = jnp.pad(jnp.where(swap, a, b), [*lead, (half, 0)])
    return second + jnp.pad(jnp.where(swap, b, a), [*lead, (0, half)])


@dataclass(frozen=True)
class MaxMinBits(StoreRule):
    """Keeps which of each pair was the larger: one bit a pair."""

    name: str = "bits"

    def forward(self, layer: MaxMin, x: Any) -> tuple[Any, Any]:
        """The activation, and where the pair was exchanged."""
        a, b = _halves(x)
        return layer(x), a < b

    def backward(self, layer: MaxMin, residuals: Any, ct_out: Any) -> tuple[list[Any], Any]:
        """No parameters; the cotangent, exchanged back."""
        return [], _exchange(ct_out, residuals)


@dataclass(frozen=True)
class Unpermute(InvertRule):
    """Undoes the permutation that `base` keeps, for the output and for the cotangent.

    It is exact, and the order stays what it was, even of two values that are rebuilt near each other.

    **Residuals:** those of `base`. **Cost:** a pass over each.
    """

    base: StoreRule
    name: str = "undo"
    keeps: bool = True

    def forward(self, layer: Any, x: Any) -> tuple[Any, Any]:
        """The activation and the permutation."""
        return self.base.forward(layer, x)

    def inverse(self, layer: Any, y: Any, kept: Any) -> Any:
        """`x`."""
        return self.base.backward(layer, kept, y)[1]

    def backward(self, layer: Any, y: Any, kept: Any, ct_out: Any) -> tuple[Any, list[Any], Any]:
        """Both undone."""
        return self.inverse(layer, y, kept), *self.base.backward(layer, kept, ct_out)


@dataclass(frozen=True)
class MaxMinUndo(VijpRule):
    r"""The Jacobian is a permutation $P$: $\bar x = \bar y P^\top$, $\bar y = \bar x P$.

    Nothing is erased. **Residuals:** one bit a pair. **Cost:** one pass. **Growth:** exactly 1, local error
    0.
    **Source:** ours.
    """

    name: str = "undo"

    def forward(self, layer: MaxMin, x: Any) -> tuple[Any, Any]:
        """The activation, and where the pair was exchanged."""
        a, b = _halves(x)
        return layer(x), a < b

    def reverse(self, layer: MaxMin, residuals: Any, ct_out: Any) -> tuple[Any, Any]:
        """The cotangent, exchanged back."""
        return _exchange(widen(ct_out), residuals), ()

    def rebuild(self, layer: MaxMin, x: Any, ct_in: Any, fragment: Any) -> Any:
        """The cotangent, exchanged as the forward exchanged at `x`."""
        a, b = _halves(x)
        return _exchange(ct_in, a < b)


@layer
class GroupSort:
    """Sorts each group of `size` channels, ascending: the channels `c, c + C/size, c + 2C/size, ...` of `C`,
    last.

    >>> mw.layers.GroupSort(2)(jnp.array([2.0, 5.0, 1.0, 4.0]))
    Array([1., 4., 2., 5.], dtype=float32)
    """

    size: int = static(default=4)

    def rank(self, x: Float[Array, "*batch channels"]) -> Int[Array, "*batch size groups"]:
        """Where each value goes within its group: how many are smaller, or equal and before it.

        Counting takes `size` comparisons an element in one fused pass, which XLA does faster than it sorts
        short rows.
        """
        x = self.split(x)
        mine, other = x[..., :, None, :], x[..., None, :, :]
        before = jnp.arange(self.size)[None, :, None] < jnp.arange(self.size)[:, None, None]
        return jnp.sum((other < mine) | ((other == mine) & along(before, other)), axis=-2, dtype=jnp.int32)

    def split(self, x: Float[Array, "*batch channels"]) -> Float[Array, "*batch size groups"]:
        """The groups along the last axis, their members along the one before."""
        if x.ndim < 1 or x.shape[-1] % self.size:
            raise ArgumentError(
                f"`x.shape={x.shape}`: GroupSort({self.size}) needs a multiple of {self.size} channels, last"
            )
        return x.reshape(*x.shape[:-1], self.size, x.shape[-1] // self.size)

    def __call__(self, x: Float[Array, "*batch channels"]) -> Float[Array, "*batch channels"]:
        """Applies the activation."""
        return _sort(self, x, self.rank(x))

    def vijp_rules(self, x: Any) -> Sequence[VijpRule | Unavailable]:
        """Undoing the permutation."""
        if self.size > 256:
            return [Unavailable("undo", f"groups of {self.size} are not packed: at most 256")]
        return [GroupSortUndo(), WholeOf("whole_bits", base=GroupSortUndo())]

    def store_rules(self, x: Any) -> Sequence[StoreRule]:
        """The permutation in the fewest bits."""
        return [GroupSortBits()] if self.size <= 256 else []

    def invert_rules(self, x: Any) -> Sequence[InvertRule | Unavailable]:
        """Undoing the permutation."""
        return [Unpermute(base) for base in self.store_rules(x)]


def _sort(layer: GroupSort, x: Array, rank: Array) -> Array:
    """Puts each value at its rank."""
    rank = rank[..., None, :, :]
    hot = rank == along(jnp.arange(layer.size)[:, None, None], rank)
    return jnp.sum(jnp.where(hot, layer.split(x)[..., None, :, :], jnp.zeros((), x.dtype)), axis=-2).reshape(
        x.shape
    )


def _unsort(layer: GroupSort, ct: Array, rank: Array) -> Array:
    """Puts each sorted cotangent back where its value came from."""
    rank = rank[..., :, None, :]
    hot = rank == along(jnp.arange(layer.size)[None, :, None], rank)
    return jnp.sum(
        jnp.where(hot, layer.split(ct)[..., None, :, :], jnp.zeros((), ct.dtype)), axis=-2
    ).reshape(ct.shape)


@dataclass(frozen=True)
class GroupSortBits(StoreRule):
    """Keeps the permutation: `log2(size)` bits an element, rounded up to 1, 2, 4 or 8."""

    name: str = "bits"

    def forward(self, layer: GroupSort, x: Any) -> tuple[Any, Any]:
        """The activation and the packed permutation."""
        rank = layer.rank(x)
        return layer(x), (Packing.of(rank.shape, layer.size).pack(rank), InputShape.of(x))

    def backward(self, layer: GroupSort, residuals: Any, ct_out: Any) -> tuple[list[Any], Any]:
        """No parameters; the cotangent, unsorted."""
        packed, was = residuals
        shape = (*was.shape[:-1], layer.size, was.shape[-1] // layer.size)
        return [], _unsort(layer, ct_out, Packing.of(shape, layer.size).unpack(packed))


@dataclass(frozen=True)
class GroupSortUndo(VijpRule):
    r"""The Jacobian is a permutation: as MaxMin, with `log2(size)` bits an element for residuals. Growth
    exactly 1, local error 0."""

    name: str = "undo"

    def forward(self, layer: GroupSort, x: Any) -> tuple[Any, Any]:
        """The activation and the packed permutation."""
        return GroupSortBits().forward(layer, x)

    def reverse(self, layer: GroupSort, residuals: Any, ct_out: Any) -> tuple[Any, Any]:
        """The cotangent, unsorted."""
        _, ct_in = GroupSortBits().backward(layer, residuals, widen(ct_out))
        return ct_in, ()

    def rebuild(self, layer: GroupSort, x: Any, ct_in: Any, fragment: Any) -> Any:
        """The cotangent, sorted as the forward sorted `x`."""
        return _sort(layer, ct_in, layer.rank(x))
