"""Whether a layer is a function of its input and its leaves alone: its program is traced twice and compared.

A plan traces a layer's function once for each of its sweeps, and JAX does not notice where it does not do
the same each time (a mask drawn by NumPy's generator, a counter in Python): forward and backward would be of
two networks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import CellType
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from mwplan.common import trees

PyTree = Any

CLOSED = (
    "closes over an array that is being differentiated, and a planned step differentiates what it is given: "
    "make it a leaf of the layer (a pytree with `__call__`, or `jax.tree_util.Partial(function, weights)`), "
    "or a part of the activation"
)
IMPURE = (
    "is not the same each time it is traced: {}. A step calls a layer several times, forward and backward, "
    "and must get the same function: draw masks with `jax.random` from a key that is a leaf of the layer or "
    "of its input, and keep counters there"
)


def traced(layer: PyTree, x: PyTree) -> tuple[PyTree, str | None]:
    """The shapes that `layer(x)` returns, and what is wrong with it, if anything is: two traces of it differ,
    or it closes over what is being differentiated.

    `x`: arrays or shapes. What JAX remembers (of a function under `jax.jit`) is the same in all sweeps, and
    here. **Cost:** two traces.
    """
    first, out = _trace(layer, x)
    second, _ = _trace(layer, x)
    if differentiated(first):
        return out, CLOSED
    differs = difference(first, second)
    return out, differs and IMPURE.format(differs)


def differentiated(closed: ClosedJaxpr) -> bool:
    """Whether a program closes over a value that is being differentiated around it."""
    return any(map(is_differentiated, closed.consts))


def is_differentiated(leaf: Any) -> bool:
    """Whether `leaf` is a value that is being differentiated."""
    return type(leaf).__name__ in ("JVPTracer", "LinearizeTracer")


def closes_over(function: Any) -> bool:
    """Whether a plain function has such a value among what it closes over."""
    cells = getattr(function, "__closure__", None) or ()
    held = [cell.cell_contents for cell in cells if cell != CellType()]
    return any(map(is_differentiated, jax.tree.leaves(held)))


def _trace(layer: PyTree, x: PyTree) -> tuple[ClosedJaxpr, PyTree]:
    # A function of its own for each trace, or JAX would remember the first.
    found: tuple[ClosedJaxpr, PyTree] = jax.make_jaxpr(lambda layer, x: layer(x), return_shape=True)(layer, x)
    return found


def difference(first: ClosedJaxpr, second: ClosedJaxpr) -> str | None:
    """In what two programs differ, in words, or None where they are the same."""
    a, b = list(_parts(first.jaxpr)), list(_parts(second.jaxpr))
    if len(a) != len(b):
        return f"one has {len(a)} operations and the other {len(b)}"
    for (name, given, more), (other, others_given, others_more) in zip(a, b):
        if name != other:
            return f"one has `{name}` where the other has `{other}`"
        if more != others_more:
            return f"`{name}` has other parameters"
        for one, another in zip(given, others_given, strict=True):
            if not _same(one, another):
                return f"`{name}` gets another constant"
    for one, another in zip(_constants(first), _constants(second), strict=True):
        if not _same(one, another):
            return f"a constant of shape {list(np.shape(one))} has other values"
    return None


def _parts(jaxpr: Jaxpr) -> Iterator[tuple[str, list[Any], str]]:
    """Of each operation its name, the numbers among its arguments (None for the others) and what else it is
    given."""
    for eqn in jaxpr.eqns:
        inner = [one for value in eqn.params.values() for one in _jaxprs(value)]
        plain = {key: value for key, value in eqn.params.items() if not _jaxprs(value) and _tells(value)}
        shapes = [str(var.aval) for var in (*eqn.invars, *eqn.outvars)]
        given = [var.val if isinstance(var, Literal) else None for var in eqn.invars]
        text = re.sub(r"0x[0-9a-f]+", "", f"{plain} {shapes}")
        yield eqn.primitive.name, given, text
        for one in inner:
            yield from _parts(one.jaxpr if isinstance(one, ClosedJaxpr) else one)


def _tells(value: Any) -> bool:
    """Whether a parameter is data: JAX makes functions, and names of functions, anew at each trace."""
    return isinstance(value, (int, float, bool, tuple, list, np.dtype, np.ndarray, np.generic))


def _constants(closed: ClosedJaxpr) -> list[Any]:
    found = list(closed.consts)
    for eqn in closed.jaxpr.eqns:
        for one in (one for value in eqn.params.values() for one in _jaxprs(value)):
            inner = one if isinstance(one, ClosedJaxpr) else ClosedJaxpr(one, ())
            found += _constants(inner)
    return found


def _jaxprs(value: Any) -> list[Any]:
    several = value if isinstance(value, (tuple, list)) else (value,)
    return [one for one in several if isinstance(one, (ClosedJaxpr, Jaxpr))]


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, jax.core.Tracer) or isinstance(b, jax.core.Tracer):
        return True  # two values of the program around: what they are, nobody knows yet
    if any(hasattr(one, "dtype") and trees.is_key(one) for one in (a, b)):
        a, b = jax.random.key_data(a), jax.random.key_data(b)
    try:
        with jax.ensure_compile_time_eval():
            return bool(np.array_equal(np.asarray(a), np.asarray(b), equal_nan=_may_be_nan(a)))
    except TypeError:  # no array
        return bool(a == b)


def _may_be_nan(a: Any) -> bool:
    return bool(np.issubdtype(np.asarray(a).dtype, np.inexact))
