"""The pieces between cuts as layers.

A piece's activation is a tuple of arrays: what crosses the cut. Arrays without a gradient that are
floating-point all the same (masks, images, running averages) cross as integers of the same bits, so that no
cotangent is made, kept or added for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mwplan.common import trees
from mwplan.functions.known import Known, KnownPiece, steps_for
from mwplan.functions.programs import Program
from mwplan.network.chain import layer_name
from mwplan.network.layer import layer, static

#: How an array is held: as it is; as it is, though it has no gradient; as integers of the same bits.
PLAIN, STOPPED, BITS = "plain", "stopped", "bits"


class Label:
    """What a piece is called. All labels are equal: pieces that differ in nothing else are the same layer."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Label)

    def __hash__(self) -> int:
        return hash(Label)

    def __repr__(self) -> str:
        return "Label()"

    def __str__(self) -> str:
        return self.text


@layer
class Piece(KnownPiece):
    """A stretch of a function's operations, from the arrays that cross the cut before it to those that cross
    the cut after it.

    **Attributes:** `params`, the parameters (or slices of them) that it reads; `others`, what else it reads
    that is no activation: data that no other piece reads, keys; `program`, its operations, whose inputs are
    those arrays of the activation which it reads, `params` and `others`, in this order; `reads`, for each of
    the first the position in the activation and how it is held; `held`, how each of `others` is; `returns`,
    of each array of the next activation: `("x", i)`, the `i`-th of this one, or `("plain" | "bits", j)`, the
    `j`-th result; `known`, the layer that it is, whose rules it has and which is executed in place of the
    operations; `why`, if there is none, the reason."""

    params: tuple[Any, ...]
    others: tuple[Any, ...]
    program: Program = static()
    reads: tuple[tuple[int, str], ...] = static()
    held: tuple[str, ...] = static()
    returns: tuple[tuple[str, int], ...] = static()
    label: Label = static()
    known: Known | None = static(default=None)
    why: Label = static(default=Label(""))

    def __call__(self, x: tuple[Any, ...]) -> tuple[Any, ...]:
        """The next activation."""
        if self.known is None:
            return self.as_written(x)
        return self.known.after(x, self.layer()(self.known.taken(x)))

    def as_written(self, x: tuple[Any, ...]) -> tuple[Any, ...]:
        """The next activation, by the function's own operations."""
        given = [(x[i], how) for i, how in self.reads]
        given += [(leaf, PLAIN) for leaf in self.params]
        given += list(zip(self.others, self.held))
        args = [taken(leaf, how, aval) for (leaf, how), aval in zip(given, self.program.in_avals)]
        made = self.program(*args)
        return tuple(x[i] if how == "x" else given_out(made[i], how) for how, i in self.returns)

    def layer(self, params: Sequence[Any] | None = None) -> Any:
        """The layer that the piece is, with its own parameters, or with others."""
        assert self.known is not None
        first = len(self.reads)
        env = dict(enumerate(self.params if params is None else params, first))
        held = zip(self.others, self.held, self.program.in_avals[first + len(self.params) :])
        env.update(enumerate((taken(*one) for one in held), first + len(self.params)))
        return self.known.layer(env, steps_for(self.program, self.known.values))

    def shown_name(self) -> str:
        """What it is called in tables."""
        if self.known is None:
            return "Piece"
        return layer_name(jax.tree.unflatten(self.known.treedef, self.known.leaves))

    def reason(self) -> str:
        """Why it is not known to be a layer."""
        return str(self.why)


def taken(leaf: Any, how: str, aval: Any) -> Any:
    """The array that is held so."""
    if how == STOPPED:
        return jax.lax.stop_gradient(leaf)
    return from_bits(leaf, aval.dtype) if how == BITS else leaf


def given_out(leaf: Any, how: str) -> Any:
    """An array, to be held so."""
    return to_bits(leaf) if how == BITS else leaf


def to_bits(numbers: Any) -> Any:
    """Floating-point numbers as unsigned integers of the same bits; of complex ones the parts on a last
    axis."""
    if jnp.iscomplexobj(numbers):
        numbers = jnp.stack([numbers.real, numbers.imag], -1)
    kind = f"uint{jnp.finfo(numbers.dtype).bits}"
    return jax.lax.bitcast_convert_type(jax.lax.stop_gradient(numbers), kind)


def from_bits(bits: Any, dtype: Any) -> Any:
    """What `to_bits` was given."""
    if not jnp.issubdtype(dtype, jnp.complexfloating):
        return jax.lax.bitcast_convert_type(bits, dtype)
    parts = jax.lax.bitcast_convert_type(bits, jnp.finfo(dtype).dtype)
    return jax.lax.complex(parts[..., 0], parts[..., 1])


def held_as(aval: Any, carries: bool) -> str:
    """How an array that crosses cuts is held."""
    return PLAIN if carries or not trees.is_inexact(aval) else BITS
