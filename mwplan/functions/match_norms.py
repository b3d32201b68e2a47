"""Normalisation and pooling, recognised in operations."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from mwplan.functions.expressions import computes
from mwplan.functions.registry import recognises
from mwplan.functions.stretches import Operation, full
from mwplan.layers.norm import LayerNorm, RMSNorm
from mwplan.layers.pooling import AveragePool, MaxPool


def unspread(y: Operation) -> Operation:
    """`y` without axes of one entry that were added or taken away."""
    while y.name in ("broadcast_in_dim", "reshape", "squeeze", "expand_dims") and y.inputs:
        if math.prod(y.inputs[0].shape) != math.prod(y.shape):
            break
        y = y.inputs[0]
    return y


def is_mean(y: Operation) -> Operation | None:
    """What `y` is the mean of over the last axis, that axis kept or not; else None."""
    y = unspread(y)
    if y.name == "select_n" and y.inputs[0].is_weight and _is_nan(y.inputs[1]):  # `jnp.var` of no entries
        y = unspread(y.inputs[2])
    if y.name not in ("div", "mul"):
        return None
    total, count = y.inputs
    if y.name == "mul" and total.is_weight:
        total, count = count, total
    total = unspread(total)
    if total.name != "reduce_sum":
        return None
    of = total.inputs[0]
    size = of.shape[-1]
    number = _number(count)
    wanted = size if y.name == "div" else 1 / size
    if tuple(total.params["axes"]) != (of.ndim - 1,) or number is None or abs(number / wanted - 1) > 1e-6:
        return None
    return of


def _is_nan(one: Operation) -> bool:
    number = one.number
    return number is not None and math.isnan(number)


def _number(one: Operation) -> float | None:
    """A number, or a difference of two: `jnp.var` divides by `n - 0`."""
    if one.number is not None:
        return one.number
    if one.name == "weight" and one.made_by == "sub":
        a, b = (_number(inner) for inner in one.inputs)
        return None if a is None or b is None else a - b
    if one.name == "weight" and one.made_by == "convert_element_type":
        return _number(one.inputs[0])
    return None


def _square_of(y: Operation) -> Operation | None:
    if y.name == "square" or (y.name == "integer_pow" and y.params["y"] == 2):
        return y.inputs[0]
    if y.name == "mul" and y.inputs[0] is y.inputs[1]:
        return y.inputs[0]
    return None


def _centred(y: Operation) -> bool:
    """Whether `y` is the input less its mean."""
    return y.name == "sub" and y.inputs[0].is_input and is_mean(y.inputs[1]) is y.inputs[0]


def _spread(y: Operation) -> tuple[bool, float] | None:
    """`(centred, eps)` where `y` is the variance, or the mean square, plus a number; else None."""
    y = unspread(y)
    if y.name != "add":
        return None
    for a, b in (y.inputs, y.inputs[::-1]):
        if b.number is None:
            continue
        a = unspread(a)
        squares = is_mean(a)
        of = None if squares is None else _square_of(squares)
        if of is not None and (of.is_input or _centred(of)):
            return not of.is_input, b.number
        if a.name in ("sub", "max") and _by_moments(a):
            return True, b.number
    return None


def _by_moments(y: Operation) -> bool:
    """Whether `y` is the mean of squares less the square of the mean, or zero where that is negative."""
    if y.name == "max":
        if y.inputs[0].number != 0 and y.inputs[1].number != 0:
            return False
        y = y.inputs[1] if y.inputs[0].number == 0 else y.inputs[0]
    if y.name != "sub":
        return False
    squares = is_mean(y.inputs[0])
    mean = _square_of(unspread(y.inputs[1]))
    of = None if squares is None else _square_of(squares)
    return of is not None and of.is_input and mean is not None and is_mean(mean) is of


def _factors(y: Operation) -> tuple[list[Operation], list[Operation]]:
    """What a product is made of: factors and divisors."""
    above: list[Operation] = []
    below: list[Operation] = []
    waiting = [(y, False)]
    while waiting:
        one, under = waiting.pop()
        product = not one.is_weight and one.name in ("mul", "div")
        if product and (one.shape == y.shape or _square_of(one) is None):
            a, b = one.inputs
            waiting += [(a, under), (b, under != (one.name == "div"))]
        else:
            (below if under else above).append(one)
    return above, below


@recognises("add", "mul", "div")
def norm(y: Operation) -> Any:
    """LayerNorm and RMSNorm over the last axis, however mean, variance and root are written; the layer's own
    too."""
    if len(y.graph.inputs) != 1 or y.ndim < 2:
        return None
    x = y.graph.at(y.graph.inputs[0])
    if x.shape != y.shape or x.dtype != y.dtype:
        return None
    whole, offset = y, None
    if y.name == "add":
        for a, b in (y.inputs, y.inputs[::-1]):
            vector = full(y.shape[-1:], b.number, y.dtype) if b.number is not None else b.vector()
            if vector is not None:
                y, offset = a, vector
                break
        else:
            return None
    above, below = _factors(y)
    roots = [one for one in above + below if unspread(one).name in ("rsqrt", "sqrt", "custom_jvp_call")]
    if not roots:
        return None
    return _affine(y, offset, above, below) or _own(whole, x)


def _affine(y: Operation, offset: Any, above: list[Operation], below: list[Operation]) -> Any:
    scale: Any = None
    centred: bool | None = None
    root: tuple[bool, float] | None = None
    for one in above + below:
        inner = unspread(one)
        upper = one in above
        if one.is_weight:
            if one.number == 1.0 and upper:
                continue
            if scale is not None or not upper or (scale := one.vector()) is None:
                return None
        elif (one.is_input or _centred(one)) and upper and centred is None:
            centred = not one.is_input
        elif inner.name in ("rsqrt", "sqrt") and (inner.name == "rsqrt") == upper and root is None:
            root = _spread(inner.inputs[0])
        else:
            return None
    if root is None or centred is None or root[0] != centred:
        return None
    channels, dtype = y.shape[-1:], y.dtype
    scale = full(channels, 1.0, dtype) if scale is None else scale
    if centred:
        return LayerNorm(scale, full(channels, 0.0, dtype) if offset is None else offset, root[1])
    return RMSNorm(scale, root[1]) if offset is None else None


def _own(y: Operation, x: Operation) -> Any:
    """The layer's own operations, which hold its `eps` as a number."""
    like = jax.ShapeDtypeStruct(y.shape[-1:], jnp.float32 if y.dtype == jnp.float16 else y.dtype)
    numbers = {
        one.number
        for inner in y.walk()
        for one in _all_weights(inner)
        if one.number is not None and 0 < one.number < 0.1
    }
    for eps in {1e-5, 1e-6, *numbers}:
        for candidate in (LayerNorm(like, like, eps), RMSNorm(like, eps)):  # type: ignore[arg-type]
            found = computes(candidate, y, x)
            if found is not None:
                return found
    return None


