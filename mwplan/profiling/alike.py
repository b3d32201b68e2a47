"""Layers that are the same program, whatever they are called: one measurement is enough for all of them.

Blocks of a network often differ in structure by a static name alone (a field, a prefix for logging), which no
operation sees. So layers of one type, without rules of their own, whose arrays and inputs are of the same
shapes, are compared by their programs: that of the layer, and that of its vjp, in which the rules of
`jax.custom_vjp` and `jax.custom_jvp` have become operations. All options of such layers come of these two.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import jax

from mwplan.common import trees
from mwplan.compilers import digests
from mwplan.network import rules
from mwplan.network.chain import layer_signature

PyTree = Any


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
    """The names of the layer's program and its vjp's; None where these do not tell all: of a layer with rules
    of its own, or one that cannot be traced so or named."""
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
    names = digests.digest(plain), digests.digest(joint)
    return None if None in names else (type(layer), *names)
