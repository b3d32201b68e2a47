"""The network as the planner sees it: a chain of layers."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import traceback
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from mwplan.common import trees
from mwplan.common.errors import ChainError
from mwplan.network.layer import layer, static
from mwplan.network.purity import CLOSED, closes_over, traced
from mwplan.network.tying import warn_if_tied
from mwplan.network.wrapping import Wrapper, hidden

PyTree = Any


@layer
class Function:
    """A function without parameters as a layer. Its identity is part of the chain's structure."""

    function: Callable[[Any], Any] = static()

    def __call__(self, x: PyTree) -> PyTree:
        """Applies the function."""
        return self.function(x)


@layer
class Partitioned(Wrapper):
    """A callable pytree with leaves that are not arrays (functions, Python scalars), made fit for `jax.jit`.

    The arrays are the leaves; the rest is structure, and must be hashable. It has the rules and the
    attributes of what was taken apart.
    """

    arrays: list[Any]
    rest: tuple[Any, ...] = static()
    treedef: Any = static()

    def whole(self) -> PyTree:
        """The layer that was taken apart."""
        arrays = iter(self.arrays)
        leaves = [next(arrays) if leaf is _ARRAY else leaf for leaf in self.rest]
        return jax.tree.unflatten(self.treedef, leaves)


class _Array:
    def __repr__(self) -> str:
        return "array"


_ARRAY = _Array()

#: What stands in a chain for JAX's own activations; `mwplan.layers.standard` fills it.
STANDARD: dict[Callable[..., Any], Any] = {}


