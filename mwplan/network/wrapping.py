"""Layers around another layer: what that one can do, they can do.

A wrapper's rules are those of the layer within, called with it. Here: `frozen`, a layer whose weights are
not trained.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from mwplan.common import trees
from mwplan.common.errors import ArgumentError
from mwplan.network import rules
from mwplan.network.layer import layer, static

PyTree = Any


class Wrapper:
    """A layer around another, `whole()`, whose rules and attributes it has."""

    def whole(self) -> Any:
        """The layer within."""
        raise NotImplementedError

    def within(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(*args)`, where the layer within may be called."""
        return function(*args)

    def trained(self, grads: list[Any]) -> list[Any]:
        """Of the gradients of the parameters of `whole()`, those of the wrapper's own."""
        return grads

    def __call__(self, x: PyTree) -> PyTree:
        """Applies the layer."""
        return self.within(self.whole(), x)

    def __getattr__(self, name: str) -> Any:
        # What the wrapper has itself is found before. Python asks for names like `__setstate__` while there
        # is nothing yet; and what makes a layer anew would take it out of the wrapper.
        if name.startswith("__") or name in ("refresh", "with_basis"):
            raise AttributeError(name)
        return getattr(object.__getattribute__(self, "whole")(), name)

    def vijp_rules(self, x: PyTree) -> Sequence[Any]:
        """Those of the layer within."""
        return _adapted(self, x, "vijp_rules", ThroughVijp)

    def invert_rules(self, x: PyTree) -> Sequence[Any]:
        """Those of the layer within."""
        return _adapted(self, x, "invert_rules", ThroughInvert)

    def store_rules(self, x: PyTree) -> Sequence[Any]:
        """Those of the layer within, unless they keep what a gradient needs that is not asked for."""
        if len(trees.parameters(self)) < len(trees.parameters(self.whole())):
            return ()
        return _adapted(self, x, "store_rules", ThroughStore)


def _adapted(one: Wrapper, x: PyTree, method: str, adapter: Callable[[Any], Any]) -> list[Any]:
    find = getattr(one.whole(), method, None)
    found = find(x) if callable(find) else ()
    return [rule if isinstance(rule, rules.Unavailable) else adapter(rule) for rule in found]


@dataclass(frozen=True)
class StoreOf(rules.StoreRule):
    """A rule that stands for another, `base`: that of a layer within."""

    base: rules.StoreRule

    @property
    def name(self) -> str:  # type: ignore[override]
        """As there."""
        return self.base.name


@dataclass(frozen=True)
class VijpOf(rules.VijpRule):
    """As `StoreOf`."""

    base: rules.VijpRule

    @property
    def name(self) -> str:  # type: ignore[override]
        """As there."""
        return self.base.name

    @property
    def has_fragment(self) -> bool:  # type: ignore[override]
        """As there."""
        return self.base.has_fragment

    @property
    def any_weights(self) -> bool:  # type: ignore[override]
        """As there."""
        return self.base.any_weights


@dataclass(frozen=True)
class InvertOf(rules.InvertRule):
    """As `StoreOf`."""

    base: rules.InvertRule

    @property
    def name(self) -> str:  # type: ignore[override]
        """As there."""
        return self.base.name

    @property
    def keeps(self) -> bool:  # type: ignore[override]
        """As there."""
        return self.base.keeps


@dataclass(frozen=True)
class ThroughStore(StoreOf):
    """A rule of the layer within."""

    def forward(self, layer: Any, x: PyTree) -> tuple[PyTree, PyTree]:
        """As there."""
        got: tuple[PyTree, PyTree] = layer.within(self.base.forward, layer.whole(), x)
        return got

    def backward(self, layer: Any, residuals: PyTree, ct_out: PyTree) -> tuple[list[Any], PyTree]:
        """As there, the gradients those of the wrapper."""
        grads, ct_in = layer.within(self.base.backward, layer.whole(), residuals, ct_out)
        return layer.trained(grads), ct_in


@dataclass(frozen=True)
class ThroughVijp(VijpOf):
    """A rule of the layer within."""

    def check(self, layer: Any, x: PyTree) -> str | None:
        """As there."""
        return self.base.check(layer.whole(), x)

    def forward(self, layer: Any, x: PyTree) -> tuple[PyTree, PyTree]:
        """As there."""
        got: tuple[PyTree, PyTree] = layer.within(self.base.forward, layer.whole(), x)
        return got

    def reverse(self, layer: Any, residuals: PyTree, ct_out: PyTree) -> tuple[PyTree, PyTree]:
        """As there."""
        got: tuple[PyTree, PyTree] = layer.within(self.base.reverse, layer.whole(), residuals, ct_out)
        return got

    def rebuild(self, layer: Any, x: PyTree, ct_in: PyTree, fragment: PyTree) -> PyTree:
        """As there."""
        return layer.within(self.base.rebuild, layer.whole(), x, ct_in, fragment)


