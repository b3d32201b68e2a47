"""Pytree helpers: a layer's parameters apart from the rest, sizes in bytes, working precision."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mwplan.common import platforms, tiles


def is_inexact(leaf: Any) -> bool:
    """Whether `leaf` is a floating or complex array, a tracer of one, or a `jax.ShapeDtypeStruct` of one."""
    return hasattr(leaf, "dtype") and hasattr(leaf, "shape") and jnp.issubdtype(leaf.dtype, jnp.inexact)


def is_array(leaf: Any) -> bool:
    """Whether `leaf` is an array (or a tracer) that may be an argument of a compiled function."""
    return isinstance(leaf, (jax.Array, np.ndarray, np.generic))


def is_key(leaf: Any) -> bool:
    """Whether `leaf`, an array or a `jax.ShapeDtypeStruct`, holds typed random keys."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def tie(tree: Any, free: type | tuple[type, ...] = ()) -> Any:
    """The same arrays behind one optimization barrier: none exists for XLA before all of them do. Those in
    nodes of the types `free` stay outside."""
    leaves, treedef = jax.tree.flatten(tree, is_leaf=lambda node: isinstance(node, free))
    index = [i for i, leaf in enumerate(leaves) if is_array(leaf) and not is_float0(leaf)]
    if index:
        for i, leaf in zip(index, jax.lax.optimization_barrier([leaves[i] for i in index])):
            leaves[i] = leaf
    return jax.tree.unflatten(treedef, leaves)


def after(tree: Any, first: Any) -> Any:
    """The same arrays; on TPUs none of them is there before the arrays of `first` are. Random keys are left.

    A barrier would not do: XLA:TPU removes barriers before it orders instructions. Here the arrays depend on
    a number of `first` that is both NaN and finite, as none is. What makes `first` fuses with what reads it
    as it would anyway.
    """
    if platforms.platform() != "tpu":
        return tree
    for leaf in jax.tree.leaves(first):
        if is_inexact(leaf) and leaf.size:
            number = jax.lax.slice(leaf, (0,) * leaf.ndim, (1,) * leaf.ndim).reshape(())
            never = (number != number) & jnp.isfinite(number)
            tree = jax.tree.map(lambda one, never=never: _unless(never, one), tree)
    return tree


def _unless(never: Any, leaf: Any) -> Any:
    """An array, or zeros."""
    if not is_array(leaf) or is_float0(leaf) or is_key(leaf):
        return leaf
    return typed_like(jnp.where(never, jnp.zeros_like(leaf), leaf), leaf)


class PartlyTrained:
    """A node of a pytree that says itself which of its leaves are parameters."""

    def parameter_flags(self) -> list[bool]:
        """Of each leaf, whether it is one."""
        raise NotImplementedError


def parameter_flags(tree: Any) -> list[bool]:
    """Of each leaf of `tree`, whether it is a parameter: an inexact array, unless a `PartlyTrained` node says
    that it is not."""
    flags: list[bool] = []
    for node in jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, PartlyTrained)):
        flags += node.parameter_flags() if isinstance(node, PartlyTrained) else [is_inexact(node)]
    return flags


def parameters(layer: Any) -> list[Any]:
    """The parameters of `layer`, in the order of its leaves: what a gradient is taken of."""
    return [leaf for leaf, flag in zip(jax.tree.leaves(layer), parameter_flags(layer), strict=True) if flag]


def with_parameters(layer: Any, params: list[Any]) -> Any:
    """`layer` with its parameters replaced by `params`, in the order of `parameters`."""
    return map_parameters(layer, params, lambda leaf: leaf)


def only_parameters(tree: Any, params: list[Any]) -> Any:
    """`tree` with `params` for its parameters, and None for all other leaves."""
    return map_parameters(tree, params, lambda leaf: None)


