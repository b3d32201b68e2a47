"""Products, convolutions and moves, recognised in operations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from mwplan.functions.registry import recognises
from mwplan.functions.stretches import Operation, full
from mwplan.layers.circular import Circular
from mwplan.layers.conv import Conv1D, Conv2D
from mwplan.layers.dense import Dense
from mwplan.layers.sequential import Sequential
from mwplan.layers.shapes import PadChannels, Permute, Reshape, Split

MOVES = ("reshape", "transpose", "squeeze", "expand_dims", "broadcast_in_dim")


def sequence(*layers: Any) -> Any:
    """The layers that are some, as one."""
    some = [one for one in layers if one is not None]
    return some[0] if len(some) == 1 else Sequential(tuple(some))


def biased(y: Operation, axis: int = -1) -> tuple[Operation, Any]:
    """`(a, b)` where `y` is `a` plus a weight that varies along one axis alone; else `(y, None)`."""
    if y.name == "add":
        for a, b in (y.inputs, y.inputs[::-1]):
            if b.is_weight and not a.is_weight and a.shape == y.shape and y.ndim:
                size = (y.shape[axis],)
                vector = b.along(axis % y.ndim) if b.number is None else full(size, b.number, y.dtype)
                if vector is not None:
                    return a, vector
    return y, None


def merged(y: Operation, kept: int) -> Operation:
    """`y` without reshapes that leave its last `kept` axes as they are."""
    while (
        y.name == "reshape"
        and y.ndim >= kept
        and y.inputs[0].ndim >= kept
        and y.shape[y.ndim - kept :] == y.inputs[0].shape[y.inputs[0].ndim - kept :]
    ):
        y = y.inputs[0]
    return y


def plain(y: Operation) -> bool:
    """Whether a product says nothing of precision, result type or sharding."""
    params = y.params
    preferred = params.get("preferred_element_type")
    same = preferred is None or preferred == y.inputs[0].dtype
    return params.get("precision") is None and same and params.get("out_sharding") is None


@recognises("add", "dot_general", "reshape", "transpose")
def dense(y: Operation) -> Any:
    """`x @ w + b`, over any axes of `x` that `jnp.einsum` sums over, in any order."""
    lead = y
    y, bias = biased(merged(y, 1))
    y = merged(y, 1)
    if y.name == "transpose" and bias is None and tuple(y.params["permutation"]) == (*range(1, y.ndim), 0):
        y = y.inputs[0]  # the weight came first
    if y.name != "dot_general" or not plain(y):
        return None
    (axes_a, axes_b), batch = y.params["dimension_numbers"]
    if batch[0] or batch[1]:
        return None
    a, b = y.inputs
    swapped = a.is_weight
    if swapped:
        a, b, axes_a, axes_b = b, a, axes_b, axes_a
    if b.name != "weight" or a.is_weight:
        return None
    x = merged(a, len(axes_a))
    order = sorted(range(len(axes_a)), key=lambda i: axes_a[i])
    summed = [axes_a[i] for i in order]
    if not x.is_input or summed != [*range(a.ndim - len(summed), a.ndim)]:
        return None
    left = [axis for axis in range(b.ndim) if axis not in axes_b]
    if swapped and (len(left) != 1 or lead is y):
        return None
    inner, outer = [b.shape[axes_b[i]] for i in order], [b.shape[axis] for axis in left]
    weight = b.weight.transpose(*(axes_b[i] for i in order), *left)
    weight = weight.reshape(math.prod(inner), math.prod(outer))
    before = Reshape(tuple(inner), (math.prod(inner),)) if len(inner) > 1 else None
    after = Reshape((math.prod(outer),), tuple(outer)) if len(outer) != 1 else None
    if after is not None and bias is not None:
        return None
    return sequence(before, Dense(weight, bias), after)


@recognises("add", "conv_general_dilated", "reshape", "slice", "bilinear", "transpose")
def convolution(y: Operation) -> Any:
    """A convolution of one or two axes in any layout, with what is padded before it and added after it."""
    whole = y
    for dims in (1, 2)[: max(0, whole.ndim - 1)]:
        for axis in (-1, -1 - dims):
            y, bias = biased(merged(whole, dims + 1), axis)
            y = merged(y, dims + 1)
            if y.name == "bilinear" and axis == -1 and y.ndim == dims + 2:
                return _circular(y, bias, dims)
            conv = y.inputs[0] if y.name == "slice" else y
            if conv.name == "conv_general_dilated" and conv.ndim == dims + 2:
                found = _conv(y, conv, bias, axis % y.ndim, dims)
                if found is not None or axis != -1:
                    return found
    return None


def _circular(y: Operation, bias: Any, dims: int) -> Any:
    product = y.params["product"]
    x, w = y.inputs
    if not isinstance(product, Circular) or w.name != "weight" or w.ndim != dims + 2:
        return None
    if not merged(x, dims + 1).is_input or not _centred(product.pads):
        return None
    make = Conv1D if dims == 1 else Conv2D
    return make(w.weight, bias, None, (1,) * dims, "CIRCULAR", tuple(product.dilation), 1)


def _centred(pads: Sequence[Sequence[int]]) -> bool:
    """Whether a circular padding is the one that the layer has."""
    return all(lo == (lo + hi) // 2 for lo, hi in pads)


def _conv(y: Operation, conv: Operation, bias: Any, axis: int, dims: int) -> Any:
    """`y`: the convolution, or the leading part of its first axis."""
    p, (x, w) = conv.params, conv.inputs
    if x.is_weight or w.name != "weight" or not plain(conv) or p["batch_group_count"] != 1:
        return None
    if any(d != 1 for d in p["lhs_dilation"]):
        return None
    names = p["dimension_numbers"]
    if names.lhs_spec != names.out_spec or (bias is not None and axis != names.out_spec[1]):
        return None
    space = names.lhs_spec[2:]
    stride, dilation = tuple(p["window_strides"]), tuple(p["rhs_dilation"])
    order = (*names.rhs_spec[2:], names.rhs_spec[1], names.rhs_spec[0])
    taps = w.weight.transpose(*order)
    reach = [d * (k - 1) for d, k in zip(dilation, taps.shape)]
    pads = [[int(lo), int(hi)] for lo, hi in p["padding"]]
    if y is not conv and not _shortened(y, conv, x, pads, space, stride, reach):
        return None
    x, outer, circular = _padded(x, space)
    if circular and (any(map(any, pads)) or not _centred(outer)):
        return None
    pads = [[lo + a, hi + b] for (lo, hi), (a, b) in zip(pads, outer)]
    if any(n < 0 for pair in pads for n in pair):
        return None
    if circular and [sum(pair) for pair in outer] != reach:
        return None
    last = (names.lhs_spec[0], *space, names.lhs_spec[1])
    moved = last != tuple(range(conv.ndim))
    x = x if moved else merged(x, dims + 1)
    if not x.is_input:
        return None
    padding = "CIRCULAR" if circular else tuple((lo, hi) for lo, hi in pads)
    made = (Conv1D if dims == 1 else Conv2D)(
        taps, bias, None, stride, padding, dilation, p["feature_group_count"]
    )
    if not moved:
        return made
    back = tuple(last.index(a) for a in range(conv.ndim))
    return Sequential((Permute(last), made, Permute(back)))


def _shortened(
    y: Operation,
    conv: Operation,
    x: Operation,
    pads: list[list[int]],
    space: Sequence[int],
    stride: Sequence[int],
    reach: Sequence[int],
) -> bool:
    """Takes what `y` leaves out at the ends of a convolution's axes out of `pads`, if it is that."""
    if any(y.params["start_indices"]) or any(s != 1 for s in y.params["strides"] or (1,)):
        return False
    for i, axis in enumerate(space):
        if y.shape[axis] != conv.shape[axis]:
            needed = stride[i] * (y.shape[axis] - 1) + reach[i] + 1 - x.shape[axis] - pads[i][0]
            pads[i][1] = max(0, needed)
    return all(a == b for axis, (a, b) in enumerate(zip(y.shape, conv.shape)) if axis not in space)


