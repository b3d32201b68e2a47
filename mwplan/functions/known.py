"""A piece that is known to be a layer of `mwplan.layers`: that layer's rules, for the piece's activation.

The layer takes one array of the tuple that crosses the cut, or two, and makes as many; the others pass by.
Its weights are made of what the piece holds: reshaped, transposed, computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mwplan.common import trees
from mwplan.functions.programs import Program, evaluate
from mwplan.functions.recognition import of
from mwplan.functions.stretches import Weight
from mwplan.functions.tracing import Step
from mwplan.network import rules
from mwplan.network.rules import Unavailable
from mwplan.network.wrapping import InvertOf, StoreOf, VijpOf

PyTree = Any


@dataclass(frozen=True)
class Known:
    """What a piece is: `treedef` and `leaves` of the layer, whose `Weight`s have the numbers of the piece's
    program; `inputs`, the positions in the activation of what it takes, `results`, of what it makes in the
    next; `passing`, of each array of the next activation the position in this one, or -1."""

    treedef: Any
    leaves: tuple[Any, ...]
    inputs: tuple[int, ...]
    results: tuple[int, ...]
    passing: tuple[int, ...]

    def layer(self, env: Mapping[int, Any], steps: Sequence[Step]) -> Any:
        """The layer, of the values in `env`."""
        values = dict(env)
        evaluate(steps, values, ())
        leaves = [leaf.array(values) if isinstance(leaf, Weight) else leaf for leaf in self.leaves]
        return jax.tree.unflatten(self.treedef, leaves)

    @property
    def values(self) -> list[int]:
        """The values that its weights are."""
        return [leaf.value for leaf in self.leaves if isinstance(leaf, Weight) and leaf.value is not None]

    def taken(self, x: PyTree) -> Any:
        """What the layer takes of the activation, or of its cotangent."""
        return of([x[i] for i in self.inputs])

    def made(self, y: PyTree) -> Any:
        """What the layer makes in the next activation, or its cotangent."""
        return of([y[i] for i in self.results])

    def after(self, x: PyTree, made: Any) -> tuple[Any, ...]:
        """The next activation (or cotangent), of this one and of what the layer makes."""
        parts = dict(zip(self.results, (made,) if len(self.results) == 1 else made))
        return tuple(parts[i] if i in parts else x[at] for i, at in enumerate(self.passing))

    def before(self, y: PyTree, taken: Any, missing: Mapping[int, Any]) -> tuple[Any, ...]:
        """This activation (or cotangent), of the next one, of what the layer takes, and of what the next one
        lacks."""
        parts = dict(missing) | dict(zip(self.inputs, (taken,) if len(self.inputs) == 1 else taken))
        parts |= {at: y[i] for i, at in enumerate(self.passing) if at >= 0}
        return tuple(parts[i] for i in range(len(parts)))

    def lost(self, count: int) -> list[int]:
        """The positions of `count` arrays that the next activation lacks, and the layer does not take."""
        return [i for i in range(count) if i not in self.inputs and i not in self.passing]


def steps_for(program: Program, values: Sequence[int]) -> tuple[Step, ...]:
    """The operations of a program that make these of its values."""
    wanted, found = {*values}, []
    for step in reversed(program.steps):
        if not wanted.isdisjoint(step.outputs):
            found.append(step)
            wanted.update(step.read)
    return tuple(reversed(found))


class KnownPiece:
    """A piece with `known`: the rules of the layer that it is."""

    known: Known | None
    params: tuple[Any, ...]

    def layer(self, params: Sequence[Any] | None = None) -> Any:
        """The layer that the piece is, with its own parameters, or with others."""
        raise NotImplementedError

    def vijp_rules(self, x: PyTree) -> Sequence[Any]:
        """Those of the layer; where there is none, the reason."""
        if self.known is None:
            return [Unavailable("vijp", f"not recognised: {self.reason()}")]
        return [_in_piece(one, VijpInPiece) for one in _found(self, x, "vijp_rules")]

    def store_rules(self, x: PyTree) -> Sequence[Any]:
        """Those of the layer."""
        return [one if one in rules.SMALLER else StoreInPiece(one) for one in _found(self, x, "store_rules")]

    def invert_rules(self, x: PyTree) -> Sequence[Any]:
        """Those of the layer."""
        found = _found(self, x, "invert_rules")
        if found and self.known is not None and self.known.lost(len(x)):
            return [
                Unavailable(one.name, "its input has arrays that its output does not hand on")
                for one in found
            ]
        return [_in_piece(one, InvertInPiece) for one in found]

    def reason(self) -> str:
        """Why the piece is not known."""
        raise NotImplementedError


def _found(piece: KnownPiece, x: PyTree, method: str) -> Sequence[Any]:
    """The layer's rules, asked with shapes."""
    if piece.known is None:
        return ()
    layer = jax.eval_shape(lambda params: piece.layer(params), piece.params)
    find = getattr(layer, method, None)
    if not callable(find):
        return ()
    got: list[Any] = []
    taken = piece.known.taken(x)
    jax.eval_shape(lambda layer: got.extend(getattr(layer, method)(taken)), layer)
    return got