def as_layer(candidate: Any, position: int) -> Any:
    """`candidate` as a layer: itself, or wrapped so that all its leaves are arrays; JAX's own activations as
    the layers that they are (`mwplan.layers.standard`).

    Raises `ChainError` where it cannot be called.
    """
    if not callable(candidate):
        raise ChainError(
            f"`layers[{position}]` is {candidate!r}, which is not callable: give a function or a pytree with "
            "`__call__`"
        )
    if any(
        cls.__name__ == "Module" and cls.__module__.startswith("flax.") for cls in type(candidate).__mro__
    ):
        raise ChainError(
            f"`layers[{position}]` ({type(candidate).__name__}) is a Flax module: give "
            "`mwplan.adapters.flax.from_linen(module, variables)` or `from_nnx(module)`"
        )
    if (module := hidden(candidate)) is not None:
        raise ChainError(
            f"`layers[{position}]` is a function of a {type(module).__name__} whose weights are hidden: "
            "nothing would be trained. Give a pytree: `eqx.filter_vmap(module)` for `jax.vmap(module)`, the "
            "module itself for `jax.jit(module)`, `jax.tree_util.Partial(...)` for `functools.partial(...)`; "
            "or, if that is what is meant, a function that calls `mw.frozen(module)`"
        )
    leaves, treedef = jax.tree.flatten(candidate)
    if all(trees.is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
        return candidate
    if jax.tree_util.treedef_is_leaf(treedef):
        known = isinstance(candidate, Hashable) and candidate in STANDARD
        return STANDARD[candidate] if known else Function(candidate)
    rest = tuple(_ARRAY if trees.is_array(leaf) else leaf for leaf in leaves)
    try:
        hash(rest)
    except TypeError as error:
        raise ChainError(
            f"`layers[{position}]` ({type(candidate).__name__}) has leaves that are neither arrays nor "
            f"hashable: {error}"
        ) from error
    return Partitioned([leaf for leaf in leaves if trees.is_array(leaf)], rest, treedef)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Stack:
    """A block of layers repeated `depth` times, each with weights of its own, stacked along a leading axis.

    In a chain it counts as `depth * len(block)` layers, and a schedule treats each as it likes; where it
    treats repetitions alike they are compiled once, as one `lax.scan`. The block must return what it takes:
    the same shapes and dtypes.

    **Attributes:** `block`, a tuple of layers whose leaves all have a leading axis of length `depth`;
    `depth`.

    >>> layers = [mw.layers.Dense.init(jax.random.key(i), 8, 8) for i in range(3)]
    >>> net = mw.stack(mw.Chain(layers), jnp.ones(8))
    >>> (stack,) = net.parts
    >>> stack.depth, stack.block[0].weight.shape, len(net)
    (3, (3, 8, 8), 3)
    """

    block: tuple[Any, ...]
    depth: int = field(metadata={"static": True})

    @classmethod
    def of(cls, block: Any, depth: int) -> Stack:
        """From layers whose leaves are stacked already: one layer, or a sequence of them. Raises
        `ChainError`."""
        parts = tuple(block) if isinstance(block, (list, tuple)) else (block,)
        parts = tuple(as_layer(candidate, i) for i, candidate in enumerate(parts))
        if isinstance(depth, bool) or not isinstance(depth, int) or depth < 1:
            raise ChainError(f"`depth={depth!r}` must be an integer, at least 1")
        if not parts:
            raise ChainError("`block` is empty: a stack repeats at least one layer")
        for path, leaf in jax.tree_util.tree_leaves_with_path(parts):
            if leaf.ndim < 1 or leaf.shape[0] != depth:
                raise ChainError(
                    f"`block{jax.tree_util.keystr(path)}` has shape {list(leaf.shape)}: the leaves of a "
                    "stack need a leading "
                    f"axis of length `depth={depth}`"
                )
        return cls(parts, depth)

    @classmethod
    def init(cls, make: Callable[[Any], Any], key: Any, depth: int) -> Stack:
        """`depth` blocks, each `make(key)` of a key of its own: a layer or a tuple of layers."""
        made = [make(one) for one in jax.random.split(key, depth)]
        blocks = [tuple(one) if isinstance(one, (list, tuple)) else (one,) for one in made]
        return cls.of(jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks), depth)

    def __len__(self) -> int:
        return self.depth * len(self.block)

    def layer(self, repetition: Any, phase: int) -> Any:
        """One layer: `repetition` from 0, concrete or traced, `phase` within the block."""
        return jax.tree.map(lambda leaf: leaf[repetition], self.block[phase])

    def __call__(self, x: PyTree) -> PyTree:
        """Applies the block `depth` times, in a `lax.scan`."""

        def step(value: PyTree, block: tuple[Any, ...]) -> tuple[PyTree, None]:
            return functools.reduce(lambda v, one: one(v), block, value), None

        return jax.lax.scan(step, x, self.block, length=self.depth)[0]

    def unstacked(self) -> list[Any]:
        """The layers, one by one."""
        return [self.layer(i, j) for i in range(self.depth) for j in range(len(self.block))]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a layer of a chain is: which part, and for a stack which `repetition` and `phase` of its
    block."""

    part: int
    repetition: int = 0
    phase: int = 0


@jax.tree_util.register_pytree_with_keys_class
class Chain:
    """A sequence of layers, `x_l = layer_l(x_{l-1})`: a callable pytree like its layers.

    **Arguments:** `layers`, callables from one pytree to another; their inexact-array leaves are the
    parameters. Plain functions are taken as they are, but JAX's own activations (`jax.nn.relu`, `jnp.tanh`,
    ...) as the layers of `mwplan.layers` that compute the same. Layers that hold functions among their leaves
    (as Equinox modules may) are split into arrays and structure, so that a chain can always be an argument of
    a `jax.jit`ted function. A `Stack` among them counts as all the layers that it repeats.

    **Attributes:** `parts`, what it was made of. `len`, indices and iteration see layers, those of stacks one
    by one.

    **Raises:** `ChainError` for an empty chain or a layer that is not callable. **Warns:**
    `TiedWeightsWarning` where one array is two parameters.

    >>> net = mw.Chain([mw.layers.Dense.init(jax.random.key(0), 8, 4), jnp.tanh])
    >>> len(net), net(jnp.ones((2, 8))).shape
    (2, (2, 4))
    """

    parts: tuple[Any, ...]

    def __init__(self, layers: Sequence[Any], *more: Any) -> None:
        if more:
            raise ChainError("`layers` are one argument: a list, `mw.Chain([first, second, ...])`")
        if isinstance(layers, Chain):
            layers = layers.parts
        if callable(layers) or not isinstance(layers, Sequence):
            raise ChainError(f"`layers` must be a sequence of callables, got {type(layers).__name__}")
        if not layers:
            raise ChainError("`layers` is empty: a chain needs at least one layer")
        self.parts = tuple(
            one if isinstance(one, Stack) else as_layer(one, i) for i, one in enumerate(layers)
        )
        warn_if_tied(self.parts)

    @property
    def layers(self) -> tuple[Any, ...]:
        """All layers; those of stacks are cut out of them."""
        if not any(isinstance(part, Stack) for part in self.parts):
            return self.parts
        return tuple(
            one for part in self.parts for one in (part.unstacked() if isinstance(part, Stack) else [part])
        )

    def places(self) -> list[Place]:
        """Where each layer is."""
        out = []
        for i, part in enumerate(self.parts):
            if isinstance(part, Stack):
                out += [Place(i, n, j) for n in range(part.depth) for j in range(len(part.block))]
            else:
                out.append(Place(i))
        return out

    def __call__(self, x: PyTree) -> PyTree:
        """Applies all layers in turn."""
        return functools.reduce(lambda value, one: one(value), self.parts, x)

    def __len__(self) -> int:
        return sum(len(part) if isinstance(part, Stack) else 1 for part in self.parts)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.layers)

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return Chain(self.layers[index])
        if not -len(self) <= index < len(self):
            raise IndexError(f"layer {index} of a chain of {len(self)}")
        index %= len(self)
        for part in self.parts:
            size = len(part) if isinstance(part, Stack) else 1
            if index < size:
                return part.layer(*divmod(index, len(part.block))) if isinstance(part, Stack) else part
            index -= size
        raise AssertionError("unreachable")

    def __repr__(self) -> str:
        names = [
            f"{part.depth}x({' '.join(layer_name(one) for one in part.block)})"
            if isinstance(part, Stack)
            else layer_name(part)
            for part in self.parts
        ]
        return f"Chain({len(self)} layers: {' '.join(names)})"

    def tree_flatten_with_keys(self) -> tuple[Any, None]:
        """The parts are the children."""
        return [(jax.tree_util.SequenceKey(i), one) for i, one in enumerate(self.parts)], None

    @classmethod
    def tree_unflatten(cls, aux: None, children: Sequence[Any]) -> Chain:
        """Rebuilds without checks: children may be anything JAX puts there."""
        self = object.__new__(cls)
        self.parts = tuple(children)
        return self


def stack(chain: Chain, x: PyTree, *, longest_block: int = 8) -> Chain:
    """The same chain with repeated blocks of layers (up to `longest_block` layers long) made into stacks.

    Blocks repeat where structure, parameter shapes and activation shapes do. `x`: arrays or shapes. The
    result's gradients have its structure; schedules fit both. Cost: a copy of the parameters.

    >>> layers = [f for i in range(3) for f in (mw.layers.Dense.init(jax.random.key(i), 8, 8), jnp.tanh)]
    >>> net = mw.stack(mw.Chain(layers), jnp.ones(8))
    >>> len(net.parts), len(net)
    (1, 6)
    """
    structs = boundaries(check_chain(chain), x)
    layers = chain.layers
    # The structure itself too: two functions may have one signature.
    keys = [
        (jax.tree.structure(one), text, str(structs[i]))
        for i, (one, text) in enumerate(zip(layers, signatures(chain)))
    ]
    parts: list[Any] = []
    for start, period, count in repeats(keys, longest_block):
        block = layers[start : start + period * count]
        if count > 1 and str(structs[start]) == str(structs[start + period]):
            rows = [tuple(block[k * period : (k + 1) * period]) for k in range(count)]
            parts.append(Stack(jax.tree.map(_stacked, *rows), count))
        else:
            parts += block
    return Chain.tree_unflatten(None, parts)


def _stacked(*leaves: Any) -> Any:
    """Arrays, or shapes, with a new leading axis."""
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
        return trees.struct_of(leaves[0], (len(leaves), *leaves[0].shape))
    return trees.typed_like(jnp.stack(leaves), leaves[0])


def unstack(chain: Chain) -> Chain:
    """The same chain with every layer by itself.

    >>> net = mw.stack(mw.Chain([jnp.tanh] * 3), jnp.ones(8))
    >>> len(mw.unstack(net).parts)
    3
    """
    return Chain.tree_unflatten(None, chain.layers)


def repeats(keys: Sequence[Hashable], longest: int = 8) -> Iterator[tuple[int, int, int]]:
    """Cuts a sequence into stretches `(start, period, count)`: `count` times the same `period` keys.

    Greedy, from the left: the stretch that covers most, of the shortest period; what repeats nowhere comes as
    `(start, 1, 1)`.
    """
    at = 0
    while at < len(keys):
        best = (1, 1)
        for period in range(1, min(longest, (len(keys) - at) // 2) + 1):
            same = 0
            while at + period + same < len(keys) and keys[at + same] == keys[at + period + same]:
                same += 1
            count = 1 + same // period
            if count > 1 and count * period > best[0] * best[1]:
                best = period, count
        yield at, *best
        at += best[0] * best[1]


def layer_name(one: Any) -> str:
    """What a layer is called in tables: its class, or its function's name."""
    if isinstance(one, Function):
        return getattr(one.function, "__name__", type(one.function).__name__)
    if isinstance(one, Wrapper):
        return layer_name(one.whole())
    named = getattr(type(one), "shown_name", None)
    return named(one) if callable(named) else type(one).__name__


