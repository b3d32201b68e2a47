"""Splits what a rule keeps into what is new memory and what is there already, and packs it.

A rule's residuals are a pytree. Each array leaf is one of: a parameter of the layer, its input or its output
(the same object: found by identity at trace time, so nothing is guessed; or a parameter or the input in
another shape), one number throughout whatever the arguments (`jax.vjp` of `jax.nn.relu` keeps zeros as large
as the activation), or new. Only new leaves are held; booleans among them are packed (`mwplan.network.bits`;
XLA stores a bool as a byte). The rest is looked up or made again when the residuals are restored.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun
from jax.interpreters.partial_eval import dce_jaxpr
from jaxtyping import Array

from mwplan.common import trees
from mwplan.network.bits import Packing

PyTree = Any


@dataclass(frozen=True)
class _Spec:
    """Where each leaf comes from: `("own", i)`, `("bits", i, packing)`, `("all", number, shape, dtype)`,
    `("made", program)`, `("layer" | "input" | "output", i)`, or `("layer" | "input", i, shape)` where the
    leaf there has another shape; and the treedef."""

    sources: tuple[tuple[Any, ...], ...]
    treedef: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Residuals:
    """The new leaves of a rule's residuals, and how to find the others."""

    own: list[Any]
    spec: _Spec = field(metadata={"static": True})

    @property
    def keeps_input(self) -> bool:
        """Whether some leaf is the layer's input."""
        return any(s[0] == "input" for s in self.spec.sources)

    @property
    def packs(self) -> bool:
        """Whether some leaf is a mask, packed."""
        return any(s[0] == "bits" for s in self.spec.sources)

    @property
    def keeps_output(self) -> bool:
        """Whether some leaf is the layer's output."""
        return any(s[0] == "output" for s in self.spec.sources)


def split(residuals: PyTree, layer: PyTree, x: PyTree, y: PyTree, origins: Sequence[Any] = ()) -> Residuals:
    """Keeps of `residuals` what is new beside `layer`, `x` and `y`.

    `origins`, if there are any: what `origins` says of each leaf. A leaf that appears twice is kept once.
    Call it where `residuals` was made: identity does not survive a `jit` boundary.
    """
    known: dict[int, tuple[Any, ...]] = {}
    for where, tree in (("output", y), ("input", x), ("layer", layer)):  # later wins: x is y is an input
        known.update({id(leaf): (where, i) for i, leaf in enumerate(jax.tree.leaves(tree))})
    leaves, treedef = jax.tree.flatten(residuals)
    own: list[Any] = []
    sources = []
    for leaf, origin in zip(leaves, origins or [None] * len(leaves), strict=True):
        source = known.get(id(leaf))
        if source is None:
            if isinstance(origin, Reshaped) and id(origin.leaf) in known:
                source = (*known[id(origin.leaf)], jnp.shape(leaf))
            elif isinstance(origin, Made):
                source = ("made", origin)
            elif origin is not None and not isinstance(origin, Reshaped):
                source = ("all", origin, jnp.shape(leaf), jnp.result_type(leaf))
            elif jnp.result_type(leaf) == jnp.bool_ and (packing := Packing.of(jnp.shape(leaf), 2)).worth:
                source = ("bits", len(own), packing)
                own.append(packing.pack(leaf))
            else:
                source = ("own", len(own))
                own.append(leaf)
            known[id(leaf)] = source
        sources.append(source)
    return Residuals(own, _Spec(tuple(sources), treedef))


def restore(held: Residuals, layer: PyTree, x: PyTree, y: PyTree, ct: PyTree = ()) -> PyTree:
    """What `split` took apart. `x` and `y` may be None where no leaf came from them; `ct`, for which what is
    unpacked waits: a TPU's compiler would unpack as soon as it has packed."""
    pools = {"layer": jax.tree.leaves(layer), "input": jax.tree.leaves(x), "output": jax.tree.leaves(y)}
    leaves = []
    for kind, index, *shape in held.spec.sources:
        if kind == "own":
            leaves.append(held.own[index])
        elif kind == "all":
            leaves.append(jnp.full(shape[0], index, shape[1]))
        elif kind == "made":
            leaves.append(index())
        elif kind == "bits":
            (packing,) = shape
            packed = held.own[index] if packing.axis is None else trees.after(held.own[index], ct)
            leaves.append(packing.unpack(packed).astype(jnp.bool_))
        else:
            leaf = pools[kind][index]
            leaves.append(leaf.reshape(shape[0]) if shape else leaf)
    return jax.tree.unflatten(held.spec.treedef, leaves)


_REMEMBERED: list[Any] = []


def remembered(function: Callable[..., Any]) -> Any:
    """`function` with its results remembered until `forget`, which ends each sweep and each profile: a
    structure among its arguments may hold functions."""
    cached = functools.lru_cache(maxsize=512)(function)
    _REMEMBERED.append(cached)
    return cached


def new_bytes(held: Residuals) -> int:
    """Bytes of the new leaves: what holding them costs."""
    return trees.nbytes(held.own)


def forget() -> None:
    """Drops what is `remembered`: functions among it, and the arrays that they close over."""
    for one in _REMEMBERED:
        one.cache_clear()


@dataclass(frozen=True)
class Reshaped:
    """The elements of an argument's `leaf` in their order, in another shape."""

    leaf: Any


@dataclass(frozen=True)
class Made:
    """An array that is the same whatever the arguments, by the few elementwise operations that make it.

    `text` is the program's, and tells it from others: two traces of one function make two objects.
    """

    text: str
    program: ClosedJaxpr = field(compare=False, repr=False)

    def __call__(self) -> Array:
        """The array. A compiler fuses it into what reads it."""
        made: Array = jaxpr_as_fun(self.program)()[0]
        return made


