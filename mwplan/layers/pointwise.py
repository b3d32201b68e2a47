"""The pointwise vijp of a convolution: input positions that one output alone reads."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mwplan.common import trees
from mwplan.layers.geometry import Geometry
from mwplan.layers.linear import LinearRule, Refined, left_inverse, no_examples, rank_problem, times
from mwplan.network.rules import Unavailable, VijpRule


def lone_taps(g: Geometry) -> list[list[int]]:
    """For each axis the taps `t` whose input position no other output reads, and that lie inside the input
    for every output.

    Another tap `t'` reads position `s j + d t` for the output `j + d (t - t') / s`, if that is an integer.
    """
    found = []
    for n, k, s, d, (lo, _), m in zip(g.size, g.kernel, g.stride, g.dilation, g.pads, g.out):
        taps = [t for t in range(k) if not any(t != o and d * (t - o) % s == 0 for o in range(k))]
        if g.circular:
            taps = taps if n % s == 0 and d * (k - 1) < n else []
        else:
            taps = [t for t in taps if d * t - lo >= 0 and s * (m - 1) + d * t - lo < n]
        found.append(taps)
    return found


def rules(layer: Any, g: Geometry) -> list[VijpRule | Unavailable]:
    """The pointwise rule, where the shapes allow it."""
    taps = lone_taps(g)
    inner, outer = layer.weight.shape[-2], layer.weight.shape[-1] // layer.groups
    count = int(np.prod([len(t) for t in taps]))
    if not count:
        reason = (
            f"every input position is read by several outputs (kernel {g.kernel}, stride {g.stride}), "
            "or lies in the padding"
        )
        return [Unavailable("pointwise", reason)]
    if outer > count * inner:
        return [
            Unavailable(
                "pointwise",
                f"{count} lone taps of {inner} channels do not determine {outer} output channels a group",
            )
        ]
    return [Pointwise(), Refined(Pointwise())]


@dataclass(frozen=True)
class Pointwise(LinearRule):
    r"""Solves for each output from the input positions that it alone reads.

    With stride $s$ and $k \le 2s - 1$ taps (dilation 1), tap $t \in [k - s, s - 1]$ of output $j$ reads
    position $sj + t$, and no other output does, so $u_{sj+t} = \bar y_j W_t^\top$ there. Stacking these taps
    gives $[u_{sj+t}]_t = \bar y_j\,[W_t]_t^\top$: one small left inverse for all positions, as for a dense
    layer; in several dimensions the taps are a product of sets.

    **Condition:** the stack, `(taps * inner) x outer` a group, has full column rank; the positions lie inside
    the input for every output.
    **Cost:** $2\,taps\,inner\,outer$ flop an output position, $taps / k^d$ of a forward. No residuals, no
    fragment.
    **Source:** ours, from linear algebra.
    """

    name: str = "pointwise"

    def matrix(self, layer: Any, g: Geometry) -> Float[Array, "groups rows outer"]:
        """The stacked taps of each group."""
        weight = trees.widen(layer.weight)
        for axis, taps in enumerate(lone_taps(g)):
            weight = jnp.take(weight, np.asarray(taps), axis)
        outer = weight.shape[-1]
        stacked = weight.reshape(-1, layer.groups, outer // layer.groups)
        return jnp.moveaxis(stacked, 1, 0)

    def check(self, layer: Any, x: Any) -> str | None:
        """Full column rank of the stack, finite."""
        g = layer.geometry(x.shape)
        return rank_problem(jax.jit(lambda one: self.matrix(one, g))(layer), "the stack of the lone taps")

    def rebuild(self, layer: Any, x: Any, ct_in: Any, fragment: Any) -> Any:
        """`ct_out`."""
        if not ct_in.size:
            return no_examples(layer, x, ct_in)
        g = layer.geometry(x.shape)
        dims = layer.dims
        lead = ct_in.shape[: -1 - dims]
        groups = layer.groups
        parts = []
        for taps in itertools.product(*lone_taps(g)):
            part = ct_in.reshape(-1, *ct_in.shape[len(lead) :])
            for axis, t in enumerate(taps):
                part = _every(
                    part,
                    axis + 1,
                    g.dilation[axis] * t - g.pads[axis][0],
                    g.stride[axis],
                    g.out[axis],
                    g.circular,
                )
            parts.append(part.reshape(*part.shape[:-1], groups, -1))
        rows = jnp.concatenate(parts, -1)
        inverse = left_inverse(self.matrix(layer, g))
        if groups > 1 or trees.explicitly_sharded(rows):
            ct_out = jnp.einsum("...gi,goi->...go", rows, inverse)
        else:
            ct_out = times(rows[..., 0, :], inverse[0].T)
        return ct_out.reshape(*lead, *g.out, -1)


def _every(a: Array, axis: int, start: int, step: int, count: int, circular: bool) -> Array:
    """`count` positions of `axis` from `start` by `step`, wrapped where circular."""
    if circular:
        a, start = jnp.roll(a, -start, axis), 0
    index: Sequence[slice] = (slice(None),) * axis
    return a[(*index, slice(start, start + step * (count - 1) + 1, step))]