def _in_piece(one: Any, adapter: Any) -> Any:
    return one if isinstance(one, Unavailable) else adapter(one)


@dataclass(frozen=True)
class StoreInPiece(StoreOf):
    """A rule of the layer that a piece is."""

    def forward(self, layer: Any, x: PyTree) -> tuple[PyTree, PyTree]:
        """As there."""
        made, kept = self.base.forward(layer.layer(), layer.known.taken(x))
        return layer.known.after(x, made), (kept, _shapes_of_lost(layer, x))

    def backward(self, layer: Any, residuals: PyTree, ct_out: PyTree) -> tuple[list[Any], PyTree]:
        """As there, the gradients those of the piece's parameters."""
        kept, lost = residuals
        grads, taken = self.base.backward(layer.layer(), kept, layer.known.made(ct_out))
        return pulled(layer, grads), layer.known.before(ct_out, taken, _zeros(lost))


@dataclass(frozen=True)
class VijpInPiece(VijpOf):
    """A rule of the layer that a piece is."""

    def check(self, layer: Any, x: PyTree) -> str | None:
        """As there."""
        return self.base.check(layer.layer(), layer.known.taken(x))

    def forward(self, layer: Any, x: PyTree) -> tuple[PyTree, PyTree]:
        """As there."""
        made, kept = self.base.forward(layer.layer(), layer.known.taken(x))
        return layer.known.after(x, made), (kept, _shapes_of_lost(layer, x))

    def reverse(self, layer: Any, residuals: PyTree, ct_out: PyTree) -> tuple[PyTree, PyTree]:
        """As there; the cotangents of what passes by are handed on."""
        (kept, lost), ct_out = residuals, trees.widen(ct_out)
        taken, fragment = self.base.reverse(layer.layer(), kept, layer.known.made(ct_out))
        return layer.known.before(ct_out, taken, _zeros(lost)), fragment

    def rebuild(self, layer: Any, x: PyTree, ct_in: PyTree, fragment: PyTree) -> PyTree:
        """As there; the cotangents of what passes by are handed on."""
        known = layer.known
        made = self.base.rebuild(layer.layer(), known.taken(x), known.taken(ct_in), fragment)
        return known.after(ct_in, made)


@dataclass(frozen=True)
class InvertInPiece(InvertOf):
    """A rule of the layer that a piece is."""

    def check(self, layer: Any, x: PyTree) -> str | None:
        """As there."""
        return self.base.check(layer.layer(), layer.known.taken(x))

    def forward(self, layer: Any, x: PyTree) -> tuple[PyTree, PyTree]:
        """As there."""
        made, kept = self.base.forward(layer.layer(), layer.known.taken(x))
        return layer.known.after(x, made), kept

    def inverse(self, layer: Any, y: PyTree, kept: PyTree) -> PyTree:
        """As there; what passes by is handed back."""
        return layer.known.before(y, self.base.inverse(layer.layer(), layer.known.made(y), kept), {})

    def backward(
        self, layer: Any, y: PyTree, kept: PyTree, ct_out: PyTree
    ) -> tuple[PyTree, list[Any], PyTree]:
        """As there, the gradients those of the piece's parameters."""
        known = layer.known
        if type(self.base).backward is rules.InvertRule.backward:
            return super().backward(layer, y, kept, ct_out)
        x, grads, ct_in = self.base.backward(layer.layer(), known.made(y), kept, known.made(ct_out))
        return known.before(y, x, {}), pulled(layer, grads), known.before(ct_out, ct_in, {})


def pulled(piece: Any, grads: list[Any]) -> list[Any]:
    """Gradients of the parameters of the layer that a piece is, as those of the piece's."""
    if not piece.params:
        return []
    like, pull = jax.vjp(lambda params: trees.parameters(piece.layer(params)), piece.params)
    found: tuple[Any, ...] = pull([g.astype(a.dtype) for g, a in zip(grads, like, strict=True)])[0]
    return list(found)


@jax.tree_util.register_static
@dataclass(frozen=True)
class _Lost:
    """Arrays that a piece is given and does not hand on: position, shape, dtype ("" if not floating)."""

    shapes: tuple[tuple[int, tuple[int, ...], str], ...]


def _shapes_of_lost(piece: Any, x: PyTree) -> _Lost:
    return _Lost(
        tuple(
            (i, tuple(x[i].shape), str(x[i].dtype) if trees.is_inexact(x[i]) else "")
            for i in piece.known.lost(len(x))
        )
    )


def _zeros(lost: _Lost) -> dict[int, Any]:
    """No cotangents."""
    return {
        i: jnp.zeros(shape, trees.working_dtype(dtype)) if dtype else np.zeros(shape, jax.dtypes.float0)
        for i, shape, dtype in lost.shapes
    }