def _all_weights(y: Operation) -> list[Operation]:
    """The weights that an operation reads, and what these are made of nearby."""
    found = [one for one in y.inputs if one.is_weight]
    for one in list(found):
        for inner in one.inputs:
            found += [inner, *inner.inputs]
    return found


@recognises("div", "mul", "squeeze", "reduce_window_max", "reduce_max")
def pooling(y: Operation) -> Any:
    """Average and max pooling over windows that do not overlap, channels last."""
    if len(y.graph.inputs) != 1:
        return None
    x = y.graph.at(y.graph.inputs[0])
    if y.name == "reduce_window_max":
        window = _window(y, x)
        return None if window is None else MaxPool(window)
    if y.name in ("div", "mul") and (found := _average(y, x)):
        return found
    return _own_pooling(y, x)


def _window(y: Operation, x: Operation) -> tuple[int, ...] | None:
    """The window of a reduction of the input over windows side by side, in one or more axes before the
    last."""
    p = y.params
    window = tuple(p["window_dimensions"])
    if y.inputs[0] is not x or tuple(p["window_strides"]) != window or window[-1] != 1:
        return None
    ones = (1,) * y.ndim
    if (
        tuple(p["base_dilation"]) != ones
        or tuple(p["window_dilation"]) != ones
        or any(map(any, p["padding"]))
    ):
        return None
    lead = next((i for i, w in enumerate(window) if w != 1), len(window) - 1)
    return window[lead:-1] or None


def _average(y: Operation, x: Operation) -> Any:
    total, count = y.inputs
    if y.name == "mul" and total.is_weight:
        total, count = count, total
    if total.is_weight or count.number is None:
        return None
    window = _window(total, x) if total.name == "reduce_window_sum" else _by_reshape(total, x)
    if window is None:
        return None
    size = math.prod(window)
    wanted = size if y.name == "div" else 1 / size
    return AveragePool(window) if abs(count.number / wanted - 1) < 1e-6 else None


def _by_reshape(total: Operation, x: Operation) -> tuple[int, ...] | None:
    """The window where each spatial axis is split in two and summed over the second part."""
    if total.name != "reduce_sum" or total.inputs[0].name != "reshape" or total.inputs[0].inputs[0] is not x:
        return None
    split, axes = total.inputs[0].shape, sorted(total.params["axes"])
    dims = len(axes)
    lead = x.ndim - 1 - dims
    if lead < 0 or axes != [lead + 1 + 2 * i for i in range(dims)] or len(split) != x.ndim + dims:
        return None
    window = tuple(split[axis] for axis in axes)
    wanted = [part for i, w in enumerate(window) for part in (x.shape[lead + i] // w, w)]
    return window if [*split] == [*x.shape[:lead], *wanted, x.shape[-1]] else None


def _own_pooling(y: Operation, x: Operation) -> Any:
    """The layers' own operations."""
    if y.ndim != x.ndim or y.ndim < 2 or y.shape[-1] != x.shape[-1] or y.shape == x.shape:
        return None
    names = {one.name for one, _ in zip(y.walk(), range(24))}
    if not names & {"gather", "reduce_sum"}:
        return None
    space = [i for i in range(x.ndim - 1) if x.shape[i] != y.shape[i]]
    if not space or space != [*range(space[0], x.ndim - 1)]:
        return None
    members = {one.shape[-2] for one in y.walk() if one.name == "reshape" and one.ndim == y.ndim + 1}
    make = MaxPool if "gather" in names else AveragePool
    for window in _windows(x, y, space[0]):
        if math.prod(window) in members and (found := computes(make(window), y, x)) is not None:
            return found
    return None


def _windows(x: Operation, y: Operation, lead: int) -> list[tuple[int, ...]]:
    """The windows with which the input's axes become the output's."""
    found: list[tuple[int, ...]] = [()]
    for n, m in zip(x.shape[lead:-1], y.shape[lead:-1]):
        found = [(*one, w) for one in found for w in range(1, n + 1) if n // w == m]
    return found
