"""Matchers: what recognises a layer in a stretch of operations, and where one's own is added."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mwplan.common.errors import ArgumentError
from mwplan.functions.stretches import Operation

#: From the last operation of a stretch to the layer that the stretch is, or None.
Matcher = Callable[[Operation], Any]

#: By the name of a stretch's last operation, those that are asked, in order.
MATCHERS: dict[str, list[Matcher]] = {}


def recognises(*last: str) -> Callable[[Matcher], Matcher]:
    """Teaches `mw.cut`, `mw.fit_function`, `mw.vijp` and `mw.explain` to recognise a layer in a function's
    operations: a decorator of a function that matches.

    The function gets the last operation of a stretch that takes one array to one array, an expression: `name`
    (of its primitive, "input", "weight" or "number"), `inputs`, `params`, `shape`, `dtype`. It returns a
    layer that computes the same, a callable pytree with rules (`mwplan.layers.layer`), or None. Where the
    layer has arrays, it has what `operation.weight` or `operation.vector()` give. It is called often: it
    should return None at the first operation that does not fit.

    That the layer computes what the stretch does is checked by numbers before a plan is made
    (`mw.fit_function`); with shapes alone (`mw.estimate`) it is believed.

    **Arguments:** `last`, the names of primitives that such a stretch may end with, as `jax.make_jaxpr`
    prints them. **Returns:** the function. **Raises:** `ArgumentError` where there is no name.

    A scaling of channels, divided by the scale on the way back:

    >>> from mwplan.network.rules import VijpRule
    >>> class Unscale(VijpRule):
    ...     name = "unscale"
    ...     def rebuild(self, layer, x, ct_in, fragment):
    ...         return ct_in / jnp.expand_dims(layer.scale, range(ct_in.ndim - 1))
    >>> @mw.layers.layer
    ... class Scale:
    ...     scale: jax.Array
    ...     def __call__(self, x):
    ...         return x * jnp.expand_dims(self.scale, range(x.ndim - 1))
    ...     def vijp_rules(self, x):
    ...         return [Unscale()]
    >>> @mw.recognises("mul")
    ... def scaling(y):
    ...     for x, w in (y.inputs, y.inputs[::-1]):
    ...         if x.is_input and w.name == "weight" and w.vector() is not None:
    ...             return Scale(w.vector())
    >>> x, w = jnp.ones((5, 3)), jnp.array([1.0, 2.0, 4.0])
    >>> y, vijp_fn = mw.vijp(lambda x: x * w, x)
    >>> vijp_fn(jnp.ones((5, 3)))[0].tolist()
    [1.0, 0.5, 0.25]
    >>> mw.functions.registry.forget(scaling)
    """
    if not last or not all(isinstance(name, str) for name in last):
        raise ArgumentError(
            f"`last={last!r}` must be names of primitives, as in `@mw.recognises('mul', 'div')`"
        )

    def add(matcher: Matcher) -> Matcher:
        for name in last:
            MATCHERS.setdefault(name, []).append(matcher)
        return matcher

    return add


def forget(matcher: Matcher) -> None:
    """Undoes `recognises`."""
    for some in MATCHERS.values():
        while matcher in some:
            some.remove(matcher)
