"""What one device of a mesh sees: the figures of a profile are bytes of one device."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np

from mwplan.common import trees

PyTree = Any


def local(tree: PyTree) -> PyTree:
    """A shard of each array of `tree`, on one device; an array that is on one device already is as it was."""
    return jax.tree.map(lambda a: _on_one_device(a.addressable_shards[0].data) if spread(a) else a, tree)


def gathered(tree: PyTree) -> PyTree:
    """`tree` with every array whole on one device. Cost: a copy of what is spread, all of which this process
    must address."""
    return jax.tree.map(lambda a: _on_one_device(a) if spread(a) else a, tree)


def may_be_spread() -> bool:
    """Whether arrays of the program being traced may lie on several devices. Under `jax.jit` nobody can say
    before it is called; within `jax.shard_map` they do not."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and set(mesh.axis_names) == set(mesh.manual_axes):
        return False
    return jax.device_count() > 1


def explicit_mesh(tree: PyTree) -> jax.sharding.AbstractMesh | None:
    """The mesh of arrays whose types say how they are spread over it (axes of `AxisType.Explicit`); None
    where there are none."""
    for leaf in jax.tree.leaves(tree):
        mesh: jax.sharding.AbstractMesh = jax.typeof(leaf).sharding.mesh
        if mesh.explicit_axes:
            return mesh
    return None


def spec(struct: jax.ShapeDtypeStruct) -> jax.sharding.PartitionSpec:
    """How a traced array of that type is spread."""
    return jax.sharding.PartitionSpec() if struct.sharding is None else struct.sharding.spec


def _on_one_device(a: Any) -> Any:
    if trees.is_key(a):
        return jax.random.wrap_key_data(_on_one_device(jax.random.key_data(a)), impl=jax.random.key_impl(a))
    if explicit_mesh(a) is not None:  # the array's type would go on to speak of it
        a = a.addressable_shards[0].data if a.is_fully_replicated else np.asarray(a)
    return jax.device_put(a, jax.local_devices()[0])


def local_bytes(tree: PyTree) -> int:
    """Bytes of the arrays of `tree` (or shapes, of what is whole) on each device."""
    return sum(
        trees.nbytes(jax.ShapeDtypeStruct(shard_shape(leaf), leaf.dtype))
        for leaf in jax.tree.leaves(tree)
        if hasattr(leaf, "shape") and hasattr(leaf, "dtype") and math.prod(leaf.shape)
    )


def shard_shape(leaf: Any) -> tuple[int, ...]:
    """The shape of what one device has of an array."""
    return tuple(leaf.sharding.shard_shape(leaf.shape)) if spread(leaf) else tuple(leaf.shape)


def spread(leaf: Any) -> bool:
    """Whether `leaf` is an array on more devices than one."""
    return isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) > 1
