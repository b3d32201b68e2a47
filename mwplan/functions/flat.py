"""A function's gradient step of flat arguments: the arrays of its parameters, of its other arguments, and
what it closes over."""

from __future__ import annotations

import collections
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from mwplan.common import trees
from mwplan.execution import execute
from mwplan.functions.assembly import SHARED_BY
from mwplan.functions.cut import Cut
from mwplan.functions.kinds import SLICES
from mwplan.network import sharding
from mwplan.plans.schedule import Schedule

PyTree = Any
Flat = tuple[list[Any], list[Any], list[Any]]


@dataclass(frozen=True)
class Gradient:
    """Makes the step that executes a schedule over a function's pieces."""

    cut: Cut
    has_aux: bool

    def __call__(self, schedule: Schedule, *, arrangement: Any = 0) -> Callable[..., Any]:
        """`step(params, data, captured) -> ((value, report), grads)`."""
        planned = execute.value_and_grad(
            _first, schedule, has_aux=True, wrt_input=self.cut.plan.shares, arrangement=arrangement
        )

        def step(params: list[Any], data: list[Any], captured: list[Any]) -> Any:
            arrays = [*params, *data]
            chain, x, back = self.cut.build_flat(params, data, captured)
            ((_, y), report), grads = planned(chain, x)
            chain_grads, x_grads = grads if self.cut.plan.shares else (grads, x)
            value, aux = self.cut.value(y, arrays, captured)
            return ((value, aux) if self.has_aux else value, report), back(chain_grads, x_grads)

        return step


def plain(cut: Cut, loss: Callable[..., Any], has_aux: bool) -> Callable[..., Any]:
    """Plain backpropagation, of flat arguments."""

    def step(params: list[Any], data: list[Any], captured: list[Any]) -> Any:
        def of(params: list[Any]) -> Any:
            tree, args = cut.flow.traced.signature.arguments([*params, *data])
            return loss(tree, *args)

        return jax.value_and_grad(of, has_aux=has_aux, allow_int=True)(params)

    return step


def split(cut: Cut, params: PyTree, args: tuple[Any, ...]) -> Flat:
    """The arrays (or shapes) of the arguments: those of `params`, the others, and what the function closes
    over."""
    signature = cut.flow.traced.signature
    arrays = [trees.array_or_shape(leaf) for leaf in signature.arrays(params, args)]
    count = sum(i < signature.params for i in signature.dynamic)
    return arrays[:count], arrays[count:], list(cut.flow.traced.captured)


def fixed_bytes(cut: Cut, flat: Flat) -> int:
    """Bytes on each device of the arguments, of the gradients and of what the function returns."""
    results = cut.flow.traced.outputs
    made = sum(cut.flow.traced.nbytes(v) for v in {*results} if isinstance(v, int))
    return sharding.local_bytes(flat) + sharding.local_bytes(trees.parameters(flat[0])) + made


def copied_bytes(cut: Cut, flat: Flat) -> int:
    """Bytes of what is computed of the arguments before the chain and held for its whole length: stacked
    arrays in another order, other bits of floating-point data, parameters stacked for a loop, of these the
    gradients too; and the gradients of weights that several layers share. Not counted are parts of an
    argument, which are taken where they are read, and what the last piece alone holds, between whose two
    passes nothing else happens."""

    def held(flat: Flat) -> tuple[Any, list[Any]]:
        chain, x, _ = cut.build_flat(*flat)
        parts = chain.parts[:-1]
        return (parts, x), [*trees.parameters(parts), *(trees.parameters(x) if cut.plan.shares else [])]

    jaxpr = jax.make_jaxpr(held)(flat).jaxpr
    makers = {var: eqn for eqn in jaxpr.eqns for var in eqn.outvars}

    def computed(var: Any) -> bool:
        while var in makers and makers[var].primitive.name in SLICES:
            var = makers[var].invars[0]
        return var in makers

    count = len(jax.tree.leaves(jax.eval_shape(held, flat)[0]))
    made = {var for var in jaxpr.outvars[:count] if computed(var)}
    twice = made.intersection(jaxpr.outvars[count:])
    uses = collections.Counter(jaxpr.outvars[count:])
    more = sum((n - 1) * trees.nbytes(var.aval) for var, n in uses.items() if n >= SHARED_BY)
    return more + sum(trees.nbytes(var.aval) for some in (made, twice) for var in some)


def _first(y: tuple[Any, ...]) -> tuple[Any, Any]:
    """The loss, which is the first of the chain's output, and all of it."""
    return y[0], y