def map_parameters(tree: Any, params: list[Any], other: Callable[[Any], Any]) -> Any:
    """`tree` with `params` for its parameters, and `other(leaf)` for every other leaf."""
    leaves, treedef = jax.tree.flatten(tree)
    new = iter(params)
    flags = parameter_flags(tree)
    return jax.tree.unflatten(
        treedef, [next(new) if f else other(a) for a, f in zip(leaves, flags, strict=True)]
    )


def array_or_shape(leaf: Any) -> Any:
    """`leaf` as a JAX array; a `jax.ShapeDtypeStruct` as it is."""
    return leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jnp.asarray(leaf)


def only_shapes(tree: Any) -> bool:
    """Whether any leaf is a `jax.ShapeDtypeStruct`."""
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree))


def nbytes(tree: Any) -> int:
    """Bytes of all array leaves of `tree` (arrays, tracers or `jax.ShapeDtypeStruct`s) as devices hold them:
    numbers of 4 and of 2 bits share bytes; on TPUs with the padding of tiles (`mwplan.common.tiles`)."""
    total, padded = 0, platforms.platform() == "tpu"
    for leaf in jax.tree.leaves(tree):
        if hasattr(leaf, "dtype") and hasattr(leaf, "shape"):
            each = 8 * leaf.dtype.itemsize if is_key(leaf) else bits(leaf.dtype)
            total += tiles.padded_bytes(leaf.shape, each) if padded else -(-math.prod(leaf.shape) * each // 8)
    return total


def bits(dtype: Any) -> int:
    """Bits that a device needs for one number of `dtype` (no random key); 0 for float0."""
    known = np.dtype(jax.dtypes.canonicalize_dtype(dtype))
    return 0 if known == jax.dtypes.float0 else int(jax.dtypes.itemsize_bits(known))


def struct(tree: Any) -> Any:
    """The same pytree with a `jax.ShapeDtypeStruct` for every array leaf, weakly typed where that is."""
    return jax.tree.map(struct_of, tree)


def struct_of(leaf: Any, shape: tuple[int, ...] | None = None) -> jax.ShapeDtypeStruct:
    """The `jax.ShapeDtypeStruct` of one leaf, or of another `shape`, weakly typed where `leaf` is."""
    return jax.ShapeDtypeStruct(
        jnp.shape(leaf) if shape is None else shape, jnp.result_type(leaf), weak_type=is_weak(leaf)
    )


def is_weak(leaf: Any) -> bool:
    """Whether `leaf`, an array, a number or a `jax.ShapeDtypeStruct`, takes the dtype of what it meets, as
    Python's numbers and `jnp.full(shape, 0.1)` do."""
    kind = leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jax.typeof(leaf)
    return bool(getattr(kind, "weak_type", False))


def typed_like(leaf: Any, like: Any) -> Any:
    """The array `leaf` weakly typed where `like`, of the same dtype, is."""
    return weakened(leaf) if is_weak(like) and not is_weak(leaf) else leaf


def weakened(leaf: Any) -> Any:
    """The array `leaf`, weakly typed (`is_weak`). Costs nothing."""
    dtype = np.dtype(leaf.dtype)
    return jax.lax.convert_element_type_p.bind(leaf, new_dtype=dtype, weak_type=True, sharding=None)


def along(weights: Any, activation: Any) -> Any:
    """`weights` along the last axes of `activation`, as `jax_numpy_rank_promotion="raise"` wants it said."""
    return jnp.expand_dims(weights, range(activation.ndim - weights.ndim))


def working_dtype(dtype: Any) -> Any:
    """The dtype that cotangents have inside a moonwalk run: `dtype`, or float32 where that is wider."""
    return jnp.float32 if bits(dtype) <= 8 else jnp.promote_types(dtype, jnp.float32)


def widen(tree: Any) -> Any:
    """`tree` (arrays or shapes) with its inexact leaves in `working_dtype`: the same object where one is
    already."""

    def one(a: Any) -> Any:
        wide = working_dtype(a.dtype) if is_inexact(a) else None
        if wide is None or a.dtype == wide:
            return a
        return jax.ShapeDtypeStruct(a.shape, wide) if isinstance(a, jax.ShapeDtypeStruct) else a.astype(wide)

    return jax.tree.map(one, tree)


def no_cotangent(leaf: Any) -> Any:
    """What `jax.vjp` has for the cotangent of an array (or its shape) that is no parameter, an integer, a
    mask or random keys: float0 zeros, which have no memory."""
    return np.zeros(jnp.shape(leaf), jax.dtypes.float0)


def as_cotangent(tree: Any, like: Any) -> Any:
    """`tree`, a cotangent of `like`, with `no_cotangent` where `like` has integers, masks or random keys,
    whatever `tree` has there."""
    return jax.tree.map(lambda a, b: a if is_inexact(b) or is_float0(a) else no_cotangent(b), tree, like)


def cast_like(tree: Any, like: Any) -> Any:
    """`as_cotangent`, with each inexact leaf in the dtype of the matching leaf of `like`."""
    return jax.tree.map(
        lambda a, b: a.astype(b.dtype) if is_inexact(b) and a.dtype != b.dtype else a,
        as_cotangent(tree, like),
        like,
    )


def is_float0(leaf: Any) -> bool:
    """Whether a leaf has no memory: it is no argument or result of a compiled program."""
    return getattr(leaf, "dtype", None) == jax.dtypes.float0


def transpose(linear: Callable[[Any], Any], x: Any, ct: Any) -> Any:
    """`ct` through the transpose of `linear`, a function of arrays like the `jax.ShapeDtypeStruct`s of the
    pytree `x`.

    Within `jax.shard_map` such an array varies from device to device as `ct` does: otherwise the transpose
    would sum over the devices.
    """
    axes = varying_axes(ct)
    like = jax.eval_shape(lambda: jax.tree.map(lambda one: vary(jnp.zeros(one.shape, one.dtype), axes), x))
    return jax.linear_transpose(linear, like)(ct)[0]


def varying_axes(tree: Any) -> frozenset[str]:
    """The axes of a surrounding `jax.shard_map` along which any array (or `jax.ShapeDtypeStruct`) of `tree`
    varies from device to device.

    None where JAX does not track it: outside `shard_map`, and with `check_vma=False`.
    """
    found: frozenset[str] = frozenset()
    for leaf in jax.tree.leaves(tree):
        kind = jax.typeof(leaf) if is_array(leaf) else leaf
        # jax 0.11 says `manual_axis_type`, what came before `vma`.
        names = getattr(getattr(kind, "manual_axis_type", None), "varying", None)
        found |= frozenset((getattr(kind, "vma", None) or ()) if names is None else names)
    return found


def vary(tree: Any, axes: frozenset[str]) -> Any:
    """`tree` with every array declared to vary along `axes`, as values that meet in a loop or in a derivative
    must be. Costs nothing."""

    def one(leaf: Any) -> Any:
        missing = tuple(sorted(axes - varying_axes(leaf))) if is_array(leaf) else ()
        if not missing or leaf.dtype == jax.dtypes.float0:
            return leaf
        cast = getattr(jax.lax, "pcast", None)
        if cast is None:  # older than jax 0.9
            return getattr(jax.lax, "pvary")(leaf, missing)  # noqa: B009
        return cast(leaf, missing, to="varying")

    return jax.tree.map(one, tree) if axes else tree


def explicitly_sharded(tree: Any) -> bool:
    """Whether the type of any array of `tree` says how it is sharded: a mesh axis of type `Explicit`."""
    meshes = (
        getattr(getattr(jax.typeof(leaf), "sharding", None), "mesh", None) for leaf in jax.tree.leaves(tree)
    )
    return any(jax.sharding.AxisType.Explicit in (getattr(mesh, "axis_types", None) or ()) for mesh in meshes)
