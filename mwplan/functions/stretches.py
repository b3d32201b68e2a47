"""Operations as a matcher sees them: an expression that leads from an input to a result.

A *stretch* is consecutive operations that take one array (or two) of the activation, which nobody needs
afterwards, to one array (or two). What does not depend on these inputs are weights: parameters, and what is
computed of them.

Operations that change nothing are left out: copies, barriers, names, reshapes to the same shape.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mwplan.common import trees
from mwplan.functions.tracing import ALIAS, Constant, Operand, Step

#: Operations that hand on each operand.
_SAME = frozenset(["copy", "copy_p", "name", "optimization_barrier", "pvary", "pcast"])
#: Operations that change nothing where types and shapes stay the same.
_MOVES = frozenset(["reshape", "convert_element_type", "squeeze", "broadcast_in_dim", "transpose"])
#: All that may be left out.
SEEN_THROUGH = _SAME | _MOVES | {ALIAS.name}


@dataclass(frozen=True)
class Weight:
    """An array of a layer that is to be made of a stretch's values: what `Operation.weight` is, and what a
    matcher puts where the layer has an array.

    `value`, its number, or None for an array of ones or zeros; `views`, what is done with it, in order.

    >>> weight = mw.Weight(3, (8, 2, 2), jnp.float32)
    >>> weight.reshape(8, 4).T.shape
    (4, 8)
    """

    value: int | None
    shape: tuple[int, ...]
    dtype: Any
    views: tuple[tuple[str, Any], ...] = ()

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of entries."""
        return math.prod(self.shape)

    @property
    def T(self) -> Weight:
        """Transposed."""
        return self.transpose(*range(self.ndim)[::-1])

    def reshape(self, *shape: int) -> Weight:
        """In another shape."""
        if shape == self.shape:
            return self
        return replace(self, shape=shape, views=(*self.views, ("reshape", shape)))

    def transpose(self, *axes: int) -> Weight:
        """With its axes permuted."""
        if axes == tuple(range(self.ndim)):
            return self
        shape = tuple(self.shape[a] for a in axes)
        return replace(self, shape=shape, views=(*self.views, ("transpose", axes)))

    def numbered(self, new: Mapping[int, int]) -> Weight:
        """With another number."""
        return self if self.value is None else replace(self, value=new[self.value])

    def struct(self) -> jax.ShapeDtypeStruct:
        """Its shape."""
        return jax.ShapeDtypeStruct(self.shape, self.dtype)

    def array(self, env: Mapping[int, Any]) -> Any:
        """The array, of the values in `env`: the same object where nothing is done with it."""
        found: Any = None if self.value is None else env[self.value]
        for name, how in self.views:
            if name == "full":
                found = jnp.full(self.shape, how, self.dtype)
            else:
                found = jnp.reshape(found, how) if name == "reshape" else jnp.transpose(found, how)
        return found


def full(shape: tuple[int, ...], number: float, dtype: Any) -> Any:
    """An array of one number, for a layer that wants one where the function has none."""
    return Weight(None, shape, np.dtype(dtype), (("full", number),))