@dataclass(frozen=True)
class ThroughInvert(InvertOf):
    """A rule of the layer within."""

    def check(self, layer: Any, x: PyTree) -> str | None:
        """As there."""
        return self.base.check(layer.whole(), x)

    def forward(self, layer: Any, x: PyTree) -> tuple[PyTree, PyTree]:
        """As there."""
        got: tuple[PyTree, PyTree] = layer.within(self.base.forward, layer.whole(), x)
        return got

    def inverse(self, layer: Any, y: PyTree, kept: PyTree) -> PyTree:
        """As there."""
        return layer.within(self.base.inverse, layer.whole(), y, kept)

    def backward(
        self, layer: Any, y: PyTree, kept: PyTree, ct_out: PyTree
    ) -> tuple[PyTree, list[Any], PyTree]:
        """As there, the gradients those of the wrapper."""
        if type(self.base).backward is rules.InvertRule.backward:
            return super().backward(layer, y, kept, ct_out)
        x, grads, ct_in = layer.within(self.base.backward, layer.whole(), y, kept, ct_out)
        return x, layer.trained(grads), ct_in


@layer
class Frozen(Wrapper, trees.PartlyTrained):
    """A layer some of whose weights, or all, are no parameters; see `frozen`.

    `inner`: the layer; `kept`: which of its leaves are trained all the same.
    """

    inner: Any
    kept: tuple[int, ...] = static(default=())

    def whole(self) -> Any:
        """The layer within, its weights the same arrays."""
        return self.inner

    def parameter_flags(self) -> list[bool]:
        """Of each leaf, whether it is a parameter."""
        flags = trees.parameter_flags(self.inner)
        return [flag and i in self.kept for i, flag in enumerate(flags)]

    def trained(self, grads: list[Any]) -> list[Any]:
        """Those of `kept`."""
        mine = [i in self.kept for i, flag in enumerate(trees.parameter_flags(self.inner)) if flag]
        return [grad for grad, wanted in zip(grads, mine, strict=True) if wanted]

    def __call__(self, x: PyTree) -> PyTree:
        """Applies the layer; `jax.grad` of it gives zeros for what is not trained."""
        leaves, treedef = jax.tree.flatten(self.inner)
        flags = self.parameter_flags()
        leaves = [
            jax.lax.stop_gradient(leaf) if trees.is_inexact(leaf) and not flag else leaf
            for leaf, flag in zip(leaves, flags)
        ]
        return jax.tree.unflatten(treedef, leaves)(x)


def frozen(one: Any, trained: Callable[[Any], PyTree] | None = None) -> Any:
    """`one`, a layer or any callable pytree, with weights that are not trained: nothing is computed, tied or
    kept for their gradients, and none is counted in a profile.

    A layer of a chain, or within one: a low-rank update beside a frozen product is
    `LowRank(base=mw.frozen(dense), a=a, b=b)`. `mw.value_and_grad` has None for what is frozen, and
    `jax.grad` zeros. The layer keeps its rules: vijps and inverses are what they were. Where whole layers at
    a chain's start are frozen, apply them before it: nothing needs the cotangent that goes through them.

    **Arguments:** `one`; `trained`, a function of it that returns the weights that are parameters all the
    same (one array or a pytree of them).
    **Returns:** a layer with the same leaves. **Raises:** `ArgumentError` where it cannot be called, or
    `trained` returns what is no weight of it.

    >>> body, head = (mw.layers.Dense.init(jax.random.key(i), 8, 8) for i in range(2))
    >>> net = mw.Chain([mw.frozen(body), head])
    >>> len(jax.tree.leaves(mw.trainable(net)))  # the head's weight and bias
    2
    >>> net = mw.Chain([mw.frozen(body, trained=lambda dense: dense.bias), head])
    >>> len(jax.tree.leaves(mw.trainable(net)))
    3
    """
    if not callable(one):
        raise ArgumentError(f"`one` is a {type(one).__name__}, which is not callable: give a layer")
    if trained is None:
        return Frozen(one)
    leaves = jax.tree.leaves(one)
    where = {id(leaf): i for i, leaf in enumerate(leaves) if trees.is_inexact(leaf)}
    wanted = jax.tree.leaves(trained(one))
    if not all(id(leaf) in where for leaf in wanted):
        raise ArgumentError(
            f"`trained` returned {len(wanted)} leaves, not all of them weights of {type(one).__name__}: "
            "return those arrays themselves, as in `lambda block: (block.scale, block.bias)`"
        )
    return Frozen(one, tuple(sorted(where[id(leaf)] for leaf in wanted)))


def trainable(tree: PyTree) -> PyTree:
    """`tree` (a chain, say) with None for every leaf that is no parameter: of the structure of
    `mw.value_and_grad`'s gradients, and what an optimizer's `init` and `update` take.

    >>> import optax
    >>> net = mw.Chain([mw.layers.Dense.init(jax.random.key(0), 8, 8), jnp.tanh])
    >>> weights = mw.trainable(net)
    >>> state = optax.adam(1e-3).init(weights)
    >>> len(jax.tree.leaves(weights))
    2
    """
    return trees.only_parameters(tree, trees.parameters(tree))


def hidden(candidate: Any) -> Any:
    """The callable pytree with parameters around which `candidate` is a mere function, or None: what
    `jax.vmap`, `jax.jit`, `functools.partial` or a method bound to it make of a module."""
    while jax.tree_util.treedef_is_leaf(jax.tree.structure(candidate)):
        inner = getattr(candidate, "__wrapped__", None)
        inner = getattr(candidate, "__self__", None) if inner is None else inner
        inner = candidate.func if isinstance(candidate, functools.partial) else inner
        if inner is None or not callable(inner):
            return None
        candidate = inner
        if trees.parameters(candidate):
            return candidate if not trees.is_array(candidate) else None
    return None
