"""Flax modules as layers: parameters become leaves, code becomes structure. Needs the `flax` extra for
`from_nnx`.

Variables that are no parameters (the running averages of a BatchNorm) are leaves too, but held as integers of
the same bits: they have no gradient, and no optimizer touches them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from mwplan.common import trees
from mwplan.common.errors import ArgumentError
from mwplan.network.layer import layer, static

__all__ = ["NNX", "Fixed", "Linen", "from_linen", "from_nnx"]

PyTree = Any


@layer
class Fixed:
    """An array of floating-point numbers that is no parameter.

    >>> fixed = flax.Fixed.of(jnp.ones(2))
    >>> fixed.bits.dtype, fixed.value.dtype
    (dtype('uint32'), dtype('float32'))
    """

    bits: Any
    dtype: str = static()
    weak: bool = static(default=False)

    @classmethod
    def of(cls, numbers: Any) -> Fixed:
        """From an array, or its shape; of complex numbers the parts on a last axis."""
        if isinstance(numbers, jax.ShapeDtypeStruct):
            shaped: Fixed = jax.eval_shape(cls.of, numbers)
            return shaped
        parts = jnp.stack([numbers.real, numbers.imag], -1) if jnp.iscomplexobj(numbers) else numbers
        bits = jax.lax.bitcast_convert_type(parts, f"uint{trees.bits(parts.dtype)}")
        return cls(bits, jnp.dtype(numbers.dtype).name, trees.is_weak(numbers))

    @property
    def value(self) -> Any:
        """The numbers."""
        if not self.dtype.startswith("complex"):
            numbers = jax.lax.bitcast_convert_type(self.bits, self.dtype)
        else:
            half = f"float{int(self.dtype.removeprefix('complex')) // 2}"
            parts = jax.lax.bitcast_convert_type(self.bits, half)
            numbers = jax.lax.complex(parts[..., 0], parts[..., 1])
        return trees.weakened(numbers) if self.weak else numbers


def _fix(tree: PyTree) -> PyTree:
    """`tree` without parameters."""
    return jax.tree.map(lambda leaf: Fixed.of(leaf) if trees.is_inexact(leaf) else leaf, tree)


def _restored(tree: PyTree) -> PyTree:
    """What `_fix` was given."""
    return jax.tree.map(
        lambda leaf: leaf.value if isinstance(leaf, Fixed) else leaf,
        tree,
        is_leaf=lambda leaf: isinstance(leaf, Fixed),
    )


@layer
class Linen:
    """A Flax Linen module with its variables; `y = module.apply(variables, x, rngs=rngs, **options)`.

    Variables that `apply` would change (batch statistics) are read, not updated; those of the collection
    "params" alone are parameters.

    >>> from flax import linen
    >>> module = linen.Dense(4)
    >>> layer = flax.from_linen(module, module.init(jax.random.key(0), jnp.ones((2, 8))))
    >>> sorted(layer.variables["params"])
    ['bias', 'kernel']
    """

    params: PyTree
    others: PyTree
    rngs: PyTree = None
    module: Any = static(default=None)
    options: tuple[tuple[str, Any], ...] = static(default=())

    @property
    def variables(self) -> dict[str, PyTree]:
        """All of them, as `module.init` returns them."""
        others: dict[str, PyTree] = _restored(self.others)
        return {"params": self.params} | others if self.params else others

    def __call__(self, x: PyTree) -> PyTree:
        """Applies the module."""
        more = {} if self.rngs is None else {"rngs": self.rngs}
        return self.module.apply(self.variables, x, **more, **dict(self.options))


def from_linen(module: Any, variables: PyTree, *, rngs: PyTree = None, **options: Any) -> Linen:
    """`module` (hashable, as Linen modules are) with `variables`, as from `module.init(key, x)`.

    **Arguments:** `rngs`, random keys by name, as `module.apply` takes them: leaves of the layer, so that
    other keys (`dataclasses.replace(layer, rngs=...)`) need no new plan and no new compilation; `options` go
    to every call and are part of the structure: True, False, numbers, texts. **Raises:** `ArgumentError` for
    an array among them.

    >>> from flax import linen
    >>> module = linen.Dense(4)
    >>> layer = flax.from_linen(module, module.init(jax.random.key(0), jnp.ones((2, 8))))
    >>> layer(jnp.ones((2, 8))).shape
    (2, 4)
    """
    for name, value in options.items():
        if any(map(trees.is_array, jax.tree.leaves(value))):
            raise ArgumentError(
                f"`{name}` holds arrays, and options are structure: keys go into `rngs`, other arrays into "
                "the activation"
            )
    others = {name: tree for name, tree in variables.items() if name != "params"}
    # A name says where a module stands in another: blocks that differ in nothing else are equal here.
    module = module.clone(name=None, parent=None)
    return Linen(variables.get("params", {}), _fix(others), rngs, module, tuple(sorted(options.items())))


@layer
class NNX:
    """A Flax NNX module, split into its graph and its state.

    A call merges them into a copy of the module, and what it changes is dropped with the copy: the counters
    of random streams; other state only where `drop_state` says so, else the call raises `ArgumentError`.

    `params`: its state of `nnx.Param`; `others`: all other state, which is no parameter.

    >>> from flax import nnx
    >>> layer = flax.from_nnx(nnx.Linear(8, 4, rngs=nnx.Rngs(0)))
    >>> type(layer.module()).__name__
    'Linear'
    """

    params: PyTree
    others: PyTree
    graph: Any = static()
    drop_state: bool = static(default=False)

    def module(self) -> Any:
        """A copy of the module, with the parameters as they are."""
        from flax import nnx

        return nnx.merge(self.graph, _copied(self.params), _restored(_copied(self.others)))

    def __call__(self, x: PyTree) -> PyTree:
        """Applies the module."""
        module = self.module()
        before = _state(module)
        y = module(x)
        changed = [path for path, value in _state(module).items() if value is not before.get(path, value)]
        if changed and not self.drop_state:
            names = ", ".join(f"`{'.'.join(map(str, path))}`" for path in changed[:4])
            raise ArgumentError(
                f"a call of {type(module).__name__} changes its state ({names}), which a layer of a chain "
                "cannot hand back: running averages would stay as they are. Use `mw.fit_function(loss, "
                "params, ...)` with `has_aux=True` and a loss that returns the new state, which plans the "
                "module as it is; or fix the state (`module.eval()`, `use_running_average=True`); or, if "
                "what changes is not wanted, `from_nnx(module, drop_state=True)`"
            )
        return y


def from_nnx(module: Any, *, drop_state: bool = False) -> NNX:
    """`module` as a layer: its state are the leaves, and `module` stays as it is.

    **Arguments:** `drop_state`: whether changes that a call makes to the state (the batch statistics of a
    BatchNorm) are dropped. Those of the counters of random streams always are: two calls agree, and Dropout
    draws the same mask in each. For a new mask in each step, make the layer again from a module with other
    `rngs`; no new plan is needed.
    **Raises:** `ArgumentError`, where the layer is called (or planned), if a call changes state that is not
    to be dropped.

    >>> from flax import nnx
    >>> layer = flax.from_nnx(nnx.Linear(8, 4, rngs=nnx.Rngs(0)))
    >>> layer(jnp.ones((2, 8))).shape
    (2, 4)
    """
    from flax import nnx

    graph, params, others = nnx.split(module, nnx.Param, ...)  # type: ignore[misc]
    return NNX(_copied(params), _fix(_copied(others)), graph, drop_state)


def _state(module: Any) -> dict[Any, Any]:
    """The arrays of a module's state by their paths, but for those of random streams."""
    from flax import nnx

    flat = nnx.to_flat_state(nnx.state(module))
    return {path: one.get_value() for path, one in flat if not isinstance(one, nnx.RngState)}


def _copied(state: PyTree) -> PyTree:
    """The same arrays in new variables: a merged module writes into the variables that it was given."""
    return jax.tree.map(lambda leaf: leaf, state)
