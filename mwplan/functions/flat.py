"""A function's gradient step of flat arguments: the arrays of its parameters, of its other arguments, and
what it closes over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from mwplan.common import trees
from mwplan.execution import execute
from mwplan.functions.cut import Cut
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


def _first(y: tuple[Any, ...]) -> tuple[Any, Any]:
    """The loss, which is the first of the chain's output, and all of it."""
    return y[0], y
