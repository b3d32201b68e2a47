"""Activations, recognised in operations.

Piecewise linear ones are recognised by what they compute: an expression of products with numbers, sums,
maxima, absolute values and choices by a comparison with zero is homogeneous, so its values at 1 and at -1
say what it is. Where a maximum's branches tie, JAX's derivative is the mean of both, and the layer's one of
them: the check by numbers finds out whether that happens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from mwplan.functions.expressions import computes, expression, names_of
from mwplan.functions.match_linear import joined, part_start
from mwplan.functions.registry import recognises
from mwplan.functions.stretches import Graph, Operation
from mwplan.functions.tracing import Constant, Flat, Operand
from mwplan.layers.activations import GroupSort, LeakyReLU, MaxMin, ReLU
from mwplan.layers.sequential import Sequential
from mwplan.layers.shapes import Permute, Reshape
from mwplan.layers.smooth import Smooth

_ARITHMETIC: dict[str, Callable[..., Any]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "neg": np.negative, "abs": np.abs,
    "max": np.maximum, "min": np.minimum, "gt": np.greater, "ge": np.greater_equal, "lt": np.less,
    "le": np.less_equal, "select_n": lambda which, *cases: cases[int(which)],
}  # fmt: skip
_COMPARED = ("gt", "ge", "lt", "le")
#: Operations at most, of an elementwise expression.
_MOST = 24


def _values(y: Operation, given: Callable[[Operation], float | None]) -> float | None:
    """`y` where inputs are the numbers that `given` says; None where it has operations of another kind."""
    known: dict[int, Any] = {}

    def value(one: Operation, depth: int = 0) -> Any:
        if id(one) not in known:
            known[id(one)] = found(one, depth)
        return known[id(one)]

    def found(one: Operation, depth: int) -> Any:
        number = given(one)
        if number is None and one.is_weight:
            number = one.number
        if number is not None:
            return number
        if one.name not in _ARITHMETIC or depth > _MOST or one.shape != y.shape:
            return None
        read = [value(inner, depth + 1) for inner in one.inputs]
        return None if any(one is None for one in read) else _ARITHMETIC[one.name](*read)

    got = value(y)
    return None if got is None else float(got)


def _homogeneous(y: Operation) -> bool:
    """Whether an elementwise expression is positively homogeneous: linear on either side of zero."""
    degrees: dict[int, int | None] = {}

    def degree(one: Operation) -> int | None:
        """1, or 0 for what only depends on the sign; None for everything else."""
        if id(one) not in degrees:
            degrees[id(one)] = found(one)
        return degrees[id(one)]

    def found(one: Operation) -> int | None:
        if one.is_input:
            return 1
        if one.number is not None:
            return 0
        if one.name not in _ARITHMETIC or one.shape != y.shape:
            return None
        a, *others = one.inputs
        if one.name in _COMPARED:
            zero = [other.number == 0 for other in (a, *others)]
            return 0 if any(zero) and all(z or degree(o) == 1 for z, o in zip(zero, (a, *others))) else None
        if one.name == "mul":
            left, right = degree(a), degree(others[0])
            return None if left is None or right is None or left + right > 1 else left + right
        if one.name == "select_n" and degree(a) != 0:
            return None
        found = {
            degree(other)
            for other in (others if one.name == "select_n" else (a, *others))
            if other.number != 0
        }
        return found.pop() if len(found) == 1 else None

    return degree(y) == 1


@recognises("select_n", "max", "add", "mul", "sub")
def leaky(y: Operation) -> Any:
    """Leaky ReLU and ReLU, however they are written."""

    def at(number: float) -> float | None:
        return _values(y, lambda one: number if one.is_input else None)

    sides = [at(1.0), at(-1.0)]
    if sides[0] is None or sides[1] is None or abs(sides[0] - 1) > 1e-6 or not _homogeneous(y):
        return None
    slope = -sides[1]
    if slope == 1:
        return None
    return ReLU() if slope == 0 else LeakyReLU(float(np.float32(slope)))


@recognises("custom_jvp_call")
def relu(y: Operation) -> Any:
    """`jax.nn.relu`, told by its rule too."""
    return ReLU() if y.inputs[0].is_input and _same_as("relu", y) else None


_KINDS: dict[str, tuple[str, ...]] = {
    "gelu": ("gelu", "gelu_erfc"),
    "gelu_tanh": ("gelu_tanh",),
    "silu": ("silu",),
    "softplus": ("softplus", "softplus_layer"),
    "tanh": ("tanh",),
    "sigmoid": ("sigmoid",),
}
_FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "relu": jax.nn.relu,
    "gelu": Smooth("gelu"),
    "gelu_erfc": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
    "softplus": jax.nn.softplus,
    "softplus_layer": Smooth("softplus"),
    "tanh": jax.lax.tanh,
    "sigmoid": jax.nn.sigmoid,
}
_CURVED = frozenset(["erf", "erfc", "tanh", "logistic", "custom_jvp_call"])


@functools.lru_cache(maxsize=128)
def _traced(name: str, shape: tuple[int, ...], dtype: str) -> Any:
    """The program of one of JAX's activations."""
    closed = jax.make_jaxpr(_FUNCTIONS[name])(jax.ShapeDtypeStruct(shape, dtype))
    flat = Flat(frozenset())
    given: list[Operand] = [flat.value(closed.in_avals[0])]
    (made,) = flat.walk(closed.jaxpr, closed.consts, given, "")
    if isinstance(made, Constant):
        return None
    steps = {v: step for step in flat.steps for v in step.outputs}
    y = Graph(steps, flat.avals, (0,), set(steps)).at(made)
    return expression(y, (0,))[0], names_of(y)


