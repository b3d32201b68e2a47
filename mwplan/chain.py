"""The network as the planner sees it: a chain of layers."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from mwplan import trees
from mwplan.errors import ChainError
from mwplan.layers.base import layer, static

PyTree = Any


@layer
class Function:
    """A function without parameters as a layer. Its identity is part of the chain's structure."""

    function: Callable[[Any], Any] = static()

    def __call__(self, x: PyTree) -> PyTree:
        """Applies the function."""
        return self.function(x)


@layer
class Partitioned:
    """A callable pytree with leaves that are not arrays (functions, Python scalars), made fit for `jax.jit`.

    The arrays are the leaves; the rest is structure, and must be hashable.
    """

    arrays: list[Any]
    rest: tuple[Any, ...] = static()
    treedef: Any = static()

    def whole(self) -> PyTree:
        """The layer that was taken apart."""
        arrays = iter(self.arrays)
        leaves = [next(arrays) if leaf is _ARRAY else leaf for leaf in self.rest]
        return jax.tree.unflatten(self.treedef, leaves)

    def __call__(self, x: PyTree) -> PyTree:
        """Applies the layer."""
        return self.whole()(x)

    def store_rules(self, x: PyTree) -> Sequence[Any]:
        """None beside the generic one: rules would see this wrapper."""
        return ()


class _Array:
    def __repr__(self) -> str:
        return "array"


_ARRAY = _Array()


def as_layer(candidate: Any, position: int) -> Any:
    """`candidate` as a layer: itself, or wrapped so that all its leaves are arrays.

    Raises `ChainError` where it cannot be called.
    """
    if not callable(candidate):
        raise ChainError(
            f"`layers[{position}]` is {candidate!r}, which is not callable: give a function or a pytree with `__call__`"
        )
    leaves, treedef = jax.tree.flatten(candidate)
    if all(trees.is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
        return candidate
    if jax.tree_util.treedef_is_leaf(treedef):
        return Function(candidate)
    rest = tuple(_ARRAY if trees.is_array(leaf) else leaf for leaf in leaves)
    try:
        hash(rest)
    except TypeError as error:
        raise ChainError(
            f"`layers[{position}]` ({type(candidate).__name__}) has leaves that are neither arrays nor hashable: {error}"
        ) from error
    return Partitioned([leaf for leaf in leaves if trees.is_array(leaf)], rest, treedef)


@jax.tree_util.register_pytree_with_keys_class
class Chain:
    """A sequence of layers, `x_l = layer_l(x_{l-1})`: a callable pytree like its layers.

    **Arguments:** `layers`, callables from one pytree to another; their inexact-array leaves are the parameters. Plain functions
    are taken as they are. Layers that hold functions among their leaves (as Equinox modules may) are split into
    arrays and structure, so that a chain can always be an argument of a `jax.jit`ted function.

    **Raises:** `ChainError` for an empty chain or a layer that is not callable.
    """

    layers: tuple[Any, ...]

    def __init__(self, layers: Sequence[Any]) -> None:
        if isinstance(layers, Chain):
            layers = layers.layers
        if callable(layers) or not isinstance(layers, Sequence):
            raise ChainError(f"`layers` must be a sequence of callables, got {type(layers).__name__}")
        if not layers:
            raise ChainError("`layers` is empty: a chain needs at least one layer")
        self.layers = tuple(as_layer(candidate, i) for i, candidate in enumerate(layers))

    def __call__(self, x: PyTree) -> PyTree:
        """Applies all layers in turn."""
        return functools.reduce(lambda value, one: one(value), self.layers, x)

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.layers)

    def __getitem__(self, index: int) -> Any:
        return self.layers[index]

    def __repr__(self) -> str:
        return f"Chain({len(self)} layers: {' '.join(layer_name(one) for one in self.layers)})"

    def tree_flatten_with_keys(self) -> tuple[Any, None]:
        """The layers are the children."""
        return [(jax.tree_util.SequenceKey(i), one) for i, one in enumerate(self.layers)], None

    @classmethod
    def tree_unflatten(cls, aux: None, children: Sequence[Any]) -> Chain:
        """Rebuilds without checks: children may be anything JAX puts there."""
        self = object.__new__(cls)
        self.layers = tuple(children)
        return self


def layer_name(one: Any) -> str:
    """What a layer is called in tables: its class, or its function's name."""
    if isinstance(one, Function):
        return getattr(one.function, "__name__", type(one.function).__name__)
    if isinstance(one, Partitioned):
        return type(one.whole()).__name__
    return type(one).__name__


def check_chain(chain: Any) -> Chain:
    """`chain` if it is one, else `ChainError`."""
    if not isinstance(chain, Chain):
        raise ChainError(
            f"`chain` is a {type(chain).__name__}: make it one with `mw.Chain([...])`, a list of callable layers"
        )
    return chain


def boundaries(chain: Chain, x: PyTree) -> list[PyTree]:
    """The shapes and dtypes of `x_0 .. x_L`, without computing anything.

    Raises `ChainError` naming the layer that does not accept what it gets.
    """
    out = [trees.struct(x)]
    for i, one in enumerate(chain.layers):
        try:
            out.append(jax.eval_shape(one, out[-1]))
        except Exception as error:
            shapes = jax.tree.map(lambda a: f"{a.dtype}{list(a.shape)}", out[-1])
            raise ChainError(
                f"layer {i + 1} ({layer_name(one)}) does not accept its input {shapes}: {error}"
            ) from error
    return out


def layer_signature(one: Any) -> str:
    """A text that two layers share exactly if they have the same structure and the same shapes of parameters."""
    leaves, treedef = jax.tree.flatten(one)
    shapes = [f"{leaf.dtype}{list(leaf.shape)}" if hasattr(leaf, "shape") else repr(leaf) for leaf in leaves]
    text = f"{type(one).__module__}.{type(one).__qualname__} {treedef} {shapes}"
    return re.sub(r" at 0x[0-9a-f]+", "", text)  # an address differs from one process to the next


def fingerprint(chain: Chain) -> str:
    """Identifies a chain's structure and parameter shapes (not their values, nor the input's shape)."""
    return hashlib.sha256("\n".join(layer_signature(one) for one in chain.layers).encode()).hexdigest()[:16]