def _padded(x: Operation, space: Sequence[int]) -> tuple[Operation, list[tuple[int, int]], bool]:
    """What `x` is padded of, by how much along each axis, and whether it is wrapped around."""
    outer = [(0, 0)] * len(space)
    if x.name == "pad" and x.inputs[1].number == 0:
        config = x.params["padding_config"]
        if all(not inner for _, _, inner in config) and all(
            axis in space or not (lo or hi) for axis, (lo, hi, _) in enumerate(config)
        ):
            return x.inputs[0], [(int(config[axis][0]), int(config[axis][1])) for axis in space], False
        return x, outer, False
    circular = False
    for i, axis in reversed([*enumerate(space)]):
        if x.name != "concatenate" or x.params["dimension"] != axis:
            continue
        wrapped = _wrapped(x, axis)
        if wrapped is None:
            break
        x, outer[i] = wrapped
        circular = True
    return x, outer, circular


def _wrapped(x: Operation, axis: int) -> tuple[Operation, tuple[int, int]] | None:
    """`(a, (lo, hi))` where `x` is the last `lo` entries of `a`, `a`, and its first `hi`."""
    parts = list(x.inputs)
    of = next((one for one in parts if one.name != "slice"), None)
    if of is None:
        return None
    at, size = parts.index(of), of.shape[axis]
    if len(parts) > 3 or at > 1 or len(parts) - at > 2:
        return None
    pads = [0, 0]
    for i, one in enumerate(parts):
        if one is of:
            continue
        start, stop = (one.params[name] for name in ("start_indices", "limit_indices"))
        whole = all(a == 0 for d, a in enumerate(start) if d != axis)
        same = all(b == of.shape[d] for d, b in enumerate(stop) if d != axis)
        ends = stop[axis] == size if i < at else start[axis] == 0
        if one.inputs[0] is not of or not (whole and same and ends) or one.params["strides"] not in (
            None, (1,) * of.ndim,
        ):  # fmt: skip
            return None
        pads[i > at] = one.shape[axis]
    return of, (pads[0], pads[1])