class Operation:
    """One operation of a stretch, by its result: an expression of the stretch's inputs and of weights.

    **Attributes:** `name`, that of its primitive, "input" for an input, "weight" for what does not depend on
    the inputs, "number" for a constant; `inputs`, the operations whose results it reads; `params`, the
    primitive's; `index`, which of its results this is; `shape`, `dtype`, `ndim`. Of one stretch, equal
    operations are the same object.

    >>> seen = []
    >>> @mw.recognises("sin")
    ... def look(y):
    ...     seen.append((y.name, [one.name for one in y.inputs], y.shape))
    >>> found = mw.explain(lambda x: jnp.sin(x), jnp.ones(3))
    >>> seen[0]
    ('sin', ['input'], (3,))
    >>> mw.functions.registry.forget(look)
    """

    def __init__(self, graph: Graph, value: Operand) -> None:
        self.graph, self.value = graph, value
        aval = value.aval if isinstance(value, Constant) else graph.avals[value]
        self.shape: tuple[int, ...] = tuple(aval.shape)
        self.dtype = aval.dtype
        self.index = 0
        self.step: Step | None = None
        if isinstance(value, Constant):
            self.name = "number"
        elif value in graph.inputs:
            self.name = "input"
        elif value not in graph.dependent:
            self.name = "weight"
        else:
            self.step = graph.steps[value]
            self.name = self.step.primitive.name
            self.index = self.step.outputs.index(value)

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def params(self) -> dict[str, Any]:
        """The primitive's parameters."""
        return self.step.params if self.step else {}

    @functools.cached_property
    def inputs(self) -> tuple[Operation, ...]:
        """What it reads; of a weight, what that is computed of."""
        step = self.step
        if step is None and self.name == "weight":
            step = self.graph.steps.get(self.value)  # type: ignore[arg-type]
        return tuple(map(self.graph.at, step.inputs)) if step else ()

    @property
    def made_by(self) -> str:
        """The primitive that makes a weight, or "" where it is there before."""
        step = self.graph.steps.get(self.value) if isinstance(self.value, int) else None
        return step.primitive.name if step else ""

    @property
    def is_input(self) -> bool:
        """Whether it is an input of the stretch."""
        return self.name == "input"

    @property
    def is_weight(self) -> bool:
        """Whether it depends on no input: a weight or a number."""
        return self.name in ("weight", "number")

    @property
    def weight(self) -> Any:
        """A weight, for a layer: a `Weight`, whatever type the layer's array has."""
        if isinstance(self.value, Constant):
            return full(self.shape, np.asarray(self.value.value).item(), self.dtype)
        return Weight(self.value, self.shape, self.dtype)

    @property
    def number(self) -> float | None:
        """The number that a constant is throughout, however it is spread; or None."""
        return self.graph.number(self.value)

    def walk(self) -> Iterator[Operation]:
        """All operations of the expression that depend on an input, each once."""
        seen: set[int] = set()
        waiting = [self]
        while waiting:
            one = waiting.pop()
            if id(one) not in seen and not one.is_weight:
                seen.add(id(one))
                yield one
                waiting += one.inputs

    def vector(self) -> Any:
        """A weight that is the same along all axes but the last, as the vector that it is; or None."""
        return self.along(self.ndim - 1)

    def along(self, axis: int) -> Any:
        """A weight that is the same along all axes but one, as the vector that it is; or None."""
        if not self.is_weight or not self.ndim:
            return None
        size = self.shape[axis]
        if math.prod(self.shape) == size:
            return self.weight.reshape(size) if self.name == "weight" else None
        if self.made_by != "broadcast_in_dim":
            return None
        (inner, *_), dims = self.inputs, self.graph.params(self)["broadcast_dimensions"]
        if axis not in dims or inner.shape[dims.index(axis)] != size:
            return None
        if math.prod(inner.shape) == size:
            return inner.weight.reshape(size)
        return inner.along(dims.index(axis))


class Graph:
    """What makes what: `steps`, by the values they make; `dependent`, the values that depend on `inputs`."""

    def __init__(
        self,
        steps: Mapping[int, Step],
        avals: Sequence[Any],
        inputs: Sequence[int],
        dependent: set[int],
    ) -> None:
        self.steps, self.avals = steps, avals
        self.inputs, self.dependent = tuple(inputs), dependent
        self.known: dict[Any, Operation] = {}

    def at(self, value: Operand) -> Operation:
        """The operation that makes a value."""
        value = resolved(value, self.steps, self.avals, self.inputs)
        key = value if isinstance(value, int) else id(value)
        if key not in self.known:
            self.known[key] = Operation(self, value)
        return self.known[key]

    def params(self, one: Operation) -> dict[str, Any]:
        """The parameters of the primitive that makes an operation's result, a weight's too."""
        step = self.steps.get(one.value) if isinstance(one.value, int) else None
        return step.params if step else {}

    def number(self, value: Operand) -> float | None:
        """See `Operation.number`."""
        while not isinstance(value, Constant):
            step = self.steps.get(value)
            if step is None or step.primitive.name not in (
                "broadcast_in_dim", "reshape", "convert_element_type", "alias",
            ):  # fmt: skip
                return None
            value = step.inputs[0]
        if np.ndim(value.value) or trees.is_key(value.aval):
            return None
        found = np.asarray(value.value)
        return float(found) if found.dtype.kind in "fiub" or found.dtype == jnp.bfloat16 else None


def resolved(
    value: Operand, steps: Mapping[int, Step], avals: Sequence[Any], inputs: Sequence[int]
) -> Operand:
    """The value that another one is a mere copy of."""
    while isinstance(value, int) and value not in inputs:
        step = steps.get(value)
        if step is None:
            break
        name = step.primitive.name
        if name in _SAME:
            value = step.inputs[step.outputs.index(value)]
        elif step.primitive is ALIAS:
            if isinstance(step.inputs[0], Constant):
                break
            value = step.inputs[0]
        elif name in _MOVES:
            source = step.inputs[0]
            if not isinstance(source, int) or not _unchanged(step, avals[source], avals[value]):
                break
            value = source
        else:
            break
    return value


def _unchanged(step: Step, before: Any, after: Any) -> bool:
    if before.shape != after.shape or before.dtype != after.dtype:
        return False
    order = step.params.get("permutation")
    return order is None or tuple(order) == tuple(range(len(order)))
