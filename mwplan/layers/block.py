"""The block recursion of one-dimensional convolutions of stride 1: the fragmental checkpointing of the
paper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mwplan.common import trees
from mwplan.layers.geometry import Geometry
from mwplan.layers.linear import LinearRule, left_inverse, no_examples, rank_problem
from mwplan.layers.spectral import flatten_batch
from mwplan.network.rules import Unavailable, VijpRule

BLOCKS = (4, 8, 16, 32, 64)
"""The block sizes that are offered as options."""


def rules(layer: Any, g: Geometry) -> list[VijpRule | Unavailable]:
    """Block recursions, where the shapes allow them."""
    if layer.dims != 1 or g.stride != (1,) or g.kernel == (1,):
        return [
            Unavailable(
                "block",
                "the block recursion is for one-dimensional convolutions of stride 1 with several taps",
            )
        ]
    inner, outer = layer.weight.shape[-2], layer.weight.shape[-1] // layer.groups
    (reach,), (size,) = g.reach, g.out
    if outer > inner:
        return [
            Unavailable(
                "block", f"tap 0 of {inner} channels does not determine {outer} output channels a group"
            )
        ]
    if not g.circular and max(g.pads[0]) > reach:
        return [Unavailable("block", f"padding {g.pads[0]} is wider than the taps reach ({reach})")]
    found: list[VijpRule | Unavailable] = []
    for block in BLOCKS:
        if block <= reach:
            found.append(
                Unavailable(
                    f"block_{block}", f"blocks of {block} are no larger than the {reach} known slices"
                )
            )
        elif block >= 2 * size:
            found.append(Unavailable(f"block_{block}", f"the output has {size} positions"))
        else:
            found.append(Block(block))
    return found


@dataclass(frozen=True)
class Block(LinearRule):
    r"""Blocks of $B$ positions whose first $d(k-1)$ are known; the others follow by substitution with tap 0.

    $u_i = \sum_t \bar y_{i - dt} W_t^\top$ gives $\bar y_i = (u_i - \sum_{t \ge 1} \bar y_{i - dt}
    W_t^\top)(W_0^+)^\top$: each position from the $d(k-1)$ before it. All blocks advance together. Padding by
    at most $d(k-1)$ zeros a side leaves $u_i$ inside the input for every position that is solved for. Errors
    are multiplied at each substitution, up to $\rho^B$ with $\rho$ the growth of the recursion: the measured
    growth decides which $B$ a plan can use.

    **Fragment:** the known slices, $d(k-1)/B$ of the cotangent. **Condition:** tap 0 (`inner x outer` a
    group) has full column rank. **Cost:** that of a forward, in $B - d(k-1)$ sequential steps. **Source:**
    arXiv:2402.14212, whose fragmental setting this is; blocks in parallel and the left inverse for
    $outer < inner$ are ours.
    """

    block: int
    has_fragment: bool = True

    @property
    def name(self) -> str:  # type: ignore[override]
        """`block_8` for blocks of 8."""
        return f"block_{self.block}"

    def known(self, g: Geometry) -> np.ndarray:
        """The positions kept."""
        position = np.arange(g.out[0])
        return position[position % self.block < g.reach[0]]

    def taps(self, layer: Any) -> Float[Array, "kernel groups inner outer"]:
        """The taps of each group."""
        k, inner, outer = layer.weight.shape
        weight = trees.widen(layer.weight).reshape(k, inner, layer.groups, outer // layer.groups)
        return jnp.swapaxes(weight, 1, 2)

    def check(self, layer: Any, x: Any) -> str | None:
        """Full column rank of tap 0, finite."""
        return rank_problem(self.taps(layer)[0], "tap 0 of `weight`")

    def fragment(self, layer: Any, residuals: Any, ct_out: Any) -> Any:
        """The known slices."""
        return ct_out[..., self.known(layer.geometry(residuals.shape)), :]

    def rebuild(self, layer: Any, x: Any, ct_in: Any, fragment: Any) -> Any:
        """`ct_out`."""
        if not ct_in.size:
            return no_examples(layer, x, ct_in)
        g = layer.geometry(x.shape)
        (m,), (reach,), (d,), ((lo, _),) = g.out, g.reach, g.dilation, g.pads
        size, blocks, groups = self.block, -(-m // self.block), layer.groups
        flat = flatten_batch(ct_in, 1)
        n = flat.shape[0]
        u = jnp.roll(flat, lo, 1) if g.circular else jnp.pad(flat, ((0, 0), (lo, 0), (0, 0)))
        u = jnp.pad(u[:, :m], ((0, 0), (0, blocks * size - u[:, :m].shape[1]), (0, 0)))
        u = jnp.moveaxis(u.reshape(n, blocks, size, groups, -1), 2, 0)
        taps = self.taps(layer)
        solve = left_inverse(taps[0])
        start = jnp.zeros((n, blocks * size, fragment.shape[-1]), fragment.dtype)
        start = start.at[:, self.known(g)].set(flatten_batch(fragment, 1))
        start = jnp.moveaxis(start.reshape(n, blocks, size, groups, -1)[:, :, :reach], 2, 0)

        def step(window: Array, u_i: Array) -> tuple[Array, Array]:
            before = window[reach - d :: -d]
            rest = jnp.einsum("tnbgo,tgio->nbgi", before, taps[1:])
            ct = jnp.einsum("nbgi,goi->nbgo", u_i - rest, solve)
            return jnp.concatenate([window[1:], ct[None]]), ct

        _, solved = jax.lax.scan(step, start, u[reach:])
        ct_out = jnp.moveaxis(jnp.concatenate([start, solved]), 0, 2).reshape(n, blocks * size, -1)[:, :m]
        return ct_out.reshape(*ct_in.shape[:-2], m, -1)