@recognises(*MOVES)
def moves(y: Operation) -> Any:
    """Reshapes and permutations."""
    found: list[Any] = []
    while not y.is_input:
        if y.name not in MOVES or y.is_weight:
            return None
        x = y.inputs[0]
        if x.is_weight or math.prod(x.shape) != math.prod(y.shape):
            return None
        if y.name == "transpose":
            found.append(Permute(tuple(map(int, y.params["permutation"]))))
        elif y.name == "broadcast_in_dim" and [*y.params["broadcast_dimensions"]] != sorted(
            y.params["broadcast_dimensions"]
        ):
            return None
        else:
            found.append(_reshape(x.shape, y.shape))
        y = x
    return sequence(*reversed(found)) if found else None


def _reshape(before: tuple[int, ...], after: tuple[int, ...]) -> Reshape:
    """One of as few axes as differ."""
    same = 0
    while same < min(len(before), len(after)) - 1 and before[same] == after[same]:
        same += 1
    return Reshape(before[same:], after[same:])


@recognises("pad")
def padded_channels(y: Operation) -> Any:
    """Channels of zeros, appended."""
    x, number = y.inputs
    *others, last = y.params["padding_config"]
    if not x.is_input or number.number != 0 or any(map(any, others)):
        return None
    return PadChannels(int(last[1])) if last[0] == 0 and last[1] > 0 and last[2] == 0 else None


def parts_of(parts: Sequence[Operation]) -> Any:
    """`Split` where these are the equal parts of an input, along its last axis; else None."""
    first = parts[0]
    x = first.inputs[0] if first.name in ("slice", "split") else None
    if x is None or not x.is_input or x.shape[-1] % len(parts):
        return None
    size = x.shape[-1] // len(parts)
    starts = [part_start(one, x) for one in parts]
    sizes = {one.shape[-1] for one in parts}
    if starts != [i * size for i in range(len(parts))] or sizes != {size}:
        return None
    return Split(len(parts))


def part_start(one: Operation, x: Operation) -> int | None:
    """Where along the last axis of `x` a slice of it begins that is whole along all others; else None."""
    if one.is_weight or one.is_input or not one.inputs or one.inputs[0] is not x:
        return None
    if one.name == "split" and one.params["axis"] == x.ndim - 1:
        return int(sum(one.params["sizes"][: one.index]))
    if one.name != "slice" or any(s != 1 for s in one.params["strides"] or (1,)):
        return None
    return int(one.params["start_indices"][-1]) if one.shape[:-1] == x.shape[:-1] else None


def joined(y: Operation) -> tuple[Operation, ...] | None:
    """The parts that `y` is, one after the other along its last axis; else None."""
    if y.name != "concatenate" or y.params["dimension"] != y.ndim - 1:
        return None
    return y.inputs