def _same_as(name: str, y: Operation) -> bool:
    """Whether `y` is this function of the one input."""
    known = _traced(name, y.shape, str(y.dtype))
    if known is None or known[1] != names_of(y):
        return False
    program, sources = expression(y, y.graph.inputs)
    return not sources and program == known[0]


@recognises("mul", "add", "tanh", "logistic", "custom_jvp_call")
def smooth(y: Operation) -> Any:
    """`Smooth`, with or without a slope beside it."""
    curve, slope = y, 0.0
    if y.name == "add":
        for a, b in (y.inputs, y.inputs[::-1]):
            factor, of = _factor(a)
            rest, inner = _factor(b)
            if of.is_input and factor is not None and rest is not None and abs(factor + rest - 1) < 1e-6:
                curve, slope = inner, factor
    names: set[str] = set()
    for count, one in enumerate(curve.walk()):
        if one.shape != y.shape or count > _MOST:
            return None
        names.add(one.name)
    if curve.is_input or not names & _CURVED:
        return None
    for kind, spellings in _KINDS.items():
        if any(_same_as(name, curve) for name in spellings):
            return Smooth(kind, round(slope, 7))
    return None


def _factor(y: Operation) -> tuple[float | None, Operation]:
    """`(c, a)` where `y` is the number `c` times `a`."""
    if y.name == "mul":
        for a, b in (y.inputs, y.inputs[::-1]):
            if b.number is not None and not a.is_weight:
                return b.number, a
    return None, y


@recognises("concatenate")
def maxmin(y: Operation) -> Any:
    """The larger and the smaller of each pair of channels, first half and second."""
    parts = joined(y)
    if parts is None or len(parts) != 2 or parts[0].shape != parts[1].shape or len(y.graph.inputs) != 1:
        return None
    x = y.graph.at(y.graph.inputs[0])
    half = y.shape[-1] // 2
    if x.shape != y.shape:
        return None

    def order(part: Operation, a: float, b: float) -> float | None:
        def given(one: Operation) -> float | None:
            start = part_start(one, x)
            return {0: a, half: b}.get(-1 if start is None else start) if one.shape[-1] == half else None

        return _values(part, given)

    kinds = {"max", "min", "select_n", "slice", "split", "input", *_COMPARED}
    if any(one.name not in kinds for part in parts for one in part.walk()):
        return None
    found = [[order(part, a, b) for a, b in ((1.0, 2.0), (2.0, 1.0))] for part in parts]
    return MaxMin() if found == [[2.0, 2.0], [1.0, 1.0]] else None


@recognises("reshape", "sort")
def sorted_groups(y: Operation) -> Any:
    """Groups sorted by `jnp.sort`, or as `GroupSort` does: of channels far apart, or side by side."""
    inner = y.inputs[0] if y.name == "reshape" else y
    if inner.name == "sort":
        return _by_sort(y, inner)
    if inner.name != "reduce_sum" or inner.ndim < 2 or y.ndim < 1 or len(y.graph.inputs) != 1:
        return None
    x = y.graph.at(y.graph.inputs[0])
    size = inner.shape[-2]
    return computes(GroupSort(size), y, x) if x.shape == y.shape else None


def _by_sort(y: Operation, inner: Operation) -> Any:
    before = inner.inputs[0]
    x = before.inputs[0] if before.name == "reshape" else before
    axis = inner.params["dimension"]
    if not x.is_input or x.shape != y.shape or inner.params["num_keys"] != 1 or len(inner.inputs) != 1:
        return None
    if before.shape[: y.ndim - 1] != y.shape[:-1] or before.ndim != y.ndim + 1:
        return None
    size = before.shape[axis]
    if axis == y.ndim - 1:
        return GroupSort(size)
    groups = y.shape[-1] // size
    apart = (
        Reshape((size * groups,), (groups, size)),
        Permute((1, 0)),
        Reshape((size, groups), y.shape[-1:]),
    )
    beside = (Reshape(y.shape[-1:], (size, groups)), Permute((1, 0)), Reshape((groups, size), y.shape[-1:]))
    return Sequential((*apart, GroupSort(size), *beside)) if axis == y.ndim else None
