"""A function as a flat program: its jaxpr without calls, repeated equations, dead ones, and with views told
from copies.

Calls (`jit`, `custom_jvp`, `custom_vjp`, `checkpoint`, `layers.bilinear`, the solve of `custom_linear_solve`)
are inlined, equal equations with equal operands merged and dead ones dropped, as XLA would. Reshapes are
views, and so are transposes that only products see: libraries take either layout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from mwplan.common import trees
from mwplan.network.canonical import CALLS

PRODUCTS = {"dot_general", "conv_general_dilated"}

_CALLS = {
    **CALLS,
    "core_call": "call_jaxpr",
    "checkpoint": "jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
}
VIEWS = {"reshape", "squeeze", "expand_dims", "optimization_barrier", "stop_gradient", "copy", "pvary"}


@dataclass(eq=False, slots=True)
class Value:
    """An array of a program. `root`: the array whose memory it is (itself, unless it is a view); `constant`:
    depends on no array."""

    shape: tuple[int, ...]
    dtype: Any
    nbytes: int
    constant: bool = False
    root: Value = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.root is None:
            self.root = self

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


@dataclass(eq=False, slots=True)
class Node:
    """One equation."""

    name: str
    params: dict[str, Any]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]


@dataclass(frozen=True)
class Graph:
    """A program without calls: equations in an order in which they can run."""

    inputs: list[Value]
    nodes: list[Node]
    outputs: list[Value]


def trace(operation: Callable[..., Any], *args: Any) -> tuple[Graph, Any]:
    """The program that `operation(*args)` is, and the shapes of its result. `args`: pytrees of arrays or
    shapes; nothing is computed.

    The graph's inputs and outputs are the leaves of `args` and of the result, in order.
    """
    jaxpr, shapes = jax.make_jaxpr(operation, return_shape=True)(*args)
    return graph(jaxpr), shapes


def graph(jaxpr: Jaxpr | ClosedJaxpr) -> Graph:
    """The flat program of a jaxpr."""
    inliner = _Inliner()
    opened = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    consts = [_value(var.aval) for var in opened.constvars]
    inputs = [_value(var.aval) for var in opened.invars]
    outputs = inliner.run(opened, consts, inputs)
    wanted = {id(v) for v in outputs}
    alive = []
    for node in reversed(inliner.nodes):
        if any(id(v) in wanted for v in node.outputs):
            wanted.update(id(v) for v in node.inputs)
            alive.append(node)
    nodes = alive[::-1]
    _find_views(nodes)
    return Graph(inputs, nodes, outputs)


class _Inliner:
    """Collects the equations of a jaxpr and of all that it calls."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.known: dict[Any, tuple[Value, ...]] = {}
        self.literals: dict[Any, Value] = {}

    def run(self, jaxpr: Jaxpr, consts: Sequence[Value], args: Sequence[Value]) -> list[Value]:
        """The outputs' values."""
        env: dict[Any, Value] = {}
        env.update(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, args, strict=True))

        def read(atom: Any) -> Value:
            if isinstance(atom, Literal):
                key = (str(atom.aval), str(atom.val))
                return self.literals.setdefault(key, _value(atom.aval, constant=True))
            return env[atom]

        for eqn in jaxpr.eqns:
            inputs = [read(atom) for atom in eqn.invars]
            env.update(zip(eqn.outvars, self.equation(eqn, inputs), strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def equation(self, eqn: Any, inputs: list[Value]) -> Sequence[Value]:
        """What an equation gives: new, or known from an equal one."""
        name = eqn.primitive.name
        if name == "custom_linear_solve":
            lengths, jaxprs = eqn.params["const_lengths"], eqn.params["jaxprs"]
            start = lengths.matvec + lengths.vecmat
            consts = inputs[start : start + lengths.solve]
            return self.call(jaxprs.solve, [*consts, *inputs[sum(lengths) :]])
        if name in _CALLS:
            if eqn.params.get("differentiated") and eqn.params.get("prevent_cse"):
                inputs = self.barrier(inputs)
            return self.call(eqn.params[_CALLS[name]], inputs)
        try:
            key = (name, tuple(map(id, inputs)), tuple(sorted(eqn.params.items())))
            if key in self.known:
                return self.known[key]
        except TypeError:  # parameters that cannot be compared: not merged
            key = None
        free = all(v.constant for v in inputs) and not eqn.effects and name != "random_bits"
        outputs = tuple(_value(var.aval, constant=free) for var in eqn.outvars)
        if key is not None and name != "optimization_barrier":
            self.known[key] = outputs
        self.nodes.append(Node(name, eqn.params, tuple(inputs), outputs))
        return outputs

    def barrier(self, inputs: Sequence[Value]) -> list[Value]:
        """The same arrays, from which everything is computed anew."""
        outputs = tuple(Value(v.shape, v.dtype, v.nbytes, v.constant) for v in inputs)
        self.nodes.append(Node("optimization_barrier", {}, tuple(inputs), outputs))
        return list(outputs)

    def call(self, jaxpr: Any, inputs: Sequence[Value]) -> list[Value]:
        """The same of a called jaxpr."""
        if isinstance(jaxpr, ClosedJaxpr):
            consts = [_value(var.aval) for var in jaxpr.jaxpr.constvars]
            return self.run(jaxpr.jaxpr, consts, inputs)
        return self.run(jaxpr, (), inputs)


def _value(aval: Any, constant: bool = False) -> Value:
    shape, dtype = tuple(getattr(aval, "shape", ())), getattr(aval, "dtype", None)
    if dtype is None or dtype == jax.dtypes.float0:
        return Value(shape, dtype, 0, True)
    return Value(shape, dtype, trees.nbytes(jax.ShapeDtypeStruct(shape, dtype)), constant)


def _find_views(nodes: list[Node]) -> None:
    """Gives views the root of what they look at."""
    readers: dict[int, set[str]] = {}
    for node in nodes:
        for v in node.inputs:
            readers.setdefault(id(v), set()).add(node.name)
    maker = {id(v): node.name for node in nodes for v in node.outputs}
    for node in nodes:
        if node.name == "transpose":
            at_product = maker.get(id(node.inputs[0])) in PRODUCTS
            view = at_product or readers.get(id(node.outputs[0]), {""}) <= PRODUCTS
        elif node.name in ("broadcast_in_dim", "reduce_sum", "reduce_max"):
            view = node.inputs[0].size == node.outputs[0].size
        elif node.name == "convert_element_type":
            view = node.inputs[0].dtype == node.outputs[0].dtype
        else:
            view = node.name in VIEWS
        if view:
            for old, new in zip(node.inputs, node.outputs):
                new.root = old.root