def check_chain(chain: Any) -> Chain:
    """`chain` if it is one, else `ChainError`."""
    if not isinstance(chain, Chain):
        raise ChainError(
            f"`chain` is a {type(chain).__name__}: make it one with `mw.Chain([...])`, a list of callable "
            "layers"
        )
    return chain


def check_closures(chain: Chain) -> None:
    """Raises `ChainError` where a function among the layers closes over what is being differentiated."""
    for i, part in enumerate(chain.parts):
        if isinstance(part, Function) and closes_over(part.function):
            raise ChainError(f"`layers[{i}]` ({layer_name(part)}) {CLOSED}")


def boundaries(chain: Chain, x: PyTree) -> list[PyTree]:
    """The shapes and dtypes of `x_0 .. x_L`, without computing anything.

    Raises `ChainError` naming the layer that does not accept what it gets, or is not the same each time it is
    traced. **Cost:** two traces of each distinct layer.
    """
    out = [trees.struct(x)]
    known: dict[Hashable, PyTree] = {}
    for part in chain.parts:
        block = one_block(part) if isinstance(part, Stack) else [part]
        inside = [out[-1]]
        for one in block:
            inside.append(_output(one, inside[-1], len(out) + len(inside) - 1, known))
        if isinstance(part, Stack):
            if not _alike(inside[-1], inside[0]):
                raise ChainError(
                    f"the block of the stack at layer {len(out)} takes {_shapes(inside[0])} and returns "
                    f"{_shapes(inside[-1])}: "
                    "what is repeated must return what it takes"
                )
            out += inside[1:] * part.depth
        else:
            out.append(inside[-1])
    return out


