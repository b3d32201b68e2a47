"""Layers that are the same program, whatever they are called: one measurement is enough for all of them.

Blocks of a network often differ in structure by a static name alone (a field, a prefix for logging), which no
operation sees. So layers of one type, without rules of their own, whose arrays and inputs are of the same
shapes, are compared by their programs: that of the layer, and that of its vjp, in which the rules of
`jax.custom_vjp` and `jax.custom_jvp` have become operations. All options of such layers come of these two.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr

from mwplan.common import trees
from mwplan.network import rules
from mwplan.network.chain import layer_signature

PyTree = Any
_ADDRESS = re.compile(r"0x[0-9a-f]+")


def structures(layers: Sequence[PyTree], structs: Sequence[PyTree]) -> list[Hashable]:
    """For each layer (arrays, or shapes) at its input's shapes a key that two share only if one measurement
    is enough for both. **Cost:** where layers differ in structure alone, a trace of each and of its vjp."""
    kinds: dict[Hashable, set[Hashable]] = {}
    own, rough = [], []
    for one, struct in zip(layers, structs):
        leaves, treedef = jax.tree.flatten(one)
        shapes = tuple(str(trees.struct_of(leaf)) if _shaped(leaf) else repr(leaf) for leaf in leaves)
        own.append((treedef, layer_signature(one)))
        rough.append((type(one), shapes, str(struct)))
        kinds.setdefault(rough[-1], set()).add(own[-1])
    programs: dict[Hashable, Hashable] = {}
    keys: list[Hashable] = []
    for one, struct, structure, kind in zip(layers, structs, own, rough):
        if len(kinds[kind]) == 1:
            keys.append(structure)
            continue
        if (structure, kind) not in programs:
            programs[structure, kind] = _program(one, struct) or structure
        keys.append(programs[structure, kind])
    return keys


def _shaped(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def _program(layer: PyTree, x: PyTree) -> Hashable:
    """The layer's program and its vjp's as texts, with the arrays that they close over; None where that does
    not tell all: of a layer with rules of its own, or one that cannot be traced so."""
    if rules.has_own(layer, x):
        return None
    layer, x = trees.struct(layer), trees.struct(x)

    def both(params: list[Any], inputs: list[Any], ct: PyTree) -> Any:
        def call(params: list[Any], inputs: list[Any]) -> PyTree:
            return trees.parameters(trees.with_parameters(layer, params)(trees.with_parameters(x, inputs)))

        _, vjp = jax.vjp(call, params, inputs)
        return vjp(ct)

    try:
        plain = jax.make_jaxpr(lambda layer, x: layer(x))(layer, x)
        ct = trees.parameters(jax.eval_shape(lambda layer, x: layer(x), layer, x))
        joint = jax.make_jaxpr(both)(trees.parameters(layer), trees.parameters(x), ct)
    except Exception:
        return None
    return (type(layer), *map(_text, (plain, joint)))


def _text(closed: ClosedJaxpr) -> Hashable:
    consts = tuple(_constant(one) for one in closed.consts)
    return _ADDRESS.sub("", str(closed)), consts


def _constant(one: Any) -> Hashable:
    """An array by what it holds, anything else by itself."""
    if isinstance(one, jax.core.Tracer) or not trees.is_array(one):
        return id(one)
    array = np.asarray(jax.random.key_data(one) if trees.is_key(one) else one)
    return array.shape, array.dtype.name, array.tobytes()