def origins(function: Callable[..., Any], *args: PyTree) -> tuple[Any, ...]:
    """For each leaf of what `function(*args)` returns: the number that all its elements are whatever the
    arrays in `args`, the program that makes it whatever they are (`Made`), the leaf of `args` that it is in
    another shape (`Reshaped`), or None.

    Nothing at all, `()`, where an argument has a part that cannot be hashed, or the same array twice: what is
    returned is then of another structure, which JAX makes without the duplicates. **Cost:** one more trace of
    `function`, once for each structure of `args`.
    """
    leaves, treedef = jax.tree.flatten(args)
    arrays = [id(leaf) for leaf in leaves if trees.is_array(leaf)]
    if len({*arrays}) < len(arrays):
        return ()
    kinds = tuple(trees.struct_of(leaf) if trees.is_array(leaf) else leaf for leaf in leaves)
    try:
        # Types tell 1 from 1.0 and True among the leaves that are no arrays; with `jax_enable_x64` numbers
        # are of other precision.
        found = _origins(function, treedef, kinds, (*map(type, leaves), jnp.result_type(float)))
    except TypeError:
        return ()
    return tuple(Reshaped(leaves[one.leaf]) if isinstance(one, Reshaped) else one for one in found)


@remembered
def _origins(
    function: Callable[..., Any], treedef: Any, kinds: tuple[Any, ...], more: tuple[Any, ...]
) -> tuple[Any, ...]:
    """`origins`, remembered, leaves by their numbers; `more`, what else tells calls apart."""
    where = [i for i, kind in enumerate(kinds) if isinstance(kind, jax.ShapeDtypeStruct)]

    def call(arrays: list[Any]) -> list[Any]:
        given = list(kinds)
        for i, array in zip(where, arrays):
            given[i] = array
        return jax.tree.leaves(function(*jax.tree.unflatten(treedef, given)))

    found = jax.make_jaxpr(call)([kinds[i] for i in where])
    arguments = {var: Reshaped(i) for var, i in zip(found.jaxpr.invars, where)}
    origins = [_origin(found.jaxpr, var, arguments.get) for var in found.jaxpr.outvars]
    return tuple(
        _made(found.jaxpr, var) if origin is None else origin
        for var, origin in zip(found.jaxpr.outvars, origins, strict=True)
    )


#: primitives so cheap that their results are made again rather than kept
_CHEAP = frozenset((
    "iota", "broadcast_in_dim", "reshape", "squeeze", "expand_dims", "transpose", "copy", "stop_gradient",
    "convert_element_type", "eq", "ne", "lt", "le", "gt", "ge", "and", "or", "not", "xor", "select_n", "add",
    "sub", "mul", "neg", "max", "min", "sign", "abs",
))  # fmt: skip


def _made(jaxpr: Jaxpr, var: Any) -> Made | None:
    """The part of a program that makes `var`, if it needs no argument and has `_CHEAP` operations alone."""
    if isinstance(var, Literal):
        return None
    alone, used = dce_jaxpr(jaxpr, [one is var for one in jaxpr.outvars])
    if any(used) or not all(map(_is_cheap, alone.eqns)):
        return None
    read = [*alone.outvars, *(one for eqn in alone.eqns for one in eqn.invars)]
    if not {one for one in read if not isinstance(one, Literal)}.isdisjoint(alone.constvars):
        return None
    program = ClosedJaxpr(alone.replace(constvars=[]), [])
    return Made(str(program), program)


def _is_cheap(eqn: Any) -> bool:
    """Whether an operation may be done again. None may that reads an array of the program's own: that is
    memory, and no part of the program's text."""
    if any(isinstance(one, Literal) and np.ndim(one.val) > 0 for one in eqn.invars):
        return False
    inner = eqn.params.get("jaxpr")
    if eqn.primitive.name in ("jit", "pjit") and isinstance(inner, ClosedJaxpr):
        return not inner.consts and all(map(_is_cheap, inner.jaxpr.eqns))
    return eqn.primitive.name in _CHEAP


#: primitives that leave the elements in their order
_SHAPES = ("copy", "reshape", "squeeze", "expand_dims", "broadcast_in_dim", "stop_gradient")


def _origin(jaxpr: Jaxpr, var: Any, arguments: Callable[[Any], Any]) -> Any:
    """What a variable is, if that is written in the program: a number throughout, or an argument in another
    shape; `arguments`: what the program's own are."""
    if isinstance(var, Literal):
        return np.asarray(var.val).item() if np.ndim(var.val) == 0 else None
    if var in jaxpr.invars:
        return arguments(var)
    for eqn in jaxpr.eqns:
        if var not in eqn.outvars:
            continue
        name = eqn.primitive.name
        if name in (*_SHAPES, "convert_element_type"):
            found = _origin(jaxpr, eqn.invars[0], arguments)
            if isinstance(found, Reshaped):
                before: Any = eqn.invars[0].aval
                alike = name in _SHAPES and before.size == var.aval.size
                return found if alike and eqn.params.get("dimensions") is None else None
            if name in _SHAPES or found is None:
                return found
            return np.asarray(found, eqn.params["new_dtype"]).item()
        inner = eqn.params.get("jaxpr")
        if name in ("jit", "pjit") and isinstance(inner, ClosedJaxpr):

            def given(one: Any, within: Jaxpr = inner.jaxpr, eqn: Any = eqn) -> Any:
                return _origin(jaxpr, eqn.invars[within.invars.index(one)], arguments)

            return _origin(inner.jaxpr, inner.jaxpr.outvars[eqn.outvars.index(var)], given)
    return None