def _alike(a: PyTree, b: PyTree) -> bool:
    """Whether two pytrees have the same shapes and dtypes, weak or not."""
    weak = [jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype), tree) for tree in (a, b)]
    return bool(weak[0] == weak[1])


def one_block(part: Stack) -> tuple[Any, ...]:
    """The shapes of one of a stack's blocks."""
    shapes: tuple[Any, ...] = jax.eval_shape(
        lambda block: jax.tree.map(lambda leaf: leaf[0], block), part.block
    )
    return shapes


_BATCH = ". The input is of the whole batch: what takes one example needs `jax.vmap`, `eqx.filter_vmap`"


def _output(one: Any, x: PyTree, position: int, known: dict[Hashable, PyTree]) -> PyTree:
    """The shapes that a layer returns, looked up in `known` where a layer like it is there."""
    leaves, treedef = jax.tree.flatten((one, x))
    key: Hashable = (treedef, tuple(trees.struct_of(a) if trees.is_array(a) else a for a in leaves))
    try:
        if key in known:
            return known[key]
    except TypeError:  # something in the layer cannot be hashed
        key = object()
    where = f"layer {position} ({layer_name(one)})"
    try:
        y, problem = traced(one, x)
    except Exception as error:
        hint = "" if _raised_itself(error) else _BATCH
        raise ChainError(
            f"{where} does not accept its input {_shapes(x)}: {type(error).__name__}: {error}{hint}"
        ) from error
    if problem:
        raise ChainError(f"{where} {problem}")
    # Shapes and dtypes alone: within `jax.shard_map` JAX's structs also say where arrays are.
    y = trees.struct(y)
    if not jax.tree.leaves(y):
        raise ChainError(f"{where} returned no array, but {y!r}: is its `return` missing?")
    known[key] = y
    return y


def _raised_itself(error: Exception) -> bool:
    """Whether an error was raised by a statement of the layer's own, and not by what that called."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    library = f"{os.sep}jax{os.sep}" in last.filename or f"{os.sep}numpy{os.sep}" in last.filename
    return not library and (last.line or "").startswith(("raise", "assert"))


def _shapes(struct: PyTree) -> PyTree:
    return jax.tree.map(lambda a: f"{a.dtype}{list(a.shape)}{' weak' * trees.is_weak(a)}", struct)


_WEAK = " weak"


def layer_signature(one: Any) -> str:
    """A text that two layers share exactly if they have the same structure and the same shapes and types of
    parameters."""
    leaves, treedef = jax.tree.flatten(one)
    shapes = [
        f"{_dtype(leaf)}{list(leaf.shape)}{_WEAK * trees.is_weak(leaf)}"
        if hasattr(leaf, "shape")
        else repr(leaf)
        for leaf in leaves
    ]
    text = f"{type(one).__module__}.{type(one).__qualname__} {treedef} {shapes}"
    return re.sub(r" at 0x[0-9a-f]+", "", text)  # an address differs from one process to the next


def _dtype(leaf: Any) -> Any:
    """As `jax.jit` sees it: NumPy's 64-bit numbers may be of 32."""
    return leaf.dtype if trees.is_key(leaf) else jax.dtypes.canonicalize_dtype(leaf.dtype)


def signatures(chain: Chain) -> list[str]:
    """`layer_signature` of every layer."""
    out = []
    for part in chain.parts:
        if isinstance(part, Stack):
            out += [layer_signature(one) for one in one_block(part)] * part.depth
        else:
            out.append(layer_signature(part))
    return out


def fingerprint(chain: Chain) -> str:
    """Identifies a chain's structure and parameter shapes (not their values, nor the input's shape); stacked
    or not is the same, and so is weakly typed or not: an optimizer's update makes weak parameters strong."""
    text = "\n".join(signatures(chain)).replace(f"{_WEAK}'", "'")
    return hashlib.sha256(text.encode()).hexdigest()[:16]
